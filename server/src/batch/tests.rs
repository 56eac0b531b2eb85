use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cadre_engine::request::Request;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{
    result::told,
    run::{Ended, Limits, run},
    *,
};
use crate::{
    http::HttpOptions,
    lines::{
        input::{Input, MAX_LINE_BYTES},
        manifest::Manifest,
        output::Output,
    },
    metrics::exporter,
    testing::{Fake, say, served},
};

fn answerer(fake: &Arc<Fake>) -> Answerer {
    let handle = exporter().unwrap().build_recorder().handle();
    let app =
        Arc::new(App::new(handle, HttpOptions { max_body_bytes: MAX_LINE_BYTES, ..HttpOptions::default() }, None));
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

/// A file of such requests, and what its answers are written to, in order.
struct Rig {
    folder: TempDir,
    fake: Arc<Fake>,
}

impl Rig {
    fn new(fake: Arc<Fake>, prompts: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let asked = |(number, prompt)| format!("{}\n", completion(&format!("{number}"), json!({"prompt": prompt})));
        fs::write(folder.path().join("in"), prompts.iter().enumerate().map(asked).collect::<String>()).unwrap();
        Self { folder, fake }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn written(&self) -> String {
        fs::read_to_string(self.path("out")).unwrap()
    }

    /// Waits until `count` requests have come, and for some time more.
    async fn asked(&self, count: usize) {
        let all = async {
            while self.fake.requests.lock().unwrap().len() < count {
                sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), all).await.unwrap();
        sleep(Duration::from_millis(200)).await;
        assert_eq!(self.fake.requests.lock().unwrap().len(), count);
    }

    async fn run(&self, limits: Limits, stop: &AtomicBool) -> Ended {
        let input = Input::open(&self.path("in"), self.folder.path()).unwrap();
        let scan = input.scan(|_| {}).unwrap();
        let mut output = Output::open(&self.path("out")).unwrap();
        let done = output.resume(&scan, told).unwrap().done;
        let writer = output.begin(&Manifest::new(&scan, Map::new()), &done, true).unwrap();
        run(answerer(&self.fake), input.lines(&scan).unwrap(), done, writer, limits, stop, |_| {}).await.unwrap()
    }
}

const LIMITS: Limits = Limits { in_flight: 2, window: 2 };

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_put_through() {
    let rig = Rig::new(Fake::saying("ok"), &["ab"; 3]);
    assert_eq!(rig.run(LIMITS, &AtomicBool::new(false)).await, Ended::Finished);
    let numbers: Vec<u64> = rig.written().lines().map(|line| told(line.as_bytes()).unwrap().number).collect();
    assert_eq!(numbers, [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_told_to_stop_leaves_whole_lines() {
    let rig = Rig::new(Fake::saying("ok"), &["ab"; 3]);
    rig.run(LIMITS, &AtomicBool::new(true)).await;
    let written = rig.written();
    assert!(written.is_empty() || written.ends_with('\n'));
    assert!(written.lines().all(|line| told(line.as_bytes()).is_some()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_so_many_answers_wait_for_a_slow_one() {
    let script = |request: &Request| if request.prompt.len() == 4 { Vec::new() } else { say(request, "ok") };
    let fake = Fake::new(script);
    let rig = Rig::new(fake.clone(), &[&["slow"][..], &["ab"; 39]].concat());
    let limits = Limits { in_flight: 4, window: 8 };
    let slow = async {
        // The others wait, until the first line is written.
        rig.asked(8).await;
        let index = fake.requests.lock().unwrap().iter().position(|request| request.prompt.len() == 4).unwrap();
        let request = fake.requests.lock().unwrap()[index].clone();
        say(&request, "ok").into_iter().for_each(|event| fake.tell(index, event));
    };
    let stop = AtomicBool::new(false);
    let (ended, ()) = tokio::join!(rig.run(limits, &stop), slow);
    assert_eq!((ended, fake.requests.lock().unwrap().len()), (Ended::Finished, 40));
    let numbers: Vec<u64> = rig.written().lines().map(|line| told(line.as_bytes()).unwrap().number).collect();
    assert!(numbers.iter().copied().eq(1..=40), "{numbers:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_so_many_bytes_are_asked_at_a_time() {
    let rig = Rig::new(Fake::new(|_| Vec::new()), &[]);
    let padded = |number: u64| {
        format!("{}\n", completion(&number.to_string(), json!({"prompt": "ab", "padding": "x".repeat(6 << 20)})))
    };
    fs::write(rig.path("in"), (0..6).map(padded).collect::<String>()).unwrap();
    let stop = AtomicBool::new(false);
    let ending = async {
        rig.asked(3).await;
        stop.store(true, Ordering::Relaxed);
    };
    let (ended, ()) = tokio::join!(rig.run(Limits { in_flight: 6, window: 6 }, &stop), ending);
    assert_eq!(ended, Ended::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_on_which_the_server_fails_is_told_and_the_others_are_answered() {
    let fake = Fake::new(|request| if request.prompt.len() == 3 { panic!("a defect") } else { say(request, "ok") });
    let rig = Rig::new(fake, &["ab", "abc", "ab"]);
    assert_eq!(rig.run(LIMITS, &AtomicBool::new(false)).await, Ended::Finished);
    let failed: Vec<bool> = rig.written().lines().map(|line| told(line.as_bytes()).unwrap().failed).collect();
    assert_eq!(failed, [false, true, false]);
}
