//! The README's examples, pasted.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::process::Command;

use cadre_tests::{binary, heldout, python, server::Server, source};

/// The fenced blocks of a language, in order.
fn blocks(language: &str) -> Vec<String> {
    let readme = source::read("README.md");
    let parts = readme.split("\n```").skip(1).step_by(2);
    parts.filter_map(|part| part.strip_prefix(language)?.strip_prefix('\n').map(str::to_owned)).collect()
}

/// The block that has `word`.
#[track_caller]
fn block(language: &str, word: &str) -> String {
    let found = blocks(language).into_iter().find(|block| block.contains(word));
    found.unwrap_or_else(|| unreachable!("the README has no {language} block with {word}"))
}

/// The flags of the first command, without the quotes around the prompt.
fn first_question() -> String {
    let commands = block("sh", "cargo run --release");
    let (_, rest) = commands.split_once("--prompt \"").unwrap();
    rest.split_once('"').unwrap().0.to_owned()
}

#[test]
fn the_first_command_answers_a_held_out_question_rightly() {
    let question = first_question();
    let known = heldout::questions().into_values().flatten().find(|known| known.prompt == question);
    let known = known.unwrap_or_else(|| unreachable!("{question:?} is not among the held-out questions"));
    assert_eq!(binary::output(&["generate", "--prompt", &question]).trim(), known.answer);
    for file in ["README.md", ".ci/run"] {
        let text = source::read(file);
        assert!(text.contains(&question) && text.contains(&known.answer), "{file} has the question and its answer");
    }
}

#[test]
fn the_test_command_is_the_one_that_ci_runs() {
    let commands = block("sh", "cargo test");
    let command = commands.lines().find(|line| line.starts_with("cargo test")).unwrap();
    assert!(source::read(".ci/run").contains(command.trim()), "{command}");
}

#[test]
fn curl_works() {
    let server = Server::start_unnamed(&[]);
    let script = block("sh", "curl").replace("http://localhost:8000", server.address());
    let output = Command::new("bash").args(["-euc", &script]).output().unwrap();
    python::assert_success(&script, &output);
    let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let said = answer["choices"][0]["message"]["content"].as_str().unwrap();
    let known = heldout::questions().into_values().flatten().find(|question| script.contains(&question.prompt));
    assert_eq!(said, known.map_or(said.to_owned(), |known| known.answer));
    assert!(!said.is_empty());
}

#[test]
fn the_file_of_requests_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let cadre = binary::cadre().to_str().unwrap();
    let script = block("sh", "requests.jsonl").replace("cargo run --release --", cadre);
    let output = Command::new("bash").args(["-euc", &script]).current_dir(folder.path()).output().unwrap();
    python::assert_success(&script, &output);
    let results = std::fs::read_to_string(folder.path().join("results.jsonl")).unwrap();
    assert!(results.contains("15 + 17 = 32.") && results.lines().count() == 2, "{results}");
}

#[test]
fn the_python_example_works() {
    let interpreter = python::interpreter("openai");
    let server = Server::start_unnamed(&[]);
    let script = block("python", "openai").replace("http://localhost:8000", server.address());
    let output = Command::new(interpreter).args(["-c", &script]).output().unwrap();
    python::assert_success(&script, &output);
    assert!(!output.stdout.trim_ascii().is_empty(), "it prints the answer");
}
