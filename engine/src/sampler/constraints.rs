//! What a request does to the logits before a token is chosen. Excluded tokens get minus infinity.

use crate::sequence::Sequence;

const EXCLUDED: f32 = f32::NEG_INFINITY;

/// Whether [`apply`] may change anything.
pub(super) fn any(sequence: &Sequence) -> bool {
    let (params, stop) = (&sequence.request().sampling, &sequence.request().stop);
    params.allowed_token_ids.is_some()
        || !params.bad_words.is_empty()
        || !params.logit_bias.is_empty()
        || sequence.generated().len() < stop.min_tokens as usize
        || params.repetition_penalty != 1.0
        || sequence.counts().generated().next().is_some()
}

/// Applies everything in the order that [`super`] gives. Ids outside of the row are ignored.
pub(super) fn apply(logits: &mut [f32], sequence: &Sequence) {
    let params = &sequence.request().sampling;
    if let Some(allowed) = &params.allowed_token_ids {
        keep_only(logits, allowed);
    }
    for word in &params.bad_words {
        exclude_word_end(logits, word, sequence.generated());
    }
    exclude_stops(logits, sequence);
    for (&token, bias) in &params.logit_bias {
        change(logits, token, |logit| logit + bias);
    }
    apply_penalties(logits, sequence);
}

fn change(logits: &mut [f32], token: u32, change: impl Fn(f32) -> f32) {
    if let Some(logit) = logits.get_mut(token as usize) {
        *logit = change(*logit);
    }
}

fn keep_only(logits: &mut [f32], allowed: &[u32]) {
    let kept: Vec<_> = allowed.iter().filter_map(|&token| Some((token, *logits.get(token as usize)?))).collect();
    logits.fill(EXCLUDED);
    for (token, logit) in kept {
        change(logits, token, |_| logit);
    }
}

/// Excludes the last token of `word` where the continuation ends with the tokens before it.
fn exclude_word_end(logits: &mut [f32], word: &[u32], generated: &[u32]) {
    if let Some((&last, before)) = word.split_last()
        && generated.ends_with(before)
    {
        change(logits, last, |_| EXCLUDED);
    }
}

fn exclude_stops(logits: &mut [f32], sequence: &Sequence) {
    let stop = &sequence.request().stop;
    if sequence.generated().len() < stop.min_tokens as usize {
        for &token in stop.eos_token_ids.iter().chain(&stop.stop_token_ids) {
            change(logits, token, |_| EXCLUDED);
        }
    }
}

fn apply_penalties(logits: &mut [f32], sequence: &Sequence) {
    let params = &sequence.request().sampling;
    let repetition = params.repetition_penalty;
    if repetition != 1.0 {
        for token in sequence.counts().seen() {
            change(logits, token, |logit| if logit > 0.0 { logit / repetition } else { logit * repetition });
        }
    }
    for (token, count) in sequence.counts().generated() {
        change(logits, token, |logit| logit - params.frequency_penalty * count as f32 - params.presence_penalty);
    }
}
