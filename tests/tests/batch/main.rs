//! `cadre batch`: what its lines get, and that nothing which ends it loses, doubles or changes one.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

mod requests;
mod resume;

use std::{fs, path::PathBuf};

use cadre_tests::binary::{Run, run};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Requests and what becomes of them, in a folder of their own.
struct Batch {
    folder: TempDir,
}

impl Batch {
    fn new(lines: &[Value]) -> Self {
        Self::of_text(&lines.iter().map(|line| format!("{line}\n")).collect::<String>())
    }

    fn of_text(text: &str) -> Self {
        let batch = Self { folder: tempfile::tempdir().unwrap() };
        fs::write(batch.path("in.jsonl"), text).unwrap();
        batch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn shown(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The command line that writes `output`.
    fn args<'a>(&self, output: &str, flags: &[&'a str]) -> Vec<std::borrow::Cow<'a, str>> {
        let own = [
            "batch".to_owned(),
            "--input".to_owned(),
            self.shown("in.jsonl"),
            "--output".to_owned(),
            self.shown(output),
        ];
        own.into_iter().map(Into::into).chain(flags.iter().map(|flag| (*flag).into())).collect()
    }

    fn run(&self, output: &str, flags: &[&str]) -> Run {
        let args = self.args(output, flags);
        run(&args.iter().map(AsRef::as_ref).collect::<Vec<_>>())
    }

    /// Runs it to its end, which has to be good, and returns what it says.
    #[track_caller]
    fn finish(&self, output: &str, flags: &[&str]) -> String {
        let run = self.run(output, flags);
        assert_eq!((run.code, run.stdout.as_str()), (Some(0), ""), "{}", run.stderr);
        run.stderr
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// The lines of a file, sorted: each begins with the number of its request.
    fn sorted(&self, name: &str) -> String {
        sorted(&self.text(name))
    }
}

fn sorted(text: &str) -> String {
    let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
    lines.sort_unstable();
    lines.concat()
}

fn values(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn request(custom_id: &str, url: &str, body: Value) -> Value {
    json!({"custom_id": custom_id, "method": "POST", "url": url, "body": body})
}

/// Requests of every kind, greedy and drawn, some with a beginning in common, every fiftieth at fault.
fn requests(count: usize) -> Vec<Value> {
    let chat = |index: usize| {
        let question = format!("What is {} + {}?", index % 60, index / 7 % 60);
        let shared = if index.is_multiple_of(3) {
            "You are terse and you never say more than you were asked for. ".repeat(2)
        } else {
            String::new()
        };
        let temperature = if index % 50 == 49 { 99.0 } else { [0.0, 1.0, 0.7][index % 3] };
        let messages = json!([{"role": "system", "content": shared}, {"role": "user", "content": question}]);
        json!({"messages": messages, "max_tokens": 4 + index % 29, "temperature": temperature})
    };
    let completion =
        |index: usize| json!({"prompt": format!("The garden {index}"), "max_tokens": 1 + index % 12, "logprobs": 1});
    let line = |index: usize| {
        let custom_id = format!("request-{index}");
        match index % 4 {
            0 => request(&custom_id, "/v1/completions", completion(index)),
            _ => request(&custom_id, "/v1/chat/completions", chat(index)),
        }
    };
    (0..count).map(line).collect()
}
