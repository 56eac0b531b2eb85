//! Log-probabilities from the raw logits.

use super::{
    SampleError,
    row::{Rank, Row},
};
use crate::request::TokenLogprobs;

/// Log-probability and rank of `token`, and the `top` most likely tokens; sorts only those. `best` is working memory.
pub(super) fn of(row: Row<'_>, token: u32, top: u32, best: &mut Vec<Rank>) -> Result<TokenLogprobs, SampleError> {
    let Some(&own) = row.logits.get(token as usize) else {
        return Err(SampleError::UnknownToken { token, vocab_size: row.logits.len() });
    };
    let normaliser = row.log_sum_exp();
    // Two finite logits may lie further apart than f32 reaches; a log-probability stays a number nevertheless.
    let logprob = |logit: f32| (f64::from(logit) - normaliser).max(f64::from(f32::MIN)) as f32;
    row.list_best(top as usize, best);
    best.sort_unstable();
    let top = best.iter().map(|one| (one.token(), logprob(one.logit()))).collect();
    Ok(TokenLogprobs { logprob: logprob(own), rank: rank(row.logits, token, own), top })
}

/// One more than the tokens that rank before `token`.
fn rank(logits: &[f32], token: u32, own: f32) -> u32 {
    let (before, after) = logits.split_at(token as usize);
    let higher = after.iter().filter(|&&logit| logit > own).count();
    let not_lower = before.iter().filter(|&&logit| logit >= own).count();
    1 + (higher + not_lower) as u32
}
