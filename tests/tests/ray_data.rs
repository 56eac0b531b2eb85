//! The script of `docs/scale-out.md` on a cluster of two nodes on this machine, one of which is killed.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{fs, process::Command};

use cadre_tests::{
    binary, python,
    source::{read, root},
};
use serde_json::json;

/// Every third drawn by the number of its line, and every fortieth at fault.
fn requests(count: usize) -> String {
    let line = |index: usize| {
        let prompt = format!("The garden of number {index} is");
        let temperature = if index % 40 == 39 { 99.0 } else { [0.0, 0.0, 1.0][index % 3] };
        let body = json!({"prompt": prompt, "max_tokens": 100, "ignore_eos": true, "temperature": temperature});
        let request = json!({"custom_id": index.to_string(), "method": "POST", "url": "/v1/completions", "body": body});
        format!("{request}\n")
    };
    (0..count).map(line).collect()
}

/// `ray_batch.py`, as the document has it.
fn script() -> String {
    let document = read("docs/scale-out.md");
    let (_, rest) = document.split_once("```python\n").unwrap();
    rest.split_once("```").unwrap().0.to_owned()
}

#[test]
fn a_cluster_that_loses_a_node_gives_the_bytes_of_one_machine() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("ray_batch.py"), script()).unwrap();
    fs::write(path("requests.jsonl"), requests(240)).unwrap();
    // Few at a time: so that there is a time to kill it.
    let batch = ["batch", "--max-num-seqs", "2", "--threads", "1"];
    let alone = ["-i", &path("requests.jsonl"), "-o", &path("alone.jsonl"), "--ordered"];
    binary::output(&[&batch[..], &alone].concat());

    let interpreter = python::interpreter("scale-out");
    let mut command = Command::new(&interpreter);
    command.arg(root().join("tests/python/ray_cluster.py")).arg(path("work"));
    command.arg(&interpreter).arg(path("ray_batch.py"));
    command.args([
        "-i",
        &path("requests.jsonl"),
        "-o",
        &path("cluster.jsonl"),
        "--work",
        &path("work"),
        "--lines",
        "40",
    ]);
    let output = command.arg(binary::cadre()).args(batch).output().unwrap();
    python::assert_success("ray_batch.py", &output);
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("killed a node"), "{said}");
    for ending in ["", ".errors.jsonl"] {
        let text = |name: &str| fs::read_to_string(path(&format!("{name}.jsonl{ending}"))).unwrap();
        assert!(text("cluster") == text("alone"), "lines are lost, doubled or others:\n{said}");
    }
}
