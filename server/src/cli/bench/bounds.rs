//! The most that a machine allows: no step is shorter than reading its weights once takes, nor than its
//! multiply-adds do. Both are held to overlap fully; keys, values and activations count as nothing. A model that the
//! caches hold may exceed it, and so may uneven routing, which reads fewer experts than the bound expects.

use anyhow::{Result, ensure};
use cadre_engine::{
    compute::{Compute, Roofline},
    model::ModelInfo,
    nn::Format,
};

use super::{Kind, Run};
use crate::{engine::Engine, host};

/// The buffer whose reading is timed: larger than any cache.
const BUFFER_BYTES: u64 = 1 << 30;
/// Below this a large cache might hold it.
const LEAST_BUFFER_BYTES: usize = 256 << 20;

/// What a model asks of a machine.
pub(super) struct Bounds {
    compute: Compute,
    format: Format,
    work: Work,
}

/// What a run could not exceed, why, and how much of it the run reached.
pub(super) struct Bound {
    pub(super) tokens_per_second: f64,
    pub(super) roofline: Roofline,
    pub(super) share: f64,
}

impl Bounds {
    pub(super) fn new(engine: &Engine, max_num_batched_tokens: usize) -> Self {
        let work = Work { model: engine.runtime.handle().info().clone(), max_num_batched_tokens };
        // The experts do most of the work.
        Self { compute: engine.compute.clone(), format: engine.formats.experts, work }
    }

    /// Measures the machine.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub(super) fn measure(&self) -> Result<Roofline> {
        let quarter = host::free_memory_bytes().map_or(BUFFER_BYTES, |bytes| bytes / 4);
        let buffer_bytes = usize::try_from(BUFFER_BYTES.min(quarter))?;
        ensure!(
            buffer_bytes >= LEAST_BUFFER_BYTES,
            "--roofline reads a quarter of the free memory, which must be more than the caches hold: expected at least \
             {LEAST_BUFFER_BYTES} bytes, found {buffer_bytes}; free memory, or leave --roofline out"
        );
        Ok(self.compute.roofline(self.format, buffer_bytes)?)
    }

    /// What the machine, which could do `roofline` around the run, allowed for the `speed` in tokens per second.
    pub(super) fn of(&self, kind: Kind, run: &Run, roofline: Roofline, speed: f64) -> Bound {
        let tokens_per_second = match kind {
            Kind::Prefill => self.work.prefill(run.prompt, &roofline),
            Kind::Decode => self.work.decode(run.batch, &roofline),
        };
        Bound { tokens_per_second, roofline, share: speed / tokens_per_second }
    }
}

/// The work of a run: a model, and how its prompts are cut.
struct Work {
    model: ModelInfo,
    max_num_batched_tokens: usize,
}

impl Work {
    /// A prompt goes in steps of `max_num_batched_tokens`; the head takes part once, for the last token.
    fn prefill(&self, prompt: usize, roofline: &Roofline) -> f64 {
        let (full_steps, rest) = (prompt / self.max_num_batched_tokens, prompt % self.max_num_batched_tokens);
        let body = |tokens: usize| self.model.touched_bytes(tokens) - self.model.head_bytes as f64;
        let last = if rest > 0 { body(rest) } else { 0.0 };
        let bytes = full_steps as f64 * body(self.max_num_batched_tokens) + last + self.model.head_bytes as f64;
        self.tokens_per_second(prompt, 1, bytes, roofline)
    }

    fn decode(&self, batch: usize, roofline: &Roofline) -> f64 {
        self.tokens_per_second(batch, batch, self.model.touched_bytes(batch), roofline)
    }

    /// For `tokens`, of which `scored` have logits, with `bytes` of weights read.
    fn tokens_per_second(&self, tokens: usize, scored: usize, bytes: f64, roofline: &Roofline) -> f64 {
        let body = (self.model.active_parameters - self.model.head_parameters) as f64;
        let operations = 2.0 * (body * tokens as f64 + self.model.head_parameters as f64 * scored as f64);
        tokens as f64 / (bytes / roofline.read_bandwidth).max(operations / roofline.matrix_rate)
    }
}

#[cfg(test)]
mod tests {
    use cadre_engine::model::MoeLayerInfo;

    use super::*;

    const ROOFLINE: Roofline = Roofline { read_bandwidth: 1e11, matrix_rate: 1e12 };

    /// A layer of 4 experts, of which a token uses 2, and a head of a tenth of the rest.
    fn work() -> Work {
        let model = ModelInfo {
            num_layers: 1,
            hidden_size: 1,
            vocab_size: 1,
            num_kv_heads: 1,
            head_dim: 1,
            max_position_embeddings: 1,
            total_parameters: 0,
            active_parameters: 110_000_000,
            head_parameters: 10_000_000,
            weight_bytes: 0,
            dense_bytes: 200_000_000,
            head_bytes: 50_000_000,
            moe_layers: vec![MoeLayerInfo { experts: 4, top_k: 2, expert_bytes: 400_000_000 }],
        };
        Work { model, max_num_batched_tokens: 512 }
    }

    #[track_caller]
    fn equal(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 1e-6, "expected {expected}, found {found}");
    }

    #[test]
    fn small_batches_wait_for_memory() {
        // 0.2 + 2 · 0.4 GB in 10 ms for one; 0.2 + 3 · 0.4 GB in 14 ms for two.
        equal(work().decode(1, &ROOFLINE), 100.0);
        equal(work().decode(2, &ROOFLINE), 2.0 / 0.014);
    }

    #[test]
    fn large_batches_wait_for_the_cores() {
        // 0.22 G operations a token.
        equal(work().decode(1000, &ROOFLINE), 1e12 / 0.22e9);
    }

    #[test]
    fn prompts_use_the_head_once() {
        // 0.2 G operations a token, and 0.02 G once; 1.8 GB in 18 ms allow more.
        equal(work().prefill(512, &ROOFLINE), 512.0 / (512.0 * 0.2e-3 + 0.02e-3));
        equal(work().prefill(1024, &ROOFLINE), 1024.0 / (1024.0 * 0.2e-3 + 0.02e-3));
    }

    #[test]
    fn prompts_read_all_weights_once_a_step() {
        let mut work = work();
        let roofline = &Roofline { matrix_rate: 1e15, ..ROOFLINE };
        // All experts in each step of 512 tokens, and of the single token of the last step two.
        equal(work.prefill(512, roofline), 512.0 / 0.018);
        equal(work.prefill(1025, roofline), 1025.0 / (2.0 * 0.0175 + 0.0095 + 0.0005));
        work.max_num_batched_tokens = 2048;
        equal(work.prefill(1024, roofline), 1024.0 / 0.018);
    }
}
