//! The command line: what each subcommand prints, and how it fails.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{fs, path::Path};

use cadre_tests::{
    binary::{output, run, run_with_input},
    checkpoint::{Qwen3Moe, copy_embedded},
    heldout::{self, Question},
    server::Server,
};
use serde_json::{Value, json};

/// A sum if the model can add, else whatever it can do best.
fn a_question() -> Question {
    let families = heldout::questions();
    let family = families.get("add").or(families.values().next()).unwrap();
    family[0].clone()
}

#[test]
fn generate_answers_and_ends() {
    let question = a_question();
    assert_eq!(output(&["generate", "--prompt", &question.prompt]).trim(), question.answer);
    let piped = run_with_input(&["generate", "--prompt", "-"], &question.prompt);
    assert_eq!((piped.code, piped.stdout.trim()), (Some(0), question.answer.as_str()));
    assert_eq!(piped.stderr, "", "nothing but the answer is printed");
}

#[test]
fn generate_says_what_the_server_says() {
    let server = Server::start(&[]);
    let more = json!({"temperature": 1.4, "seed": 6, "max_tokens": 20, "top_p": 0.9, "stop": ["q"]});
    let answer = server.chat("Spell bread.", more).ok();
    let flags = ["--temperature", "1.4", "--seed", "6", "--max-tokens", "20", "--top-p", "0.9", "--stop", "q"];
    for engine in [&["--threads", "1"][..], &["--threads", "2", "--max-num-batched-tokens", "5"]] {
        let said = output(&[&["generate", "--prompt", "Spell bread."], &flags[..], engine].concat());
        assert_eq!(said.strip_suffix('\n'), answer["choices"][0]["message"]["content"].as_str());
    }
    let raw = server.complete("The garden is", json!({"max_tokens": 8})).ok();
    let said = output(&["generate", "--raw", "--prompt", "The garden is", "--max-tokens", "8"]);
    assert_eq!(said.strip_suffix('\n'), raw["choices"][0]["text"].as_str());
}

#[test]
fn chat_keeps_the_conversation() {
    let server = Server::start(&[]);
    let mut messages = vec![];
    let mut expected = String::new();
    for question in ["My name is Paul.", "What is my name?"] {
        messages.push(json!({"role": "user", "content": question}));
        let body = json!({"messages": messages});
        let answer = server.client().post("/v1/chat/completions", &body).ok();
        let said = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
        expected += &format!("{said}\n");
        messages.push(json!({"role": "assistant", "content": said}));
    }
    let two = "My name is Paul.\nWhat is my name?\n";
    let run = run_with_input(&["chat"], two);
    assert_eq!((run.code, run.stdout.trim_end()), (Some(0), expected.trim_end()), "{}", run.stderr);

    let again = run_with_input(&["chat"], &format!("{two}/reset\n{two}/exit\nnever asked\n"));
    assert_eq!(again.stdout.trim_end(), format!("{expected}{expected}").trim_end(), "after /reset it is as new");
    assert_eq!(run_with_input(&["chat"], "").code, Some(0));
}

#[test]
fn inspect_tells_what_a_checkpoint_is() {
    let table = output(&["inspect"]);
    assert!(output(&["inspect", "--template"]).contains("message['role']"));
    for part in ["bailing_moe_v2", "experts", "embedding", "attention", "chat template"] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
    let about: Value = serde_json::from_str(&output(&["inspect", "--json"])).unwrap();
    assert_eq!(about["architecture"], "bailing_moe_v2");
    let count = |name: &str| about[name].as_u64().unwrap();
    assert!(count("active_parameters") < count("total_parameters"));
    assert!((3_000_000..5_000_000).contains(&count("total_parameters")), "{about}");
    let parts = about["parts"].as_object().unwrap();
    let bytes: u64 = parts.values().map(|part| part["bytes"].as_u64().unwrap()).sum();
    assert_eq!(bytes, count("total_bytes"));

    let directory = tempfile::tempdir().unwrap();
    let sizes = Qwen3Moe { layers: 2, hidden: 64, heads: 4, experts: 8, expert_width: 32, positions: 128 };
    let weights = sizes.write(directory.path());
    let about: Value =
        serde_json::from_str(&output(&["inspect", "--json", "--model", path(directory.path())])).unwrap();
    assert_eq!((about["architecture"].as_str(), about["total_bytes"].as_u64()), (Some("qwen3_moe"), Some(weights)));
}

/// The JSON lines of `cadre bench` with these flags.
fn bench(flags: &[&str]) -> Vec<Value> {
    let lines = output(&[&["bench", "--json", "--repetitions", "2"], flags].concat());
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn bench_measures() {
    let small = ["--prompt", "16,64", "--generate", "4", "--batch", "1,3"];
    let lines = bench(&[&["--threads", "1"], &small[..]].concat());
    let sizes: Vec<_> =
        lines.iter().map(|line| (line["kind"].as_str().unwrap(), &line["tokens"], &line["batch"])).collect();
    let [one, three, four, sixteen, sixty_four] = [1, 3, 4, 16, 64].map(|number| json!(number));
    let expected = [
        ("prefill", &sixteen, &one),
        ("prefill", &sixty_four, &one),
        ("decode", &four, &one),
        ("decode", &four, &three),
    ];
    assert_eq!(sizes, expected);
    for line in &lines {
        assert!(line["tokens_per_second"].as_f64().unwrap() > 0.0, "{line}");
        assert!(line["peak_rss_bytes"].as_u64().unwrap() > 1 << 20, "{line}");
        assert_eq!((&line["threads"], &line["format"]), (&json!(1), &json!("bf16")), "{line}");
        assert!(!line["isa"].as_str().unwrap().is_empty(), "{line}");
        assert!(line.get("bound_tokens_per_second").is_none(), "{line}");
    }
    let table = output(&[&["bench"], &small[..]].concat());
    assert!(table.contains("prefill") && table.contains("tok/s") && !table.contains("bound"), "{table}");
    let too_long = run(&["bench", "--prompt", "5000", "--batch", "1", "--generate", "2", "--repetitions", "1"]);
    assert!(too_long.code == Some(0) && too_long.stderr.contains("5001 tokens don't fit"), "{}", too_long.stderr);
}

#[test]
fn bench_holds_figures_against_the_machine() {
    let small = ["--roofline", "--prompt", "16", "--generate", "4", "--batch", "1,4"];
    let lines = bench(&small);
    assert_eq!(lines.len(), 3);
    let number = |line: &Value, key: &str| line[key].as_f64().unwrap();
    for line in &lines {
        // The share and the bound are those of one of the repetitions.
        let speed = number(line, "share_of_bound") * number(line, "bound_tokens_per_second");
        let range = number(line, "tokens_per_second_min") * 0.999..=number(line, "tokens_per_second_max") * 1.001;
        assert!(speed > 0.0 && range.contains(&speed), "{line}");
        assert!(
            number(line, "read_bytes_per_second") > 0.0 && number(line, "matrix_operations_per_second") > 0.0,
            "{line}"
        );
    }
    let table = output(&[&["bench", "--repetitions", "1"], &small[..]].concat());
    for part in ["GB/s", "G operations/s", "bound", "share", "%"] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
}

#[test]
fn bench_refuses_sizes_of_nothing() {
    for flags in [["--prompt", "0"], ["--prompt", "16,x"], ["--generate", "0"], ["--batch", "1,0"], ["--batch", "x"]] {
        let run = run(&[&["bench"], &flags[..]].concat());
        assert!(run.code == Some(2) && run.stderr.contains(flags[0]), "{flags:?}: {:?} {}", run.code, run.stderr);
    }
}

#[test]
fn other_formats_answer_as_well() {
    let question = a_question();
    let said = output(&["generate", "--format", "f32", "--prompt", &question.prompt]);
    assert_eq!(said.trim(), question.answer);
}

#[test]
fn help_names_the_flags() {
    let all = output(&["--help"]);
    for (command, flags) in [
        ("serve", &["--host", "--port", "--served-model-name", "--max-num-seqs", "--kv-memory", "--max-model-len"][..]),
        ("generate", &["--prompt", "--max-tokens", "--temperature", "--model", "--threads", "--format", "--kv-dtype"]),
        ("chat", &["--system", "--model"]),
        ("inspect", &["--model", "--json"]),
        ("pack", &["--model", "--output", "--format", "--experts-format", "--dense-format"]),
        ("plan", &["--model", "--memory", "--measure", "--json", "--max-num-seqs"]),
        ("bench", &["--json", "--prompt", "--generate", "--batch", "--roofline", "--max-num-batched-tokens"]),
    ] {
        assert!(all.contains(command), "{all}");
        let help = output(&[command, "--help"]);
        for flag in flags {
            assert!(help.contains(flag), "{command} {flag}:\n{help}");
        }
    }
    assert!(output(&["--version"]).starts_with("cadre "));
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A sentence on standard error that has these words, exit status 1, no panic and nothing on standard output.
#[track_caller]
fn fails(args: &[&str], words: &[&str]) {
    let run = run(args);
    assert_eq!(run.code, Some(1), "{args:?}: {}", run.stderr);
    assert_eq!(run.stdout, "", "{args:?}");
    for word in words {
        assert!(run.stderr.contains(word), "{args:?}: expected {word:?} in\n{}", run.stderr);
    }
    assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
}

#[test]
fn flags_out_of_range_are_usage_errors() {
    for flags in [
        &["generate", "--prompt", "x", "--temperature", "nan"][..],
        &["generate", "--prompt", "x", "--top-p", "inf"],
        &["serve", "--max-num-seqs", "0"],
        &["serve", "--max-num-batched-tokens", "0"],
        &["serve", "--kv-memory", "0"],
    ] {
        let run = run(flags);
        assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""), "{flags:?}: {}", run.stderr);
        assert!(run.stderr.contains("invalid value"), "{flags:?}: {}", run.stderr);
    }
}

#[test]
fn models_that_cannot_be_used_are_explained() {
    fails(&["generate", "--prompt", "x", "--model", "no/such/dir"], &["no/such/dir"]);
    fails(&["inspect", "--model", "nowhere"], &["nowhere", "directory"]);
    let directory = tempfile::tempdir().unwrap();
    let model = path(directory.path());
    let generate = ["generate", "--prompt", "x", "--model", model];
    fails(&generate, &["config.json"]);

    copy_embedded(directory.path(), &["model.safetensors"]);
    fails(&generate, &["model.safetensors"]);
    copy_embedded(directory.path(), &[]);
    let weights = directory.path().join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    for length in [0, 5, 1000, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&weights, &bytes[..length]).unwrap();
        fails(&generate, &["model.safetensors"]);
    }
    fs::write(&weights, &bytes).unwrap();

    let config = fs::read_to_string(directory.path().join("config.json")).unwrap();
    for (field, value, words) in [
        ("model_type", json!("mamba"), &["mamba", "bailing_moe_v2", "olmoe", "qwen3_moe"][..]),
        ("hidden_size", json!(128), &["shape", "128"]),
        ("hidden_size", json!(-1), &["hidden_size"]),
        ("hidden_size", json!(1e30), &["hidden_size"]),
        ("num_hidden_layers", json!(5), &["layers.4"]),
        ("num_hidden_layers", json!(1_000_000_000), &["num_hidden_layers"]),
        ("num_experts", json!(1_000_000_000_000_u64), &["num_experts"]),
        ("num_experts_per_tok", json!(17), &["num_experts_per_tok"]),
        ("rope_theta", json!("NaN"), &["rope_theta"]),
        ("vocab_size", json!(null), &["vocab_size"]),
    ] {
        let mut changed: Value = serde_json::from_str(&config).unwrap();
        // The class decides before `model_type`.
        changed["architectures"] = json!([]);
        changed[field] = value;
        fs::write(directory.path().join("config.json"), changed.to_string()).unwrap();
        fails(&generate, words);
    }
    fs::write(directory.path().join("config.json"), "{").unwrap();
    fails(&generate, &["config.json", "JSON"]);
}

#[test]
fn flags_that_cannot_be_honoured_are_explained() {
    let generate = ["generate", "--prompt", "x"];
    for (flags, words) in [
        (&["--max-model-len", "99999999"][..], &["--max-model-len", "1024"][..]),
        (&["--kv-memory", "1KiB"], &["--kv-memory"]),
        (&["--kv-memory", "64KiB", "--max-model-len", "512"], &["--kv-memory", "--max-model-len", "512"]),
        (&["--temperature", "5"], &["temperature", "5"]),
        (&["--top-p", "0"], &["top_p"]),
        (&["--max-tokens", "5000"], &["1024", "5000"]),
    ] {
        fails(&[&generate[..], flags].concat(), words);
    }
    for flags in [&["--kv-memory", "1 parsec"][..], &["--threads", "0"], &["--format", "int3"], &["--no-such-flag"]] {
        let run = run(&[&generate[..], flags].concat());
        assert_eq!(run.code, Some(2), "{flags:?}: {}", run.stderr);
    }
    assert_eq!(run(&["serve", "--host", "not an address"]).code, Some(1));
}
