//! Runs of `cadre finetune`: killed ones go on to the same bytes, budgets change no bit, and what is wrong is told.

use std::{
    fs,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use cadre_tests::{
    binary::{self, Run, output, run},
    checkpoint::{Qwen3Moe, copy_embedded},
    peak::peak_of,
    wait_for,
};
use serde_json::{Value, json};

pub fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Chats that ask to write words backwards.
pub fn data(file: &Path, examples: usize) {
    let words = ["stone", "river", "cloud", "maple", "tiger", "ocean", "candle", "silver", "garden", "pepper"];
    let line = |index: usize| {
        let word = format!("{}{}", words[index % 10], words[index / 10 % 10]);
        let back: String = word.chars().rev().collect();
        json!({"messages": [{"role": "user", "content": format!("Backwards: {word}")}, {"role": "assistant", "content": back}]})
    };
    let lines: Vec<String> = (0..examples).map(|index| line(index).to_string()).collect();
    fs::write(file, lines.join("\n") + "\n").unwrap();
}

/// The log's lines of a kind.
pub fn log(output: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(output.join("train_log.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).filter(|line: &Value| line["type"] == kind).collect()
}

/// What a step found: all of its line but times and memory.
fn found(output: &Path) -> Vec<String> {
    let of = |line: Value| {
        ["step", "loss", "aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens"]
            .map(|field| line[field].to_string())
            .join(" ")
    };
    log(output, "step").into_iter().map(of).collect()
}

/// The bytes that a run's end is compared by.
fn result(output: &Path) -> Vec<Vec<u8>> {
    let latest = |name: &str| fs::read(output.join("checkpoint-12").join(name)).unwrap();
    let adapter = fs::read(output.join("adapter_model.safetensors")).unwrap();
    vec![adapter, latest("optimizer.safetensors"), latest("trainer_state.json")]
}

fn flags<'a>(data: &'a str, output: &'a str) -> Vec<&'a str> {
    let steps = ["--max-steps", "12", "--batch-size", "3", "--save-every", "2", "--rank", "4", "--grad-accum", "2"];
    let losses =
        ["--aux-loss-coef", "0.01", "--z-loss-coef", "0.001", "--targets", "all-linear,lm_head", "--dropout", "0.1"];
    [&["finetune", "--data", data, "--output", output, "--eval", data][..], &steps, &losses].concat()
}

/// Kills `cadre` once `ready` says so, or after it has ended by itself.
pub fn killed_when(arguments: &[&str], ready: impl Fn() -> bool) {
    let mut child = binary::command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the moment", 120, || ready() || child.try_wait().unwrap().is_some());
    let _ = child.kill();
    child.wait().unwrap();
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_with_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let lines = directory.path().join("train.jsonl");
    data(&lines, 20);
    let (whole, broken) = (directory.path().join("whole"), directory.path().join("broken"));
    output(&flags(path(&lines), path(&whole)));
    let arguments = flags(path(&lines), path(&broken));
    killed_when(&arguments, || broken.join("checkpoint-2").exists());
    let resumed = [&arguments[..], &["--resume"]].concat();
    for steps in [5, 8, 9] {
        // Somewhere in a step, or while a checkpoint is written.
        killed_when(&resumed, || {
            fs::read_to_string(broken.join("train_log.jsonl")).is_ok_and(|log| log.lines().count() >= steps)
        });
    }
    output(&resumed);
    assert!(result(&whole) == result(&broken));
    assert_eq!(found(&whole), found(&broken));
    assert_eq!(found(&whole).len(), 12);
    // The load before the first step is that of the model before, also in a run that was gone on with.
    let loads = log(&whole, "routing");
    assert_eq!(loads, log(&broken, "routing"));
    let of_layers: Vec<usize> =
        loads[0]["loads"].as_array().unwrap().iter().map(|l| l.as_array().unwrap().len()).collect();
    assert!(loads.len() == 2 && loads[0] != loads[1] && of_layers == [0, 16, 16, 16], "{loads:?}");
    for line in log(&whole, "step") {
        let entropy: Vec<f64> = serde_json::from_value(line["expert_entropy"].clone()).unwrap();
        assert!(entropy.len() == 3 && entropy.iter().all(|share| (0.1..=1.0).contains(share)), "{line}");
        assert_eq!(line["idle_experts"].as_array().unwrap().len(), 3);
    }
    // What follows the end is nothing: no further evaluation, and no further line.
    let ended = fs::read_to_string(broken.join("train_log.jsonl")).unwrap();
    output(&resumed);
    assert!(result(&whole) == result(&broken));
    assert_eq!(fs::read_to_string(broken.join("train_log.jsonl")).unwrap(), ended);
    assert_eq!(log(&broken, "evaluation").len(), 1);
    assert!(whole.join("report.html").exists() && !whole.join("checkpoint-2").exists(), "the latest three are kept");
}

#[test]
fn another_model_of_the_same_shape_is_not_gone_on_with() {
    let directory = tempfile::tempdir().unwrap();
    let [model, lines, folder] = ["model", "train.jsonl", "run"].map(|name| directory.path().join(name));
    fs::create_dir(&model).unwrap();
    copy_embedded(&model, &[]);
    data(&lines, 4);
    let fixed = ["finetune", "--model", path(&model), "--data", path(&lines), "--output", path(&folder)];
    let arguments = [&fixed[..], &["--max-steps", "2", "--rank", "2"]].concat();
    output(&arguments);
    let resumed = [&arguments[..], &["--resume"]].concat();
    output(&resumed);
    let weights = model.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let error = refused(&resumed);
    assert!(error.contains("had model") && error.contains("fingerprint"), "{error}");
}

/// Arguments for a run that doesn't end by itself.
fn endless<'a>(data: &'a str, output: &'a str) -> Vec<&'a str> {
    let steps = ["--max-steps", "100000", "--batch-size", "2", "--rank", "2", "--save-every", "0"];
    [&["finetune", "--data", data, "--output", output][..], &steps].concat()
}

#[test]
fn a_signal_saves_and_ends() {
    let directory = tempfile::tempdir().unwrap();
    let lines = directory.path().join("train.jsonl");
    data(&lines, 20);
    for signal in ["INT", "TERM"] {
        let folder = directory.path().join(signal);
        let mut command = binary::command(&endless(path(&lines), path(&folder)));
        let child = command.args(["--log-every", "1000"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("the first step", 120, || !log_if_there(&folder).is_empty());
        binary::signal(&child, signal);
        let start = Instant::now();
        let ended = child.wait_with_output().unwrap();
        assert!(ended.status.code() == Some(130) && start.elapsed() < Duration::from_secs(30), "{}", ended.status);
        let told = String::from_utf8(ended.stderr).unwrap();
        assert!(told.contains("--resume"), "{told}");
        // What was made since the last line is in one more.
        let steps = log(&folder, "step").last().unwrap()["step"].as_u64().unwrap() + 1;
        assert!(folder.join(format!("checkpoint-{steps}")).join("trainer_state.json").exists());
    }
}

/// The step log of a run that may not have begun.
fn log_if_there(output: &Path) -> String {
    let log = fs::read_to_string(output.join("train_log.jsonl")).unwrap_or_default();
    log.lines().filter(|line| line.contains(r#""type":"step""#)).collect()
}

#[test]
fn one_run_at_a_time_is_in_a_directory_and_nothing_is_written_over() {
    let directory = tempfile::tempdir().unwrap();
    let [lines, folder] = ["train.jsonl", "run"].map(|name| directory.path().join(name));
    data(&lines, 8);
    let arguments = endless(path(&lines), path(&folder));
    let resumed = [&arguments[..], &["--resume"]].concat();
    assert!(refused(&resumed).contains("no checkpoint and no log"));
    let mut child = binary::command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for("the first step", 120, || !log_if_there(&folder).is_empty());
    let error = refused(&resumed);
    assert!(error.contains("another run is in"), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
    // It was killed before its first checkpoint: with --resume it begins again, without it nothing is lost.
    let error = refused(&arguments);
    assert!(error.contains("has a run") && error.contains("--resume"), "{error}");
    let short: Vec<&str> = resumed.iter().map(|word| if *word == "100000" { "2" } else { word }).collect();
    output(&short);
    assert_eq!(found(&folder).len(), 2);
    // Its result stays, also when its checkpoints are gone.
    fs::remove_dir_all(folder.join("checkpoint-2")).unwrap();
    for arguments in [&short, &arguments] {
        let error = refused(arguments);
        assert!(error.contains("has adapter_model.safetensors") && error.contains("another --output"), "{error}");
    }
}

#[test]
fn a_log_with_some_of_the_steps_counts_all_of_them() {
    let directory = tempfile::tempdir().unwrap();
    let [lines, whole, thinned] = ["train.jsonl", "whole", "thinned"].map(|name| directory.path().join(name));
    data(&lines, 20);
    let train = |folder: &Path, more: &[&str]| {
        let fixed =
            ["--max-steps", "8", "--batch-size", "3", "--rank", "2", "--save-every", "0", "--price-per-hour", "2"];
        output(&[&["finetune", "--data", path(&lines), "--output", path(folder)][..], &fixed, more].concat());
        log(folder, "step")
    };
    let all = train(&whole, &[]);
    let some = train(&thinned, &["--log-every", "3"]);
    let steps: Vec<u64> = some.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 3, 6, 7]);
    let tokens = |lines: &[Value]| lines.iter().map(|line| line["tokens"].as_u64().unwrap()).sum::<u64>();
    assert_eq!(tokens(&all), tokens(&some));
    let report = fs::read_to_string(thinned.join("report.html")).unwrap();
    assert!(report.contains("<tr><th>Steps</th><td>8</td></tr>"));
    for row in [
        "<tr><th>max-steps</th><td>8</td></tr>",
        "<tr><th>loss-on</th><td>all</td></tr>",
        "<tr><th>model</th>",
        "<tr><th>dtype</th><td>auto</td></tr>",
        "<p>2/h ÷",
    ] {
        assert!(report.contains(row), "{row} is missing in\n{report}");
    }
    assert!(!report.contains("<th>epochs</th>") && !report.contains("<th>expert-share</th>"), "{report}");
    let share: Vec<f64> = serde_json::from_value(all[3]["busiest_expert"].clone()).unwrap();
    assert!(share.len() == 3 && share.iter().all(|share| (1.0 / 16.0..=1.0).contains(share)), "{share:?}");
}

/// With a rate of nearly 0 half of the losses are above the mean, which this threshold takes for spikes.
#[test]
fn examples_that_are_never_tried_again_are_told_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let [lines, folder] = ["train.jsonl", "run"].map(|name| directory.path().join(name));
    data(&lines, 20);
    let fixed = ["--max-steps", "40", "--batch-size", "2", "--rank", "2", "--learning-rate", "1e-9"];
    let arguments = [&["finetune", "--data", path(&lines), "--output", path(&folder)][..], &fixed].concat();
    let told = run(&[&arguments[..], &["--spike-threshold", "1e-6"]].concat());
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    let left: Vec<Value> = log(&folder, "guard").into_iter().filter(|line| line["step"] == 40).collect();
    assert!(!left.is_empty() && told.stderr.contains("not tried again"), "{}", told.stderr);
    for line in left {
        assert_eq!(line["examples"].as_array().unwrap().len(), 2, "{line}");
        let decision = line["decision"].as_str().unwrap();
        assert!(fs::read_to_string(folder.join("report.html")).unwrap().contains(decision), "{decision}");
    }
}

#[test]
fn a_run_of_one_step_makes_it() {
    let directory = tempfile::tempdir().unwrap();
    let [lines, folder] = ["train.jsonl", "run"].map(|name| directory.path().join(name));
    data(&lines, 4);
    output(&["finetune", "--data", path(&lines), "--output", path(&folder), "--max-steps", "1"]);
    assert_eq!(log(&folder, "step")[0]["learning_rate"], 2e-4);
}

#[test]
fn broken_lines_are_told_one_by_one() {
    let directory = tempfile::tempdir().unwrap();
    let [lines, held_out] = ["train.jsonl", "held-out.jsonl"].map(|name| directory.path().join(name));
    data(&lines, 2);
    let good = fs::read_to_string(&lines).unwrap();
    fs::write(&lines, good.clone() + &"broken\n".repeat(30)).unwrap();
    fs::write(&held_out, good + "broken\n").unwrap();
    let arguments = ["finetune", "--data", path(&lines), "--eval", path(&held_out), "--dry-run"];
    let error = refused(&arguments);
    assert!(
        error.contains("train.jsonl:32: not valid JSON") && error.contains("held-out.jsonl:3: not valid"),
        "{error}"
    );
    assert!(error.contains("cannot be used: 30") && error.matches("train.jsonl:3: ").count() == 1, "{error}");
    let skipped = run(&[&arguments[..], &["--skip-bad"]].concat());
    assert_eq!(skipped.code, Some(0), "{}", skipped.stderr);
    assert!(skipped.stderr.contains("train.jsonl:32: not valid JSON"), "{}", skipped.stderr);
    assert!(skipped.stdout.contains("30 broken lines are left out"), "{}", skipped.stdout);
    // A reader that goes away, as `head` does, is no failure.
    let mut command = binary::command(&[&arguments[..], &["--skip-bad"]].concat());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    let told = String::from_utf8(ended.stderr).unwrap();
    assert!(ended.status.success() && !told.contains("panicked"), "{told}");
}

/// What looks at data beside the steps takes no more memory than a step.
#[test]
fn evaluations_stay_within_the_budget() {
    let directory = tempfile::tempdir().unwrap();
    let [lines, held_out, folder] = ["train.jsonl", "held-out.jsonl", "run"].map(|name| directory.path().join(name));
    data(&lines, 400);
    data(&held_out, 400);
    let fixed = ["--batch-size", "1", "--max-steps", "3", "--rank", "2", "--report-to", "none", "--memory", "BUDGET"];
    let arguments =
        [&["finetune", "--data", path(&lines), "--eval", path(&held_out), "--output", path(&folder)][..], &fixed]
            .concat();
    let with = |budget: &'static str| -> Vec<&str> {
        arguments.iter().map(|word| if *word == "BUDGET" { budget } else { word }).collect()
    };
    let needed = refused(&with("1MiB"));
    let least: u64 = needed.split("needs at least ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let budget = format!("{}MiB", least + 8);
    let peak = peak_of(&with(budget.leak()));
    assert!(peak <= (least + 8) << 20, "{} MiB of {}", peak >> 20, least + 8);
}

#[test]
fn budgets_change_no_bit() {
    let directory = tempfile::tempdir().unwrap();
    let (model, lines) = (directory.path().join("model"), directory.path().join("train.jsonl"));
    fs::create_dir(&model).unwrap();
    let sizes = Qwen3Moe { layers: 6, hidden: 256, heads: 4, experts: 64, expert_width: 160, positions: 256 };
    let bytes = sizes.write(&model);
    data(&lines, 12);
    let train = |name: &str, more: &[&str]| {
        let folder = directory.path().join(name);
        let fixed =
            ["--max-steps", "2", "--batch-size", "2", "--rank", "2", "--save-every", "0", "--report-to", "none"];
        let targets = ["--targets", "all-linear,lm_head"];
        let arguments = [
            &["finetune", "--model", path(&model), "--data", path(&lines), "--output", path(&folder)][..],
            &fixed,
            &targets,
            more,
        ];
        let peak = peak_of(&arguments.concat());
        (folder, peak)
    };
    let (whole, peak) = train("whole", &[]);
    assert!(peak > bytes);
    // The model takes 95 MB; experts are read, and layers are computed again.
    let (small, small_peak) = train("small", &["--memory", "105MiB"]);
    assert_eq!(found(&whole), found(&small));
    let adapter = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    assert!(adapter(&whole) == adapter(&small));
    assert!(log(&small, "step")[1]["expert_misses"].as_u64().unwrap() > 0);
    assert!(small_peak <= (105 << 20) * 105 / 100, "{small_peak}");
    let refused = refused(&[
        "finetune",
        "--model",
        path(&model),
        "--data",
        path(&lines),
        "--output",
        path(&directory.path().join("none")),
        "--memory",
        "20MiB",
    ]);
    assert!(refused.contains("--memory") && refused.contains("needs at least"), "{refused}");
}

/// What `cadre` says when it fails.
#[track_caller]
pub fn refused(arguments: &[&str]) -> String {
    let Run { code, stderr, .. } = run(arguments);
    assert_eq!(code, Some(1), "{stderr}");
    stderr
}

#[test]
fn what_is_wrong_is_told_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let (lines, folder) = (directory.path().join("train.jsonl"), directory.path().join("run"));
    let with = |more: &[&str]| {
        [&["finetune", "--data", path(&lines), "--output", path(&folder)][..], more]
            .concat()
            .iter()
            .map(|s| (*s).to_owned())
            .collect::<Vec<String>>()
    };
    let told = |more: &[&str]| {
        let arguments = with(more);
        refused(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    fs::write(&lines, "{\"text\": \"ab\"}\nnot json\n{\"messages\": []}\n{\"text\": 3}\n").unwrap();
    let error = told(&[]);
    for word in ["train.jsonl:2: ", "train.jsonl:3: ", "train.jsonl:4: ", "cannot be used: 3"] {
        assert!(error.contains(word), "{word} is missing in {error}");
    }
    data(&lines, 4);
    let error = told(&["--targets", "q_proj"]);
    assert!(error.contains("q_proj") && error.contains("query_key_value"), "{error}");
    for (flags, word) in [
        (&["--rank", "0"][..], "--rank must be at least 1"),
        (&["--rank", "100000000000"], "--rank must be at most 65536, found 100000000000"),
        (&["--rank", "65536", "--memory", "1GiB"], "needs at least"),
        (&["--batch-size", "4294967296", "--grad-accum", "4294967296"], "--batch-size must be at most"),
        (&["--batch-size", "65536", "--grad-accum", "65536", "--memory", "1MiB"], "needs at least"),
        (&["--max-steps", "0"], "--max-steps must be at least 1"),
        (&["--learning-rate", "0"], "--learning-rate must be above 0"),
        (&["--learning-rate", "1e300"], "--learning-rate must be above 0 and at most 1"),
        (&["--alpha", "1e300"], "--alpha must be above 0 and at most"),
        (&["--clip", "inf"], "--clip must be above 0 and at most"),
        (&["--weight-decay", "2"], "--weight-decay must be from 0 to 1"),
        (&["--price-per-hour=-3"], "--price-per-hour must be from 0"),
        (&["--price-per-hour", "nan"], "--price-per-hour must be from 0"),
        (&["--keep", "0"], "--keep must be at least 1"),
        (&["--log-every", "0"], "--log-every must be at least 1"),
        (&["--dtype", "int3"], "int3"),
        (&["--max-length", "1"], "max"),
        (&["--resume"], "no checkpoint"),
        (&["--config", "/nowhere.toml"], "/nowhere.toml"),
        (&["--dtype", "q4_k", "--memory", "1"], "--memory"),
    ] {
        let error = told(flags);
        assert!(error.contains(word), "{word} is missing in {error}");
    }
    assert!(!folder.exists());
}

#[test]
fn a_config_file_has_the_flags_names_and_flags_win() {
    let directory = tempfile::tempdir().unwrap();
    let (lines, folder) = (directory.path().join("train.jsonl"), directory.path().join("run"));
    data(&lines, 4);
    let config = directory.path().join("run.toml");
    let text = format!(
        "data = [{:?}]\noutput = {:?}\nmax-steps = 3\nrank = 2\ntargets = [\"experts\"]\n",
        path(&lines),
        path(&folder)
    );
    fs::write(&config, text).unwrap();
    let shown = output(&["finetune", "--config", path(&config), "--dry-run", "--max-steps", "7"]);
    assert!(
        shown.contains("steps    7") && shown.contains("experts: 16 x 3 adapted") && !shown.contains("attention"),
        "{shown}"
    );
    for word in ["router frozen", "weights", "peak", "<role>", "  *  "] {
        assert!(shown.contains(word), "{word} is missing in\n{shown}");
    }
    assert!(!folder.exists());
    output(&["finetune", "--config", path(&config)]);
    assert_eq!(found(&folder).len(), 3);
    // Another rank is another run, and so are other lines in the same file.
    data(&lines, 5);
    let error = refused(&["finetune", "--config", path(&config), "--resume"]);
    assert!(error.contains("data") && error.contains("fingerprint"), "{error}");
    data(&lines, 4);
    let error = refused(&["finetune", "--config", path(&config), "--resume", "--rank", "4"]);
    assert!(error.contains("rank") && error.contains("--output"), "{error}");
    let error = refused(&["finetune", "--config", path(&config)]);
    assert!(error.contains("--resume"), "{error}");
    fs::write(&config, "ranks = 3\n").unwrap();
    let error = refused(&["finetune", "--config", path(&config)]);
    assert!(error.contains("ranks"), "{error}");
}
