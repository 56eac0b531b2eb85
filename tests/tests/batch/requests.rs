//! What a line gets, and where its answer goes.

use std::{fs, io::Read};

use cadre_tests::{
    adapter::{Adapts, write},
    binary::{run, run_with_input},
    server::{MODEL, Server},
};
use serde_json::{Value, json};

use super::{Batch, request, requests, sorted, values};

const CHAT: &str = "/v1/chat/completions";

#[test]
fn a_line_gets_the_servers_answer() {
    let server = Server::start(&[]);
    let mut lines = requests(24);
    // Without a seed the server draws at random.
    lines.iter_mut().for_each(|line| line["body"]["seed"] = 5.into());
    let batch = Batch::new(&lines);
    batch.finish("out.jsonl", &["--served-model-name", MODEL, "--ordered"]);
    for (line, answer) in lines.iter().zip(values(&batch.text("out.jsonl"))) {
        let told = server.client().post(line["url"].as_str().unwrap(), &line["body"]);
        let of_server = told.json();
        assert_eq!((&answer["custom_id"], &answer["error"]), (&line["custom_id"], &Value::Null));
        assert_eq!(answer["response"]["status_code"], told.status);
        let body = &answer["response"]["body"];
        for same in ["object", "model", "choices", "error"] {
            assert_eq!(body[same], of_server[same], "{same} of {line}");
        }
        assert_eq!(body["usage"]["total_tokens"], of_server["usage"]["total_tokens"]);
    }
}

#[test]
fn an_order_changes_nothing_but_the_order() {
    let batch = Batch::new(&requests(100));
    batch.finish("ordered.jsonl", &["--ordered", "--max-num-seqs", "7"]);
    batch.finish("any.jsonl", &["--threads", "1"]);
    let ordered = batch.text("ordered.jsonl");
    assert_eq!(ordered, batch.sorted("ordered.jsonl"));
    assert_eq!(ordered, batch.sorted("any.jsonl"), "neighbours, threads and order change no byte");
}

#[test]
fn a_bad_line_is_one_error_and_the_rest_goes_on() {
    let good =
        request("good", CHAT, json!({"messages": [{"role": "user", "content": "Spell bread."}], "max_tokens": 9}));
    let wrong = request("wrong", CHAT, json!({"messages": [], "surprise": 1}));
    let elsewhere = request("elsewhere", "/v1/models", json!({}));
    let text = format!("{good}\n\n{{\"custom_id\": \"torn\n{wrong}\n{elsewhere}\n");
    let batch = Batch::of_text(&text);
    let said = batch.finish("out.jsonl", &["--ordered"]);
    assert!(
        said.contains("4 lines in") && said.contains("3 of them failed") && said.contains("out.jsonl.errors.jsonl"),
        "{said}"
    );
    let told = values(&batch.text("out.jsonl"));
    let ids: Vec<&str> = told.iter().map(|line| line["id"].as_str().unwrap()).collect();
    // Numbers are the file's own: the blank line counts, and has no answer.
    assert_eq!(ids, ["batch_req_0000000001", "batch_req_0000000003", "batch_req_0000000004", "batch_req_0000000005"]);
    assert_eq!(told[0]["response"]["body"]["choices"][0]["message"]["content"], "b-r-e-a-d");
    assert_eq!(told[1]["error"]["code"], "invalid_json_line");
    assert!(told[1]["error"]["message"].as_str().unwrap().starts_with("line 3: "), "{}", told[1]);
    assert_eq!((&told[2]["response"]["status_code"], &told[2]["custom_id"]), (&json!(400), &json!("wrong")));
    assert_eq!((&told[3]["error"]["code"], &told[3]["response"]), (&json!("invalid_url"), &Value::Null));
    assert_eq!(values(&batch.text("out.jsonl.errors.jsonl")), told[1..]);
}

#[test]
fn one_custom_id_twice_is_refused_before_the_start() {
    let mut lines = requests(30);
    lines[20]["custom_id"] = lines[4]["custom_id"].clone();
    let batch = Batch::new(&lines);
    let run = batch.run("out.jsonl", &[]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("lines 5 and 21: \"request-4\""), "{}", run.stderr);
    assert!(!batch.path("out.jsonl").exists());
}

#[test]
fn streams_and_compressed_files_hold_the_same() {
    let lines = requests(40);
    let batch = Batch::new(&lines);
    batch.finish("plain.jsonl", &["--ordered"]);
    let plain = batch.text("plain.jsonl");
    for name in ["out.jsonl.gz", "out.jsonl.zst"] {
        batch.finish(name, &["--ordered"]);
        let (bytes, mut text) = (fs::read(batch.path(name)).unwrap(), String::new());
        if name.ends_with("gz") {
            flate2::read::MultiGzDecoder::new(&bytes[..]).read_to_string(&mut text).unwrap();
        } else {
            zstd::Decoder::new(&bytes[..]).unwrap().read_to_string(&mut text).unwrap();
        }
        assert_eq!(text, plain, "{name}");
    }
    // What was answered at another time has another `created`, and nothing else.
    let timeless = |text: &str| {
        let mut lines = values(text);
        lines.iter_mut().for_each(|line| line["response"]["body"]["created"] = Value::Null);
        lines
    };
    let piped = run_with_input(&["batch", "-i", "-", "-o", "-", "--ordered"], &batch.text("in.jsonl"));
    assert_eq!(piped.code, Some(0), "{}", piped.stderr);
    assert_eq!(timeless(&piped.stdout), timeless(&plain));

    // The compressed answers are no requests, but they are lines.
    let path = batch.shown("out.jsonl.zst");
    let piped = run(&["batch", "--input-file", &path, "--output-file", "-"]);
    assert_eq!(piped.stdout.lines().count(), lines.len(), "{}", piped.stderr);
    assert!(values(&piped.stdout).iter().all(|line| line["error"]["code"] == "missing_required_parameter"));
}

#[test]
fn a_line_may_ask_an_adapter_and_a_changed_one_is_another_run() {
    let asked = |custom_id: &str, model: &str| {
        let messages = json!([{"role": "user", "content": "What is 15 + 17?"}]);
        request(custom_id, CHAT, json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 20}))
    };
    let batch = Batch::new(&[asked("base", MODEL), asked("adapted", "ours"), asked("nobody", "theirs")]);
    let adapter = batch.path("adapter");
    write(&adapter, Adapts::Attention, 1);
    let named = format!("ours={}", adapter.display());
    let flags = ["--served-model-name", MODEL, "--adapter", &named, "--ordered"];
    batch.finish("out.jsonl", &flags);
    let told = values(&batch.text("out.jsonl"));
    let said = |line: usize| told[line]["response"]["body"]["choices"][0]["message"]["content"].clone();
    assert_eq!(said(0), "15 + 17 = 32.");
    assert_ne!(said(1), said(0));
    assert_eq!(told[1]["response"]["body"]["model"], "ours");
    assert_eq!(told[2]["response"]["status_code"], 404);
    write(&adapter, Adapts::Attention, 2);
    let run = batch.run("out.jsonl", &flags);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("adapters was"), "{}", run.stderr);
}

#[test]
fn a_full_disk_ends_the_run_with_an_error() {
    let batch = Batch::new(&requests(3));
    let run = run(&["batch", "-i", &batch.shown("in.jsonl"), "-o", "/dev/full"]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("No space left"), "{}", run.stderr);
}

#[test]
fn a_file_without_lines_is_done() {
    let batch = Batch::of_text("\n");
    assert!(batch.finish("out.jsonl", &[]).contains("nothing to do"));
    assert_eq!(sorted(&batch.text("out.jsonl")), "");
}
