//! `/v1/batches`: files of requests in the background, beside requests, through kills and restarts.

use std::{collections::BTreeMap, path::Path, time::Duration};

use cadre_tests::{
    adapter::{Adapts, write},
    client::Client,
    server::{MODEL, Server},
    wait_for,
};
use serde_json::{Value, json};

use super::{adapters::load, jobs::post_file};

const CHAT: &str = "/v1/chat/completions";

fn start(storage: &Path) -> Server {
    Server::start(&["--storage", storage.to_str().unwrap()])
}

/// Requests for answers of so many tokens.
fn requests(count: usize, tokens: u32) -> Vec<Value> {
    let request = |index: usize| {
        let messages = json!([{"role": "user", "content": format!("What is {index} + {}?", index % 17)}]);
        json!({
            "custom_id": format!("request-{index}"), "method": "POST", "url": CHAT,
            "body": {"model": MODEL, "messages": messages, "max_tokens": tokens, "ignore_eos": true, "seed": index},
        })
    };
    (0..count).map(request).collect()
}

fn upload(client: &Client, lines: &[Value]) -> String {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    upload_text(client, &text)
}

fn upload_text(client: &Client, text: &str) -> String {
    post_file(client, "batch", text, &[]).ok()["id"].as_str().unwrap().to_owned()
}

fn body(file: &str) -> Value {
    json!({"input_file_id": file, "endpoint": CHAT, "completion_window": "24h", "metadata": {"team": "a"}})
}

fn create(client: &Client, file: &str) -> String {
    let batch = client.post("/v1/batches", &body(file)).ok();
    assert_eq!((&batch["object"], &batch["status"]), (&json!("batch"), &json!("validating")), "{batch}");
    batch["id"].as_str().unwrap().to_owned()
}

fn batch(client: &Client, id: &str) -> Value {
    client.get(&format!("/v1/batches/{id}")).ok()
}

#[track_caller]
fn wait_until(client: &Client, id: &str, status: &str) -> Value {
    wait_for(status, 120, || {
        let found = batch(client, id);
        let ended = ["completed", "failed", "expired", "cancelled"].contains(&found["status"].as_str().unwrap());
        assert!(!ended || found["status"] == status, "{found}");
        found["status"] == status
    });
    batch(client, id)
}

/// Waits until so many lines are answered.
fn wait_for_lines(client: &Client, id: &str, lines: u64) {
    wait_for("answers", 120, || batch(client, id)["request_counts"]["completed"].as_u64().unwrap() >= lines);
}

/// The lines of a batch's file by their `custom_id`, none twice.
fn lines(client: &Client, batch: &Value, file: &str) -> BTreeMap<String, Value> {
    let Some(file) = batch[file].as_str() else { return BTreeMap::new() };
    let text = client.get(&format!("/v1/files/{file}/content")).text;
    let mut lines = BTreeMap::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let id = line["custom_id"].as_str().unwrap().to_owned();
        assert!(lines.insert(id.clone(), line).is_none(), "{id} twice");
    }
    lines
}

#[test]
fn a_batch_gets_the_servers_answers() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let mut asked = requests(30, 8);
    asked[7]["body"]["messages"] = json!([]);
    asked[9]["body"]["model"] = json!("gpt-9");
    let id = create(client, &upload(client, &asked));
    let done = wait_until(client, &id, "completed");
    assert_eq!(done["request_counts"], json!({"total": 30, "completed": 28, "failed": 2}));
    let [answers, errors] = ["output_file_id", "error_file_id"].map(|file| lines(client, &done, file));
    assert_eq!((answers.len(), errors.len()), (28, 2));
    assert_eq!(errors["request-7"]["response"]["status_code"], 400);
    assert_eq!(errors["request-9"]["response"]["body"]["error"]["code"], "model_not_found");
    let mut tokens = 0;
    for (index, request) in asked.iter().enumerate().filter(|(index, _)| ![7, 9].contains(index)) {
        let line = &answers[&format!("request-{index}")];
        let told = client.post(CHAT, &request["body"]).ok();
        let body = &line["response"]["body"];
        assert_eq!((&line["error"], &line["response"]["status_code"]), (&Value::Null, &json!(200)));
        assert_eq!(body["choices"], told["choices"]);
        tokens += body["usage"]["total_tokens"].as_u64().unwrap();
    }
    assert_eq!(done["usage"]["total_tokens"], tokens);
    assert_eq!((&done["metadata"], &done["model"]), (&json!({"team": "a"}), &Value::Null), "of two models: none");
    let times = ["created_at", "in_progress_at", "finalizing_at", "completed_at"].map(|name| done[name].as_i64());
    assert!(times.iter().all(Option::is_some) && times.is_sorted(), "{done}");
    assert_eq!(done["expires_at"].as_i64(), times[0].map(|created| created + 24 * 3600));
    let file = client.get(&format!("/v1/files/{}", done["output_file_id"].as_str().unwrap())).ok();
    assert_eq!(file["purpose"], "batch_output");
    let metrics = server.metrics();
    assert_eq!(metrics.value("cadre_batch_lines_total", &[("status", "failed")]), 2.0);
    assert_eq!(metrics.value("cadre_batches", &[("status", "completed")]), 1.0);
}

#[test]
fn a_killed_server_goes_on_with_a_batch() {
    let storage = tempfile::tempdir().unwrap();
    let asked = requests(300, 40);
    let mut server = start(storage.path());
    let id = create(server.client(), &upload(server.client(), &asked));
    for lines in [20, 120] {
        wait_for_lines(server.client(), &id, lines);
        // As kill -9 does.
        drop(server);
        server = start(storage.path());
    }
    // One that is told to end, too.
    wait_for_lines(server.client(), &id, 200);
    server.terminate();
    assert!(server.wait_for_exit(Duration::from_secs(10)).success());
    let server = start(storage.path());
    let client = server.client();
    let done = wait_until(client, &id, "completed");
    assert_eq!(done["request_counts"], json!({"total": 300, "completed": 300, "failed": 0}));
    let answers = lines(client, &done, "output_file_id");
    assert_eq!((answers.len(), &done["error_file_id"]), (300, &Value::Null));
    for index in (0..300).step_by(23) {
        let told = client.post(CHAT, &asked[index]["body"]).ok();
        assert_eq!(answers[&format!("request-{index}")]["response"]["body"]["choices"], told["choices"]);
    }
    assert!(!storage.path().join("batches").join(&id).exists(), "what is done leaves nothing behind");
}

#[test]
fn a_cancelled_batch_keeps_what_it_has() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let file = upload(client, &requests(2000, 40));
    let [first, second] = [(); 2].map(|()| create(client, &file));
    wait_for_lines(client, &first, 5);
    let kept = client.delete(&format!("/v1/files/{file}"));
    assert!(kept.status == 409 && kept.text.contains(&first), "{}", kept.text);
    // The one that waits for its turn, then the one that is answered.
    for id in [&second, &first] {
        let cancelling = client.post(&format!("/v1/batches/{id}/cancel"), &json!({})).ok();
        assert!(["cancelling", "cancelled"].contains(&cancelling["status"].as_str().unwrap()), "{cancelling}");
        let cancelled = wait_until(client, id, "cancelled");
        let answers = lines(client, &cancelled, "output_file_id").len();
        assert_eq!(cancelled["request_counts"]["completed"], answers);
        assert!(answers < 2000 && (answers == 0) == (id == &second), "{answers} answers");
        let again = client.post(&format!("/v1/batches/{id}/cancel"), &json!({}));
        assert!(again.status == 409 && again.text.contains("cancelled"), "{}", again.text);
    }
    assert_eq!(client.delete(&format!("/v1/files/{file}")).status, 200);
    let listed = client.get("/v1/batches?limit=1").ok();
    assert_eq!((&listed["data"][0]["id"], &listed["has_more"]), (&json!(second), &json!(true)));
    let rest = client.get(&format!("/v1/batches?after={second}")).ok();
    assert_eq!((&rest["data"][0]["id"], &rest["has_more"]), (&json!(first), &json!(false)));
}

#[test]
fn requests_go_before_a_batch() {
    let storage = tempfile::tempdir().unwrap();
    // One place, which a line of the batch has, and a further line waits for.
    let server = Server::start(&["--storage", storage.path().to_str().unwrap(), "--max-num-seqs", "1"]);
    let client = server.client();
    let id = create(client, &upload(client, &requests(50, 900)));
    let count = |name: &str| server.metrics().value(name, &[]);
    wait_for("a line under way and one that waits", 60, || {
        count("vllm:num_requests_running") == 1.0 && count("vllm:num_requests_waiting") == 1.0
    });
    let before = count("cadre_batch_lines_total");
    for word in ["one", "two", "three"] {
        server.chat(&format!("Spell {word}."), json!({"max_tokens": 2})).ok();
    }
    let meanwhile = count("cadre_batch_lines_total") - before;
    assert!(meanwhile <= 1.0, "{meanwhile} lines went before those that somebody waits for");
    client.post(&format!("/v1/batches/{id}/cancel"), &json!({})).ok();
    wait_until(client, &id, "cancelled");
}

#[test]
fn lines_wait_for_memory_for_their_adapters() {
    const NAMES: [&str; 4] = ["a", "b", "c", "d"];
    let folder = tempfile::tempdir().unwrap();
    NAMES.iter().zip(0..).for_each(|(name, seed)| write(&folder.path().join(name), Adapts::Experts, seed));
    let storage = folder.path().join("storage");
    let flags = ["--allow-runtime-adapters", folder.path().to_str().unwrap(), "--storage", storage.to_str().unwrap()];
    let unlimited = Server::start(&flags[..2]);
    let load_all = |server| NAMES.iter().for_each(|name| assert_eq!(load(server, name, name).0, 200));
    load_all(&unlimited);
    // For one of the four, and a half.
    let room = unlimited.metrics().value("cadre_memory_bytes", &[("pool", "adapters")]) / 4.0 * 1.5;
    let server = Server::start(&[&flags[..], &["--adapter-memory", &(room as u64).to_string()]].concat());
    load_all(&server);
    let mut asked = requests(20, 12);
    for (request, name) in asked.iter_mut().zip(NAMES.into_iter().cycle()) {
        request["body"]["model"] = name.into();
    }
    let id = create(server.client(), &upload(server.client(), &asked));
    let done = wait_until(server.client(), &id, "completed");
    assert_eq!(done["request_counts"], json!({"total": 20, "completed": 20, "failed": 0}));
    let answers = lines(server.client(), &done, "output_file_id");
    for request in &asked {
        let answer = &answers[request["custom_id"].as_str().unwrap()]["response"]["body"];
        assert_eq!(answer["choices"], unlimited.client().post(CHAT, &request["body"]).ok()["choices"]);
    }
}

#[test]
fn a_file_that_is_none_of_requests_fails_with_its_lines() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let good = &requests(3, 4);
    let elsewhere = json!({"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}});
    let text = format!("{}\nno json\n{}\n{elsewhere}\n", good[0], json!({"custom_id": "c"}));
    let failed = |text: &str| {
        let id = create(client, &upload_text(client, text));
        let failed = wait_until(client, &id, "failed");
        assert!(failed["failed_at"].is_i64() && failed["errors"]["object"] == "list", "{failed}");
        let of = |error: &Value| (error["code"].as_str().unwrap().to_owned(), error["line"].as_u64());
        failed["errors"]["data"].as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    let expected = [("invalid_json_line", 2), ("missing_required_parameter", 3), ("mismatched_endpoint", 4)];
    assert_eq!(failed(&text), expected.map(|(code, line)| (code.to_owned(), Some(line))));
    let twice = format!("{}\n{}\n{}\n", good[0], good[1], good[0]);
    assert_eq!(failed(&twice), [("duplicate_custom_id".to_owned(), Some(3))]);
    assert_eq!(failed("\n\n"), [("empty_file".to_owned(), None)]);
    let told = failed(&"x\n".repeat(50));
    assert_eq!((told.len(), &told[20]), (21, &("too_many_errors".to_owned(), None)));
}

#[test]
fn what_is_no_batch_is_refused() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let file = upload(client, &requests(1, 4));
    let other = post_file(client, "fine-tune", "{}\n", &[]).ok()["id"].clone();
    for (name, value, status, says) in [
        ("input_file_id", json!("file-none"), 404, "no file `file-none`"),
        ("input_file_id", other, 404, "of the purpose batch"),
        ("input_file_id", Value::Null, 400, "required"),
        ("endpoint", json!("/v1/embeddings"), 400, "/v1/score"),
        ("completion_window", json!("soon"), 400, "24h"),
        ("completion_window", json!("0h"), 400, "24h"),
        ("metadata", json!({"a": 5}), 400, "a string"),
        ("output_expires_after", json!({"anchor": "created_at", "seconds": 5}), 400, "at least 3600"),
        ("output_expires_after", json!({"anchor": "now", "seconds": 3600}), 400, "created_at"),
    ] {
        let mut body = body(&file);
        body[name] = value;
        let answer = client.post("/v1/batches", &body);
        assert!(answer.status == status && answer.text.contains(says), "{body}: {}", answer.text);
        assert!(answer.json()["error"]["param"].as_str().unwrap().starts_with(name), "{}", answer.text);
    }
    for path in ["/v1/batches/batch_none", "/v1/batches?after=batch_none", "/v1/batches?limit=0"] {
        assert!([400, 404].contains(&client.get(path).status), "{path}");
    }
    assert_eq!(client.post("/v1/batches/batch_none/cancel", &json!({})).status, 404);
    assert_eq!(Server::start(&[]).client().get("/v1/batches").status, 404, "without --storage");
}
