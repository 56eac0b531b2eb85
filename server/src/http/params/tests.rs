use std::collections::HashSet;

use cadre_engine::request::SamplingParams;
use serde_json::json;

use super::{
    shared::{MaxTokens, Shared},
    *,
};
use crate::{
    engine::Served,
    http::fields::Fields,
    testing::{Fake, MAX_MODEL_LEN, object, served},
};

const LISTS: [&[&str]; 5] = [HONOURED, HONOURED_CHAT, HONOURED_COMPLETIONS, HONOURED_TOKENIZE, WITHOUT_EFFECT];

fn parse(body: Value) -> Result<Shared, ApiError> {
    parse_with(body, MaxTokens::Default(16))
}

fn parse_with(body: Value, max_tokens: MaxTokens) -> Result<Shared, ApiError> {
    Shared::parse(Fields::new(&object(body)), &served(Fake::saying("")), max_tokens, None)
}

#[test]
fn no_parameter_is_in_two_lists() {
    let refused = |list: &[Refusal]| list.iter().map(|refusal| refusal.name).collect::<Vec<_>>();
    let mut seen = HashSet::new();
    for name in LISTS.concat().into_iter().chain(refused(REFUSED)) {
        assert!(seen.insert(name), "{name} is in two lists");
    }
    for name in refused(REFUSED_CHAT).into_iter().chain(refused(REFUSED_COMPLETIONS)) {
        assert!(!HONOURED.contains(&name) && !WITHOUT_EFFECT.contains(&name), "{name} is in two lists");
    }
}

#[test]
fn the_lists_are_sorted() {
    for list in LISTS {
        assert!(list.is_sorted(), "{list:?}");
    }
    for list in [REFUSED, REFUSED_CHAT, REFUSED_COMPLETIONS] {
        assert!(list.is_sorted_by_key(|refusal| refusal.name));
    }
}

/// Every field of OpenAI's and vLLM's requests is in a list.
#[test]
fn every_published_parameter_has_its_list() {
    const CHAT: &str = "messages model audio frequency_penalty function_call functions logit_bias logprobs \
        max_completion_tokens max_tokens metadata modalities moderation n parallel_tool_calls prediction \
        presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format \
        safety_identifier seed service_tier stop store stream stream_options temperature tool_choice tools top_logprobs \
        top_p user verbosity web_search_options use_beam_search top_k min_p repetition_penalty watermarking \
        length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens \
        spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids \
        allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens documents \
        chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority request_id \
        session_id return_tokens_as_token_ids return_token_ids return_prompt_text return_weight_versions \
        routed_experts_prompt_start cache_salt kv_transfer_params vllm_xargs repetition_detection \
        thinking_token_budget include_reasoning stream_interval";
    const COMPLETIONS: &str = "model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n \
        presence_penalty seed stop stream stream_options suffix temperature top_p user";
    for (endpoint, names) in [(Endpoint::Chat, CHAT), (Endpoint::Completions, COMPLETIONS)] {
        for name in names.split_whitespace() {
            let unknown = admit(&object(json!({name: {"?": 1}})), endpoint, false);
            assert_eq!(unknown.unwrap_or_default(), Vec::<String>::new(), "{name}");
        }
    }
}

/// A value that no shared parameter takes is refused in its name: so each of them is read.
#[test]
fn every_honoured_parameter_is_read() {
    const BY_THE_ENDPOINTS: &[&str] = &["logprobs", "max_tokens", "model"];
    for name in HONOURED.iter().filter(|name| !BY_THE_ENDPOINTS.contains(name)) {
        let body =
            json!({"stream": true, name.to_owned(): if *name == "logit_bias" { json!(7) } else { json!({"?": {}}) }});
        // `stream_options` takes objects, and ignores what it doesn't know in them.
        let body = if *name == "stream_options" { json!({"stream": true, "stream_options": 7}) } else { body };
        let error = parse(body).map(drop).expect_err(name);
        assert_eq!(error.param.as_deref(), Some(*name), "{}", error.message);
    }
}

#[test]
fn ranges() {
    for (body, message) in [
        (json!({"temperature": 2.5}), "temperature must be in [0, 2], got 2.5."),
        (json!({"temperature": -0.1}), "temperature must be in [0, 2], got -0.1."),
        (json!({"top_p": 0}), "top_p must be in (0, 1], got 0."),
        (json!({"top_p": 1.1}), "top_p must be in (0, 1], got 1.1."),
        (json!({"top_k": -2}), "top_k must be 0 (disable), or at least 1, got -2."),
        (json!({"min_p": 1.5}), "min_p must be in [0, 1], got 1.5."),
        (json!({"presence_penalty": 3}), "presence_penalty must be in [-2, 2], got 3."),
        (json!({"frequency_penalty": -3}), "frequency_penalty must be in [-2, 2], got -3."),
        (json!({"repetition_penalty": 0}), "repetition_penalty must be greater than 0, got 0."),
        (json!({"n": 0}), "n must be at least 1, got 0."),
        (json!({"n": 1000}), "n must be at most 128, got 1000."),
        (json!({"n": 2, "temperature": 0}), "n must be 1 when using greedy sampling, got 2."),
        (json!({"min_tokens": 17}), "min_tokens must be at most max_tokens (16), got 17."),
        (json!({"stop": [""]}), "`stop[0]` must not be the empty string."),
        (json!({"stop": 7}), "`stop` must be a string or an array of strings, got 7."),
        (json!({"stop_token_ids": [257]}), "`stop_token_ids[0]` must be a token id below 257, got 257."),
        (json!({"logit_bias": {"x": 1}}), "Keys of logit_bias must be token ids below 257, got \"x\"."),
        (json!({"logit_bias": {"7": 101}}), "logit_bias.7 must be in [-100, 100], got 101."),
        (json!({"allowed_token_ids": []}), "allowed_token_ids must not be empty: no token is left."),
        (
            json!({"allowed_token_ids": [256, 97], "bad_words": ["a"], "min_tokens": 1}),
            "allowed_token_ids must hold a token that neither bad_words nor min_tokens bans: no token is left.",
        ),
        (json!({"prompt_logprobs": 21}), "prompt_logprobs must be at most 20, got 21."),
        (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs are not available when `stream=True`."),
        (json!({"stream_options": {}}), "Stream options can only be defined when `stream=True`."),
        (json!({"truncate_prompt_tokens": -2}), "truncate_prompt_tokens must be at least -1, got -2."),
        (json!({"truncate_prompt_tokens": 0}), "truncate_prompt_tokens must be -1 or at least 1, got 0."),
        (json!({"truncation_side": "up"}), "truncation_side must be \"left\" or \"right\", got \"up\"."),
        (json!({"routed_experts_prompt_start": -1}), "routed_experts_prompt_start must be at least 0, got -1."),
        (
            json!({"routed_experts_prompt_start": 2}),
            "routed_experts_prompt_start needs a server that was started with --enable-return-routed-experts.",
        ),
        (json!({"seed": 1.5}), "`seed` must be an integer, got 1.5."),
    ] {
        let error = parse(body.clone()).map(drop).expect_err(&body.to_string());
        assert_eq!(error.message, message);
        assert!(error.param.is_some(), "{body}");
    }
}

#[test]
fn borders_of_the_ranges_are_inside() {
    for body in [
        json!({"temperature": 0}),
        json!({"temperature": 2}),
        json!({"top_p": 1, "top_k": -1, "min_p": 0}),
        json!({"top_k": 0, "min_p": 1}),
        json!({"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 0.1}),
        json!({"logit_bias": {"0": -100, "256": 100}, "n": 128}),
        json!({"seed": i64::MIN}),
        json!({"min_tokens": 16, "stop": "x", "stop_token_ids": []}),
    ] {
        parse(body.clone()).unwrap_or_else(|error| panic!("{body}: {error}"));
    }
}

#[test]
fn null_is_absent_for_every_parameter() {
    let names = LISTS.concat().into_iter().chain(REFUSED.iter().map(|refusal| refusal.name));
    let body: Map<String, Value> = names.map(|name| (name.to_owned(), Value::Null)).collect();
    for endpoint in [Endpoint::Chat, Endpoint::Completions] {
        assert_eq!(admit(&body, endpoint, true).unwrap(), Vec::<String>::new());
    }
    parse(body.into()).unwrap();
}

#[test]
fn what_is_not_given_is_the_checkpoints() {
    let mut served = Served::clone(&served(Fake::saying("")));
    served.sampling = SamplingParams { temperature: 0.6, top_k: 20, ..SamplingParams::default() };
    let body = object(json!({"top_k": 5}));
    let sampling = Shared::parse(Fields::new(&body), &served, MaxTokens::Default(16), None).unwrap().sampling;
    assert_eq!((sampling.temperature, sampling.top_k), (0.6, 5));
}

#[test]
fn seeds() {
    assert_eq!(parse(json!({"seed": -1})).unwrap().sampling.seed, u64::MAX);
    let drawn = || parse(json!({})).unwrap().sampling.seed;
    assert_ne!(drawn(), drawn());
}

#[test]
fn bad_words_are_banned_at_the_beginning_and_after_a_space() {
    let words = parse(json!({"bad_words": ["ab"]})).unwrap().sampling.bad_words;
    assert_eq!(words, [vec![97, 98], vec![32, 97, 98]]);
}

#[test]
fn refused_parameters_pass_only_when_they_ask_for_nothing() {
    for (body, refused) in [
        (json!({"tools": [{}]}), true),
        (json!({"tool_choice": "auto"}), true),
        (json!({"tool_choice": "none"}), false),
        (json!({"response_format": {"type": "json_object"}}), true),
        (json!({"response_format": {"type": "text"}}), false),
        (json!({"modalities": ["text"]}), false),
        (json!({"modalities": ["text", "audio"]}), true),
        (json!({"use_beam_search": false, "priority": 0, "length_penalty": 1.0, "documents": []}), false),
        (json!({"guided_json": {}}), true),
        (json!({"suffix": ""}), false),
        (json!({"suffix": "x"}), true),
    ] {
        for endpoint in [Endpoint::Chat, Endpoint::Completions] {
            let result = admit(&object(body.clone()), endpoint, false);
            assert_eq!(result.is_err(), refused, "{body}");
            if let Err(error) = result {
                assert!(body.get(error.param.unwrap()).is_some());
            }
        }
    }
    assert!(admit(&object(json!({"echo": true})), Endpoint::Chat, false).is_err());
    assert!(admit(&object(json!({"echo": true})), Endpoint::Completions, false).is_ok());
    assert!(admit(&object(json!({"top_logprobs": 2})), Endpoint::Completions, false).is_err());
}

#[test]
fn unknown_fields_are_named_or_refused() {
    let body = object(json!({"colour": "red", "user": "me", "temperature": 1}));
    assert_eq!(admit(&body, Endpoint::Chat, false).unwrap(), ["colour"]);
    let error = admit(&body, Endpoint::Chat, true).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("colour"));
}

#[test]
fn long_prompts_are_cut_where_asked() {
    let prompt: Vec<u32> = (0..10).collect();
    for (body, kept) in [
        (json!({"truncate_prompt_tokens": 3}), vec![7, 8, 9]),
        (json!({"truncate_prompt_tokens": 3, "truncation_side": "right"}), vec![0, 1, 2]),
        (json!({"truncate_prompt_tokens": 30}), prompt.clone()),
        (json!({"truncate_prompt_tokens": -1}), prompt.clone()),
        (json!({}), prompt.clone()),
    ] {
        let request = parse(body).unwrap().request(prompt.clone(), MAX_MODEL_LEN, None).unwrap();
        assert_eq!(request.prompt, kept);
    }
    let asked = parse_with(json!({"truncate_prompt_tokens": -1}), MaxTokens::Asked(6)).unwrap();
    assert_eq!(asked.request(prompt, 10, None).unwrap().prompt, [6, 7, 8, 9]);
}

#[test]
fn defaults_of_max_tokens_fit_the_context_and_demands_are_kept() {
    let max_tokens = |max_tokens, prompt: usize| {
        let shared = parse_with(json!({}), max_tokens).unwrap();
        shared.request(vec![0; prompt], 20, None).unwrap().stop.max_tokens
    };
    assert_eq!(max_tokens(MaxTokens::Default(16), 3), 16);
    assert_eq!(max_tokens(MaxTokens::Default(16), 12), 8);
    assert_eq!(max_tokens(MaxTokens::Default(u32::MAX), 12), 8);
    assert_eq!(max_tokens(MaxTokens::Default(u32::MAX), 20), 1, "the engine refuses it");
    assert_eq!(max_tokens(MaxTokens::Asked(16), 12), 16, "the engine refuses it");
    let shared = parse_with(json!({"min_tokens": 9}), MaxTokens::Default(u32::MAX)).unwrap();
    let error = shared.request(vec![0; 12], 20, None).unwrap_err();
    assert_eq!(error.body()["error"]["code"], "context_length_exceeded");
}
