//! lm-evaluation-harness, unmodified, against the real server: it finds what it finds in transformers with the same weights.
//! `tests/fixtures/lm_eval` has the items and those results; `tests/reference/make_lm_eval_fixtures.py` made them.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{fs, path::Path, process::Command};

use cadre_tests::{
    python,
    server::{MODEL, Server},
    source::root,
};
use serde_json::Value;
use tempfile::TempDir;

/// Of log-likelihoods, whose largest here are sums over hundreds of tokens.
const TOLERANCE: f64 = 1e-3;

const TASKS: &[&str] = &["cadre_choices", "cadre_last_words", "cadre_texts", "cadre_answers"];

/// The fixtures' model, served.
struct Harness {
    server: Server,
    model: TempDir,
}

impl Harness {
    fn start() -> Self {
        let model = tempfile::tempdir().unwrap();
        for folder in ["parity/qwen3_moe-base", "lm_eval"] {
            copy_files(&root().join("tests/fixtures").join(folder), model.path());
        }
        // In f32, and so long that texts are cut where the reference's were.
        let flags = ["--model", model.path().to_str().unwrap(), "--format", "f32", "--max-model-len", "64"];
        Self { server: Server::start(&flags), model }
    }

    /// What lm-eval makes of `tasks` with a model of this kind.
    fn results(&self, kind: &str, route: &str, model_args: &str, batch_size: &str, tasks: &[&str]) -> Value {
        let address = self.server.address();
        let model_args = format!("model={MODEL},base_url={address}{route},max_length=64,{model_args}");
        let cache = tempfile::tempdir().unwrap();
        let mut command = Command::new(python::interpreter("lm-eval"));
        command.arg(root().join("tests/python/lm_eval_results.py")).args([kind, &model_args, batch_size]).args(tasks);
        command.current_dir(root().join("tests/fixtures/lm_eval"));
        let output = command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", cache.path()).output().unwrap();
        python::assert_success("lm-eval", &output);
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn copy_files(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap).filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Holds results against those that transformers gave in the same `way`.
#[track_caller]
fn assert_expected(way: &str, tasks: &[&str], results: &Value) {
    let expected = fs::read_to_string(root().join("tests/fixtures/lm_eval/expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    for task in tasks {
        let (found, expected) = (&results[task], &expected[way][task]);
        assert_same_answers(&found["items"], &expected["items"], &format!("{way}, {task}"));
        for (name, expected) in expected["metrics"].as_object().unwrap() {
            assert_same_metric(name, found["metrics"][name].as_f64().unwrap(), expected.as_f64().unwrap());
        }
    }
}

/// Texts and greedy flags are the same, log-likelihoods nearly.
#[track_caller]
fn assert_same_answers(found: &Value, expected: &Value, place: &str) {
    match (found, expected) {
        (Value::Array(found), Value::Array(expected)) => {
            assert_eq!(found.len(), expected.len(), "{place}");
            for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
                assert_same_answers(found, expected, &format!("{place}, {index}"));
            }
        }
        (Value::Number(found), Value::Number(expected)) => {
            let difference = found.as_f64().unwrap() - expected.as_f64().unwrap();
            assert!(difference.abs() < TOLERANCE, "{place}: log-likelihood {found}, expected {expected}");
        }
        _ => assert_eq!(found, expected, "{place}"),
    }
}

/// Accuracies are the same; the others come from log-likelihoods, perplexities as exponentials.
#[track_caller]
fn assert_same_metric(name: &str, found: f64, expected: f64) {
    let same = match name {
        "acc,none" | "acc_norm,none" | "exact_match,none" => found == expected,
        _ => (found / expected - 1.0).abs() < TOLERANCE,
    };
    assert!(same, "{name}: {found}, expected {expected}");
}

#[test]
fn tasks_have_the_results_of_transformers_by_the_servers_tokenizer() {
    let harness = Harness::start();
    let results = harness.results("local-completions", "/v1/completions", "num_concurrent=4", "1", TASKS);
    assert_expected("completions", TASKS, &results);
    let tokenized = harness.server.metrics().value("cadre_http_requests_total", &[("route", "/tokenize")]);
    assert!(tokenized > 0.0, "lm-eval had a tokenizer of its own");
}

#[test]
fn tasks_have_the_results_of_transformers_by_a_tokenizer_of_ones_own_and_in_batches() {
    let harness = Harness::start();
    let tokenizer = format!("tokenizer_backend=huggingface,tokenizer={}", harness.model.path().to_str().unwrap());
    let results = harness.results("local-completions", "/v1/completions", &tokenizer, "8", TASKS);
    assert_expected("completions", TASKS, &results);
}

#[test]
fn a_chat_has_the_results_of_transformers() {
    let tasks = &["cadre_answers"];
    let results =
        Harness::start().results("local-chat-completions", "/v1/chat/completions", "num_concurrent=2", "1", tasks);
    assert_expected("chat", tasks, &results);
}
