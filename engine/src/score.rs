//! Scoring: how likely given texts are, without generating any.
//!
//! There are two ways to the scores of a [`Passage`], which are the same bit for bit. [`Runtime`](crate::runtime::Runtime)
//! takes it as a [request](Passage::request) that generates nothing. [`LayerMajor`] carries many passages, a *super-batch*,
//! through the first layer, then through the second, and so on: each layer's weights are read once a super-batch, and those
//! of the next layer while this one computes. It is the way for models that are larger than memory.
//!
//! A super-batch lies on one axis of rows, a row a token. Its passages are sorted, and what one has in common with the one
//! before it is computed once, by whole blocks of the KV cache ([`rows`]). A layer takes the rows in chunks; between layers
//! the hidden states wait in memory or in a file ([`hidden`]). Only one layer's keys and values are there at a time, and of
//! them only those that the chunk at hand and the rest of its last passage need.

mod hidden;
mod rows;
#[cfg(test)]
mod tests;

use std::{fs::File, ops::ControlFlow, sync::Arc};

use hidden::Hidden;
use rows::{Chunk, Rows, Target};

use crate::{
    Error, Result, Tensor,
    adapter::LoadedAdapter,
    compute::Compute,
    experts::Lane,
    kv::{
        KvCache, KvDtype,
        blocks::{BLOCK_SIZE, blocks_for},
    },
    model::{Model, ModelInfo, StepBatch, StepContext},
    ops,
    request::{Request, SamplingParams, Scores, Scoring, StopParams},
    sampler::{BatchSampler, SampleError, ScoreRow},
};

/// Memory for the logits of the rows that are scored at once.
const LOGITS_BYTES: usize = 64 << 20;

/// A text whose tokens are scored.
#[derive(Debug, Clone, PartialEq)]
pub struct Passage {
    /// Its token ids; never empty, every id below the vocabulary's size.
    pub tokens: Vec<u32>,
    /// What is wanted of it.
    pub scoring: Scoring,
    /// What is added to the model for it.
    pub adapter: Option<Arc<LoadedAdapter>>,
}

impl Passage {
    /// The same as a request to the runtime, which answers it by [`Event::Scores`](crate::request::Event::Scores).
    #[must_use]
    pub fn request(self) -> Request {
        Request {
            prompt: self.tokens,
            n: 1,
            sampling: SamplingParams::default(),
            stop: StopParams {
                max_tokens: 0,
                min_tokens: 0,
                eos_token_ids: Vec::new(),
                ignore_eos: true,
                stop_token_ids: Vec::new(),
            },
            logprobs: None,
            scoring: Some(self.scoring),
            routed_experts_from: None,
            adapter: self.adapter,
        }
    }

    /// Leading tokens that have to go through the model: the last one only if something is scored after it.
    #[must_use]
    pub fn computed(&self) -> usize {
        self.tokens.len() - usize::from(self.scoring.next.is_empty())
    }
}

/// How many rows of a super-batch `passage` adds behind `before`, with which it shares the blocks that they have in common:
/// at least as many as it will add.
#[must_use]
pub fn rows_after(before: Option<&Passage>, passage: &Passage) -> usize {
    passage.computed() - before.map_or(0, |before| rows::shared_blocks(before, passage) * BLOCK_SIZE)
}

/// An order for passages that go to a runtime with a prefix cache: each with the one, if any, that should be scored before it
/// comes, so that what both begin with is computed once.
#[must_use]
pub fn in_turn(passages: &[Passage]) -> Vec<(usize, Option<usize>)> {
    rows::in_turn(passages)
}

/// The limits of a [`LayerMajor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerMajorConfig {
    /// Rows that are computed at once.
    pub chunk_rows: usize,
    /// Tokens of the longest passage.
    pub max_model_len: usize,
    /// What keys and values are kept as.
    pub kv_dtype: KvDtype,
}

impl LayerMajorConfig {
    /// Bytes that keys and values take at most.
    #[must_use]
    pub fn kv_bytes(&self, info: &ModelInfo) -> u64 {
        let block = KvCache::block_bytes(1, info.num_kv_heads, info.head_dim, self.kv_dtype);
        (blocks_for(self.max_model_len) + 2 * self.chunk_blocks()) as u64 * block as u64
    }

    /// Blocks that one chunk begins at most: short passages leave most of theirs empty.
    fn chunk_blocks(&self) -> usize {
        (self.chunk_rows / 4).max(1)
    }
}

/// How far a super-batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Rows that went through a layer, of all layers together.
    pub done: usize,
    /// How many these will be.
    pub total: usize,
}

/// Scores super-batches, one at a time.
pub struct LayerMajor {
    model: Box<dyn Model>,
    compute: Compute,
    sampler: BatchSampler,
    config: LayerMajorConfig,
}

/// What became of each passage, in the order in which they were given.
pub type PassageScores = Vec<Result<Scores, SampleError>>;

impl LayerMajor {
    /// Scores with `model`.
    #[must_use]
    pub fn new(model: Box<dyn Model>, compute: Compute, config: LayerMajorConfig) -> Self {
        Self { sampler: BatchSampler::new(compute.clone()), model, compute, config }
    }

    /// Scores `passages`. Their hidden states, f32 `[rows, hidden]`, lie in memory, or in `spill` if that is given. `tell` is
    /// told after each chunk; if it breaks, there is no result.
    ///
    /// # Errors
    /// When weights can't be read, `spill` can't be written or read, memory can't be had, or an op fails.
    pub fn score(
        &mut self,
        passages: &[Passage],
        spill: Option<File>,
        mut tell: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Option<PassageScores>> {
        let info = self.model.info().clone();
        let rows = Rows::new(passages, self.config.chunk_rows, self.config.chunk_blocks());
        let LayerMajorConfig { kv_dtype, .. } = self.config;
        let mut kv = KvCache::layer_by_layer(info.num_kv_heads, info.head_dim, rows.num_blocks, kv_dtype)?;
        let mut hidden = Hidden::new(rows.len(), info.hidden_size, spill);
        let mut scores = Unfinished::new(passages);
        let mut progress = Progress { done: 0, total: rows.len() * info.num_layers };
        for layer in 0..info.num_layers {
            for chunk in &rows.chunks {
                let batch = rows.batch(chunk, passages);
                let mut step = self.step(&batch, &mut kv);
                let before = if layer == 0 { self.model.embed(&mut step)? } else { hidden.read(chunk.rows.clone())? };
                let after = self.model.layer(&mut step, layer, before)?;
                if layer + 1 < info.num_layers {
                    hidden.write(chunk.rows.clone(), &after)?;
                } else {
                    self.head(chunk, batch, &mut kv, &after, &mut scores)?;
                }
                progress.done += chunk.rows.len();
                if tell(progress).is_break() {
                    return Ok(None);
                }
            }
        }
        Ok(Some(scores.scores))
    }

    fn step<'a>(&'a self, batch: &'a StepBatch, kv: &'a mut KvCache) -> StepContext<'a> {
        StepContext { compute: &self.compute, batch, kv, routes: None, lane: Lane::LayerMajor }
    }

    /// Scores the targets of a chunk, whose hidden states after the last layer are `hidden`.
    fn head(
        &self,
        chunk: &Chunk,
        mut batch: StepBatch,
        kv: &mut KvCache,
        hidden: &Tensor,
        scores: &mut Unfinished<'_>,
    ) -> Result<()> {
        let vocab_size = self.model.info().vocab_size;
        let most_rows = (LOGITS_BYTES / (vocab_size.max(1) * size_of::<f32>())).max(1);
        let mut targets = &chunk.targets[..];
        while let Some(first) = targets.first() {
            // Whole rows, as many as may be there at once.
            let mut wanted = vec![first.row];
            let mut taken = 0;
            for target in targets {
                if wanted.last() != Some(&target.row) {
                    if wanted.len() == most_rows {
                        break;
                    }
                    wanted.push(target.row);
                }
                taken += 1;
            }
            let (now, later) = targets.split_at(taken);
            targets = later;
            batch.logit_rows = wanted.iter().map(|row| (row - chunk.rows.start) as u32).collect();
            let selected = ops::select_rows(hidden, &batch.logit_rows)?;
            let logits = self.model.head(&mut self.step(&batch, kv), &selected)?;
            if logits.dims() != [wanted.len(), vocab_size] {
                let (expected, found) = (vec![wanted.len(), vocab_size], logits.dims().to_vec());
                return Err(Error::Shape { what: "logits of scored rows".into(), expected, found });
            }
            ops::values(&logits, |logits| {
                scores.note(now, &self.sampler.score(&scores.rows(now, &wanted, logits, vocab_size)));
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// The scores of all passages, as far as they are known.
struct Unfinished<'a> {
    passages: &'a [Passage],
    scores: PassageScores,
}

impl<'a> Unfinished<'a> {
    fn new(passages: &'a [Passage]) -> Self {
        let unscored = |passage: &Passage| {
            let first = (passage.scoring.from as usize).clamp(1, passage.tokens.len());
            Ok(Scores { prompt: vec![None; first], next: Vec::new() })
        };
        Self { passages, scores: passages.iter().map(unscored).collect() }
    }

    /// The rows of `logits`, which are those of `wanted`, that score `targets`.
    fn rows<'l>(
        &self,
        targets: &[Target],
        wanted: &[usize],
        logits: &'l [f32],
        vocab_size: usize,
    ) -> Vec<ScoreRow<'l>> {
        let of = |target: &Target| {
            let at = wanted.partition_point(|row| *row < target.row);
            let logits = &logits[at * vocab_size..][..vocab_size];
            ScoreRow { logits, token: target.token, top: self.passages[target.passage].scoring.top }
        };
        targets.iter().map(of).collect()
    }

    /// Notes what came of `targets`; those of one passage come in its order.
    fn note(&mut self, targets: &[Target], results: &[Result<crate::request::TokenLogprobs, SampleError>]) {
        for (target, result) in targets.iter().zip(results) {
            let length = self.passages[target.passage].tokens.len();
            match (&mut self.scores[target.passage], result) {
                (Ok(scores), Ok(logprobs)) if scores.prompt.len() < length => {
                    scores.prompt.push(Some(logprobs.clone()))
                }
                (Ok(scores), Ok(logprobs)) => scores.next.push(logprobs.clone()),
                (failed @ Ok(_), Err(error)) => *failed = Err(error.clone()),
                (Err(_), _) => {}
            }
        }
    }
}
