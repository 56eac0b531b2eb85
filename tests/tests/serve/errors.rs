//! What is refused, and how: one row a mistake.

use cadre_tests::server::{MODEL, Server, chat_body, completion_body};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// Bad chat requests: what is added to a good one, and the parameter that is blamed.
fn bad_chats() -> Vec<(Value, &'static str)> {
    vec![
        (json!({"temperature": 3}), "temperature"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_p": 1.1}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": -0.1}), "min_p"),
        (json!({"presence_penalty": 2.1}), "presence_penalty"),
        (json!({"frequency_penalty": -2.1}), "frequency_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_completion_tokens": -1}), "max_completion_tokens"),
        (json!({"min_tokens": 5, "max_tokens": 4}), "min_tokens"),
        (json!({"n": 0}), "n"),
        (json!({"n": 2, "temperature": 0}), "n"),
        (json!({"seed": "x"}), "seed"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"stop": [""]}), "stop[0]"),
        (json!({"stop": 7}), "stop"),
        (json!({"stop_token_ids": [99_999]}), "stop_token_ids[0]"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"99999": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias.1"),
        (json!({"allowed_token_ids": []}), "allowed_token_ids"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"guided_json": {}}), "guided_json"),
        (json!({"structured_outputs": {"regex": "a"}}), "structured_outputs"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"audio": {"voice": "v", "format": "wav"}}), "audio"),
        (json!({"web_search_options": {}}), "web_search_options"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (json!({"priority": 5}), "priority"),
        (json!({"reasoning_effort": "very"}), "reasoning_effort"),
        (json!({"add_generation_prompt": true, "continue_final_message": true}), "continue_final_message"),
        (json!({"echo": true}), "echo"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "hello"}), "messages"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "messages[0].content[0].type"),
    ]
}

/// Bad completion requests.
fn bad_completions() -> Vec<(Value, &'static str)> {
    vec![
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": {"text": "x"}}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt[1]"),
        (json!({"prompt": [1, 99_999]}), "prompt[1]"),
        (json!({"prompt": [[1], [-1]]}), "prompt[1][0]"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"best_of": 3}), "best_of"),
        (json!({"suffix": "end"}), "suffix"),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens"),
        (json!({"truncation_side": "middle"}), "truncation_side"),
        (json!({"max_completion_tokens": 1}), "max_completion_tokens"),
        (json!({"chat_template_kwargs": {"a": 1}}), "chat_template_kwargs"),
    ]
}

#[test]
fn mistakes_are_told_with_their_parameter() {
    let server = Server::start(&[]);
    let chats = bad_chats().into_iter().map(|(more, param)| (CHAT, chat_body("Hello", more), param));
    let texts = bad_completions().into_iter().map(|(more, param)| (TEXT, completion_body("Hello", more), param));
    let mut failures = Vec::new();
    for (path, body, param) in chats.chain(texts) {
        let answer = server.client().post(path, &body);
        let error = answer.json()["error"].clone();
        let as_told = answer.status == 400
            && error["type"] == "invalid_request_error"
            && error["param"] == param
            && error["code"].is_null()
            && error["message"].as_str().is_some_and(|message| message.ends_with('.'));
        if !as_told {
            failures.push(format!("{body}: expected {param}, got {} {}", answer.status, answer.text));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(server.chat("Hello", json!({"max_tokens": 1})).status, 200, "it serves on");
}

#[test]
fn errors_have_their_status_type_and_code() {
    let server = Server::start(&[]);
    let client = server.client();
    let expect = |answer: cadre_tests::client::Answer, status: u16, param: Value, code: Value| {
        let error = &answer.json()["error"];
        let found = (answer.status, &error["type"], &error["param"], &error["code"]);
        assert_eq!(found, (status, &json!("invalid_request_error"), &param, &code), "{}", answer.text);
    };
    let none = Value::Null;
    let hello = chat_body("Hello", json!({}));

    expect(server.chat("Hello", json!({"model": "nobody"})), 404, json!("model"), json!("model_not_found"));
    expect(server.complete("Hello", json!({"model": "nobody"})), 404, json!("model"), json!("model_not_found"));
    expect(client.get("/v1/models/nobody"), 404, json!("model"), json!("model_not_found"));
    expect(client.get("/v1/nothing"), 404, none.clone(), json!("unknown_url"));
    expect(client.get(CHAT), 405, none.clone(), json!("method_not_allowed"));
    expect(client.delete("/v1/models"), 405, none.clone(), json!("method_not_allowed"));
    let context = json!("context_length_exceeded");
    expect(server.chat("Hello", json!({"max_tokens": 5000})), 400, json!("messages"), context.clone());
    expect(server.chat(&"word ".repeat(3000), json!({})), 400, json!("messages"), context.clone());
    expect(server.complete(vec![9; 1024], json!({"max_tokens": 1})), 400, json!("prompt"), context);

    expect(client.post_bytes(CHAT, "application/json", b"{\"model\": "), 400, none.clone(), none.clone());
    expect(client.post_bytes(CHAT, "application/json", b"[1, 2]"), 400, none.clone(), none.clone());
    expect(client.post_bytes(CHAT, "application/json", b""), 400, none.clone(), none.clone());
    let plain = client.post_bytes(CHAT, "text/plain", hello.to_string().as_bytes());
    expect(plain, 415, none.clone(), json!("unsupported_media_type"));
    let endless = json!({"model": MODEL, "messages": [{"role": "user", "content": "x".repeat(17 << 20)}]});
    expect(client.post(CHAT, &endless), 413, none.clone(), json!("request_too_large"));

    for path in ["/tokenize", "/detokenize"] {
        let answer = client.post(path, &json!({}));
        assert_eq!((answer.status, answer.json()["error"]["param"].is_string()), (400, true), "{}", answer.text);
    }
    expect(client.post("/detokenize", &json!({"tokens": [700_000]})), 400, json!("tokens[0]"), none.clone());
    let both = json!({"prompt": "a", "messages": [{"role": "user", "content": "a"}]});
    expect(client.post("/tokenize", &both), 400, json!("prompt"), none.clone());
    expect(client.post("/tokenize", &json!({"prompt": "a", "tools": [{}]})), 400, json!("tools"), none);
    assert_eq!(client.post(CHAT, &hello).status, 200, "it serves on");
}

#[test]
fn constraints_that_leave_no_token_are_refused() {
    let server = Server::start(&[]);
    let only = server.tokens("x");
    let answer = server.chat("Hello", json!({"allowed_token_ids": only, "bad_words": ["x"], "max_tokens": 4}));
    assert_eq!(
        (answer.status, &answer.json()["error"]["param"]),
        (400, &json!("allowed_token_ids")),
        "{}",
        answer.text
    );

    // Seen only after the first token: it is the request's own mistake all the same.
    let later = json!({"allowed_token_ids": only, "bad_words": ["xx"], "max_tokens": 4});
    let answer = server.chat("Hello", later.clone());
    let error = &answer.json()["error"];
    assert_eq!((answer.status, &error["type"]), (400, &json!("invalid_request_error")), "{}", answer.text);
    let streamed = server.chat_stream("Hello", later);
    assert_eq!((streamed.text().as_str(), streamed.done), ("x", true));
    assert!(streamed.error().is_some_and(|error| error["type"] == "invalid_request_error"), "{streamed:?}");
    assert_eq!(server.chat("Hello", json!({"max_tokens": 1})).status, 200, "it serves on");
}

#[test]
fn nested_bodies_do_not_end_the_server() {
    let server = Server::start(&[]);
    let deep = format!("{{\"messages\": {}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let answer = server.client().post_bytes(CHAT, "application/json", deep.as_bytes());
    assert_eq!(answer.status, 400);
    assert_eq!(server.client().get("/health").status, 200);
}

#[test]
fn a_strict_server_refuses_what_it_does_not_know() {
    let server = Server::start(&["--strict-params"]);
    let answer = server.chat("Hello", json!({"temprature": 0}));
    assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some("temprature")));
    assert_eq!(server.chat("Hello", json!({"user": "u", "max_tokens": 1})).status, 200);
}
