//! lm-evaluation-harness, unmodified, against the real server: it finds what it finds in transformers with the same weights.
//! `tests/fixtures/lm_eval` has the items and those results; `tests/reference/make_lm_eval_fixtures.py` made them.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use cadre_tests::{
    python,
    server::{MODEL, Server},
    source::root,
};
use serde_json::Value;
use tempfile::TempDir;

/// Of log-likelihoods, which are sums over up to 250 tokens.
const TOLERANCE: f64 = 1e-3;

/// The model of the fixtures, served, and a folder for what lm-eval writes.
struct Harness {
    server: Server,
    directory: TempDir,
}

impl Harness {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let model = directory.path().join("model");
        fs::create_dir(&model).unwrap();
        for folder in ["parity/qwen3_moe-base", "lm_eval"] {
            copy_files(&root().join("tests/fixtures").join(folder), &model);
        }
        let model = model.to_str().unwrap();
        // In f32, and cutting long texts where the reference did.
        let server = Server::start(&[
            "--model",
            model,
            "--dense-format",
            "f32",
            "--experts-format",
            "f32",
            "--max-model-len",
            "64",
        ]);
        Self { server, directory }
    }

    /// `lm_eval run` with a model of this kind, to its end.
    fn run(&self, kind: &str, route: &str, model_args: &str, flags: &[&str]) -> Results {
        let output = self.directory.path().join("output");
        let address = self.server.address();
        let model_args = format!("model={MODEL},base_url={address}{route},max_length=64,{model_args}");
        let mut command = Command::new(python::interpreter("lm-eval"));
        command.args(["-m", "lm_eval", "run", "--model", kind, "--model_args", &model_args]);
        command.args(["--include_path", "tasks", "--log_samples", "--output_path"]).arg(&output).args(flags);
        command.current_dir(root().join("tests/fixtures/lm_eval"));
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.directory.path().join("cache"));
        python::assert_success("lm_eval", &command.output().unwrap());
        Results { folder: output.join(MODEL) }
    }
}

fn copy_files(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// What a run of lm-eval has written.
struct Results {
    folder: PathBuf,
}

impl Results {
    /// The text of the one file whose name begins so.
    fn file(&self, name: &str) -> String {
        let mut names = fs::read_dir(&self.folder).unwrap().map(|entry| entry.unwrap().path());
        fs::read_to_string(names.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(name)).unwrap())
            .unwrap()
    }

    fn metrics(&self, task: &str) -> Value {
        let results: Value = serde_json::from_str(&self.file("results_")).unwrap();
        results["results"][task].clone()
    }

    /// What the model answered to each item.
    fn answers(&self, task: &str) -> Vec<Value> {
        let lines = self.file(&format!("samples_{task}_"));
        let mut items: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        items.sort_by_key(|item| item["doc_id"].as_u64());
        items.into_iter().map(|mut item| item["resps"].take()).collect()
    }

    /// Holds them against what transformers gave.
    fn check(&self, way: &str) {
        let expected = fs::read_to_string(root().join("tests/fixtures/lm_eval/expected.json")).unwrap();
        let expected: Value = serde_json::from_str(&expected).unwrap();
        for (task, expected) in expected[way].as_object().unwrap() {
            let (answers, items) = (self.answers(task), expected["items"].as_array().unwrap());
            assert_eq!(answers.len(), items.len(), "{task}");
            for (item, (found, expected)) in answers.iter().zip(items).enumerate() {
                assert_same_answer(found, expected, &format!("{way}, {task}, item {item}"));
            }
            let metrics = self.metrics(task);
            for (name, expected) in expected["metrics"].as_object().unwrap() {
                assert_same_metric(name, metrics[name].as_f64().unwrap(), expected.as_f64().unwrap());
            }
        }
    }
}

/// Greedy flags and texts are the same, log-likelihoods nearly. lm-eval writes numbers and flags as texts.
#[track_caller]
fn assert_same_answer(found: &Value, expected: &Value, what: &str) {
    match expected {
        Value::Array(expected) => {
            let found = found.as_array().unwrap();
            assert_eq!(found.len(), expected.len(), "{what}");
            found.iter().zip(expected).for_each(|(found, expected)| assert_same_answer(found, expected, what));
        }
        Value::Number(expected) => {
            let found: f64 = text(found).parse().unwrap();
            let expected = expected.as_f64().unwrap();
            assert!((found - expected).abs() < TOLERANCE, "{what}: a log-likelihood of {found}, expected {expected}");
        }
        Value::Bool(greedy) => assert_eq!(text(found), if *greedy { "True" } else { "False" }, "{what}"),
        expected => assert_eq!(found, expected, "{what}"),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| unreachable!("{value} is no text"))
}

/// Accuracies are the same; the others come from log-likelihoods, perplexities as their exponentials.
#[track_caller]
fn assert_same_metric(name: &str, found: f64, expected: f64) {
    let same = match name.split(',').next().unwrap() {
        "acc" | "acc_norm" | "exact_match" => found == expected,
        _ => (found / expected - 1.0).abs() < TOLERANCE,
    };
    assert!(same, "{name}: {found}, expected {expected}");
}

const TASKS: &[&str] = &["--tasks", "cadre_choices,cadre_last_words,cadre_texts,cadre_answers"];

#[test]
fn tasks_have_the_results_of_transformers_by_the_servers_tokenizer() {
    let harness = Harness::start();
    harness.run("local-completions", "/v1/completions", "num_concurrent=4", TASKS).check("completions");
    assert!(harness.server.metrics().value("cadre_http_requests_total", &[("route", "/tokenize")]) > 0.0);
}

#[test]
fn tasks_have_the_results_of_transformers_by_a_tokenizer_of_ones_own_and_in_batches() {
    let harness = Harness::start();
    let model = harness.directory.path().join("model");
    let tokenizer = format!("tokenizer_backend=huggingface,tokenizer={}", model.to_str().unwrap());
    let flags = [TASKS, &["--batch_size", "8"]].concat();
    harness.run("local-completions", "/v1/completions", &tokenizer, &flags).check("completions");
}

#[test]
fn a_chat_has_the_results_of_transformers() {
    let harness = Harness::start();
    let flags = ["--tasks", "cadre_answers", "--apply_chat_template"];
    harness.run("local-chat-completions", "/v1/chat/completions", "num_concurrent=2", &flags).check("chat");
}
