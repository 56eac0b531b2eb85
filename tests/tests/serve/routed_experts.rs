//! `routed_experts` as vLLM has them: which experts each token of an answer was routed to.

use cadre_tests::{
    client::Transcript,
    npy::Array,
    server::{Server, chat_body, completion_body, ids, merge},
};
use serde_json::{Value, json};

use crate::concurrency::QUESTIONS;

const FLAG: &str = "--enable-return-routed-experts";

/// The embedded model: the first of four layers has no experts; the others route a token to 2 of 16.
const LAYERS: usize = 4;
const TOP_K: usize = 2;

fn routed(choice: &Value) -> Array {
    Array::from_base64(&choice["routed_experts"])
}

#[test]
fn every_token_but_the_last_has_its_experts() {
    let server = Server::start(&[FLAG]);
    let more = json!({"max_tokens": 12, "ignore_eos": true, "return_token_ids": true});
    let chat = server.chat(QUESTIONS[0], more.clone()).ok();
    let text = server.complete(QUESTIONS[1], more).ok();
    for answer in [chat, text] {
        let array = routed(&answer["choices"][0]);
        let tokens = answer["usage"]["total_tokens"].as_u64().unwrap() as usize;
        assert_eq!(array.shape, [tokens - 1, LAYERS, TOP_K]);
        for token in array.rows() {
            assert_eq!(token[..TOP_K], [0, 0], "a layer without experts");
            assert!(token[TOP_K..].chunks_exact(TOP_K).all(|two| two[0] < two[1] && two[1] < 16), "{token:?}");
        }
        let distinct: std::collections::BTreeSet<&[u32]> = array.rows().into_iter().collect();
        assert!(distinct.len() > 5, "tokens take ways of their own");
    }
}

/// What came before, who is beside it, how its prompt is cut and where blocks run out change nothing.
#[test]
fn the_experts_are_the_same_whatever_happens_around() {
    let bodies: Vec<Value> = (0..12)
        .map(|index| {
            // The first one's choices, which run together, are more than the cache holds, whoever is beside them.
            let (n, tokens) = if index == 0 { (8, 120) } else { (1 + index % 3, 40) };
            let more = json!({"max_tokens": tokens, "ignore_eos": true, "temperature": 0.9, "seed": index, "n": n});
            chat_body(&QUESTIONS[index % 3].repeat(1 + index % 4), more)
        })
        .collect();
    let told = |answer: Value| -> Vec<Array> { answer["choices"].as_array().unwrap().iter().map(routed).collect() };
    let ask = |server: &Server, body: &Value| told(server.client().post("/v1/chat/completions", body).ok());
    let alone = Server::start(&[FLAG, "--threads", "1"]);
    let expected: Vec<_> = bodies.iter().map(|body| ask(&alone, body)).collect();
    let tight = ["--kv-memory", "384KiB", "--max-model-len", "320", "--max-num-batched-tokens", "13"];
    let server = Server::start(&[&[FLAG], &tight[..]].concat());
    let found: Vec<_> = std::thread::scope(|scope| {
        let ask = |body| ask(&server, body);
        let clients: Vec<_> = bodies.iter().map(|body| scope.spawn(move || ask(body))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(found, expected);
    server.wait_until_idle();
    assert!(server.metrics().value("vllm:num_preemptions_total", &[]) > 0.0);
}

#[test]
fn a_text_that_stops_early_has_experts_for_what_it_tells() {
    let server = Server::start(&[FLAG]);
    let more = json!({"max_tokens": 40, "ignore_eos": true, "return_token_ids": true});
    let whole = server.complete(QUESTIONS[3], more.clone()).ok();
    let text = whole["choices"][0]["text"].as_str().unwrap();
    let stop: String = text.chars().skip(text.chars().count() / 2).take(3).collect();
    let stopped = server.complete(QUESTIONS[3], merge(more, json!({"stop": [stop]}))).ok();
    let [whole, stopped] = [&whole["choices"][0], &stopped["choices"][0]];
    let tokens = ids(&stopped["prompt_token_ids"]).len() + ids(&stopped["token_ids"]).len();
    let array = routed(stopped);
    assert_eq!(array.shape[0], tokens - 1);
    assert_eq!(array.rows(), routed(whole).rows()[..tokens - 1]);
}

#[test]
fn what_is_known_of_a_prompt_can_be_left_out() {
    let server = Server::start(&[FLAG]);
    let prompt = server.tokens(&QUESTIONS[3].repeat(4));
    let ask = |start: usize| {
        let more = json!({"max_tokens": 6, "ignore_eos": true, "routed_experts_prompt_start": start});
        server.complete(prompt.clone(), more)
    };
    let whole = ask(0).ok();
    let start = prompt.len() - 5;
    let rest = ask(start).ok();
    assert_eq!(routed(&rest["choices"][0]).rows(), routed(&whole["choices"][0]).rows()[start..]);
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached(&rest) > 0 && cached(&ask(0).ok()) == 0, "what is told is computed");
    let refused = ask(prompt.len());
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("routed_experts_prompt_start")));
}

#[test]
fn streams_and_servers_without_the_flag_have_none() {
    let server = Server::start(&[FLAG]);
    let body = completion_body("a", json!({"max_tokens": 3, "stream": true}));
    let streamed: Transcript = server.client().events("/v1/completions", &body).collect();
    assert!(streamed.done && streamed.choices().all(|choice| choice.get("routed_experts").is_none()));
    let start = json!({"routed_experts_prompt_start": 1});
    let refused = server.client().post("/v1/completions", &merge(body, start.clone()));
    assert!(refused.status == 400 && refused.text.contains("stream"), "{}", refused.text);
    let plain = Server::start(&[]);
    let answer = plain.complete("ab", json!({"max_tokens": 3, "routed_experts_prompt_start": 0})).ok();
    assert!(answer["choices"][0].get("routed_experts").is_none());
    let refused = plain.complete("ab", start);
    assert!(refused.status == 400 && refused.text.contains(FLAG), "{}", refused.text);
}
