//! What a step holds at once, in bytes, beside the weights.

use cadre_kernels::gradient::Transposed;

use super::head;
use crate::nn::{Decoder, DecoderLayer, Ffn, Layout};

/// Values, gradient and two moments of a number that is trained, all f32.
const BYTES_PER_PARAMETER: u64 = 16;

/// What a step holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepMemory {
    /// Each layer's input and routing, for all tokens of a step.
    pub inputs: u64,
    /// What a layer's backward pass needs beside that, for all tokens of a step, layer by layer: for those that keep it.
    pub kept: Vec<u64>,
    /// One layer's work on one batch, forward or backward.
    pub layer: u64,
    /// The head's work on some rows.
    pub head: u64,
    /// What is trained, with its gradients and the optimizer's moments.
    pub parameters: u64,
}

impl StepMemory {
    /// Of a step of `tokens` tokens, in batches of at most `batch_tokens`, the longest sequence of which is `longest`, that
    /// trains so many `numbers`.
    #[must_use]
    pub fn new(decoder: &Decoder, numbers: u64, tokens: usize, batch_tokens: usize, longest: usize) -> Self {
        let layers = &decoder.parts.layers;
        let hidden = decoder.parts.embedding.layout().k;
        let tape = |index: usize| {
            let layer = &layers[index];
            let config = layer.attention.config;
            let attention = 3 * config.query_rows() + 4 * config.kv_rows() + hidden;
            let inner = |intermediate: usize| 2 * intermediate;
            let ffn = match &layer.ffn {
                Ffn::Dense(ffn) => inner(ffn.weights.layout().intermediate),
                Ffn::Moe(ffn) => {
                    let shared = ffn.shared.as_ref().map_or(0, |ffn| inner(ffn.weights.layout().intermediate));
                    let routed = ffn.options.top_k * (inner(ffn.experts.layout().intermediate) + 2);
                    shared + routed + ffn.experts.count()
                }
            };
            4 * (attention + ffn) as u64
        };
        let kept: Vec<u64> = (0..layers.len()).map(tape).collect();
        let largest = kept.iter().copied().max().unwrap_or(0);
        // Both passes hold a tape; the backward pass its gradients too, and some copies of the hidden states. Attention
        // holds the scores of a block of queries for each thread.
        let layer = (2 * largest + 4 * 8 * hidden as u64) * batch_tokens as u64 + 4 * 4 * 48 * longest as u64;
        Self {
            inputs: (layers.len() as u64 + 2) * 4 * (hidden * tokens) as u64,
            kept: kept.into_iter().map(|bytes| bytes * tokens as u64).collect(),
            layer: layer + transposed(decoder),
            head: head::bytes(decoder.head()),
            parameters: numbers.saturating_mul(BYTES_PER_PARAMETER),
        }
    }

    /// The first layer of those that can keep all that their backward pass needs within `bytes`: the last layers do.
    #[must_use]
    pub fn keep_from(&self, bytes: u64) -> usize {
        let mut left = bytes;
        let fits = |kept: &&u64| {
            let fits = left.checked_sub(**kept);
            left = fits.unwrap_or(0);
            fits.is_some()
        };
        self.kept.len() - self.kept.iter().rev().take_while(fits).count()
    }

    /// What a step needs at least.
    #[must_use]
    pub fn least(&self) -> u64 {
        (self.inputs + self.work() + self.holes()).saturating_add(self.parameters)
    }

    /// One layer's work and the head's. They take turns, but what one of them gives back lies in pieces between what stays: the
    /// other can't have it.
    #[must_use]
    pub fn work(&self) -> u64 {
        self.layer + self.head
    }

    /// What is free between buffers, but too short for others: measured as a fiftieth of what these take, counted as more.
    #[must_use]
    pub fn holes(&self) -> u64 {
        (self.inputs + self.work()) / 16
    }
}

/// The largest matrix of a layer, transposed.
fn transposed(decoder: &Decoder) -> u64 {
    let turned =
        |layout: Layout| Layout { format: Transposed::format(layout.format), n: layout.k, k: layout.n }.bytes() as u64;
    let of_layer = |layer: &DecoderLayer| {
        let ffn = match &layer.ffn {
            Ffn::Dense(ffn) => ffn.weights.layout(),
            Ffn::Moe(ffn) => ffn.experts.layout(),
        };
        turned(layer.attention.qkv.layout()).max(turned(ffn.gate_up()))
    };
    decoder.parts.layers.iter().map(of_layer).max().unwrap_or(0)
}
