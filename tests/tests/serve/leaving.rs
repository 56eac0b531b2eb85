//! Clients that leave: their requests end with them, wherever they were.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use cadre_tests::{
    server::{Server, chat_body, completion_body},
    wait_for,
};
use serde_json::{Value, json};

/// One sequence at a time, one token a step: every phase lasts long enough to be left.
const SLOW: &[&str] =
    &["--max-num-seqs", "1", "--max-num-batched-tokens", "1", "--threads", "1", "--no-prefix-caching"];

fn cancelled(server: &Server, phase: &str) -> f64 {
    server.metrics().value("cadre_requests_cancelled_total", &[("phase", phase)])
}

fn long_answer() -> Value {
    chat_body("Hello", json!({"ignore_eos": true, "max_tokens": 900, "stream": true}))
}

fn long_prompt(stream: bool) -> Value {
    let tokens: Vec<u32> = (0..1000).map(|index| 5 + index % 256).collect();
    completion_body(tokens, json!({"max_tokens": 1, "stream": stream}))
}

#[test]
fn while_it_generates() {
    let server = Server::start(SLOW);
    let mut events = server.client().events("/v1/chat/completions", &long_answer());
    assert!(events.nth(2).is_some(), "it has begun to answer");
    drop(events);
    wait_for("a cancelled request", 20, || cancelled(&server, "decode") == 1.0);
    server.wait_until_idle();
    let metrics = server.metrics();
    assert!(metrics.value("vllm:generation_tokens_total", &[]) < 800.0, "it did not generate to the end");
    assert_eq!(metrics.value("vllm:kv_cache_usage_perc", &[]), 0.0);
    assert_eq!(metrics.value("vllm:request_success_total", &[]), 0.0);
}

#[test]
fn while_its_prompt_is_computed() {
    let server = Server::start(SLOW);
    let events = server.client().events("/v1/completions", &long_prompt(true));
    wait_for("a running request", 20, || server.metrics().value("vllm:num_requests_running", &[]) == 1.0);
    drop(events);
    wait_for("a cancelled request", 20, || cancelled(&server, "prefill") == 1.0);
    server.wait_until_idle();
    assert_eq!(server.metrics().value("vllm:generation_tokens_total", &[]), 0.0);
}

#[test]
fn while_it_waits() {
    let server = Server::start(SLOW);
    let mut first = server.client().events("/v1/chat/completions", &long_answer());
    assert!(first.next().is_some());
    let second = server.client().events("/v1/chat/completions", &long_answer());
    wait_for("a waiting request", 20, || server.metrics().value("vllm:num_requests_waiting", &[]) == 1.0);
    drop(second);
    wait_for("a cancelled request", 20, || cancelled(&server, "queue") == 1.0);
    assert_eq!(server.metrics().value("vllm:num_requests_waiting", &[]), 0.0);
    drop(first);
    wait_for("a cancelled request", 20, || cancelled(&server, "decode") == 1.0);
    server.wait_until_idle();
}

/// Nothing is written to such a client before the end: the server has to notice by itself.
#[test]
fn without_streaming() {
    let server = Server::start(SLOW);
    let body = long_prompt(false).to_string();
    let host = server.address().trim_start_matches("http://");
    let mut connection = TcpStream::connect(host).unwrap();
    write!(
        connection,
        "POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    wait_for("a running request", 20, || server.metrics().value("vllm:num_requests_running", &[]) == 1.0);
    drop(connection);
    wait_for("a cancelled request", 20, || cancelled(&server, "prefill") == 1.0);
    server.wait_until_idle();
}

#[test]
fn one_of_many_leaves_and_the_others_do_not_notice() {
    let server = Server::start(&["--threads", "2"]);
    let ask = || server.chat("Spell bread.", json!({"ignore_eos": true, "max_tokens": 300})).ok();
    let alone = ask()["choices"].clone();
    std::thread::scope(|scope| {
        let others: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        for _ in 0..6 {
            let mut events = server.client().events("/v1/chat/completions", &long_answer());
            assert!(events.next().is_some());
        }
        for other in others {
            assert_eq!(other.join().unwrap()["choices"], alone);
        }
    });
    server.wait_until_idle();
}

/// A client that sends half a request and leaves is nobody's problem.
#[test]
fn before_it_has_asked() {
    let server = Server::start(&[]);
    let host = server.address().trim_start_matches("http://");
    for text in [
        "",
        "POST /v1/chat",
        "POST /v1/chat/completions HTTP/1.1\r\ncontent-length: 100\r\n\r\n{\"mod",
        "\u{0}\u{1}\r\n\r\n",
    ] {
        let mut connection = TcpStream::connect(host).unwrap();
        connection.write_all(text.as_bytes()).unwrap();
        drop(connection);
    }
    let mut connection = TcpStream::connect(host).unwrap();
    connection.write_all(b"GET / HTTP/9.9\r\n\r\n").unwrap();
    let mut answer = String::new();
    let _ = connection.read_to_string(&mut answer);
    assert_eq!(server.client().get("/health").status, 200);
}
