//! Many clients at once: everybody gets what they would have got alone.

use cadre_tests::{
    client::Transcript,
    server::{Server, chat_body, merge},
};
use serde_json::{Value, json};

pub const QUESTIONS: &[&str] = &[
    "What is 17 + 25?",
    "Sort 31, 4, 15, 92.",
    "Spell basket.",
    "The key is under the lamp. Where is the key?",
    "Write tiger in upper case.",
    "How many letters are in window?",
    "Who are you?",
];

/// 32 requests: short and long, greedy and sampled.
fn requests() -> Vec<Value> {
    let body = |index: usize| {
        let question = QUESTIONS[index % QUESTIONS.len()];
        let more = match index % 4 {
            0 => json!({}),
            1 => json!({"ignore_eos": true, "max_tokens": 20 + index}),
            2 => json!({"ignore_eos": true, "max_tokens": 60, "temperature": 1.3, "seed": index, "top_p": 0.95}),
            _ => {
                json!({"ignore_eos": true, "max_tokens": 40, "temperature": 0.8, "seed": index, "frequency_penalty": 0.5})
            }
        };
        let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
        chat_body(&question.repeat(1 + index % 5), merge(more, stream))
    };
    (0..32).map(body).collect()
}

/// What a client has in hand at the end.
fn essence(transcript: &Transcript) -> (String, Option<String>, Value, bool) {
    let usage = transcript.chunks.last().map(|chunk| chunk["usage"]["completion_tokens"].clone());
    (
        transcript.text(),
        transcript.finish_reason().map(str::to_owned),
        usage.unwrap_or_default(),
        transcript.done && transcript.error().is_none(),
    )
}

fn one_by_one(server: &Server, requests: &[Value]) -> Vec<Transcript> {
    requests.iter().map(|body| server.client().events("/v1/chat/completions", body).collect()).collect()
}

fn all_at_once(server: &Server, requests: &[Value]) -> Vec<Transcript> {
    std::thread::scope(|scope| {
        let clients: Vec<_> = requests
            .iter()
            .map(|body| scope.spawn(|| server.client().events("/v1/chat/completions", body).collect()))
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    })
}

fn assert_same(expected: &[Transcript], found: &[Transcript], what: &str) {
    for (index, (expected, found)) in expected.iter().zip(found).enumerate() {
        assert_eq!(essence(expected), essence(found), "request {index}, {what}");
    }
}

#[test]
fn thirty_two_clients_get_the_same_text_as_one_by_one() {
    let requests = requests();
    let alone = one_by_one(&Server::start(&["--threads", "1", "--no-prefix-caching"]), &requests);
    assert!(alone.iter().all(|transcript| transcript.done && transcript.error().is_none()));
    for threads in ["1", "2"] {
        for budget in ["13", "64", "2048"] {
            let server = Server::start(&["--threads", threads, "--max-num-batched-tokens", budget]);
            let together = all_at_once(&server, &requests);
            let what = format!("{threads} threads, {budget} tokens a step");
            assert_same(&alone, &together, &what);
            server.wait_until_idle();
            assert_eq!(
                server.metrics().value("vllm:kv_cache_usage_perc", &[]),
                0.0,
                "every block is given back, {what}"
            );
        }
    }
}

#[test]
fn when_the_cache_is_full_nothing_is_lost() {
    let requests = requests();
    let roomy = Server::start(&["--threads", "2"]);
    let alone = one_by_one(&roomy, &requests);
    // Room for 384 tokens, where the requests want some 2,500.
    let flags = ["--threads", "2", "--kv-memory", "384KiB", "--max-model-len", "320"];
    let server = Server::start(&flags);
    let together = all_at_once(&server, &requests);
    assert_same(&alone, &together, "with a tiny cache");
    // How far requests of several clients overlap is chance; the choices of one request run together and want 1,000.
    let choices = json!({"n": 4, "temperature": 1.0, "seed": 7, "ignore_eos": true, "max_tokens": 250});
    let texts = |server: &Server| server.chat("Hello", choices.clone()).ok()["choices"].clone();
    assert_eq!(texts(&server), texts(&roomy), "choices that preempt each other");
    server.wait_until_idle();
    let metrics = server.metrics();
    assert!(metrics.value("vllm:num_preemptions_total", &[]) > 0.0, "{}", metrics.text());
    assert_eq!(metrics.value("vllm:kv_cache_usage_perc", &[]), 0.0);
}

#[test]
fn a_model_of_few_seats_serves_all_in_turn() {
    let requests = &requests()[..12];
    let server = Server::start(&["--max-num-seqs", "2"]);
    let (together, alone) = (all_at_once(&server, requests), one_by_one(&server, requests));
    assert_same(&alone, &together, "two at a time");
}
