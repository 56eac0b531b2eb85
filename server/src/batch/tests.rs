use std::{
    fs,
    sync::{Arc, atomic::AtomicBool},
};

use serde_json::{Map, Value, json};

use super::{
    result::told,
    run::{Ended, Limits, run},
    *,
};
use crate::{
    http::HttpOptions,
    lines::{input::Input, manifest::Manifest, output::Output},
    metrics::exporter,
    testing::{Fake, served},
};

fn answerer(fake: &Arc<Fake>) -> Answerer {
    let handle = exporter().unwrap().build_recorder().handle();
    let app = Arc::new(App::new(handle, HttpOptions::default(), None));
    app.ready(served(fake.clone()));
    Answerer::new(app, 3, 1_700_000_000)
}

fn line(number: u64, text: &str) -> Line {
    Line { number, text: Ok(text.to_owned()) }
}

fn completion(custom_id: &str, body: Value) -> Value {
    json!({"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body})
}

async fn answer(text: &str) -> Value {
    let answered = answerer(&Fake::saying("ok")).answer(&line(17, text)).await;
    let told = told(answered.line.text.as_bytes());
    assert_eq!(told, Some(answered.line.told), "the line tells what it is of: {}", answered.line.text);
    assert_eq!(answered.line.told.number, 17);
    serde_json::from_str(&answered.line.text).unwrap()
}

#[tokio::test]
async fn an_answer_is_the_servers_in_openais_envelope() {
    let asked = completion("mine", json!({"model": "fake", "prompt": "ab", "temperature": 1.0}));
    let fake = Fake::saying("ok");
    let answered = answerer(&fake).answer(&line(17, &asked.to_string())).await;
    let told: Value = serde_json::from_str(&answered.line.text).unwrap();
    assert_eq!(
        (&told["id"], &told["custom_id"], &told["error"]),
        (&json!("batch_req_0000000017"), &json!("mine"), &Value::Null)
    );
    let (response, body) = (&told["response"], &told["response"]["body"]);
    assert_eq!((&response["status_code"], &body["choices"][0]["text"]), (&json!(200), &json!("ok")));
    assert_eq!(body["created"], 1_700_000_000);
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    // How much was cached depends on the neighbours, so it is told beside the line only.
    assert_eq!(body["usage"], json!({"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}));
    assert_eq!(answered.usage, Usage { prompt_tokens: 2, completion_tokens: 3, cached_tokens: 1 });
    let seed = fake.last_request().sampling.seed;
    let again = answerer(&fake).answer(&line(17, &asked.to_string())).await;
    assert_eq!(
        (again.line, fake.last_request().sampling.seed),
        (answered.line, seed),
        "time and chance change nothing"
    );
    answerer(&fake).answer(&line(18, &asked.to_string())).await;
    assert_ne!(fake.last_request().sampling.seed, seed, "another line draws other numbers");
}

#[tokio::test]
async fn the_servers_errors_are_answers_too() {
    let asked = completion("mine", json!({"model": "fake", "prompt": "ab", "temperature": 9}));
    let told = answer(&asked.to_string()).await;
    assert_eq!((&told["response"]["status_code"], &told["error"]), (&json!(400), &Value::Null));
    assert_eq!(told["response"]["body"]["error"]["param"], "temperature");
    let told = answer(&completion("mine", json!({"model": "other", "prompt": "ab"})).to_string()).await;
    assert_eq!(told["response"]["status_code"], 404);
}

#[tokio::test]
async fn a_line_that_is_no_request_is_told_with_its_number_and_the_reason() {
    let good = completion("mine", json!({"prompt": "ab"}));
    let with = |name: &str, value: Value| {
        let mut line = good.clone();
        line[name] = value;
        line.to_string()
    };
    for (text, custom_id, code, reason) in [
        ("{\"custom_id\": ".to_owned(), Value::Null, "invalid_json_line", "EOF"),
        ("7".to_owned(), Value::Null, "invalid_json_line", "no JSON object: 7"),
        (r#"["mine", "POST", "/v1/completions", {}]"#.to_owned(), Value::Null, "invalid_json_line", "no JSON object"),
        (with("custom_id", Value::Null), Value::Null, "missing_required_parameter", "`custom_id` is missing"),
        (with("custom_id", json!(7)), Value::Null, "invalid_custom_id", "got 7"),
        (with("method", json!("GET")), json!("mine"), "invalid_method", "GET"),
        (with("url", json!("/v1/models")), json!("mine"), "invalid_url", "/v1/models"),
        (with("body", Value::Null), json!("mine"), "missing_required_parameter", "`body` is missing"),
        (with("body", json!([1])), json!("mine"), "invalid_body", "[1]"),
        (with("body", json!({"prompt": "ab", "stream": true})), json!("mine"), "invalid_body", "`stream`"),
    ] {
        let told = answer(&text).await;
        assert_eq!((&told["custom_id"], &told["response"]), (&custom_id, &Value::Null), "{told}");
        assert_eq!(told["error"]["code"], code, "{told}");
        let message = told["error"]["message"].as_str().unwrap();
        assert!(message.starts_with("line 17: ") && message.contains(reason), "{message}");
    }
    let unreadable = Line { number: 4, text: Err("the line is not UTF-8".to_owned()) };
    let answered = answerer(&Fake::saying("ok")).answer(&unreadable).await;
    assert!(answered.line.told.failed && answered.line.text.contains("line 4: the line is not UTF-8"));
}

/// Puts three lines through and tells how that ended, and what is written.
async fn run_three(stop: bool) -> (Ended, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let asked = |number: u64| format!("{}\n", completion(&number.to_string(), json!({"prompt": "ab"})));
    fs::write(path("in"), (1..=3).map(asked).collect::<String>()).unwrap();
    let input = Input::open(&path("in"), folder.path()).unwrap();
    let scan = input.scan(|_| {}).unwrap();
    let mut output = Output::open(&path("out")).unwrap();
    let done = output.resume(&scan, told).unwrap().done;
    let writer = output.begin(&Manifest::new(&scan, Map::new()), &done, true).unwrap();
    let limits = Limits { in_flight: 2, window: 2 };
    let (answerer, input) = (answerer(&Fake::saying("ok")), input.lines().unwrap());
    let ended = run(answerer, input, done, writer, limits, &AtomicBool::new(stop), |_| {}).await.unwrap();
    (ended, fs::read_to_string(path("out")).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_put_through() {
    let (ended, written) = run_three(false).await;
    assert_eq!(ended, Ended::Finished);
    let numbers: Vec<u64> = written.lines().map(|line| told(line.as_bytes()).unwrap().number).collect();
    assert_eq!(numbers, [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_told_to_stop_leaves_whole_lines() {
    let (_, written) = run_three(true).await;
    assert!(written.is_empty() || written.ends_with('\n'));
    assert!(written.lines().all(|line| told(line.as_bytes()).is_some()));
}
