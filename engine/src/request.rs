//! What crosses the channel between callers and the runtime: a [`Request`] in, [`Event`]s out.

use std::{collections::BTreeMap, sync::Arc};

use crate::{adapter::LoadedAdapter, experts::ExpertId};

/// One request: a prompt and how to continue it, `n` times.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The prompt's token ids; never empty, every id below the vocabulary's size.
    pub prompt: Vec<u32>,
    /// How many independent continuations to make. They share the prompt's KV blocks.
    pub n: u32,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When a continuation ends.
    pub stop: StopParams,
    /// Also report the log-probabilities of each generated token and of this many most likely ones.
    pub logprobs: Option<u32>,
    /// Also report how likely the prompt is.
    pub scoring: Option<Scoring>,
    /// Also report the experts that tokens were routed to, from this position of the prompt on. Those tokens of the prompt
    /// are computed, even if the prefix cache holds them.
    pub routed_experts_from: Option<u32>,
    /// What is added to the model for it.
    pub adapter: Option<Arc<LoadedAdapter>>,
    /// Who goes first. It changes when the answer comes, never the answer.
    pub priority: Priority,
}

/// Whom a request gives way to; what comes first in this order goes first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody waits for the answer.
    #[default]
    Interactive,
    /// It may take what interactive requests leave.
    Background,
}

impl Priority {
    /// All of them, who goes first at the front.
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Background];
}

/// Which log-probabilities of a prompt are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scoring {
    /// The first of its tokens that is scored, and all after it. Nothing precedes token 0, which has no score.
    pub from: u32,
    /// How many of the most likely tokens to report beside each.
    pub top: u32,
    /// Tokens that are scored in the place after the prompt.
    pub next: Vec<u32>,
}

impl Scoring {
    /// All tokens of the prompt, and `top` of the most likely ones beside each.
    #[must_use]
    pub fn all(top: u32) -> Self {
        Self { top, ..Self::default() }
    }
}

/// The log-probabilities that a [`Scoring`] asks for.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Scores {
    /// Of each token of the prompt; `None` before the first one that is scored.
    pub prompt: Vec<Option<TokenLogprobs>>,
    /// Of each token that might follow it.
    pub next: Vec<TokenLogprobs>,
}

/// How the next token is chosen from the logits. The order of application is that of vLLM's v1 sampler:
/// allowed tokens and bans, logit bias, penalties, then temperature, min-p, top-k, top-p, then the draw.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the most likely token (greedy); otherwise the logits are divided by it.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than `min_p` times the most likely one; 0 drops none.
    pub min_p: f32,
    /// Subtracted once from the logit of every token generated so far.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time it has been generated so far.
    pub frequency_penalty: f32,
    /// Logits of tokens in the prompt or generated so far are divided (if positive) or multiplied by it; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these token ids.
    pub logit_bias: BTreeMap<u32, f32>,
    /// If set, only these token ids may be chosen.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Token sequences that may not appear in the continuation.
    pub bad_words: Vec<Vec<u32>>,
    /// Seed of this request's draws; the same seed gives the same tokens whatever else is in the batch.
    /// Choice `i` of `n` draws from stream `i` of the seed.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: BTreeMap::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            seed: 0,
        }
    }
}

/// When a continuation ends. Stop strings are the caller's: the engine knows tokens only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopParams {
    /// The most tokens to generate; 0 only evaluates the prompt.
    pub max_tokens: u32,
    /// Neither end-of-sequence nor stop tokens may be chosen before this many tokens.
    pub min_tokens: u32,
    /// The model's end-of-sequence tokens.
    pub eos_token_ids: Vec<u32>,
    /// Go on through end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Further token ids that end the continuation.
    pub stop_token_ids: Vec<u32>,
}

/// What the runtime tells about a request. For each choice: any number of `Token`, then one `Finished`.
/// `Failed` ends the whole request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The request left the queue: its first prompt tokens are in this step.
    Started {
        /// Prompt tokens whose keys and values were found in the prefix cache.
        cached_tokens: u32,
    },
    /// The prompt's log-probabilities, once, before the first token; only if they were asked for.
    Scores(Scores),
    /// The experts of further tokens that went through the model, before the token that follows them; only if they were
    /// asked for. All together give each token once, in order: for choice 0 from the position asked for on, for other
    /// choices, which have the same prompt, from the first generated token on.
    RoutedExperts {
        /// Which of the `n` choices.
        choice: u32,
        /// `[tokens, layers, top_k]`, a token's experts of a layer in ascending order; zeros for layers without routed
        /// experts.
        experts: Vec<u32>,
    },
    /// One generated token. Also sent for a token that ends the continuation.
    Token {
        /// Which of the `n` choices.
        choice: u32,
        /// The token's id.
        token: u32,
        /// Its log-probabilities, if they were asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// One choice has ended.
    Finished {
        /// Which of the `n` choices.
        choice: u32,
        /// Why.
        reason: FinishReason,
    },
    /// The request has failed; nothing follows.
    Failed(RequestError),
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token was generated.
    EndOfSequence,
    /// This stop token was generated.
    StopToken(u32),
    /// `max_tokens` or the model's length limit was reached.
    Length,
}

/// Log-probabilities at one place, from the raw distribution (softmax of the unmodified logits).
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The log-probability of the token that stands at this place.
    pub logprob: f32,
    /// Its rank among all tokens, 1 being the most likely.
    pub rank: u32,
    /// The most likely tokens, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Why a request ended without finishing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The request's own constraints leave no token to choose.
    #[error("{0}")]
    NothingAllowed(String),
    /// Weights that its tokens need could not be read; they may be when the fault is gone.
    #[error("the weights of expert {} of layer {} could not be read", .0.expert, .0.layer)]
    Weights(ExpertId),
    /// A defect: the step that it was part of failed.
    #[error("the engine failed while it worked on this request: {0}")]
    Internal(String),
    /// The runtime was told to stop before the request ended.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// No prompt token.
    #[error("the prompt is empty: expected at least one token")]
    EmptyPrompt,
    /// A token id outside of the vocabulary.
    #[error("token id {token} is out of range: the vocabulary has {vocab_size} tokens")]
    UnknownToken {
        /// The id found.
        token: u32,
        /// The vocabulary's size.
        vocab_size: usize,
    },
    /// The prompt and the tokens to generate don't fit the context.
    #[error(
        "the context holds {max_model_len} tokens, but {prompt_tokens} are in the prompt and {max_tokens} are to be generated"
    )]
    ContextLength {
        /// The longest sequence that this runtime accepts.
        max_model_len: usize,
        /// The prompt's length.
        prompt_tokens: usize,
        /// The tokens asked for.
        max_tokens: usize,
    },
    /// The runtime has ended.
    #[error("the server is shutting down")]
    ShuttingDown,
}
