//! The small routes, and whether the embedded model answers rightly.

use std::sync::Mutex;

use cadre_tests::{
    heldout,
    server::{MODEL, Server, ids},
};
use serde_json::json;

#[test]
fn the_small_routes_answer() {
    let server = Server::start(&["--served-model-name", "another-name"]);
    let client = server.client();
    assert_eq!(client.get("/health").ok()["status"], "ok");
    assert_eq!(client.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));

    let models = client.get("/v1/models").ok();
    assert_eq!(models["object"], "list");
    let names: Vec<_> = models["data"].as_array().unwrap().iter().map(|model| &model["id"]).collect();
    assert_eq!(names, [MODEL, "another-name"]);
    let card = client.get("/v1/models/another-name").ok();
    assert_eq!((card["object"].as_str(), card["owned_by"].as_str()), (Some("model"), Some("cadre")));
    assert_eq!(card["max_model_len"], 1024);

    let info = client.get("/tokenizer_info").ok();
    assert_eq!(info["vocab_size"], 640);
    assert!(info["chat_template"].as_str().unwrap().contains("message"));

    let body = json!({"model": "another-name", "messages": [{"role": "user", "content": "Hello"}]});
    assert_eq!(client.post("/v1/chat/completions", &body).ok()["model"], MODEL);
}

#[test]
fn metrics_tell_what_happened() {
    let server = Server::start(&[]);
    let usage = server.chat("What is 17 + 25?", json!({})).ok()["usage"].clone();
    server.wait_until_idle();
    let metrics = server.metrics();
    let count = |name: &str| usage[name].as_f64().unwrap();
    assert_eq!(metrics.value("vllm:prompt_tokens_total", &[("model_name", MODEL)]), count("prompt_tokens"));
    assert_eq!(metrics.value("vllm:generation_tokens_total", &[]), count("completion_tokens"));
    let route = ("route", "/v1/chat/completions");
    assert_eq!(metrics.value("cadre_http_requests_total", &[route, ("method", "POST"), ("status", "200")]), 1.0);
    assert_eq!(metrics.value("vllm:request_success_total", &[]), 1.0);
    for histogram in ["time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"] {
        assert_eq!(metrics.value(&format!("vllm:{histogram}_count"), &[]), 1.0, "{histogram}");
    }
    assert!(metrics.value("cadre_memory_bytes", &[("pool", "weights")]) > 1e6, "{}", metrics.text());
    assert!(metrics.has("vllm:cache_config_info") && metrics.has("vllm:kv_cache_usage_perc"));
}

#[test]
fn tokens_and_text_round_trip() {
    let server = Server::start(&[]);
    let client = server.client();
    for text in ["What is 17 + 25?", "naïve café — 日本語 🙂\n\ttab", " leading and trailing ", "a"] {
        let tokens = client.post("/tokenize", &json!({"prompt": text, "return_token_strs": true})).ok();
        assert_eq!(tokens["count"], tokens["tokens"].as_array().unwrap().len());
        assert_eq!(tokens["count"], tokens["token_strs"].as_array().unwrap().len());
        assert_eq!(tokens["max_model_len"], 1024);
        let back = client.post("/detokenize", &json!({"tokens": tokens["tokens"]})).ok();
        assert_eq!(back["prompt"], text);
    }
    // A conversation goes through the chat template, and is what a chat request's prompt is.
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let tokens = ids(&client.post("/tokenize", &json!({"messages": messages})).ok()["tokens"]);
    let answer = server.chat("Hello", json!({"max_tokens": 1, "return_token_ids": true})).ok();
    assert_eq!(ids(&answer["prompt_token_ids"]), tokens);
    assert_eq!(answer["usage"]["prompt_tokens"], tokens.len());
}

/// At least 95 % of each family, as the model's makers say.
#[test]
fn the_embedded_model_answers_held_out_questions() {
    let server = Server::start(&[]);
    for (family, questions) in heldout::questions() {
        let wrong = Mutex::new(Vec::new());
        let (server, wrong) = (&server, &wrong);
        std::thread::scope(|scope| {
            for share in questions.chunks(questions.len().div_ceil(8)) {
                scope.spawn(move || {
                    for question in share {
                        let answer = server.chat(&question.prompt, json!({})).ok();
                        let said = answer["choices"][0]["message"]["content"].as_str().unwrap().trim().to_owned();
                        if said != question.answer {
                            wrong.lock().unwrap().push((question.prompt.clone(), question.answer.clone(), said));
                        }
                    }
                });
            }
        });
        let wrong = std::mem::take(&mut *wrong.lock().unwrap());
        let allowed = questions.len() / 20;
        assert!(wrong.len() <= allowed, "{family}: {} of {} wrong: {wrong:#?}", wrong.len(), questions.len());
    }
}
