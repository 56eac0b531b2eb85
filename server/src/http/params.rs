//! Which parameters cadre honours, which it accepts without effect and which it refuses: the three lists.
//! Below [`shared`], the typed form of those that chat and text completions share, with their ranges.
//!
//! A parameter is never clamped, and no constraint is dropped silently: what would change the output and
//! can't be done is an error. Fields that nobody knows are ignored and named in a response header.

pub mod shared;

use serde_json::{Map, Value};

use super::{error::ApiError, fields::shown};

/// Which of the two kinds of completion is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
    /// `/tokenize` and `/detokenize`
    Tokenize,
    /// `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`
    Adapters,
    /// `/v1/fine_tuning/jobs`
    FineTuning,
    /// `/v1/batches`
    Batches,
    /// `/v1/score`
    Score,
    /// `/v1/rerank`
    Rerank,
}

/// Honoured by chat and text completions alike.
const HONOURED: &[&str] = &[
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "frequency_penalty",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "min_p",
    "min_tokens",
    "model",
    "n",
    "presence_penalty",
    "prompt_logprobs",
    "repetition_penalty",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "routed_experts_prompt_start",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
    "truncate_prompt_tokens",
    "truncation_side",
];

/// Honoured by chat completions only.
const HONOURED_CHAT: &[&str] = &[
    "add_generation_prompt",
    "chat_template_kwargs",
    "continue_final_message",
    "max_completion_tokens",
    "messages",
    "reasoning_effort",
    "top_logprobs",
];

/// Honoured by text completions only.
const HONOURED_COMPLETIONS: &[&str] = &["best_of", "echo", "prompt"];

/// Honoured by the tokenizer's routes besides those above.
const HONOURED_TOKENIZE: &[&str] = &["return_token_strs", "tokens"];

/// Honoured where adapters are loaded and unloaded.
const HONOURED_ADAPTERS: &[&str] = &["load_inplace", "lora_name", "lora_path"];

/// Honoured where fine-tuning jobs are created.
const HONOURED_FINE_TUNING: &[&str] =
    &["hyperparameters", "metadata", "method", "model", "seed", "suffix", "training_file", "validation_file"];

/// Honoured where batches are created.
const HONOURED_BATCHES: &[&str] =
    &["completion_window", "endpoint", "input_file_id", "metadata", "output_expires_after"];

/// Honoured where pairs are scored.
const HONOURED_PAIRS: &[&str] =
    &["apply_softmax", "chat_template_kwargs", "documents", "label_token_ids", "model", "query", "use_activation"];

/// Honoured by `/v1/score` besides.
const HONOURED_SCORE: &[&str] =
    &["add_special_tokens", "data_1", "data_2", "item_first", "items", "queries", "text_1", "text_2"];

/// Honoured by `/v1/rerank` besides.
const HONOURED_RERANK: &[&str] = &["return_documents", "top_n"];

/// Accepted without effect: they don't change what is generated.
const WITHOUT_EFFECT: &[&str] = &[
    "media_io_kwargs",
    "metadata",
    "mm_processor_kwargs",
    "moderation",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "session_id",
    "spaces_between_special_tokens",
    "store",
    "stream_interval",
    "user",
    "verbosity",
];

/// Refused unless set to a value that asks for nothing.
struct Refusal {
    name: &'static str,
    asks_for_nothing: fn(&Value) -> bool,
    instead: &'static str,
}

const fn refuse(name: &'static str, asks_for_nothing: fn(&Value) -> bool, instead: &'static str) -> Refusal {
    Refusal { name, asks_for_nothing, instead }
}

const CHAT_ONLY: &str = "text completions have no conversation; use /v1/chat/completions";
const UNSUPPORTED: &str = "cadre does not support it; leave it out";
const TOOLS: &str = "tool calls are not supported yet; leave it out";
const STRUCTURED: &str = "structured output is not supported yet; leave it out";

/// Refused by chat and text completions alike.
const REFUSED: &[Refusal] = &[
    refuse("audio", never, "cadre generates text only; leave it out"),
    refuse("cache_salt", never, UNSUPPORTED),
    refuse("chat_template", never, "templates from requests are not trusted; the model's own is used"),
    refuse("documents", is_empty, UNSUPPORTED),
    refuse("function_call", is_none_word, TOOLS),
    refuse("functions", is_empty, TOOLS),
    refuse("guided_choice", never, STRUCTURED),
    refuse("guided_grammar", never, STRUCTURED),
    refuse("guided_json", never, STRUCTURED),
    refuse("guided_regex", never, STRUCTURED),
    refuse("include_reasoning", is_true, "reasoning is not parsed yet, it stays in the text; leave it out"),
    refuse("kv_transfer_params", is_empty, UNSUPPORTED),
    refuse("length_penalty", is_one, "there is no beam search; leave it out"),
    refuse("logprob_token_ids", is_empty, "use `logprobs`"),
    refuse("modalities", is_text_only, "cadre generates text only; use [\"text\"]"),
    refuse("priority", is_zero, "requests are served in the order of their arrival; use 0"),
    refuse("repetition_detection", never, UNSUPPORTED),
    refuse("response_format", is_text_format, "only {\"type\": \"text\"} is supported yet"),
    refuse("return_prompt_text", is_false, "use `echo` of /v1/completions, or /tokenize"),
    refuse("return_weight_versions", is_false, UNSUPPORTED),
    refuse("structured_outputs", never, STRUCTURED),
    refuse("thinking_token_budget", never, UNSUPPORTED),
    refuse("tool_choice", is_none_word, TOOLS),
    refuse("tools", never, TOOLS),
    refuse("use_beam_search", is_false, "beam search is not supported; use `n` with a temperature"),
    refuse("vllm_xargs", is_empty, UNSUPPORTED),
    refuse("watermarking", is_false, UNSUPPORTED),
    refuse("web_search_options", never, UNSUPPORTED),
];

/// Refused by chat completions only.
const REFUSED_CHAT: &[Refusal] = &[
    refuse("best_of", is_one, "use `n`"),
    refuse("echo", is_false, "use /v1/completions"),
    refuse("suffix", is_empty, UNSUPPORTED),
];

/// Refused by text completions only.
const REFUSED_COMPLETIONS: &[Refusal] = &[
    refuse("add_generation_prompt", is_false, CHAT_ONLY),
    refuse("chat_template_kwargs", is_empty, CHAT_ONLY),
    refuse("continue_final_message", is_false, CHAT_ONLY),
    refuse("max_completion_tokens", never, "text completions are bounded by `max_tokens`"),
    refuse("messages", is_empty, CHAT_ONLY),
    refuse("reasoning_effort", is_none_word, CHAT_ONLY),
    refuse("suffix", is_empty, "no served model fills in the middle; leave it out"),
    refuse("top_logprobs", never, "give the number in `logprobs`"),
];

/// Refused where fine-tuning jobs are created.
const REFUSED_FINE_TUNING: &[Refusal] =
    &[refuse("integrations", is_empty, "this server tells nobody else of its jobs; leave it out")];

/// Refused where pairs are scored.
const REFUSED_PAIRS: &[Refusal] = &[
    refuse("activation", is_true, "it has become `use_activation`"),
    refuse("cache_salt", never, UNSUPPORTED),
    refuse("chat_template", never, "templates from requests are not trusted; start the server with --score-template"),
    refuse("priority", is_zero, "requests are served in the order of their arrival; use 0"),
    refuse("softmax", is_true, "it has become `use_activation`"),
    refuse("truncate_prompt_tokens", never, "a prompt that is cut no longer asks; shorten the document"),
];

fn never(_: &Value) -> bool {
    false
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn is_true(value: &Value) -> bool {
    value.as_bool() == Some(true)
}

fn is_false(value: &Value) -> bool {
    value.as_bool() == Some(false)
}

fn is_zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_none_word(value: &Value) -> bool {
    value.as_str() == Some("none")
}

fn is_text_format(value: &Value) -> bool {
    value.get("type").and_then(Value::as_str) == Some("text")
}

fn is_text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|kinds| kinds.iter().all(|kind| kind.as_str() == Some("text")))
}

/// Whether any route reads the parameter.
pub fn is_honoured(name: &str) -> bool {
    [
        HONOURED,
        HONOURED_CHAT,
        HONOURED_COMPLETIONS,
        HONOURED_TOKENIZE,
        HONOURED_ADAPTERS,
        HONOURED_FINE_TUNING,
        HONOURED_BATCHES,
        HONOURED_PAIRS,
        HONOURED_SCORE,
        HONOURED_RERANK,
    ]
    .iter()
    .any(|list| list.contains(&name))
}

/// Holds the body against the three lists. Returns the names of the fields that nobody knows.
///
/// # Errors
/// When a refused parameter asks for something, or, if `strict`, when there is a field that nobody knows.
pub fn admit(body: &Map<String, Value>, endpoint: Endpoint, strict: bool) -> Result<Vec<String>, ApiError> {
    let (honoured, refused): (&[&[&str]], &[&[Refusal]]) = match endpoint {
        Endpoint::Chat => (&[HONOURED, HONOURED_CHAT, WITHOUT_EFFECT], &[REFUSED, REFUSED_CHAT]),
        Endpoint::Completions => (&[HONOURED, HONOURED_COMPLETIONS, WITHOUT_EFFECT], &[REFUSED, REFUSED_COMPLETIONS]),
        // What shapes the prompt; what shapes the answer is without effect here.
        Endpoint::Tokenize => {
            (&[HONOURED, HONOURED_TOKENIZE, HONOURED_CHAT, HONOURED_COMPLETIONS, WITHOUT_EFFECT], &[REFUSED])
        }
        Endpoint::Adapters => (&[HONOURED_ADAPTERS], &[]),
        Endpoint::FineTuning => (&[HONOURED_FINE_TUNING], &[REFUSED_FINE_TUNING]),
        Endpoint::Batches => (&[HONOURED_BATCHES], &[]),
        Endpoint::Score => (&[HONOURED_PAIRS, HONOURED_SCORE, WITHOUT_EFFECT], &[REFUSED_PAIRS]),
        Endpoint::Rerank => (&[HONOURED_PAIRS, HONOURED_RERANK, WITHOUT_EFFECT], &[REFUSED_PAIRS]),
    };
    let mut unknown = Vec::new();
    for (name, value) in body.iter().filter(|(_, value)| !value.is_null()) {
        let name = name.as_str();
        if let Some(refusal) = refused.iter().copied().flatten().find(|refusal| refusal.name == name) {
            refusal.check(value)?;
        } else if !honoured.iter().any(|list| list.contains(&name)) {
            unknown.push(name.to_owned());
        }
    }
    check_unknown(&unknown, strict)?;
    Ok(unknown)
}

/// Refuses fields that nobody knows, if that was asked for.
///
/// # Errors
/// When there is one.
pub fn check_unknown(unknown: &[String], strict: bool) -> Result<(), ApiError> {
    match unknown.first() {
        Some(name) if strict => Err(ApiError::invalid(name, format!("`{name}` is not a known parameter."))),
        _ => Ok(()),
    }
}

impl Refusal {
    fn check(&self, value: &Value) -> Result<(), ApiError> {
        if (self.asks_for_nothing)(value) {
            return Ok(());
        }
        let Self { name, instead, .. } = self;
        Err(ApiError::invalid(*name, format!("`{name}` is set to {}, but {instead}.", shown(value))))
    }
}

#[cfg(test)]
mod tests;
