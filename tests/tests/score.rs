//! `cadre score`: the same scores by every lane and within every budget, those that the server tells, and nothing lost
//! whatever ends a run.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{
    fs,
    path::PathBuf,
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use cadre_tests::{
    binary::{Run, command, output, run, signal},
    checkpoint::{Qwen3Moe, copy_embedded},
    peak::peak_of,
    server::{MODEL, Server},
    wait_for,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Items and their scores, in a folder of their own.
struct Scoring {
    folder: TempDir,
}

impl Scoring {
    fn new(items: &[Value]) -> Self {
        Self::of_text(&items.iter().map(|item| format!("{item}\n")).collect::<String>())
    }

    fn of_text(text: &str) -> Self {
        let scoring = Self { folder: tempfile::tempdir().unwrap() };
        fs::write(scoring.path("in.jsonl"), text).unwrap();
        scoring
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn args(&self, output: &str, flags: &[&str]) -> Vec<String> {
        let [input, output] = ["in.jsonl", output].map(|name| self.path(name).to_str().unwrap().to_owned());
        let own = ["score".to_owned(), "--input".to_owned(), input, "--output".to_owned(), output];
        own.into_iter().chain(flags.iter().map(|flag| (*flag).to_owned())).collect()
    }

    fn run(&self, output: &str, flags: &[&str]) -> Run {
        run(&self.args(output, flags).iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Begins to run it; its standard error can be read.
    fn start(&self, output: &str, flags: &[&str]) -> Child {
        let mut command = command(&self.args(output, flags).iter().map(String::as_str).collect::<Vec<_>>());
        command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs it to its end, which has to be good, and returns what it wrote.
    #[track_caller]
    fn finish(&self, output: &str, flags: &[&str]) -> String {
        let run = self.run(output, flags);
        assert_eq!((run.code, run.stdout.as_str()), (Some(0), ""), "{}", run.stderr);
        fs::read_to_string(self.path(output)).unwrap()
    }
}

fn values(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Items of every kind, many of which begin alike.
fn items(count: usize) -> Vec<Value> {
    let shared = "The sun is warm, the garden is green, and somebody counts what grows in it. ".repeat(2);
    let item = |index: usize| match index % 4 {
        0 => json!({"id": index, "text": format!("{shared}There are {index} of them, and {} more.", index * 7)}),
        1 => {
            json!({"id": index, "prompt": format!("{shared}What is {index} + 1?"), "completion": format!(" {}", index + 1)})
        }
        2 => {
            json!({"prompt": format!("{shared}What is {index} + 1?"), "choices": [" 4", " 17.", format!(" {}.", index + 1)]})
        }
        _ => json!({"id": format!("label {index}"), "prompt": format!("Is {index} even?"), "labels": [11, 12, 13]}),
    };
    (0..count).map(item).collect()
}

#[test]
fn lanes_and_super_batches_change_no_score() {
    let scoring = Scoring::new(&items(80));
    // Windows for most texts.
    let flags = |more: &[&'static str]| [&["--max-model-len", "96", "--token-logprobs"], more].concat();
    let steps = scoring.finish("steps.jsonl", &flags(&["--lane", "steps"]));
    assert_eq!(values(&steps).len(), 80);
    for (at, more) in [
        &["--lane", "layers"][..],
        &["--lane", "layers", "--super-batch", "200", "--max-num-batched-tokens", "33", "--threads", "1"],
        &["--lane", "layers", "--super-batch", "1"],
        &["--lane", "steps", "--super-batch", "1000", "--max-num-seqs", "3"],
    ]
    .into_iter()
    .enumerate()
    {
        let other = scoring.finish(&format!("{at}.jsonl"), &flags(more));
        assert!(other == steps, "{more:?} gives other scores");
    }
}

#[test]
fn a_model_larger_than_its_budget_scores_the_same_within_it() {
    let scoring = Scoring::new(&items(60));
    let [source, pack] = ["source", "pack"].map(|name| scoring.path(name).to_str().unwrap().to_owned());
    fs::create_dir(&source).unwrap();
    let sizes = Qwen3Moe { layers: 4, hidden: 512, heads: 8, experts: 48, expert_width: 128, positions: 512 };
    sizes.write(source.as_ref());
    output(&["pack", "--model", &source, "--output", &pack]);
    let flags = |more: &[&'static str]| {
        let own = ["--model", &pack, "--max-model-len", "256", "--max-num-batched-tokens", "64", "--threads", "2"];
        own.into_iter().chain(more.iter().copied()).map(str::to_owned).collect::<Vec<_>>()
    };
    let finish = |output: &str, more: &[&'static str]| {
        let flags = flags(more);
        scoring.finish(output, &flags.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let expected = finish("whole.jsonl", &[]);
    // The first keeps hidden states in memory, the second hasn't even room for the experts of one layer.
    for (budget, mebibytes) in [("125MiB", 125), ("100MiB", 100)] {
        let more = ["--memory", budget, "--super-batch", "2000"];
        assert!(finish(&format!("{budget}.jsonl"), &more) == expected, "{budget} changes a score");
        let flags = flags(&more);
        let args = scoring.args(&format!("{budget}.peak.jsonl"), &flags.iter().map(String::as_str).collect::<Vec<_>>());
        let peak = peak_of(&args.iter().map(String::as_str).collect::<Vec<_>>());
        println!("budget {budget}, peak {} MiB", peak >> 20);
        assert!(peak <= (mebibytes << 20) * 105 / 100, "budget {budget}, peak {peak}");
    }
    let small =
        scoring.run("small.jsonl", &flags(&["--memory", "20MiB"]).iter().map(String::as_str).collect::<Vec<_>>());
    assert!(small.code == Some(1) && small.stderr.contains("needs at least"), "{}", small.stderr);
}

#[test]
fn scores_are_the_log_probabilities_that_the_server_tells() {
    let (prompt, completion) = ("What is 15 + 17? It is", " 32, I think.");
    let scoring = Scoring::new(&[
        json!({"prompt": prompt, "completion": completion}),
        json!({"text": format!("{prompt}{completion}")}),
        json!({"prompt": prompt, "choices": [completion, " 3"]}),
    ]);
    let scores = values(&scoring.finish("out.jsonl", &["--token-logprobs"]));
    let server = Server::start(&[]);
    let logprobs = |text: &str| -> Vec<Option<f64>> {
        let answer = server.complete(text, json!({"echo": true, "logprobs": 1, "max_tokens": 0})).ok();
        let logprobs = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
        logprobs.iter().map(Value::as_f64).collect()
    };
    let whole = logprobs(&format!("{prompt}{completion}"));
    let from = server.tokens(prompt).len();
    let told = |score: &Value| -> Vec<Option<f64>> {
        score["token_logprobs"].as_array().unwrap().iter().map(|one| one["logprob"].as_f64()).collect()
    };
    assert_eq!(told(&scores[0]), whole[from..], "{MODEL}");
    assert_eq!((told(&scores[1]), whole[0]), (whole[1..].to_vec(), None));
    assert_eq!(told(&scores[2]["choices"][0]), whole[from..]);
    let sum: f64 = whole[from..].iter().flatten().sum();
    assert!((scores[0]["log_likelihood"].as_f64().unwrap() - sum).abs() < 1e-9);
    let perplexity = (-whole.iter().flatten().sum::<f64>() / (whole.len() - 1) as f64).exp();
    assert!((scores[1]["perplexity"].as_f64().unwrap() - perplexity).abs() < 1e-9 * perplexity);
}

#[test]
fn greedy_says_what_the_model_would_say() {
    let prompt = "The garden is";
    let server = Server::start(&[]);
    let answer = server.complete(prompt, json!({"max_tokens": 6, "temperature": 0, "ignore_eos": true})).ok();
    let said = answer["choices"][0]["text"].as_str().unwrap();
    let items = [said, " zzz"].map(|completion| json!({"prompt": prompt, "completion": completion}));
    let scores = values(&Scoring::new(&items).finish("out.jsonl", &[]));
    assert_eq!((&scores[0]["is_greedy"], &scores[1]["is_greedy"]), (&json!(true), &json!(false)), "{said:?}");
}

#[test]
fn a_run_that_is_killed_ends_with_the_bytes_of_one_that_is_not() {
    let scoring = Scoring::new(&items(240));
    let flags = ["--lane", "layers", "--super-batch", "600", "--max-num-batched-tokens", "64"];
    let whole = scoring.finish("whole.jsonl", &flags);
    let mut killed = 0;
    for wait in [30, 90, 150, 240, 400] {
        let mut child = scoring.start("killed.jsonl", &flags);
        thread::sleep(Duration::from_millis(wait));
        killed += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(killed > 0, "it was never killed");
    assert!(scoring.finish("killed.jsonl", &flags) == whole, "the bytes differ");
    let again = scoring.run("killed.jsonl", &flags);
    assert!(again.code == Some(0) && again.stderr.contains("nothing to do"), "{}", again.stderr);
    // Another model or other flags are another run.
    let other = scoring.path("model");
    fs::create_dir(&other).unwrap();
    copy_embedded(&other, &["generation_config.json"]);
    fs::write(other.join("generation_config.json"), "{}").unwrap();
    let refused = scoring.run("killed.jsonl", &["--max-model-len", "64"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("max_model_len was"), "{}", refused.stderr);
}

#[test]
fn ctrl_c_ends_a_run_and_the_same_command_goes_on() {
    for lane in ["steps", "layers"] {
        let scoring = Scoring::new(&items(6000));
        let flags = ["--lane", lane, "--super-batch", "1000"];
        let mut child = scoring.start("out.jsonl", &flags);
        let written = || fs::metadata(scoring.path("out.jsonl")).is_ok_and(|file| file.len() > 0);
        wait_for("a run to write", 60, written);
        signal(&child, "INT");
        wait_for("it to end", 10, || child.try_wait().unwrap().is_some());
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(130), "{lane}: {said}");
        assert!(said.contains("the same command goes on"), "{lane}: {said}");
        let text = fs::read_to_string(scoring.path("out.jsonl")).unwrap();
        assert!(text.ends_with('\n') && values(&text).len() < 6000, "{lane}");
    }
}

#[test]
fn one_long_text_takes_no_more_memory_than_a_super_batch() {
    let text: String = (0..600).map(|count| format!("In the garden are {count} trees, not {}. ", count * 7)).collect();
    let scoring = Scoring::new(&[json!({"text": text})]);
    let model = scoring.path("model").to_str().unwrap().to_owned();
    fs::create_dir(&model).unwrap();
    Qwen3Moe { layers: 2, hidden: 512, heads: 8, experts: 8, expert_width: 32, positions: 512 }.write(model.as_ref());
    let [parts, whole] = ["1000", "1000000"].map(|rows| {
        let flags = ["--model", &model, "--lane", "layers", "--max-model-len", "64", "--super-batch", rows];
        let output = format!("{rows}.jsonl");
        let peak = peak_of(&scoring.args(&output, &flags).iter().map(String::as_str).collect::<Vec<_>>());
        println!("{rows} rows at a time, peak {} MiB", peak >> 20);
        (fs::read_to_string(scoring.path(&output)).unwrap(), peak)
    });
    assert!(parts.0 == whole.0, "the parts change a score");
    assert!(parts.1 + (32 << 20) < whole.1, "{} and {} MiB", parts.1 >> 20, whole.1 >> 20);
}

#[test]
fn a_line_that_is_no_item_is_its_own_error() {
    let text =
        "{\"text\": \"good enough\"}\n[\n\n{\"id\": 5, \"prompt\": \"a\", \"choices\": []}\n{\"text\": \"the last\"}\n";
    let scoring = Scoring::of_text(text);
    let scores = values(&scoring.finish("out.jsonl", &[]));
    assert_eq!(scores.iter().map(|score| score["line"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 4, 5]);
    let error = |at: usize| scores[at]["error"]["message"].as_str().unwrap();
    assert!(error(1).starts_with("line 2: this is no item"), "{}", error(1));
    assert_eq!((error(2), &scores[2]["id"]), ("line 4: `choices` is empty", &json!(5)));
    assert!(scores[0]["perplexity"].is_number() && scores[3]["perplexity"].is_number());
    assert_eq!(fs::read_to_string(scoring.path("out.jsonl.errors.jsonl")).unwrap().lines().count(), 2);
    for (flags, why) in [
        (&["--stride", "64", "--max-model-len", "64"][..], "--stride is 64"),
        (&["--max-model-len", "1"], "at least 2"),
        (&["--max-model-len", "100000000"], "positions end at"),
    ] {
        let refused = scoring.run("other.jsonl", flags);
        assert!(refused.code == Some(1) && refused.stderr.contains(why), "{}", refused.stderr);
    }
    let full = run(&["score", "-i", scoring.path("in.jsonl").to_str().unwrap(), "-o", "/dev/full"]);
    assert!(full.code == Some(1) && full.stderr.contains("cannot write"), "{}", full.stderr);
}
