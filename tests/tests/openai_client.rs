//! The official `openai` client for Python against the real server.

use std::process::Command;

use cadre_tests::{
    python,
    server::{MODEL, Server},
    source::root,
};

/// Runs a script against the server, and returns what it said.
fn run(script: &str, server: &Server) -> String {
    let path = root().join("tests/python").join(script);
    let output = Command::new(python::interpreter("openai"))
        .arg(path)
        .args([server.address(), MODEL])
        .output()
        .expect("python runs");
    python::assert_success(script, &output);
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

#[test]
fn the_official_client_works() {
    let said = run("openai_client.py", &Server::start(&[]));
    assert!(said.ends_with("checks passed"), "it did not come to its end:\n{said}");
}

#[test]
fn the_official_client_fine_tunes() {
    let storage = tempfile::tempdir().expect("a temporary directory");
    let storage = storage.path().to_str().expect("paths are UTF-8");
    let said = run("openai_jobs.py", &Server::start(&["--storage", storage]));
    assert!(said.ends_with("passed"), "it did not come to its end:\n{said}");
}

#[test]
fn the_official_client_answers_a_file_of_requests() {
    let storage = tempfile::tempdir().expect("a temporary directory");
    let storage = storage.path().to_str().expect("paths are UTF-8");
    let said = run("openai_batches.py", &Server::start(&["--storage", storage]));
    assert!(said.ends_with("passed"), "it did not come to its end:\n{said}");
}
