//! `/v1/chat/completions`: the shapes of its answers, and every parameter that changes the text.

use cadre_tests::server::{MODEL, Server, ids};
use serde_json::{Value, json};

/// Whatever the model says, it goes on for this long.
fn long() -> Value {
    json!({"ignore_eos": true, "max_tokens": 48})
}

/// Letters at random: a model that is sure of its answer would always give the same one.
fn letters(server: &Server) -> Value {
    let tokens = server.tokens("a b c d e f g h i j k l m n o p q r s t u v w x y z");
    with(long(), json!({"allowed_token_ids": tokens, "temperature": 2}))
}

fn with(mut body: Value, more: Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

const QUESTION: &str = "Where does Tom live?";

#[test]
fn a_whole_answer_has_openais_shape() {
    let server = Server::start(&[]);
    let answer = server.chat(QUESTION, json!({"max_tokens": 5, "ignore_eos": true})).ok();
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!(MODEL)));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    let choice = &answer["choices"][0];
    assert_eq!((&choice["index"], &choice["finish_reason"]), (&json!(0), &json!("length")));
    assert_eq!((&choice["message"]["role"], &choice["logprobs"]), (&json!("assistant"), &Value::Null));
    let usage = &answer["usage"];
    assert_eq!(usage["completion_tokens"], 5);
    let total = usage["prompt_tokens"].as_u64().unwrap() + 5;
    assert_eq!(usage["total_tokens"], total);
}

#[test]
fn a_streamed_answer_has_openais_shape() {
    let server = Server::start(&[]);
    let whole = server.chat(QUESTION, long()).ok();
    let streamed = server.chat_stream(QUESTION, with(long(), json!({"stream_options": {"include_usage": true}})));
    assert!(streamed.done, "the stream ends with [DONE]");
    let chunks = &streamed.chunks;
    for chunk in chunks {
        assert_eq!((&chunk["object"], &chunk["model"]), (&json!("chat.completion.chunk"), &json!(MODEL)));
        assert_eq!((&chunk["id"], &chunk["created"]), (&chunks[0]["id"], &chunks[0]["created"]));
    }
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(chunks[0]["choices"][0]["finish_reason"], Value::Null);
    let (last, usage) = (&chunks[chunks.len() - 2], &chunks[chunks.len() - 1]);
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(
        (&usage["choices"], &usage["usage"]),
        (
            &json!([]),
            &with(
                whole["usage"].clone(),
                json!({
                    "prompt_tokens_details": usage["usage"]["prompt_tokens_details"]
                })
            )
        )
    );
    let middle = &chunks[1..chunks.len() - 2];
    assert!(middle.len() > 2, "it comes in pieces: {chunks:?}");
    for chunk in middle {
        assert_eq!(chunk["usage"], Value::Null);
        assert!(chunk["choices"][0]["delta"]["content"].is_string(), "{chunk}");
        assert!(chunk["choices"][0]["delta"].get("role").is_none(), "{chunk}");
    }
    assert_eq!(streamed.text(), text(&whole));
}

#[test]
fn usage_may_be_in_every_chunk_or_in_none() {
    let server = Server::start(&[]);
    let plain = server.chat_stream(QUESTION, long());
    assert!(plain.done && plain.chunks.iter().all(|chunk| chunk.get("usage").is_none()));
    let options = json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let continuous = server.chat_stream(QUESTION, with(long(), options));
    let counts: Vec<u64> =
        continuous.chunks.iter().map(|c| c["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts.last() == Some(&48), "{counts:?}");
}

/// Bytes that never make a character, and characters of several tokens: the pieces are those of the whole.
#[test]
fn characters_are_never_split() {
    let server = Server::start(&[]);
    let tokens = server.tokens("é日🙂");
    assert!(tokens.len() > 3, "the characters are spread over tokens: {tokens:?}");
    for seed in 0..4 {
        let more = with(long(), json!({"allowed_token_ids": tokens, "temperature": 2, "seed": seed}));
        let whole = server.chat(QUESTION, more.clone()).ok();
        assert_eq!(server.chat_stream(QUESTION, more).text(), text(&whole));
    }
    // Biased to the two bytes of one character in turn, every chunk holds whole ones.
    let [first, second] = server.tokens("é")[..] else { panic!("é is two tokens") };
    let prompt = "é".repeat(8);
    let more = json!({"max_tokens": 9, "ignore_eos": true, "allowed_token_ids": [first, second], "echo": true});
    let whole = server.complete(prompt, more).ok();
    assert!(whole["choices"][0]["text"].as_str().unwrap().starts_with("éééé"));
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let server = Server::start(&[]);
    let ask = |seed: i64| server.chat(QUESTION, with(letters(&server), json!({"seed": seed}))).ok();
    let (first, again, other) = (ask(7), ask(7), ask(-8));
    assert_eq!(text(&first), text(&again));
    assert_ne!(text(&first), text(&other));
}

#[test]
fn choices_differ_and_the_first_is_what_one_would_be() {
    let server = Server::start(&[]);
    let more = with(letters(&server), json!({"seed": 3}));
    let one = server.chat(QUESTION, more.clone()).ok();
    let three = server.chat(QUESTION, with(more.clone(), json!({"n": 3}))).ok();
    let texts: Vec<&Value> = three["choices"].as_array().unwrap().iter().map(|c| &c["message"]["content"]).collect();
    assert_eq!((texts.len(), texts[0].as_str()), (3, Some(text(&one))));
    assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2]);
    assert_eq!(three["usage"]["completion_tokens"], 3 * 48);
    assert_eq!(three["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"]);

    let streamed = server.chat_stream(QUESTION, with(more, json!({"n": 3})));
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(streamed.text_of(index as u64), text.as_str().unwrap(), "choice {index}");
        let mut roles = streamed.choices().filter(|c| c["index"] == index && c["delta"]["role"].is_string());
        assert!(roles.next().is_some() && roles.next().is_none(), "one role a choice");
    }
}

#[test]
fn logprobs_are_those_of_the_tokens_chosen() {
    let server = Server::start(&[]);
    let more = with(long(), json!({"logprobs": true, "top_logprobs": 5, "return_token_ids": true}));
    let answer = server.chat(QUESTION, more.clone()).ok();
    let entries = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), 48);
    assert_eq!(ids(&answer["choices"][0]["token_ids"]).len(), 48);
    for entry in entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        let logprobs: Vec<f64> = top.iter().map(|entry| entry["logprob"].as_f64().unwrap()).collect();
        assert_eq!((top.len(), &top[0]["token"]), (5, &entry["token"]), "greedy takes the likeliest");
        assert_eq!(logprobs[0], entry["logprob"].as_f64().unwrap());
        assert!(logprobs.is_sorted_by(|a, b| a >= b) && logprobs[0] <= 0.0, "{logprobs:?}");
        assert!(logprobs.iter().map(|x| x.exp()).sum::<f64>() <= 1.0 + 1e-4, "{logprobs:?}");
    }
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e["bytes"].as_array().unwrap()).map(byte).collect();
    // Special tokens have bytes but are not part of the text.
    if !entries.iter().any(|entry| entry["token"].as_str().unwrap().starts_with('<')) {
        assert_eq!(String::from_utf8_lossy(&bytes), text(&answer));
    }
    let streamed = server.chat_stream(QUESTION, more);
    let pieces: Vec<&Value> =
        streamed.choices().filter_map(|c| c["logprobs"]["content"].as_array()).flatten().collect();
    assert_eq!(pieces, entries.iter().collect::<Vec<_>>());
    // Without top_logprobs there are none, and without logprobs there is nothing.
    let none = server.chat(QUESTION, with(long(), json!({"logprobs": true}))).ok();
    assert_eq!(none["choices"][0]["logprobs"]["content"][0]["top_logprobs"], json!([]));
}

fn byte(value: &Value) -> u8 {
    u8::try_from(value.as_u64().unwrap()).unwrap()
}

/// Every stop string of two to four characters that the text has, wherever the tokens' borders lie.
#[test]
fn stop_strings_end_the_text_across_token_borders() {
    let server = Server::start(&[]);
    let more = with(letters(&server), json!({"seed": 5, "max_tokens": 24}));
    let whole = server.chat(QUESTION, with(more.clone(), json!({"return_token_ids": true}))).ok();
    let full = text(&whole).to_owned();
    let letters: Vec<char> = full.chars().collect();
    assert!(letters.len() > 16, "{full:?}");
    for (start, length) in [(3, 2), (5, 3), (7, 4), (9, 2), (11, 3), (12, 4), (0, 1)] {
        let stop: String = letters[start..start + length].iter().collect();
        let expected = &full[..full.find(&stop).unwrap()];
        let body = with(more.clone(), json!({"stop": ["never there", stop]}));
        let answer = server.chat(QUESTION, body.clone()).ok();
        assert_eq!(text(&answer), expected, "stop {stop:?}");
        let choice = &answer["choices"][0];
        assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
        let streamed = server.chat_stream(QUESTION, body.clone());
        assert_eq!((streamed.text().as_str(), streamed.finish_reason()), (expected, Some("stop")), "stop {stop:?}");
        let kept = server.chat(QUESTION, with(body, json!({"include_stop_str_in_output": true}))).ok();
        assert_eq!(text(&kept), format!("{expected}{stop}"));
    }
    server.wait_until_idle();
    let metrics = server.metrics();
    assert_eq!(metrics.value("vllm:request_success_total", &[("finished_reason", "stop")]), 3.0 * 7.0);
    assert_eq!(metrics.value("cadre_requests_cancelled_total", &[]), 0.0, "to find a stop string is no cancellation");
    let computed = metrics.value("vllm:generation_tokens_total", &[]);
    assert!(computed < 22.0 * 24.0, "a stop string ends the computation: {computed} tokens");
}

#[test]
fn stop_tokens_end_the_text() {
    let server = Server::start(&[]);
    let more = with(letters(&server), json!({"return_token_ids": true, "seed": 2}));
    let whole = server.chat(QUESTION, more.clone()).ok();
    let tokens = ids(&whole["choices"][0]["token_ids"]);
    let stop = tokens[6];
    let place = tokens.iter().position(|&token| token == stop).unwrap();
    let answer = server.chat(QUESTION, with(more, json!({"stop_token_ids": [stop]}))).ok();
    let choice = &answer["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(stop)));
    assert_eq!(ids(&choice["token_ids"]), tokens[..=place], "the stop token is reported");
    assert!(text(&whole).starts_with(text(&answer)));
}

#[test]
fn an_answer_ends_with_the_models_own_token_unless_told_otherwise() {
    let server = Server::start(&[]);
    let eos = server.tokens("<|role_end|>");
    assert_eq!(eos.len(), 1);
    let (eos, report) = (eos[0], json!({"return_token_ids": true}));
    // All but the end and one letter is forbidden, so that any model ends at some point.
    let letter = server.tokens("x")[0];
    let bias = json!({"logit_bias": {eos.to_string(): 100, letter.to_string(): 50}});

    let answer = server.chat(QUESTION, with(bias.clone(), report.clone())).ok();
    assert_eq!(ids(&answer["choices"][0]["token_ids"]), [eos]);
    assert_eq!((text(&answer), &answer["choices"][0]["finish_reason"]), ("", &json!("stop")));
    assert_eq!(answer["choices"][0]["stop_reason"], Value::Null);

    let at_least = with(with(bias.clone(), report.clone()), json!({"min_tokens": 5, "max_tokens": 9}));
    let answer = server.chat(QUESTION, at_least).ok();
    assert_eq!(ids(&answer["choices"][0]["token_ids"]), [letter, letter, letter, letter, letter, eos]);
    assert_eq!(text(&answer), "xxxxx");

    let answer = server.chat(QUESTION, with(with(bias, report), json!({"ignore_eos": true, "max_tokens": 7}))).ok();
    assert_eq!(ids(&answer["choices"][0]["token_ids"]), [eos; 7]);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[test]
fn min_tokens_also_holds_back_stop_strings() {
    let server = Server::start(&[]);
    let letter = server.tokens("x")[0];
    let more = json!({"logit_bias": {letter.to_string(): 100}, "stop": "xx", "min_tokens": 6, "max_tokens": 20});
    assert_eq!(server.chat(QUESTION, more).ok()["usage"]["completion_tokens"], 6);
}

#[test]
fn biases_bans_and_permissions_choose_the_tokens() {
    let server = Server::start(&[]);
    let [x, y] = [server.tokens("x")[0], server.tokens("y")[0]];
    let answer = server.chat(QUESTION, with(long(), json!({"logit_bias": {x.to_string(): 100}}))).ok();
    assert_eq!(text(&answer), "x".repeat(48));
    let more = with(long(), json!({"allowed_token_ids": [x, y], "temperature": 2, "seed": 1}));
    let answer = server.chat(QUESTION, more.clone()).ok();
    assert!(text(&answer).chars().all(|letter| "xy".contains(letter)), "{answer}");
    assert!(text(&answer).contains("yx"), "both are chosen: {answer}");
    let answer = server.chat(QUESTION, with(more.clone(), json!({"bad_words": ["yx"]}))).ok();
    assert!(!text(&answer).contains("yx"), "{answer}");
    let answer = server.chat(QUESTION, with(more, json!({"logit_bias": {x.to_string(): -100}}))).ok();
    assert_eq!(text(&answer), "y".repeat(48));
}

#[test]
fn penalties_and_cuts_change_what_is_sampled() {
    let server = Server::start(&[]);
    let [x, y] = [server.tokens("x")[0], server.tokens("y")[0]];
    // Far ahead of all others, and x far ahead of y.
    let bias = json!({"logit_bias": {x.to_string(): 90, y.to_string(): 60}});
    let ask = |more: Value| text(&server.chat(QUESTION, with(long(), more)).ok()).to_owned();
    let greedy = |more: Value| ask(with(bias.clone(), more));
    assert_eq!(greedy(json!({})), "x".repeat(48));
    // The first x halves x's lead; the first y halves y's.
    assert!(greedy(json!({"repetition_penalty": 2})).starts_with("xyxx"));
    let often = greedy(json!({"frequency_penalty": 2}));
    assert!(often.starts_with("xxxx") && often.contains('y'), "{often}");
    // At most 2, once a token: seen in what is sampled from many.
    let rare = ask(with(letters(&server), json!({"presence_penalty": 2, "seed": 1})));
    assert_ne!(rare, ask(with(letters(&server), json!({"presence_penalty": -2, "seed": 1}))));
    // Cut down to the likeliest token, any temperature is greedy.
    let question = "Sort 3, 1, 2.";
    let greedy = server.chat(question, long()).ok();
    for cut in [json!({"top_k": 1}), json!({"top_p": 1e-6}), json!({"min_p": 1})] {
        let more = with(with(long(), json!({"temperature": 2, "seed": 9})), cut.clone());
        assert_eq!(text(&server.chat(question, more).ok()), text(&greedy), "{cut}");
    }
}

#[test]
fn the_template_is_told_how_to_begin_and_end() {
    let server = Server::start(&[]);
    let ask = |messages: Value, more: Value| {
        let body = json!({"model": MODEL, "messages": messages, "max_tokens": 4, "return_token_ids": true});
        let answer = server.client().post("/v1/chat/completions", &with(body, more)).ok();
        let body = json!({"tokens": ids(&answer["prompt_token_ids"])});
        server.client().post("/detokenize", &body).ok()["prompt"].as_str().unwrap().to_owned()
    };
    let user = json!({"role": "user", "content": "Hi"});
    let prompt = ask(json!([user]), json!({}));
    assert!(prompt.ends_with("<role>ASSISTANT</role>"), "{prompt}");
    let open = ask(json!([user]), json!({"add_generation_prompt": false}));
    assert_eq!(prompt, format!("{open}<role>ASSISTANT</role>"));
    let begun = json!([user, {"role": "assistant", "content": "Hello! I am"}]);
    let continued = ask(begun, json!({"continue_final_message": true}));
    assert!(continued.ends_with("<role>ASSISTANT</role>Hello! I am"), "{continued}");
    let parts = ask(json!([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]), json!({}));
    assert_eq!(parts, prompt);
    let developer = ask(json!([{"role": "developer", "content": "Be kind."}, user]), json!({}));
    assert!(developer.contains("SYSTEM</role>Be kind."), "{developer}");
}

#[test]
fn a_prefix_seen_before_is_not_computed_again_and_changes_nothing() {
    let question = "What is 1 + 2? ".repeat(12);
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let server = Server::start(&[]);
    let (first, second) = (server.chat(&question, long()).ok(), server.chat(&question, long()).ok());
    assert_eq!(cached(&first), 0);
    assert!(cached(&second) >= 64, "{}", second["usage"]);
    assert_eq!(text(&first), text(&second));
    let server = Server::start(&["--no-prefix-caching"]);
    let (third, fourth) = (server.chat(&question, long()).ok(), server.chat(&question, long()).ok());
    assert_eq!((cached(&third), cached(&fourth)), (0, 0));
    assert_eq!((text(&third), text(&fourth)), (text(&first), text(&first)));
}

#[test]
fn parameters_without_effect_have_none() {
    let server = Server::start(&[]);
    let plain = server.chat(QUESTION, long()).ok();
    let more = json!({
        "user": "u", "metadata": {"a": "b"}, "store": true, "service_tier": "auto", "parallel_tool_calls": true,
        "safety_identifier": "s", "prompt_cache_key": "k", "verbosity": "low", "stop": null, "seed": null, "tools": null,
        "temperature": null, "logit_bias": null, "response_format": {"type": "text"}, "tool_choice": "none", "n": 1,
        "field_from_the_future": [1, 2],
    });
    let answer = server.chat(QUESTION, with(long(), more));
    assert_eq!(text(&answer.ok()), text(&plain));
    assert_eq!(answer.headers.get("x-cadre-ignored").map(String::as_str), Some("field_from_the_future"));
}
