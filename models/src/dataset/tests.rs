//! What examples come of which lines, and what is refused.

mod templates;

use std::{fs, path::PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::tokenizer::tests::{byte_fallback, byte_level, byte_level_json, byte_level_tokenizer};

const ALL: DatasetOptions = DatasetOptions { max_length: 1 << 20, loss_on: LossOn::AllAssistant, skip_bad: false };
const LAST: DatasetOptions = DatasetOptions { loss_on: LossOn::LastAssistant, ..ALL };

/// A file of lines in a directory of its own.
fn file(name: &str, content: impl AsRef<[u8]>) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, content).unwrap();
    (directory, path)
}

/// Reads the files and tells nobody of broken lines.
fn read(
    files: &[impl AsRef<Path>],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &DatasetOptions,
) -> Result<Dataset, DatasetError> {
    super::read(files, tokenizer, template, options, &mut |_| {})
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

fn template(source: &str) -> ChatTemplate {
    let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"});
    ChatTemplate::from_source("chat_template.jinja", source, &tokens).unwrap()
}

fn read_rows(rows: &[Value], template: &ChatTemplate, options: &DatasetOptions) -> Result<Dataset, DatasetError> {
    let (_directory, path) = file("data.jsonl", lines(rows));
    read(&[path], &byte_level(), Some(template), options)
}

/// The text of an example, its targets in brackets.
fn shown_with(example: &Example, tokenizer: &Tokenizer) -> String {
    let mut bytes = Vec::new();
    let mut inside = false;
    for (token, target) in example.tokens.iter().zip(&example.targets) {
        if *target != inside {
            bytes.extend(if *target { "⟦" } else { "⟧" }.bytes());
            inside = *target;
        }
        bytes.extend(tokenizer.token_bytes(*token));
    }
    bytes.extend(if inside { "⟧" } else { "" }.bytes());
    String::from_utf8(bytes).unwrap()
}

/// What the only row makes.
#[track_caller]
fn shown_row(row: Value, template: &ChatTemplate, options: &DatasetOptions) -> String {
    let dataset = read_rows(&[row], template, options).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(dataset.examples.len(), 1);
    shown_with(&dataset.examples[0], &byte_level())
}

fn chat(messages: Value) -> Value {
    json!({"messages": messages})
}

/// What is said of the only row, without its place.
#[track_caller]
fn refused(row: Value, template: &ChatTemplate, options: &DatasetOptions) -> String {
    match read_rows(&[row], template, options) {
        Err(DatasetError::BadLines(lines)) => lines.first[0].reason.to_string(),
        other => panic!("{other:?}"),
    }
}

const CHATML: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}{{ tools | tojson if tools }}\
    {% if add_generation_prompt %}<assistant>{% endif %}";

/// By a template that writes what it gets.
#[track_caller]
fn by_chatml(row: Value, options: &DatasetOptions) -> String {
    shown_row(row, &template(CHATML), options)
}

#[track_caller]
fn refused_by_chatml(row: Value) -> String {
    refused(row, &template(CHATML), &ALL)
}

fn asked_and_told(name: &str) -> Vec<Value> {
    vec![json!({"role": "user", "content": name}), json!({"role": "assistant", "content": name.to_uppercase()})]
}

#[test]
fn every_format_is_told_by_its_fields() {
    let question_and_answer = "<user>a<e><assistant>⟦A<e>⟧";
    for (row, expected) in [
        (chat(asked_and_told("a").into()), question_and_answer),
        (
            json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "A"}]}),
            question_and_answer,
        ),
        (
            json!({"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "a"},
                {"from": "assistant", "value": "A"}, {"from": "tool", "value": "t"}, {"from": "gpt", "value": "B"}]}),
            "<system>s<e><user>a<e><assistant>⟦A<e>⟧<tool>t<e><assistant>⟦B<e>⟧",
        ),
        (json!({"instruction": "a", "output": "A"}), question_and_answer),
        (json!({"instruction": "a", "input": "", "output": "A"}), question_and_answer),
        (json!({"instruction": "a", "input": "b", "output": "A"}), "<user>a\n\nb<e><assistant>⟦A<e>⟧"),
        (json!({"prompt": "a ", "completion": "é漢"}), "a ⟦é漢<|end|>⟧"),
        (json!({"prompt": "a", "completion": "b<|end|>"}), "a⟦b<|end|>⟧"),
        (json!({"text": "a é"}), "a⟦ é⟧"),
        (
            json!({"prompt": asked_and_told("a"), "completion": asked_and_told("b")}),
            "<user>a<e><assistant>A<e><user>b<e><assistant>⟦B<e>⟧",
        ),
        // Lines of several formats, as some data sets have them.
        (json!({"prompt": "p", "messages": asked_and_told("a"), "text": "t", "completion": null}), question_and_answer),
        (json!({"instruction": "a", "output": "A", "text": "t", "messages": null}), question_and_answer),
    ] {
        assert_eq!(by_chatml(row.clone(), &ALL), expected, "{row}");
    }
}

#[test]
fn messages_are_what_they_are_when_served() {
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let row = json!({"tools": tools, "messages": [
        {"role": "developer", "content": "d", "name": null},
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
    ]});
    let source = "{{ messages | tojson }}{{ tools | tojson }}";
    let expected = json!([
        {"role": "system", "content": "d"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}], "content": ""},
    ]);
    let expected = template(source).render(
        expected.as_array().unwrap(),
        &crate::RenderOptions { tools: tools.as_array().cloned(), ..crate::RenderOptions::default() },
    );
    let (_directory, path) = file("data.jsonl", lines(&[row]));
    let Err(DatasetError::BadLines(bad)) = read(&[&path], &byte_level(), Some(&template(source)), &ALL) else {
        panic!("a template without answers to be found")
    };
    assert!(bad.first[0].reason.to_string().starts_with("messages[2]: "), "{bad}");
    let Row::Chat(mut chat) = Row::parse(&fs::read(&path).unwrap(), LossOn::AllAssistant).unwrap() else {
        panic!("a chat")
    };
    chat.turns.iter_mut().for_each(|turn| turn.wanted = false);
    assert_eq!(turns::render(&template(source), chat).unwrap().text, expected.unwrap());
}

#[test]
fn the_loss_is_where_it_is_asked_for() {
    let weighted = |first: Value, last: Value| {
        chat(json!([
        {"role": "user", "content": "a", "weight": 0}, {"role": "assistant", "content": "A", "weight": first},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "B", "weight": last},
        {"role": "user", "content": "c"}]))
    };
    let all = |row| by_chatml(row, &ALL);
    let last = |row| by_chatml(row, &LAST);
    assert_eq!(
        all(weighted(json!(1), json!(null))),
        "<user>a<e><assistant>⟦A<e>⟧<user>b<e><assistant>⟦B<e>⟧<user>c<e>"
    );
    assert_eq!(all(weighted(json!(0), json!(1.0))), "<user>a<e><assistant>A<e><user>b<e><assistant>⟦B<e>⟧<user>c<e>");
    assert_eq!(all(weighted(json!(1), json!(0))), "<user>a<e><assistant>⟦A<e>⟧<user>b<e><assistant>B<e><user>c<e>");
    assert_eq!(last(weighted(json!(1), json!(1))), "<user>a<e><assistant>A<e><user>b<e><assistant>⟦B<e>⟧<user>c<e>");
    assert!(refused(weighted(json!(1), json!(0)), &template(CHATML), &LAST).contains("nothing to learn from"));
    let sharegpt =
        json!({"conversations": [{"from": "gpt", "value": "A", "weight": 0}, {"from": "gpt", "value": "B"}]});
    assert_eq!(all(sharegpt), "<assistant>A<e><assistant>⟦B<e>⟧");
    let greeting = json!({"conversations": [{"from": "gpt", "value": "<think>\nhm</think> A"}]});
    let dataset = read_rows(&[greeting], &template(CHATML), &ALL).unwrap();
    assert_eq!(shown_with(&dataset.examples[0], &byte_level()), "<assistant>⟦<think>\nhm</think> A<e>⟧");
    assert_eq!(dataset.rewritten_answers, 0);
}

/// As a served prompt gets them, before and behind.
#[test]
fn special_tokens_are_the_tokenizers() {
    let mut json = byte_level_json();
    let special = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    json["post_processor"] = json!({"type": "TemplateProcessing",
        "single": [special("<|pad|>"), {"Sequence": {"id": "A", "type_id": 0}}, special("<tool>")], "pair": [],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [258], "tokens": ["<|pad|>"]},
            "<tool>": {"id": "<tool>", "ids": [259], "tokens": ["<tool>"]}}});
    let tokenizer = byte_level_tokenizer(&json);
    let rows = [json!({"text": "ab"}), json!({"prompt": "a", "completion": "b"}), chat(asked_and_told("a").into())];
    let (_directory, path) = file("data.jsonl", lines(&rows));
    let dataset = read(&[path], &tokenizer, Some(&template(CHATML)), &ALL).unwrap();
    let shown: Vec<String> = dataset.examples.iter().map(|example| shown_with(example, &tokenizer)).collect();
    assert_eq!(shown, ["<|pad|>⟦ab<tool>⟧", "<|pad|>a⟦b<|end|>⟧", "<user>a<e><assistant>⟦A<e>⟧"]);
}

/// A tokenizer that puts a space before the text, and one word over the edge.
#[test]
fn a_token_over_the_edge_is_a_target() {
    let (_directory, path) =
        file("data.jsonl", lines(&[json!({"text": "a b"}), json!({"prompt": "é", "completion": "\u{301}"})]));
    let dataset = read(&[&path], &byte_fallback(), None, &DatasetOptions { skip_bad: true, ..ALL }).unwrap();
    assert_eq!(dataset.examples[0].targets, [false, true, true, true]);
    assert!(dataset.skipped.first[0].reason.to_string().contains("no eos_token"), "{}", dataset.skipped);
    let mut json = byte_level_json();
    json["added_tokens"] = json!([]);
    json["model"]["vocab"]["ab"] = json!(257);
    json["model"]["vocab"]["<|end|>"] = json!(258);
    json["model"]["merges"] = json!([["a", "b"]]);
    let (_directory, path) = file("data.jsonl", lines(&[json!({"prompt": "xa", "completion": "bx"})]));
    let tokenizer = byte_level_tokenizer(&json);
    let dataset = read(&[path], &tokenizer, None, &ALL).unwrap();
    assert_eq!(shown_with(&dataset.examples[0], &tokenizer), "x⟦abx<|end|>⟧");
}

#[test]
fn long_examples_keep_their_beginning() {
    let rows = [
        json!({"prompt": "abc", "completion": "defg"}),
        json!({"text": "ab"}),
        json!({"prompt": "abcdef", "completion": "g"}),
    ];
    let options = |max_length| DatasetOptions { max_length, skip_bad: true, ..ALL };
    let dataset = read_rows(&rows, &template(CHATML), &options(5)).unwrap();
    let shown: Vec<String> = dataset.examples.iter().map(|example| shown_with(example, &byte_level())).collect();
    assert_eq!(shown, ["abc⟦de⟧", "a⟦b⟧"]);
    assert_eq!((dataset.truncated_examples(), dataset.cut_tokens()), (1, 3));
    assert_eq!((dataset.examples[0].truncated(), dataset.examples[1].truncated()), (true, false));
    let reason = dataset.skipped.first[0].reason.to_string();
    assert!(reason.contains("max_length 5 cuts off") && reason.contains("the line has 8"), "{reason}");
    let whole = read_rows(&rows, &template(CHATML), &options(8)).unwrap();
    assert_eq!((whole.examples.len(), whole.truncated_examples(), whole.cut_tokens()), (3, 0, 0));
    for max_length in [0, 1] {
        let error = read_rows(&rows, &template(CHATML), &options(max_length)).unwrap_err().to_string();
        assert!(error.starts_with(&format!("max_length is {max_length}: expected at least 2")), "{error}");
    }
}

#[test]
fn complaints_name_the_field() {
    let said = |role: &str, content: Value| json!({"role": role, "content": content});
    for (row, words) in [
        (json!([1]), "expected an object with named fields, found [1]"),
        (json!("x"), "expected an object with named fields, found \"x\""),
        (json!({}), "found no field"),
        (json!({"prompt": "x", "id": 7}), "found `prompt`, `id`"),
        (json!({"completion": "x"}), "expected the fields `messages`, or"),
        (chat(json!([])), "messages: expected a list of messages, found []"),
        (chat(json!("x")), "messages: expected a list of messages, found \"x\""),
        (chat(json!(["x"])), "messages[0]: expected an object, found \"x\""),
        (
            chat(json!([{"content": "x"}])),
            "messages[0].role: expected one of system, developer, user, assistant, tool, found none",
        ),
        (
            chat(json!([said("robot", json!("x"))])),
            "messages[0].role: expected one of system, developer, user, assistant, tool, found \"robot\"",
        ),
        (chat(json!([said("user", json!(7))])), "messages[0].content: expected a string, found 7"),
        (chat(json!([said("user", json!(null))])), "messages[0].content: expected a string, found none"),
        (chat(json!([said("assistant", json!(null))])), "messages[0].content: expected a string, found none"),
        (chat(json!([said("user", json!([{"type": "image_url"}]))])), "messages[0].content[0].type: expected \"text\""),
        (
            chat(json!([said("user", json!([{"type": "text"}]))])),
            "messages[0].content[0].text: expected a string, found none",
        ),
        (
            chat(json!([{"role": "assistant", "content": "x", "weight": 0.5}])),
            "messages[0].weight: expected 0 or 1, found 0.5",
        ),
        (
            chat(json!([{"role": "assistant", "content": "x", "weight": true}])),
            "messages[0].weight: expected 0 or 1, found true",
        ),
        (
            chat(json!([{"role": "assistant", "tool_calls": "f"}])),
            "messages[0].tool_calls: expected a list, found \"f\"",
        ),
        (json!({"messages": asked_and_told("a"), "tools": {}}), "tools: expected a list, found {}"),
        (chat(json!([said("user", json!("x"))])), "expected an assistant message"),
        (json!({"prompt": "x", "completion": []}), "completion: expected a string, found []"),
        (
            json!({"prompt": asked_and_told("a"), "completion": "x"}),
            "completion: expected a list of messages, found \"x\"",
        ),
        (
            json!({"prompt": asked_and_told("a"), "completion": [said("user", json!("b"))]}),
            "expected an assistant message",
        ),
        (json!({"text": ["x"]}), "text: expected a string, found [\"x\"]"),
        (json!({"prompt": "", "completion": ""}), "expected at least two tokens, found 1"),
        (json!({"text": ""}), "expected at least two tokens, found 0"),
        (json!({"text": "x"}), "expected at least two tokens, found 1"),
        (json!({"instruction": "x", "input": 1, "output": "y"}), "input: expected a string, found 1"),
        (json!({"conversations": [{"from": "human"}]}), "conversations[0].value: expected a string, found none"),
        (
            json!({"conversations": [{"from": "bing", "value": "x"}]}),
            "conversations[0].from: expected one of human, user, gpt, assistant, system, tool, found \"bing\"",
        ),
        (json!({"conversations": {}}), "conversations: expected a list of `from` and `value`, found {}"),
    ] {
        let error = if row.is_array() { parse_error(&row) } else { refused_by_chatml(row) };
        assert!(error.contains(words), "`{words}` is not in: {error}");
    }
}

fn parse_error(row: &Value) -> String {
    Row::parse(row.to_string().as_bytes(), LossOn::AllAssistant).unwrap_err().to_string()
}

#[test]
fn a_conversation_needs_a_template() {
    let rows = [chat(asked_and_told("a").into()), json!({"instruction": "a", "output": "b"}), json!({"text": "ab"})];
    let (_directory, path) = file("data.jsonl", lines(&rows));
    let error = read(&[&path], &byte_level(), None, &ALL).unwrap_err().to_string();
    assert!(error.starts_with("2 lines cannot be used:") && error.contains("has no chat template"), "{error}");
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let mut bytes = b"\xef\xbb\xbf{\"text\": \"ab\"}\r\n\r\n  \n{\"text\"\n{\"text\": \"\xff\"}\n".to_vec();
    bytes.extend(b"7\n{\"text\": \"cd\"}");
    let (_first, first) = file("first.jsonl", bytes);
    let (_second, second) = file("second.JSONL", "{\"text\": \"ef\"}\nNaN\n".to_owned() + &"x\n".repeat(30));
    let files = [&first, &second];
    let error = read(&files, &byte_level(), None, &ALL).unwrap_err().to_string();
    let said: Vec<&str> = error.lines().collect();
    assert_eq!(said[0], "34 lines cannot be used:");
    assert!(said[1].starts_with(&format!("  {}:4: not valid JSON: EOF", first.display())), "{error}");
    assert!(said[2].ends_with("first.jsonl:5: expected UTF-8, found other bytes at byte 10 of the line"), "{error}");
    assert!(said[3].ends_with("first.jsonl:6: expected an object with named fields, found 7"), "{error}");
    assert!(said[4].contains("second.JSONL:2: not valid JSON"), "{error}");
    assert_eq!((said.len(), said[21]), (22, "  … and 14 more"));

    let dataset = read(&files, &byte_level(), None, &DatasetOptions { skip_bad: true, ..ALL }).unwrap();
    let places: Vec<(bool, usize)> =
        dataset.examples.iter().map(|example| (*example.file == *first.to_string_lossy(), example.line)).collect();
    assert_eq!(places, [(true, 1), (true, 7), (false, 1)]);
    assert_eq!(dataset.skipped.count(), 34);

    let mut told = Vec::new();
    let error = super::read(&files, &byte_level(), None, &ALL, &mut |line| told.push(line.to_string())).unwrap_err();
    assert_eq!(told.len(), 34, "each is told when it is found");
    assert!(error.to_string().contains(&told[19]) && told[33].contains("second.JSONL:32: not valid JSON"), "{told:?}");
    let DatasetError::BadLines(kept) = error else { panic!("{error}") };
    assert_eq!(kept.first.len(), 20, "millions of them don't fill the memory");
}

#[test]
fn skipping_all_is_an_error() {
    let (_directory, path) = file("data.jsonl", "{}\n");
    let options = DatasetOptions { skip_bad: true, ..ALL };
    let error = read(&[path], &byte_level(), None, &options).unwrap_err().to_string();
    assert!(error.starts_with("1 line cannot be used:\n  "), "{error}");
}

#[test]
fn other_files_are_refused() {
    for (name, content, words) in [
        ("data.json", "[]", "found another ending; `jq -c '.[]' "),
        ("data", "{}", "expected a .jsonl file with one JSON object a line, found another ending"),
        ("data.jsonl", " \n[\n{\"text\": \"ab\"}\n]", "found a JSON array; `jq -c '.[]' "),
        ("data.jsonl", "", "is empty: expected one JSON object a line"),
        ("data.jsonl", "\u{feff}\n \n", "is empty: expected one JSON object a line"),
    ] {
        let (_directory, path) = file(name, content);
        let error = read(&[&path], &byte_level(), None, &ALL).unwrap_err().to_string();
        assert!(error.starts_with(&*path.to_string_lossy()) && error.contains(words), "{error}");
    }
    let missing = read(&["no/such.jsonl"], &byte_level(), None, &ALL).unwrap_err().to_string();
    assert!(missing.starts_with("cannot read no/such.jsonl: "), "{missing}");
    let error = read(&["no/such.jsonl"], &byte_level(), None, &ALL).unwrap_err();
    assert!(std::error::Error::source(&error).is_none(), "the reason would be told twice");
    let none = read(&[] as &[&str], &byte_level(), None, &ALL).unwrap_err().to_string();
    assert!(none.contains("at least one .jsonl file"), "{none}");
}
