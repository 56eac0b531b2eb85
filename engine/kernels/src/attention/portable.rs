//! The contract of the products, in plain Rust.

use std::ops::Range;

use half::bf16;

use super::{
    BLOCK_TOKENS,
    walk::{self, Expand, Products, Scores, State, Weights},
};
use crate::activation::LANES;

pub(super) struct Portable;

impl Products for Portable {
    type Operand = f32;

    unsafe fn scores<const Q: usize>(queries: &[f32], keys: &[&[f32]], scores: &mut [Scores; Q]) {
        for (query, scores) in queries.chunks_exact(queries.len() / Q).zip(scores) {
            for (keys, scores) in keys.iter().zip(scores) {
                *scores = [0.0; LANES];
                for (x, keys) in query.iter().zip(keys.chunks_exact(LANES)) {
                    scores.iter_mut().zip(keys).for_each(|(score, key)| *score += x * key);
                }
            }
        }
    }

    unsafe fn add_values<const Q: usize>(
        weights: &[Weights<f32>],
        tokens: Range<usize>,
        values: &[&[f32]],
        sums: &mut [f32],
    ) {
        for (weights, sums) in weights.iter().zip(sums.chunks_exact_mut(sums.len() / Q)) {
            for token in tokens.clone() {
                let panels = values[token / BLOCK_TOKENS].chunks_exact(LANES * BLOCK_TOKENS);
                for (panel, sums) in panels.zip(sums.chunks_exact_mut(LANES)) {
                    let values = &panel[token % BLOCK_TOKENS * LANES..];
                    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weights[token] * value);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn round(values: [f32; LANES]) -> [f32; LANES] {
        values
    }

    unsafe fn softmax(state: &mut State, scores: &mut [[f32; LANES]]) -> f32 {
        walk::softmax(state, scores)
    }

    fn prefetch(_: &[u8]) {}
}

impl Expand<f32> for Portable {
    const STORED: bool = true;

    unsafe fn expand<'a>(stored: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        stored
    }
}

impl Expand<bf16> for Portable {
    const STORED: bool = false;

    unsafe fn expand<'a>(stored: &'a [bf16], scratch: &'a mut [f32]) -> &'a [f32] {
        part_pairs(stored, scratch, bf16::to_f32)
    }
}

impl Expand<i8> for Portable {
    const STORED: bool = false;

    unsafe fn expand<'a>(stored: &'a [i8], scratch: &'a mut [f32]) -> &'a [f32] {
        part_pairs(stored, scratch, f32::from)
    }
}

/// `[.., 16][2]` to `[.., 2][16]`.
fn part_pairs<'a, T: Copy>(stored: &[T], out: &'a mut [f32], widen: impl Fn(T) -> f32) -> &'a [f32] {
    for (pairs, out) in stored.chunks_exact(2 * LANES).zip(out.chunks_exact_mut(2 * LANES)) {
        for (index, value) in pairs.iter().enumerate() {
            out[index % 2 * LANES + index / 2] = widen(*value);
        }
    }
    out
}
