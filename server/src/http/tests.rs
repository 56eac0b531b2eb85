//! Over real connections: a server on a free port, a model that says what the test wants.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::atomic::{AtomicUsize, Ordering},
    thread::{self, JoinHandle},
};

use cadre_engine::request::{Event, RequestError, Scoring};
use serde_json::{Value, json};

use super::*;
use crate::{
    metrics::exporter,
    testing::{Fake, MAX_MODEL_LEN, say, served, token},
};

struct Server {
    app: Arc<App>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Server {
    fn new(fake: &Arc<Fake>) -> Self {
        let server = Self::loading(HttpOptions { max_body_bytes: 4096, ..HttpOptions::default() });
        server.app.ready(served(fake.clone()));
        server
    }

    fn saying(text: &'static str) -> Self {
        Self::new(&Fake::saying(text))
    }

    fn loading(options: HttpOptions) -> Self {
        let app = Arc::new(App::new(exporter().unwrap().build_recorder().handle(), options, None));
        let (stop, stopped) = oneshot::channel::<()>();
        let (send, receive) = std::sync::mpsc::channel();
        let shared = app.clone();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await?;
                send.send(listener.local_addr()?).unwrap();
                let stopped = async { stopped.await.unwrap_or(()) };
                serve(listener, shared, stopped, Duration::from_millis(200)).await
            })
        });
        Self { app, address: receive.recv().unwrap(), stop: Some(stop), thread: Some(thread) }
    }

    fn stop(&mut self) {
        drop(self.stop.take());
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }

    fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], b"")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes())
    }

    fn chat(&self, extra: Value) -> Answer {
        let mut body = json!({"model": "fake", "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(crate::testing::object(extra));
        self.post("/v1/chat/completions", &body)
    }

    fn complete(&self, extra: Value) -> Answer {
        let mut body = json!({"model": "fake", "prompt": "ab"});
        body.as_object_mut().unwrap().extend(crate::testing::object(extra));
        self.post("/v1/completions", &body)
    }

    fn open(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        stream
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut text = String::new();
        self.open(method, path, headers, body).read_to_string(&mut text).unwrap();
        Answer::parse(&text)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        if !thread::panicking() {
            self.join();
        }
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let head = head.to_ascii_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = if head.contains("transfer-encoding: chunked") { unchunked(body) } else { body.to_owned() };
        Self { status, head, body }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The events of a stream, which must end with `[DONE]`.
    fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let mut events: Vec<&str> =
            self.body.split("\n\n").filter(|event| !event.is_empty()).map(|event| &event["data: ".len()..]).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
    whole
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn none_wanted(wanted: &AtomicUsize) -> impl Fn() -> bool {
    || wanted.load(Ordering::SeqCst) == 0
}

#[test]
fn loading_then_ready() {
    let server = Server::loading(HttpOptions::default());
    for answer in [server.get("/health"), server.get("/v1/models"), server.chat(json!({}))] {
        assert_eq!(answer.status, 503);
        assert_eq!(answer.json()["error"]["code"], "model_loading");
        assert!(answer.header("retry-after").is_some() && answer.header("retry-after-ms").is_some());
    }
    assert_eq!(server.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(server.get("/metrics").status, 200);
    server.app.ready(served(Fake::saying("x")));
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn models_are_listed_under_all_their_names() {
    let server = Server::saying("");
    let list = server.get("/v1/models").ok();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], "fake");
    assert_eq!(list["data"][1]["id"], "org/alias");
    assert_eq!(list["data"][0]["max_model_len"], MAX_MODEL_LEN);
    assert_eq!(server.get("/v1/models/org/alias").ok()["id"], "org/alias");
    let missing = server.get("/v1/models/other");
    assert_eq!((missing.status, missing.json()["error"]["code"].clone()), (404, json!("model_not_found")));
}

#[test]
fn few_of_many_models_are_told_to_one_who_asks_for_another() {
    let server = Server::saying("hello");
    let adapters = &server.app.served().unwrap().adapters;
    for number in 0..40 {
        adapters.add(crate::adapters::AdapterSource { name: format!("tuned-{number}"), directory: "none".into() });
    }
    let missing = server.chat(json!({"model": "gpt-9"}));
    let message = missing.json()["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(missing.status, 404);
    assert!(message.contains("`fake`") && message.contains("`tuned-0`") && message.contains("35 others"), "{message}");
    assert!(message.len() < 200, "{message}");
    // One whose files are gone is a defect, not a request's fault.
    assert_eq!(server.chat(json!({"model": "tuned-0"})).status, 500);
    // Jobs have made them: the job would go on to name what is unloaded.
    let refused = adapters.unload_on_request("tuned-0").unwrap_err().to_string();
    assert!(refused.contains("DELETE /v1/models/tuned-0"), "{refused}");
}

#[test]
fn a_chat_answer() {
    let server = Server::saying("Hello!");
    let answer = server.chat(json!({})).ok();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], "fake");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Hello!", "refusal": null}));
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &Value::Null));
    assert_eq!(choice["logprobs"], Value::Null);
    let prompt = "<user>hi<assistant>".len();
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7,
               "prompt_tokens_details": {"cached_tokens": 1}})
    );
}

#[test]
fn a_chat_stream() {
    let server = Server::saying("né🙂");
    let answer = server.chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
    let events = answer.events();
    let (usage, chunks) = events.split_last().unwrap();
    for event in &events {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!((&event["id"], &event["created"]), (&events[0]["id"], &events[0]["created"]));
    }
    let delta = |index: usize| &chunks[index]["choices"][0]["delta"];
    assert_eq!(*delta(0), json!({"role": "assistant", "content": ""}));
    assert_eq!(
        [delta(1), delta(2), delta(3)],
        [&json!({"content": "n"}), &json!({"content": "é"}), &json!({"content": "🙂"})]
    );
    assert_eq!((chunks.len(), delta(4)), (5, &json!({})));
    assert_eq!(chunks[4]["choices"][0]["finish_reason"], "stop");
    assert!(chunks.iter().all(|chunk| chunk["usage"].is_null()));
    assert!(chunks[..4].iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 8);
}

#[test]
fn usage_in_every_chunk() {
    let server = Server::saying("ab");
    let answer = server.chat(json!({"stream": true, "stream_options": {"continuous_usage_stats": true}}));
    let counts: Vec<_> = answer.events().iter().map(|event| event["usage"]["completion_tokens"].as_u64()).collect();
    assert_eq!(counts.last(), Some(&Some(3)));
    assert!(counts.iter().all(Option::is_some));
}

#[test]
fn chat_logprobs() {
    let server = Server::saying("é");
    let answer = server.chat(json!({"logprobs": true, "top_logprobs": 3})).ok();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 3, "two bytes and the end");
    assert_eq!(content[0]["bytes"], json!([0xC3]));
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["top_logprobs"].as_array().unwrap().len(), 3);
    assert_eq!(content[0]["top_logprobs"][2]["logprob"], -9999.0);
    assert_eq!(content[2]["token"], "<|end|>");
    let ids = server.chat(json!({"logprobs": true, "return_tokens_as_token_ids": true})).ok();
    assert_eq!(ids["choices"][0]["logprobs"]["content"][1]["token"], "token_id:169");
}

#[test]
fn several_choices_and_token_ids() {
    let server = Server::saying("ab");
    let answer = server.chat(json!({"n": 2, "return_token_ids": true, "prompt_logprobs": 0})).ok();
    assert_eq!(answer["choices"][1]["index"], 1);
    assert_eq!(answer["choices"][1]["token_ids"], json!([97, 98, 256]));
    assert_eq!(answer["prompt_token_ids"][0], u32::from(b'<'));
    assert_eq!(answer["prompt_logprobs"][0], Value::Null);
    assert_eq!(answer["prompt_logprobs"][1]["117"]["decoded_token"], "u");
    let events = server.chat(json!({"n": 2, "stream": true, "return_token_ids": true})).events();
    let roles = events.iter().filter(|event| event["choices"][0]["delta"]["role"] == "assistant").count();
    assert_eq!(roles, 2);
    assert_eq!(events.iter().filter(|event| event["prompt_token_ids"].is_array()).count(), 1);
}

#[test]
fn stop_strings_end_answers_and_streams() {
    let server = Server::saying("one, two");
    let choice = |extra| server.chat(extra).ok()["choices"][0].clone();
    let cut = choice(json!({"stop": ", t"}));
    assert_eq!((&cut["message"]["content"], &cut["stop_reason"]), (&json!("one"), &json!(", t")));
    let kept = choice(json!({"stop": [", t"], "include_stop_str_in_output": true}));
    assert_eq!(kept["message"]["content"], "one, t");
    let events = server.chat(json!({"stream": true, "stop": ", t"})).events();
    let text: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "one");
    assert_eq!(events.last().unwrap()["choices"][0]["stop_reason"], ", t");
}

#[test]
fn parameters_reach_the_engine() {
    let fake = Fake::saying("x");
    let server = Server::new(&fake);
    server
        .chat(json!({
            "max_tokens": 9, "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1,
            "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"5": 2},
            "allowed_token_ids": [1, 2], "bad_words": ["z"], "seed": 11, "min_tokens": 2, "ignore_eos": true,
            "stop_token_ids": [3], "logprobs": true, "top_logprobs": 2, "prompt_logprobs": 1,
            "chat_template_kwargs": {"mood": "glad"}, "add_generation_prompt": false,
        }))
        .ok();
    let request = fake.last_request();
    assert_eq!(String::from_utf8(request.prompt.iter().map(|&id| id as u8).collect()).unwrap(), "<user>higlad");
    let sampling = request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.5, 0.9, 4, 0.1));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (1.0, -1.0));
    assert_eq!((sampling.repetition_penalty, sampling.seed), (1.5, 11));
    assert_eq!(sampling.logit_bias.get(&5), Some(&2.0));
    assert_eq!(sampling.allowed_token_ids, Some(vec![1, 2]));
    assert_eq!(request.stop.max_tokens, 7, "max_completion_tokens wins");
    assert_eq!((request.stop.min_tokens, request.stop.ignore_eos), (2, true));
    assert_eq!(request.stop.stop_token_ids, [3]);
    assert_eq!((request.logprobs, request.scoring.as_ref()), (Some(2), Some(&Scoring::all(1))));
}

#[test]
fn a_final_message_can_be_continued() {
    let fake = Fake::saying("x");
    let server = Server::new(&fake);
    let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "so far"}]);
    server.chat(json!({"messages": messages, "continue_final_message": true})).ok();
    let prompt: Vec<u8> = fake.last_request().prompt.iter().map(|&id| id as u8).collect();
    assert_eq!(String::from_utf8(prompt).unwrap(), "<user>q<assistant>so far");
    let both =
        server.chat(json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": true}));
    assert_eq!(both.json()["error"]["param"], "continue_final_message");
}

#[test]
fn completions_of_every_kind_of_prompt() {
    let server = Server::saying("xyz");
    for (prompt, choices, tokens) in
        [(json!("ab"), 1, 2), (json!(["ab", "c"]), 2, 3), (json!([97, 98, 99]), 1, 3), (json!([[97], [98, 99]]), 2, 3)]
    {
        let answer = server.complete(json!({"prompt": prompt})).ok();
        assert_eq!(answer["object"], "text_completion");
        assert_eq!(answer["choices"].as_array().unwrap().len(), choices, "{prompt}");
        assert_eq!(answer["choices"][0]["text"], "xyz");
        assert_eq!(answer["usage"]["prompt_tokens"], tokens, "{prompt}");
    }
    let many = server.complete(json!({"prompt": ["a", "b"], "n": 2})).ok();
    let indices: Vec<_> = many["choices"].as_array().unwrap().iter().map(|choice| choice["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
}

#[test]
fn completions_default_to_sixteen_tokens() {
    let server = Server::saying("0123456789abcdefghij");
    let answer = server.complete(json!({})).ok();
    assert_eq!(answer["choices"][0]["text"], "0123456789abcdef");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn completions_with_logprobs_and_echo() {
    let server = Server::saying("éx");
    let answer = server.complete(json!({"echo": true, "logprobs": 2, "max_tokens": 3})).ok();
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "abéx");
    let logprobs = &choice["logprobs"];
    assert_eq!(logprobs["tokens"][0], "a");
    assert_eq!(logprobs["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert_eq!(logprobs["token_logprobs"][1], -0.5);
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][1], json!({"b": -0.5, "c": -0.5}));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 3]));
    assert_eq!(choice.get("prompt_logprobs"), None, "that is another parameter's");
}

#[test]
fn scoring_a_prompt_without_generating() {
    let server = Server::saying("unused");
    let answer = server.complete(json!({"echo": true, "logprobs": 0, "max_tokens": 0, "prompt": "abc"})).ok();
    let choice = &answer["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("abc"), &json!("length")));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5, -0.5]));
    assert_eq!(choice["logprobs"]["top_logprobs"][1], json!({"b": -0.5}));
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let without_echo = server.complete(json!({"max_tokens": 0}));
    assert_eq!(without_echo.json()["error"]["param"], "max_tokens");
}

#[test]
fn an_echo_is_what_was_sent() {
    let server = Server::saying("x");
    let echo = |prompt: Value, extra: Value| {
        let mut body = json!({"prompt": prompt, "echo": true, "logprobs": 0, "max_tokens": 1});
        body.as_object_mut().unwrap().extend(crate::testing::object(extra));
        let choice = server.complete(body).ok()["choices"][0].clone();
        (choice["text"].clone(), choice["logprobs"]["text_offset"].clone())
    };
    assert_eq!(echo(json!("a<|end|>b"), json!({})), (json!("a<|end|>bx"), json!([0, 1, 8, 9])));
    assert_eq!(echo(json!([97, 256, 98]), json!({})), (json!("a<|end|>bx"), json!([0, 1, 8, 9])));
    assert_eq!(echo(json!("abc"), json!({"truncate_prompt_tokens": 2})), (json!("bcx"), json!([0, 1, 2])));
}

#[test]
fn a_request_for_too_many_choices_is_refused() {
    let server = Server::saying("x");
    let answer = server.complete(json!({"prompt": vec!["a"; 50], "n": 100}));
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("prompt")));
}

#[test]
fn a_completion_stream_with_echo() {
    let server = Server::saying("xy");
    let events = server.complete(json!({"stream": true, "echo": true, "logprobs": 0, "prompt": ["a", "b"]})).events();
    let text = |index: u64| -> String {
        let of_choice = events.iter().filter(|event| event["choices"][0]["index"] == index);
        of_choice.map(|event| event["choices"][0]["text"].as_str().unwrap()).collect()
    };
    assert_eq!((text(0).as_str(), text(1).as_str()), ("axy", "bxy"));
    let offsets: Vec<_> = events
        .iter()
        .filter(|event| event["choices"][0]["index"] == 1)
        .flat_map(|event| event["choices"][0]["logprobs"]["text_offset"].as_array().unwrap().clone())
        .collect();
    assert_eq!(offsets, [0, 1, 2, 3]);
}

#[test]
fn mistakes_are_told_with_status_parameter_and_code() {
    let server = Server::saying("x");
    let long = "x".repeat(MAX_MODEL_LEN);
    for (extra, status, param, code) in [
        (json!({"model": "gpt-9"}), 404, json!("model"), json!("model_not_found")),
        (json!({"model": 7}), 400, json!("model"), Value::Null),
        (json!({"temperature": 3}), 400, json!("temperature"), Value::Null),
        (json!({"messages": null}), 400, json!("messages"), Value::Null),
        (json!({"messages": [{"role": "user"}]}), 400, json!("messages[0].content"), Value::Null),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), 400, json!("messages"), Value::Null),
        (
            json!({"messages": [{"role": "user", "content": long}]}),
            400,
            json!("messages"),
            json!("context_length_exceeded"),
        ),
        (json!({"max_tokens": 100_000}), 400, json!("messages"), json!("context_length_exceeded")),
        (json!({"max_tokens": 0}), 400, json!("max_tokens"), Value::Null),
        (json!({"top_logprobs": 2}), 400, json!("top_logprobs"), Value::Null),
        (json!({"logprobs": 2}), 400, json!("logprobs"), Value::Null),
        (json!({"tools": [{}]}), 400, json!("tools"), Value::Null),
        (json!({"response_format": {"type": "json_schema"}}), 400, json!("response_format"), Value::Null),
        (json!({"reasoning_effort": "huge"}), 400, json!("reasoning_effort"), Value::Null),
        (json!({"stream": "yes"}), 400, json!("stream"), Value::Null),
    ] {
        let answer = server.chat(extra.clone());
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"], &error["code"]), (status, &param, &code), "{extra}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
    for (extra, param) in [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": ["a", 7]}), "prompt[1]"),
        (json!({"prompt": [[1], [900]]}), "prompt[1][0]"),
        (json!({"prompt": {"a": 1}}), "prompt"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"suffix": "end"}), "suffix"),
    ] {
        let answer = server.complete(extra.clone());
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)), "{extra}: {}", answer.body);
    }
}

#[test]
fn mistakes_below_json_are_told_as_json() {
    let server = Server::saying("x");
    let json_type = [("content-type", "application/json")];
    let path = "/v1/chat/completions";
    let big = format!("{{\"a\": \"{}\"}}", "x".repeat(5000));
    for (answer, status, code) in [
        (server.send("POST", path, &json_type, b"{"), 400, Value::Null),
        (server.send("POST", path, &json_type, b"[]"), 400, Value::Null),
        (server.send("POST", path, &json_type, b"\xff"), 400, Value::Null),
        (server.send("POST", path, &json_type, "[".repeat(4000).as_bytes()), 400, Value::Null),
        (server.send("POST", path, &json_type, big.as_bytes()), 413, json!("request_too_large")),
        (server.send("POST", path, &[], b"{}"), 415, json!("unsupported_media_type")),
        (server.send("POST", path, &[("content-type", "text/plain")], b"{}"), 415, json!("unsupported_media_type")),
        (server.get(path), 405, json!("method_not_allowed")),
        (server.get("/v1/nothing"), 404, json!("unknown_url")),
    ] {
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["code"]), (status, &code), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
}

#[test]
fn unknown_fields_are_ignored_and_named() {
    let server = Server::saying("x");
    let answer = server.chat(json!({"colour": "red", "user": "me", "bad\nname": 1}));
    assert_eq!((answer.status, answer.header("x-cadre-ignored")), (200, Some("colour")));
    let strict = Server::loading(HttpOptions { strict_params: true, ..HttpOptions::default() });
    strict.app.ready(served(Fake::saying("x")));
    assert_eq!(strict.chat(json!({"colour": "red"})).json()["error"]["param"], "colour");
}

#[test]
fn a_failing_engine_is_a_500_or_an_event() {
    let fake = Fake::new(|request| {
        vec![token(request, 0, u32::from(b'a')), Event::Failed(RequestError::Internal("secret".to_owned()))]
    });
    let server = Server::new(&fake);
    let answer = server.chat(json!({}));
    assert_eq!((answer.status, &answer.json()["error"]["type"]), (500, &json!("server_error")));
    assert!(!answer.body.contains("secret"));
    let events = server.chat(json!({"stream": true})).events();
    assert_eq!(events[1]["choices"][0]["delta"]["content"], "a");
    assert_eq!(events[2]["error"]["type"], "server_error");
    assert_eq!(events.len(), 3);
}

#[test]
fn a_client_that_leaves_is_not_generated_for() {
    let fake = Fake::new(|_| Vec::new());
    let server = Server::new(&fake);
    for stream in [false, true] {
        let body = json!({"messages": [{"role": "user", "content": "hi"}], "stream": stream}).to_string();
        let connection =
            server.open("POST", "/v1/chat/completions", &[("content-type", "application/json")], body.as_bytes());
        eventually("the request arrives", || fake.wanted.load(Ordering::SeqCst) == 1);
        drop(connection);
        eventually("the request is cancelled", none_wanted(&fake.wanted));
    }
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_stream() {
    let fake = Fake::new(|request| vec![token(request, 0, u32::from(b'a'))]);
    let server = Server::new(&fake);
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "stream": true}).to_string();
    let connection =
        server.open("POST", "/v1/chat/completions", &[("content-type", "application/json")], body.as_bytes());
    let mut reader = BufReader::new(connection);
    let mut line = String::new();
    while !line.contains("\"content\":\"a\"") {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0);
    }
    drop(reader);
    eventually("the request is cancelled", none_wanted(&fake.wanted));
}

#[test]
fn requests_under_way_finish_or_are_told_when_the_server_ends() {
    let fake = Fake::new(|_| Vec::new());
    let mut server = Server::new(&fake);
    let body = |stream: bool| json!({"messages": [{"role": "user", "content": "hi"}], "stream": stream}).to_string();
    let open = |stream: bool| {
        let before = fake.requests.lock().unwrap().len();
        let headers = [("content-type", "application/json")];
        let connection = server.open("POST", "/v1/chat/completions", &headers, body(stream).as_bytes());
        eventually("the request arrives", || fake.requests.lock().unwrap().len() > before);
        connection
    };
    let mut connections = [open(true), open(true), open(false)];
    let start = Instant::now();
    server.stop();
    for event in say(&fake.last_request(), "done") {
        fake.tell(0, event);
    }
    let [finished, told, refused] = connections.each_mut().map(|connection| {
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap();
        Answer::parse(&text)
    });
    server.join();
    assert!(start.elapsed() < Duration::from_secs(4));
    assert_eq!(finished.events().last().unwrap()["choices"][0]["finish_reason"], "stop");
    assert_eq!(told.events().last().unwrap()["error"]["code"], "shutting_down");
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("shutting_down")));
    assert_eq!(fake.wanted.load(Ordering::SeqCst), 0);
}

#[test]
fn text_to_tokens_and_back() {
    let server = Server::saying("x");
    let tokens = server.post("/tokenize", &json!({"prompt": "hé", "return_token_strs": true})).ok();
    assert_eq!((&tokens["tokens"], &tokens["count"]), (&json!([104, 0xC3, 0xA9]), &json!(3)));
    assert_eq!(tokens["token_strs"][0], "h");
    assert_eq!(tokens["max_model_len"], MAX_MODEL_LEN);
    let text = server.post("/detokenize", &json!({"tokens": tokens["tokens"]})).ok();
    assert_eq!(text["prompt"], "hé");
    let chat = server.post("/tokenize", &json!({"messages": [{"role": "user", "content": "x"}]})).ok();
    assert_eq!(chat["count"], "<user>x<assistant>".len());
    assert_eq!(server.post("/detokenize", &json!({"tokens": [900]})).status, 400);
    assert_eq!(server.post("/tokenize", &json!({})).json()["error"]["param"], "prompt");
    let info = server.get("/tokenizer_info").ok();
    assert_eq!(info["tokenizer_class"], "Bytes");
    assert!(info["chat_template"].as_str().unwrap().contains("add_generation_prompt"));
}

#[test]
fn metrics_labels_come_from_a_fixed_set() {
    assert_eq!(route_label("/v1/models/a/b"), "/v1/models/{model}");
    assert_eq!(route_label("/v1/chat/completions"), "/v1/chat/completions");
    assert_eq!(route_label("/x?y"), "other");
    assert_eq!(method_label("BREW"), "other");
}

#[test]
fn a_request_whose_handler_panics_fails_alone() {
    let fake = Fake::new(|request| if request.prompt.len() == 3 { panic!("a defect") } else { say(request, "ok") });
    let server = Server::new(&fake);
    let answer = server.complete(json!({"prompt": "abc"}));
    assert_eq!((answer.status, &answer.json()["error"]["type"]), (500, &json!("server_error")), "{}", answer.body);
    assert_eq!(server.complete(json!({})).status, 200);
}
