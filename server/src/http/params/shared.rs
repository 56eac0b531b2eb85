//! The parameters that chat and text completions share: typed, in range, free of contradictions.

use std::{collections::BTreeMap, sync::Arc};

use cadre_engine::{
    adapter::LoadedAdapter,
    request::{Request, SamplingParams, Scoring, StopParams, SubmitError},
    sampler::GREEDY_BELOW,
};
use serde_json::Value;

use crate::{
    engine::Served,
    generation::OutputOptions,
    http::{error::ApiError, fields::Fields, reproducible::Reproducible},
    random::random_seed,
};

/// The most alternatives that are reported at one place.
pub const MAX_LOGPROBS: u32 = 20;
/// The most choices of one prompt.
const MAX_CHOICES: u32 = 128;
/// The most stop strings, and the most banned words.
const MAX_STRINGS: usize = 64;

/// What chat and text completions have in common, checked.
#[derive(Debug, Clone)]
pub struct Shared {
    /// Choices of each prompt.
    pub n: u32,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When a choice ends; its `max_tokens` is filled in once the prompt's length is known.
    pub stop: StopParams,
    /// The most tokens of a choice.
    pub max_tokens: MaxTokens,
    /// How tokens become text.
    pub output: OutputOptions,
    /// Alternatives at each place of the prompt.
    pub prompt_logprobs: Option<u32>,
    /// Tell the experts of tokens, from this position of the prompt on.
    pub routed_experts_from: Option<u32>,
    /// That of the model that is asked.
    pub adapter: Option<Arc<LoadedAdapter>>,
    /// Whether and how to stream.
    pub stream: Option<StreamOptions>,
    /// Report token ids beside the text.
    pub return_token_ids: bool,
    /// In log-probabilities, name tokens `token_id:<id>`.
    pub tokens_as_ids: bool,
    /// Add the tokenizer's own begin tokens, if said.
    pub add_special_tokens: Option<bool>,
    /// Cut prompts that are too long.
    pub truncate: Option<Truncate>,
}

/// The most tokens of a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaxTokens {
    /// As the request says, or not at all.
    Asked(u32),
    /// The endpoint's default, or what the context leaves.
    Default(u32),
}

/// How to stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamOptions {
    /// One more chunk with the usage at the end.
    pub include_usage: bool,
    /// The usage so far in every chunk.
    pub continuous_usage_stats: bool,
}

/// How to cut a prompt that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Truncate {
    /// Tokens to keep; `None`: as many as fit beside the tokens to generate.
    pub keep: Option<u32>,
    /// Which end is cut off.
    pub side: Side,
}

/// An end of the prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Its beginning.
    Left,
    /// Its end.
    Right,
}

impl Shared {
    /// Reads and checks the shared parameters. `max_tokens` is the endpoint's: their names and defaults differ. Without a seed
    /// of their own, draws are random unless they are to be reproducible.
    ///
    /// # Errors
    /// When a parameter is malformed, out of range or contradicts another.
    pub fn parse(
        fields: Fields<'_>,
        served: &Served,
        max_tokens: MaxTokens,
        reproducible: Option<Reproducible>,
    ) -> Result<Self, ApiError> {
        let default_seed = reproducible.map_or_else(random_seed, Reproducible::draws);
        let sampling = sampling(fields, served, default_seed)?;
        let stop = stop(fields, served, max_tokens)?;
        check_something_allowed(&sampling, &stop)?;
        let stream = stream_options(fields)?;
        Ok(Self {
            n: choices(fields, sampling.temperature)?,
            sampling,
            stop,
            max_tokens,
            output: OutputOptions {
                stop: fields.strings("stop", MAX_STRINGS)?,
                include_stop: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
                skip_special_tokens: fields.boolean("skip_special_tokens")?.unwrap_or(true),
            },
            prompt_logprobs: prompt_logprobs(fields, stream.is_some())?,
            routed_experts_from: routed_experts_from(fields, served, stream.is_some())?,
            stream,
            return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            tokens_as_ids: fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
            add_special_tokens: fields.boolean("add_special_tokens")?,
            truncate: truncate(fields, served.max_model_len)?,
            adapter: served.adapter.clone(),
        })
    }

    /// The engine's request for one prompt, cut if that was asked for.
    ///
    /// # Errors
    /// When the context has no room for `min_tokens`, or the experts of no token of the prompt are asked for.
    pub fn request(
        &self,
        mut prompt: Vec<u32>,
        max_model_len: usize,
        logprobs: Option<u32>,
    ) -> Result<Request, ApiError> {
        if let Some(truncate) = self.truncate {
            truncate.apply(&mut prompt, max_model_len, self.max_tokens);
        }
        let room = u32::try_from(max_model_len.saturating_sub(prompt.len())).unwrap_or(u32::MAX).max(1);
        let max_tokens = match self.max_tokens {
            MaxTokens::Asked(max_tokens) => max_tokens,
            MaxTokens::Default(max_tokens) => max_tokens.min(room),
        };
        if self.stop.min_tokens > max_tokens {
            let (prompt_tokens, max_tokens) = (prompt.len(), self.stop.min_tokens as usize);
            return Err(SubmitError::ContextLength { max_model_len, prompt_tokens, max_tokens }.into());
        }
        check_routed_experts_from(self.routed_experts_from, prompt.len())?;
        Ok(Request {
            prompt,
            n: self.n,
            sampling: self.sampling.clone(),
            stop: StopParams { max_tokens, ..self.stop.clone() },
            logprobs,
            scoring: self.prompt_logprobs.map(Scoring::all),
            routed_experts_from: self.routed_experts_from,
            adapter: self.adapter.clone(),
        })
    }
}

impl Truncate {
    fn apply(self, prompt: &mut Vec<u32>, max_model_len: usize, max_tokens: MaxTokens) {
        let reserved = match max_tokens {
            MaxTokens::Asked(max_tokens) => max_tokens as usize,
            MaxTokens::Default(_) => 1,
        };
        let room = max_model_len.saturating_sub(reserved).max(1);
        let keep = self.keep.map_or(room, |keep| keep as usize);
        if prompt.len() > keep {
            match self.side {
                Side::Left => drop(prompt.drain(..prompt.len() - keep)),
                Side::Right => prompt.truncate(keep),
            }
        }
    }
}

fn sampling(fields: Fields<'_>, served: &Served, default_seed: u64) -> Result<SamplingParams, ApiError> {
    let default = &served.sampling;
    let penalty = |name| fields.number(name, "in [-2, 2]", |x| (-2.0..=2.0).contains(&x));
    let vocab_size = served.vocab_size;
    Ok(SamplingParams {
        temperature: fields
            .number("temperature", "in [0, 2]", |x| (0.0..=2.0).contains(&x))?
            .unwrap_or(default.temperature),
        top_k: top_k(fields)?.unwrap_or(default.top_k),
        top_p: fields.number("top_p", "in (0, 1]", |x| x > 0.0 && x <= 1.0)?.unwrap_or(default.top_p),
        min_p: fields.number("min_p", "in [0, 1]", |x| (0.0..=1.0).contains(&x))?.unwrap_or(default.min_p),
        presence_penalty: penalty("presence_penalty")?.unwrap_or(default.presence_penalty),
        frequency_penalty: penalty("frequency_penalty")?.unwrap_or(default.frequency_penalty),
        repetition_penalty: fields
            .number("repetition_penalty", "greater than 0", |x| x > 0.0)?
            .unwrap_or(default.repetition_penalty),
        logit_bias: logit_bias(fields, vocab_size)?,
        allowed_token_ids: allowed_token_ids(fields, vocab_size)?,
        bad_words: bad_words(fields, served)?,
        seed: fields.integer("seed", i64::MIN, i64::MAX)?.map_or(default_seed, i64::cast_unsigned),
    })
}

fn top_k(fields: Fields<'_>) -> Result<Option<u32>, ApiError> {
    let found = fields.integer("top_k", i64::MIN, i64::from(u32::MAX))?;
    match found {
        Some(k) if k < -1 => {
            let message = format!("top_k must be 0 (disable), or at least 1, got {k}.");
            Err(ApiError::invalid("top_k", message))
        }
        other => Ok(other.map(|k| u32::try_from(k).unwrap_or(0))),
    }
}

fn logit_bias(fields: Fields<'_>, vocab_size: usize) -> Result<BTreeMap<u32, f32>, ApiError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(BTreeMap::new()) };
    let biases = Fields::nested(fields.get("logit_bias").unwrap_or(&Value::Null), "logit_bias")?;
    let mut parsed = BTreeMap::new();
    for key in map.keys() {
        let id = key.parse().ok().filter(|&id: &u32| (id as usize) < vocab_size).ok_or_else(|| {
            let message = format!("Keys of logit_bias must be token ids below {vocab_size}, got \"{key}\".");
            ApiError::invalid("logit_bias", message)
        })?;
        if let Some(bias) = biases.number(key, "in [-100, 100]", |x| (-100.0..=100.0).contains(&x))? {
            parsed.insert(id, bias);
        }
    }
    Ok(parsed)
}

fn allowed_token_ids(fields: Fields<'_>, vocab_size: usize) -> Result<Option<Vec<u32>>, ApiError> {
    let ids = fields.token_ids("allowed_token_ids", vocab_size)?;
    if ids.as_ref().is_some_and(Vec::is_empty) {
        return Err(ApiError::invalid("allowed_token_ids", "allowed_token_ids must not be empty: no token is left."));
    }
    Ok(ids)
}

/// A token must be left to choose, whatever is banned.
fn check_something_allowed(sampling: &SamplingParams, stop: &StopParams) -> Result<(), ApiError> {
    let Some(allowed) = &sampling.allowed_token_ids else { return Ok(()) };
    let ends = |id: &u32| stop.eos_token_ids.contains(id) || stop.stop_token_ids.contains(id);
    let banned = |id: &u32| sampling.bad_words.iter().any(|word| word == &[*id]);
    if !allowed.iter().all(|id| banned(id) || stop.min_tokens > 0 && ends(id)) {
        return Ok(());
    }
    let message = "allowed_token_ids must hold a token that neither bad_words nor min_tokens bans: no token is left.";
    Err(ApiError::invalid("allowed_token_ids", message))
}

/// Each word as it is at the beginning of a text, and as it is after a space.
fn bad_words(fields: Fields<'_>, served: &Served) -> Result<Vec<Vec<u32>>, ApiError> {
    let mut sequences: Vec<Vec<u32>> = Vec::new();
    for word in fields.strings("bad_words", MAX_STRINGS)? {
        for variant in [word.trim_start().to_owned(), format!(" {}", word.trim_start())] {
            let ids = served.tokenizer.encode(&variant, false).map_err(ApiError::internal)?;
            if !ids.is_empty() && !sequences.contains(&ids) {
                sequences.push(ids);
            }
        }
    }
    Ok(sequences)
}

fn stop(fields: Fields<'_>, served: &Served, max_tokens: MaxTokens) -> Result<StopParams, ApiError> {
    let (MaxTokens::Asked(max_tokens) | MaxTokens::Default(max_tokens)) = max_tokens;
    let min_tokens = fields.count("min_tokens", 0, u32::MAX)?.unwrap_or(0);
    if min_tokens > max_tokens {
        let message = format!("min_tokens must be at most max_tokens ({max_tokens}), got {min_tokens}.");
        return Err(ApiError::invalid("min_tokens", message));
    }
    Ok(StopParams {
        max_tokens,
        min_tokens,
        eos_token_ids: served.eos_token_ids.clone(),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        stop_token_ids: fields.token_ids("stop_token_ids", served.vocab_size)?.unwrap_or_default(),
    })
}

fn choices(fields: Fields<'_>, temperature: f32) -> Result<u32, ApiError> {
    let n = fields.count("n", 1, MAX_CHOICES)?.unwrap_or(1);
    if n > 1 && temperature < GREEDY_BELOW {
        return Err(ApiError::invalid("n", format!("n must be 1 when using greedy sampling, got {n}.")));
    }
    Ok(n)
}

fn prompt_logprobs(fields: Fields<'_>, stream: bool) -> Result<Option<u32>, ApiError> {
    let asked = fields.count("prompt_logprobs", 0, MAX_LOGPROBS)?;
    if asked.is_some() && stream {
        return Err(ApiError::invalid("prompt_logprobs", "prompt_logprobs are not available when `stream=True`."));
    }
    Ok(asked)
}

/// Where the experts that are told begin; nowhere in streams, as vLLM has it, or if the server doesn't tell them.
fn routed_experts_from(fields: Fields<'_>, served: &Served, stream: bool) -> Result<Option<u32>, ApiError> {
    const NAME: &str = "routed_experts_prompt_start";
    let start = fields.count(NAME, 0, u32::MAX)?.unwrap_or(0);
    let told = served.routed.is_some();
    if start > 0 && (stream || !told) {
        let message = if told {
            format!("{NAME} can't be used when `stream=True`: streams don't tell routed experts.")
        } else {
            format!("{NAME} needs a server that was started with --enable-return-routed-experts.")
        };
        return Err(ApiError::invalid(NAME, message));
    }
    Ok((told && !stream).then_some(start))
}

fn check_routed_experts_from(from: Option<u32>, prompt_tokens: usize) -> Result<(), ApiError> {
    match from {
        Some(start) if start > 0 && start as usize >= prompt_tokens => {
            let message = format!(
                "routed_experts_prompt_start must be less than the prompt's number of tokens ({prompt_tokens}), got {start}."
            );
            Err(ApiError::invalid("routed_experts_prompt_start", message))
        }
        _ => Ok(()),
    }
}

fn stream_options(fields: Fields<'_>) -> Result<Option<StreamOptions>, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let Some(options) = fields.get("stream_options") else {
        return Ok(stream.then(StreamOptions::default));
    };
    if !stream {
        let message = "Stream options can only be defined when `stream=True`.";
        return Err(ApiError::invalid("stream_options", message));
    }
    let options = Fields::nested(options, "stream_options")?;
    Ok(Some(StreamOptions {
        include_usage: options.boolean("include_usage")?.unwrap_or(false),
        continuous_usage_stats: options.boolean("continuous_usage_stats")?.unwrap_or(false),
    }))
}

fn truncate(fields: Fields<'_>, max_model_len: usize) -> Result<Option<Truncate>, ApiError> {
    let side = match fields.string("truncation_side")? {
        None | Some("left") => Side::Left,
        Some("right") => Side::Right,
        Some(other) => {
            let message = format!("truncation_side must be \"left\" or \"right\", got \"{other}\".");
            return Err(ApiError::invalid("truncation_side", message));
        }
    };
    let high = i64::try_from(max_model_len).unwrap_or(i64::MAX).min(u32::MAX.into());
    match fields.integer("truncate_prompt_tokens", -1, high)? {
        None => Ok(None),
        Some(0) => {
            Err(ApiError::invalid("truncate_prompt_tokens", "truncate_prompt_tokens must be -1 or at least 1, got 0."))
        }
        Some(keep) => Ok(Some(Truncate { keep: u32::try_from(keep).ok(), side })),
    }
}
