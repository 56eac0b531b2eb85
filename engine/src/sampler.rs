//! Logits to a token.
//!
//! The order is that of vLLM's v1 sampler:
//! 1. log-probabilities and rank, if asked for, from the raw logits;
//! 2. allowed tokens, bad words, `min_tokens`' ban of end-of-sequence and stop tokens, logit bias ([`constraints`]);
//! 3. repetition, frequency and presence penalty;
//! 4. greedy (temperature below [`GREEDY_BELOW`]): the highest logit, of equal ones the lowest id. Otherwise
//!    temperature, min-p, top-k, top-p, and the draw ([`select`]).
//!
//! Where vLLM keeps every token that ties with the k-th, we keep exactly k: of equal logits, lower ids rank first.
//!
//! A draw depends on the seed, the choice and the number of the token, and on nothing else: the generator holds no
//! state between tokens, so neither the batch nor a preemption can change what is drawn.
//!
//! A [`Sampler`] does one row at a time, a [`BatchSampler`] the rows of a step on all threads.

mod batch;
mod constraints;
mod logprobs;
mod row;
mod select;
#[cfg(test)]
mod tests;

pub use batch::{BatchSampler, SampleRow, ScoreRow};
use cadre_kernels::isa::Isa;
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use self::row::Row;
use crate::{
    request::{SamplingParams, TokenLogprobs},
    sequence::Sequence,
};

/// Temperatures below it are greedy, as in vLLM: dividing by them would leave one token anyway.
pub const GREEDY_BELOW: f32 = 1e-5;

/// Why no token could be chosen. It fails the request, not the step.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model gave a logit that is not a number, or infinite.
    #[error("the logit of token {token} is {value}: expected finite logits")]
    NotFinite {
        /// The first such token.
        token: usize,
        /// Its logit.
        value: f32,
    },
    /// The request's own constraints exclude each other.
    #[error("allowed_token_ids, bad_words, min_tokens and logit_bias together leave none of the {vocab_size} tokens")]
    NothingAllowed {
        /// Tokens in the vocabulary.
        vocab_size: usize,
    },
    /// The token to score is not in the row.
    #[error("token {token} has no logit: the row has {vocab_size}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// Logits in the row.
        vocab_size: usize,
    },
    /// A bug: only this row's request fails by it.
    #[error("a panic at a row of logits; the log says where")]
    Panicked,
}

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probabilities, if the request asks for them.
    pub logprobs: Option<TokenLogprobs>,
}

/// Chooses tokens, a row at a time. It holds only working memory, which it reuses from row to row: up to about 12 bytes
/// for each token of the vocabulary, of which most requests use none.
#[derive(Debug)]
pub struct Sampler {
    isa: Isa,
    raw_peaks: Vec<f32>,
    constrained: Vec<f32>,
    constrained_peaks: Vec<f32>,
    selection: select::Selection,
    best: Vec<row::Rank>,
}

impl Sampler {
    /// A sampler whose passes run on `isa`; every tier gives the same bits.
    #[must_use]
    pub fn new(isa: Isa) -> Self {
        Self {
            isa,
            raw_peaks: Vec::new(),
            constrained: Vec::new(),
            constrained_peaks: Vec::new(),
            selection: select::Selection::default(),
            best: Vec::new(),
        }
    }

    /// Chooses the next token of `sequence` from `logits`, those of its last token.
    ///
    /// # Errors
    /// When a logit is not finite, or when the request's constraints leave no token.
    pub fn sample(&mut self, logits: &[f32], sequence: &Sequence) -> Result<Sampled, SampleError> {
        let raw = Row::raw(self.isa, logits, &mut self.raw_peaks)?;
        let row = if constraints::any(sequence) {
            self.constrained.clear();
            self.constrained.extend_from_slice(logits);
            constraints::apply(&mut self.constrained, sequence);
            Row::constrained(self.isa, &self.constrained, &mut self.constrained_peaks)?
        } else {
            raw
        };
        let best = row.best().ok_or(SampleError::NothingAllowed { vocab_size: logits.len() })?;
        let params = &sequence.request().sampling;
        let drawn = if params.temperature >= GREEDY_BELOW {
            self.selection.draw(row, best.logit(), params, draw(params, sequence))
        } else {
            None
        };
        let token = drawn.unwrap_or(best.token());
        let top = sequence.request().logprobs;
        let logprobs = top.map(|top| logprobs::of(raw, token, top, &mut self.best)).transpose()?;
        Ok(Sampled { token, logprobs })
    }

    /// The log-probabilities of `token` in `logits`, with the `top` most likely tokens.
    ///
    /// # Errors
    /// When a logit is not finite, or when there is none for `token`.
    pub fn score(&mut self, logits: &[f32], token: u32, top: u32) -> Result<TokenLogprobs, SampleError> {
        let row = Row::raw(self.isa, logits, &mut self.raw_peaks)?;
        logprobs::of(row, token, top, &mut self.best)
    }
}

/// The uniform number in `[0, 1)` that decides the sequence's next token: two words of ChaCha8, at a place that
/// follows from the token's number, in the stream that follows from the choice.
fn draw(params: &SamplingParams, sequence: &Sequence) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(params.seed);
    rng.set_stream(u64::from(sequence.id().choice));
    rng.set_word_pos(2 * sequence.generated().len() as u128);
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}
