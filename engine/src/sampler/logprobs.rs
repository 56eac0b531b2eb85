//! Log-probabilities from the raw logits.

use super::{SampleError, by_rank, list_best};
use crate::request::TokenLogprobs;

/// Log-probability and rank of `token`, and the `top` most likely tokens. `row` is finite.
pub(super) fn of(row: &[f32], token: u32, top: u32, order: &mut Vec<u32>) -> Result<TokenLogprobs, SampleError> {
    let unknown = || SampleError::UnknownToken { token, vocab_size: row.len() };
    let own = *row.get(token as usize).ok_or_else(unknown)?;
    let normaliser = log_sum_exp(row);
    // Two finite logits may lie further apart than f32 reaches; a log-probability stays a number nevertheless.
    let logprob = |logit: f32| (f64::from(logit) - normaliser).max(f64::from(f32::MIN)) as f32;
    let before = |&(other, &logit): &(usize, &f32)| logit > own || (logit == own && other < token as usize);
    let rank = 1 + row.iter().enumerate().filter(before).count() as u32;
    let top = most_likely(row, top as usize, order).iter().map(|&id| (id, logprob(row[id as usize]))).collect();
    Ok(TokenLogprobs { logprob: logprob(own), rank, top })
}

/// The logarithm of the sum of exponentials: f32 exponentials, summed in f64 by ascending id.
fn log_sum_exp(row: &[f32]) -> f64 {
    let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|logit| f64::from((logit - highest).exp())).sum();
    f64::from(highest) + sum.ln()
}

/// The `count` tokens of the highest logits, best first; sorts only those.
fn most_likely<'a>(row: &[f32], count: usize, order: &'a mut Vec<u32>) -> &'a [u32] {
    list_best(row, 0..row.len() as u32, count, order);
    order.sort_unstable_by(by_rank(row));
    order
}
