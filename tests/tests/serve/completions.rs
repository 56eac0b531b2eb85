//! `/v1/completions`: the forms of a prompt, echo, and log-probabilities.

use cadre_tests::server::{MODEL, Server, completion_body, ids, merge};
use serde_json::{Value, json};

fn long() -> Value {
    json!({"ignore_eos": true, "max_tokens": 24})
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap()
}

fn numbers(value: &Value) -> Vec<Option<f64>> {
    value.as_array().unwrap().iter().map(Value::as_f64).collect()
}

const PROMPT: &str = "The garden is behind the tower.";

#[test]
fn a_prompt_may_be_text_or_tokens_one_or_many() {
    let server = Server::start(&[]);
    let tokens = server.tokens(PROMPT);
    let one = server.complete(PROMPT, long()).ok();
    assert!(one["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!((&one["object"], &one["model"]), (&json!("text_completion"), &json!(MODEL)));
    assert_eq!(one["usage"]["prompt_tokens"], tokens.len());
    assert_eq!(one["usage"]["completion_tokens"], 24);
    assert_eq!(one["choices"][0]["finish_reason"], "length");
    assert_eq!(text(&server.complete(tokens.clone(), long()).ok()), text(&one));

    let other = "Sort 3, 1, 2.";
    let second = server.complete(other, long()).ok();
    for prompts in [json!([PROMPT, other]), json!([tokens, server.tokens(other)])] {
        let both = server.complete(prompts, long()).ok();
        assert_eq!(both["choices"].as_array().unwrap().len(), 2);
        let texts = [0, 1].map(|index| both["choices"][index]["text"].as_str().unwrap());
        assert_eq!(texts, [text(&one), text(&second)]);
        assert_eq!(both["choices"][1]["index"], 1);
        assert_eq!(both["usage"]["completion_tokens"], 48);
    }
    let default = server.complete(PROMPT, json!({"ignore_eos": true})).ok();
    assert_eq!(default["usage"]["completion_tokens"], 16, "OpenAI's default");
}

#[test]
fn a_streamed_completion_is_the_whole_one() {
    let server = Server::start(&[]);
    let more = merge(long(), json!({"temperature": 1.3, "seed": 4, "n": 2, "logprobs": 2, "echo": true}));
    let whole = server.complete(json!([PROMPT, "Spell bread."]), more.clone()).ok();
    let body = completion_body(json!([PROMPT, "Spell bread."]), merge(more, json!({"stream": true})));
    let streamed: cadre_tests::client::Transcript = server.client().events("/v1/completions", &body).collect();
    assert!(streamed.done);
    for index in 0..4 {
        let expected = &whole["choices"][index];
        assert_eq!(streamed.text_of(index as u64), expected["text"].as_str().unwrap(), "choice {index}");
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            let of_choice = streamed.choices().filter(|choice| choice["index"] == index);
            let pieces: Vec<Value> =
                of_choice.filter_map(|choice| choice["logprobs"][list].as_array().cloned()).flatten().collect();
            assert_eq!(json!(pieces), expected["logprobs"][list], "{list} of choice {index}");
        }
    }
}

#[test]
fn echo_without_generation_scores_the_prompt() {
    let server = Server::start(&[]);
    let tokens = server.tokens(PROMPT);
    let answer = server.complete(PROMPT, json!({"echo": true, "logprobs": 3, "max_tokens": 0})).ok();
    assert_eq!(text(&answer), PROMPT);
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let logprobs = &answer["choices"][0]["logprobs"];
    let own = numbers(&logprobs["token_logprobs"]);
    assert_eq!((own.len(), own[0]), (tokens.len(), None));
    assert!(own[1..].iter().all(|logprob| logprob.is_some_and(|x| x <= 0.0)), "{own:?}");
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    let places: Vec<usize> =
        logprobs["text_offset"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as usize).collect();
    let names: Vec<&str> = logprobs["tokens"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for (name, place) in names.iter().zip(places) {
        assert!(PROMPT[place..].starts_with(name), "{name:?} at {place}");
    }
    assert_eq!(names.concat(), PROMPT);

    // vLLM's own field tells the same.
    let answer = server.complete(PROMPT, json!({"prompt_logprobs": 3, "max_tokens": 1})).ok();
    let entries = answer["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!((entries.len(), &entries[0]), (tokens.len(), &Value::Null));
    for ((entry, token), own) in entries.iter().zip(&tokens).zip(own).skip(1) {
        let entry = &entry[token.to_string()];
        assert_eq!(entry["logprob"].as_f64(), own);
        assert!(entry["rank"].as_u64().unwrap() >= 1 && entry["decoded_token"].is_string());
    }
    // So does a chat's answer.
    let chat = server.chat("Hello", json!({"prompt_logprobs": 0, "max_tokens": 1})).ok();
    assert_eq!(chat["usage"]["prompt_tokens"], chat["prompt_logprobs"].as_array().unwrap().len());
}

/// What generation says about its tokens is, bit by bit, what scoring says about the same tokens.
#[test]
fn scoring_a_generated_text_gives_its_own_logprobs() {
    let server = Server::start(&["--max-num-batched-tokens", "7"]);
    let prompt = server.tokens(PROMPT);
    let more = merge(long(), json!({"logprobs": 1, "return_token_ids": true, "temperature": 1, "seed": 11}));
    let generated = server.complete(prompt.clone(), more).ok();
    let tokens = ids(&generated["choices"][0]["token_ids"]);
    let all: Vec<u32> = prompt.iter().chain(&tokens).copied().collect();
    let scored = server.complete(all.clone(), json!({"echo": true, "logprobs": 1, "max_tokens": 0})).ok();
    let own = numbers(&scored["choices"][0]["logprobs"]["token_logprobs"]);
    assert_eq!(own.len(), all.len());
    assert_eq!(own[prompt.len()..], numbers(&generated["choices"][0]["logprobs"]["token_logprobs"]));
}

#[test]
fn echo_comes_before_what_is_generated() {
    let server = Server::start(&[]);
    let plain = server.complete(PROMPT, merge(long(), json!({"logprobs": 0}))).ok();
    let echoed = server.complete(PROMPT, merge(long(), json!({"logprobs": 0, "echo": true}))).ok();
    assert_eq!(text(&echoed), format!("{PROMPT}{}", text(&plain)));
    let prompt_tokens = server.tokens(PROMPT).len();
    let logprobs = |answer: &Value| numbers(&answer["choices"][0]["logprobs"]["token_logprobs"]);
    assert_eq!(logprobs(&echoed)[prompt_tokens..], logprobs(&plain));
    let first = &echoed["choices"][0]["logprobs"]["text_offset"][prompt_tokens];
    assert_eq!(first, PROMPT.chars().count());
}

#[test]
fn prompts_that_are_too_long_are_cut_only_when_asked() {
    let server = Server::start(&[]);
    let tokens: Vec<u32> = (0..2000).map(|index| 5 + index % 256).collect();
    assert_eq!(server.complete(tokens.clone(), json!({})).status, 400);
    let more = json!({"truncate_prompt_tokens": 10, "max_tokens": 1, "return_token_ids": true});
    let answer = server.complete(tokens.clone(), more.clone()).ok();
    assert_eq!(ids(&answer["choices"][0]["prompt_token_ids"]), tokens[1990..]);
    let answer = server.complete(tokens.clone(), merge(more, json!({"truncation_side": "right"}))).ok();
    assert_eq!(ids(&answer["choices"][0]["prompt_token_ids"]), tokens[..10]);
}

#[test]
fn tokens_can_be_named_by_their_ids() {
    let server = Server::start(&[]);
    let more = merge(long(), json!({"logprobs": 1, "return_tokens_as_token_ids": true, "return_token_ids": true}));
    let answer = server.complete(PROMPT, more).ok();
    let tokens = ids(&answer["choices"][0]["token_ids"]);
    let expected: Vec<String> = tokens.iter().map(|id| format!("token_id:{id}")).collect();
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"], json!(expected));
}
