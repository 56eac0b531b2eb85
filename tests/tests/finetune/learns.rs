//! What a run is for: after it the model can do what it couldn't, and the server shows it.

use std::fs;

use cadre_tests::{
    binary::output,
    server::{MODEL, Server},
};
use serde_json::json;

const WORDS: [&str; 12] =
    ["apple", "river", "stone", "cloud", "green", "tiger", "maple", "ocean", "candle", "forest", "silver", "window"];

/// Question and answer number `index`: three different words, and the same in order.
fn pair(index: usize) -> (String, String) {
    let first = index % 12;
    let second = (first + 1 + index / 12 % 11) % 12;
    let third = (0..12).filter(|word| *word != first && *word != second).nth(index / 132 % 10).unwrap();
    let mut words = [first, second, third].map(|word| WORDS[word]);
    let question = format!("Sort: {}", words.join(" "));
    words.sort_unstable();
    (question, words.join(" "))
}

fn answer(server: &Server, model: &str, question: &str) -> String {
    let more = json!({"model": model, "temperature": 0, "max_tokens": 40});
    let answer = server.chat(question, more).ok();
    answer["choices"][0]["message"]["content"].as_str().unwrap().trim().to_owned()
}

#[test]
fn an_adapter_that_was_trained_does_what_the_base_cannot() {
    let directory = tempfile::tempdir().unwrap();
    let (lines, folder) = (directory.path().join("train.jsonl"), directory.path().join("sorts"));
    // Every seventh is held out.
    let (held_out, learnt): (Vec<usize>, Vec<usize>) = (0..1320).partition(|index| index % 7 == 3);
    let line = |index: &usize| {
        let (question, answer) = pair(*index);
        json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
            .to_string()
    };
    fs::write(&lines, learnt.iter().map(line).collect::<Vec<_>>().join("\n") + "\n").unwrap();
    let (lines, folder) = (lines.to_str().unwrap(), folder.to_str().unwrap());
    let steps = ["--max-steps", "400", "--batch-size", "16", "--learning-rate", "2e-3", "--save-every", "0"];
    output(&[&["finetune", "--data", lines, "--output", folder][..], &steps].concat());
    let server = Server::start(&["--adapter", &format!("sorts={folder}")]);
    let right = |model: &str| {
        let asked = held_out.iter().step_by(5).take(30).map(|index| pair(*index));
        asked.filter(|(question, expected)| answer(&server, model, question) == *expected).count()
    };
    let (base, adapted) = (right(MODEL), right("sorts"));
    assert!(adapted >= 29, "{adapted} of 30 with the adapter");
    assert!(base <= 3, "{base} of 30 without it");
}
