//! How a server begins and ends: 503 while it loads, and SIGTERM.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use cadre_tests::{
    client::Transcript,
    server::{Server, chat_body, completion_body},
    wait_for,
};
use serde_json::json;

/// What an orchestrator is promised.
const LIMIT: Duration = Duration::from_secs(5);

/// A hub that takes connections and never answers keeps the server loading for as long as the test likes.
fn stalled_hub() -> (TcpListener, String) {
    let hub = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", hub.local_addr().unwrap());
    (hub, endpoint)
}

#[test]
fn while_it_loads_it_says_so() {
    let (_hub, endpoint) = stalled_hub();
    let mut server = Server::spawn(&["--model", "some/model"], &[("HF_ENDPOINT", &endpoint)]);
    let client = server.client();
    let hello = chat_body("Hello", json!({}));
    for answer in [client.get("/health"), client.get("/v1/models"), client.post("/v1/chat/completions", &hello)] {
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("model_loading")), "{}", answer.text);
        assert!(answer.headers["retry-after"].parse::<u32>().is_ok());
    }
    assert_eq!(client.get("/version").status, 200);
    assert_eq!(client.get("/metrics").status, 200);
    server.terminate();
    server.wait_for_exit(LIMIT);
}

#[test]
fn a_model_that_cannot_be_loaded_ends_it() {
    let mut server = Server::spawn(&["--model", "not-a-directory"], &[]);
    let status = server.wait_for_exit(LIMIT);
    assert_eq!(status.code(), Some(1));
    let log = server.log();
    assert!(log.contains("not-a-directory") && !log.contains("panicked"), "{log}");
}

#[test]
fn idle_it_ends_at_once() {
    let mut server = Server::start(&[]);
    let start = Instant::now();
    server.terminate();
    let status = server.wait_for_exit(LIMIT);
    assert_eq!(status.code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[test]
fn short_answers_are_finished_before_it_ends() {
    let mut server = Server::start(&["--threads", "1"]);
    let body = chat_body("Hello", json!({"ignore_eos": true, "max_tokens": 60, "stream": true}));
    let mut events = server.client().events("/v1/chat/completions", &body);
    let first = events.next().unwrap();
    server.terminate();
    let transcript: Transcript = std::iter::once(first).chain(events).collect();
    assert!(transcript.done, "{transcript:?}");
    assert_eq!(transcript.finish_reason(), Some("length"));
    assert_eq!(server.wait_for_exit(LIMIT).code(), Some(0));
}

/// More than can be finished in time: whoever isn't served to the end is told.
#[test]
fn under_load_it_ends_within_five_seconds_and_tells_everybody() {
    let flags = ["--threads", "1", "--max-num-seqs", "4", "--max-num-batched-tokens", "4", "--no-prefix-caching"];
    let mut server = Server::start(&flags);
    let client = server.client().clone();
    let mut clients: Vec<_> = (0..40)
        .map(|index| {
            let client = client.clone();
            let more = json!({"ignore_eos": true, "max_tokens": 900, "stream": true, "temperature": 1, "seed": index});
            let (path, body) = match index % 2 {
                0 => ("/v1/chat/completions", chat_body("Hello", more)),
                _ => ("/v1/completions", completion_body("Hello", more)),
            };
            std::thread::spawn(move || client.events(path, &body).collect::<Transcript>())
        })
        .collect();
    let whole = std::thread::spawn(move || {
        client.post("/v1/chat/completions", &chat_body("Hello", json!({"ignore_eos": true, "max_tokens": 900})))
    });
    wait_for("a full house", 60, || {
        let metrics = server.metrics();
        metrics.value("vllm:num_requests_running", &[]) + metrics.value("vllm:num_requests_waiting", &[]) >= 41.0
    });
    let start = Instant::now();
    server.terminate();
    let status = server.wait_for_exit(Duration::from_secs(20));
    let took = start.elapsed();
    assert_eq!(status.code(), Some(0), "{}", server.log());
    assert!(took < LIMIT, "{took:?}");
    let mut told = 0;
    for (index, client) in clients.drain(..).enumerate() {
        let transcript = client.join().unwrap();
        assert!(transcript.done, "client {index} was cut off: {:?}", transcript.chunks.last());
        match transcript.error() {
            Some(error) => {
                assert_eq!((&error["type"], &error["code"]), (&json!("server_error"), &json!("shutting_down")));
                told += 1;
            }
            None => assert!(transcript.finish_reason().is_some(), "client {index}"),
        }
    }
    assert!(told > 0, "the test did not put enough load on");
    let whole = whole.join().unwrap();
    assert!(whole.status == 200 || whole.status == 503, "{}", whole.text);
}
