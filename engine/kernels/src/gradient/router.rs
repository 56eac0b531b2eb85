//! The backward pass of [`crate::router`], and the losses that keep its experts in balance.

use crate::router::{RouterOptions, Scores, score};

/// The losses on the router's logits beside the model's own: what their gradients need.
#[derive(Debug, Clone, Copy, Default)]
pub struct RouterLosses<'a> {
    /// The gradient of the load-balancing loss (Fedus et al., arXiv:2101.03961, equation 4) of each expert's
    /// probability in a row, the same in all rows. Empty: there is none.
    pub balance: &'a [f32],
    /// The factor of `logsumexp(logits)²` of a row (Zoph et al., arXiv:2202.08906, equation 5).
    pub z: f32,
}

/// Adds up what the losses need of `logits` `[rows, experts]`: to `probabilities` each expert's, over the rows (a sigmoid's
/// scores are divided by their sum first). Returns Σ over the rows of `logsumexp(logits)²`.
///
/// # Panics
/// When the sizes don't match.
pub fn scores(kind: Scores, logits: &[f32], probabilities: &mut [f64]) -> f64 {
    let count = probabilities.len();
    assert!(logits.len().is_multiple_of(count), "logits of {count} experts");
    let mut scores = vec![0.0; count];
    let mut squares = 0.0;
    for logits in logits.chunks_exact(count) {
        score(kind, logits, &mut scores);
        let sum = normaliser(kind, &scores);
        probabilities.iter_mut().zip(&scores).for_each(|(total, score)| *total += f64::from(score / sum));
        squares += f64::from(log_sum_exp(logits)).powi(2);
    }
    squares
}

/// What scores are divided by to be probabilities.
fn normaliser(kind: Scores, scores: &[f32]) -> f32 {
    match kind {
        Scores::Softmax => 1.0,
        Scores::Sigmoid => scores.iter().sum::<f32>() + 1e-20,
    }
}

fn log_sum_exp(logits: &[f32]) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    max + logits.iter().map(|logit| (logit - max).exp()).sum::<f32>().ln()
}

/// The gradient of `logits` `[rows, experts]` into `out`, from that of the chosen experts' weights; `experts` and
/// `weight_gradients` are `[rows, top_k]`. The choice itself has no gradient.
///
/// # Panics
/// When the sizes don't match.
pub fn route_backward(
    options: &RouterOptions,
    logits: &[f32],
    experts: &[u32],
    weight_gradients: &[f32],
    losses: RouterLosses<'_>,
    out: &mut [f32],
) {
    let top_k = options.top_k;
    let rows = experts.len() / top_k;
    assert_eq!((experts.len(), weight_gradients.len()), (rows * top_k, rows * top_k), "chosen experts");
    let Some(count) = logits.len().checked_div(rows) else { return };
    assert_eq!((logits.len(), out.len()), (rows * count, rows * count), "logits of {rows} rows");
    let mut scores = vec![0.0; count];
    // The gradient of the scores.
    let mut of_scores = vec![0.0; count];
    let chosen = experts.chunks_exact(top_k).zip(weight_gradients.chunks_exact(top_k));
    for ((logits, out), (experts, gradients)) in logits.chunks_exact(count).zip(out.chunks_exact_mut(count)).zip(chosen)
    {
        score(options.scores, logits, &mut scores);
        of_scores.fill(0.0);
        let of = |expert: &u32| scores[*expert as usize];
        let sum = if options.normalise { experts.iter().map(of).sum::<f32>() + 1e-20 } else { 1.0 };
        let weighted: f32 = experts.iter().zip(gradients).map(|(expert, gradient)| of(expert) * gradient).sum();
        let shared = if options.normalise { weighted / sum } else { 0.0 };
        for (expert, gradient) in experts.iter().zip(gradients) {
            of_scores[*expert as usize] = options.scale * (gradient - shared) / sum;
        }
        if !losses.balance.is_empty() {
            let sum = normaliser(options.scores, &scores);
            let shared = match options.scores {
                Scores::Softmax => 0.0,
                Scores::Sigmoid => scores.iter().zip(losses.balance).map(|(score, of)| score * of).sum::<f32>() / sum,
            };
            of_scores.iter_mut().zip(losses.balance).for_each(|(total, of)| *total += (of - shared) / sum);
        }
        match options.scores {
            Scores::Softmax => {
                let mean: f32 = scores.iter().zip(&of_scores).map(|(score, of)| score * of).sum();
                for ((out, score), of) in out.iter_mut().zip(&scores).zip(&of_scores) {
                    *out = score * (of - mean);
                }
            }
            Scores::Sigmoid => {
                for ((out, score), of) in out.iter_mut().zip(&scores).zip(&of_scores) {
                    *out = of * score * (1.0 - score);
                }
            }
        }
        if losses.z != 0.0 {
            let factor = 2.0 * losses.z * log_sum_exp(logits);
            score(Scores::Softmax, logits, &mut scores);
            out.iter_mut().zip(&scores).for_each(|(out, score)| *out += factor * score);
        }
    }
}
