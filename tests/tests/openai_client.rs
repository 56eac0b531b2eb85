//! The official `openai` client for Python against the real server.

use std::process::Command;

use cadre_tests::{
    python,
    server::{MODEL, Server},
    source::root,
};

#[test]
fn the_official_client_works() {
    let interpreter = python::interpreter();
    let server = Server::start(&[]);
    let script = root().join("tests/python/openai_client.py");
    let output = Command::new(interpreter).arg(script).args([server.address(), MODEL]).output().expect("python runs");
    python::assert_success("openai_client.py", &output);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.trim_end().ends_with("checks passed"), "it did not come to its end:\n{said}");
}
