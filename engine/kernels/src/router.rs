//! The router: from scores of all experts to the few that a token uses.

use crate::activation;

/// How scores become a choice: data, so that a new architecture's router needs no new code.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterOptions {
    /// From logits to scores.
    pub scores: Scores,
    /// Experts per token.
    pub top_k: usize,
    /// Added to the scores for the choice alone; the weights are taken without it. `[experts]`
    pub selection_bias: Option<Vec<f32>>,
    /// Choose among the experts of the best groups only.
    pub groups: Option<GroupLimit>,
    /// Divide the chosen weights by their sum.
    pub normalise: bool,
    /// Multiply the weights by it.
    pub scale: f32,
}

/// From logits to scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// Softmax over all experts.
    Softmax,
    /// A sigmoid for each expert.
    Sigmoid,
}

/// The experts lie in `count` equal groups; a group's worth is the sum of its two best (biased) scores; the best
/// `keep` groups stay (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimit {
    /// Groups.
    pub count: usize,
    /// Groups that stay.
    pub keep: usize,
}

/// Chooses the experts of each row of `logits` `[rows, experts]`. `experts` and `weights` are `[rows, top_k]`, in
/// ascending expert index. Equal scores: the lower index wins.
///
/// # Panics
/// When the sizes don't match or the options ask for more experts than there are.
pub fn route(options: &RouterOptions, logits: &[f32], experts: &mut [u32], weights: &mut [f32]) {
    let top_k = options.top_k;
    assert!(top_k > 0 && experts.len().is_multiple_of(top_k) && experts.len() == weights.len(), "router outputs");
    if experts.is_empty() {
        return;
    }
    let count = logits.len() / (experts.len() / top_k);
    assert!(top_k <= count, "{top_k} of {count} experts");
    assert!(options.selection_bias.as_ref().is_none_or(|bias| bias.len() == count), "bias of {count} experts");
    let mut scores = vec![0.0; count];
    let mut ranking = vec![0.0; count];
    let rows = logits.chunks_exact(count).zip(experts.chunks_exact_mut(top_k)).zip(weights.chunks_exact_mut(top_k));
    for ((logits, experts), weights) in rows {
        score(options.scores, logits, &mut scores);
        ranking.copy_from_slice(&scores);
        if let Some(bias) = &options.selection_bias {
            ranking.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
        }
        if let Some(limit) = options.groups {
            drop_groups(limit, &mut ranking);
        }
        choose(&ranking, experts);
        weigh(options, &scores, experts, weights);
    }
}

/// The weights of experts that were chosen before: what [`route`] gives for the same logits and experts.
///
/// # Panics
/// When the sizes don't match.
pub fn weigh_chosen(options: &RouterOptions, logits: &[f32], experts: &[u32], weights: &mut [f32]) {
    let top_k = options.top_k;
    assert!(top_k > 0 && experts.len().is_multiple_of(top_k) && experts.len() == weights.len(), "router outputs");
    let count = logits.len().checked_div(experts.len() / top_k).unwrap_or(0);
    let mut scores = vec![0.0; count];
    let rows = experts.chunks_exact(top_k).zip(weights.chunks_exact_mut(top_k));
    for (logits, (experts, weights)) in logits.chunks_exact(count.max(1)).zip(rows) {
        score(options.scores, logits, &mut scores);
        weigh(options, &scores, experts, weights);
    }
}

pub(crate) fn score(kind: Scores, logits: &[f32], scores: &mut [f32]) {
    match kind {
        Scores::Softmax => {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            exps(logits, scores, |x| x - max);
            let sum: f32 = scores.iter().sum();
            scores.iter_mut().for_each(|score| *score /= sum);
        }
        Scores::Sigmoid => {
            exps(logits, scores, |x| -x);
            scores.iter_mut().for_each(|score| *score = 1.0 / (1.0 + *score));
        }
    }
}

/// `out = e^map(x)`, sixteen at a time.
fn exps(x: &[f32], out: &mut [f32], map: impl Fn(f32) -> f32) {
    for (x, out) in x.chunks(activation::LANES).zip(out.chunks_mut(activation::LANES)) {
        let mut lanes = [0.0; activation::LANES];
        lanes.iter_mut().zip(x).for_each(|(lane, x)| *lane = map(*x));
        out.copy_from_slice(&activation::exp(lanes)[..out.len()]);
    }
}

/// Gives the experts of the weaker groups the lowest rank.
fn drop_groups(limit: GroupLimit, ranking: &mut [f32]) {
    let size = ranking.len() / limit.count;
    let worth: Vec<f32> = ranking
        .chunks_exact(size)
        .map(|group| {
            let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for score in group {
                if *score > best {
                    (best, second) = (*score, best);
                } else if *score > second {
                    second = *score;
                }
            }
            if size == 1 { best } else { best + second }
        })
        .collect();
    let mut kept = vec![0; limit.keep];
    choose(&worth, &mut kept);
    for (group, ranking) in ranking.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&(group as u32)) {
            ranking.fill(f32::NEG_INFINITY);
        }
    }
}

/// The indices of the highest values, in ascending index. Few of many: one pass with a short sorted list.
fn choose(values: &[f32], chosen: &mut [u32]) {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(chosen.len() + 1);
    for (index, value) in values.iter().enumerate() {
        // NaN ranks lowest, so that a broken row still names distinct experts.
        let value = if value.is_nan() { f32::NEG_INFINITY } else { *value };
        if best.len() == chosen.len() && best.last().is_some_and(|(worst, _)| value <= *worst) {
            continue;
        }
        let place = best.partition_point(|(other, _)| *other >= value);
        best.insert(place, (value, index as u32));
        best.truncate(chosen.len());
    }
    chosen.iter_mut().zip(&best).for_each(|(chosen, (_, index))| *chosen = *index);
    chosen.sort_unstable();
}

fn weigh(options: &RouterOptions, scores: &[f32], experts: &[u32], weights: &mut [f32]) {
    weights.iter_mut().zip(experts).for_each(|(weight, expert)| *weight = scores[*expert as usize]);
    // The reference's guard against a zero sum.
    let sum = if options.normalise { weights.iter().sum::<f32>() + 1e-20 } else { 1.0 };
    weights.iter_mut().for_each(|weight| *weight = *weight / sum * options.scale);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(scores: Scores, top_k: usize) -> RouterOptions {
        RouterOptions { scores, top_k, selection_bias: None, groups: None, normalise: false, scale: 1.0 }
    }

    fn one(options: &RouterOptions, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let (mut experts, mut weights) = (vec![0; options.top_k], vec![0.0; options.top_k]);
        route(options, logits, &mut experts, &mut weights);
        (experts, weights)
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let options = RouterOptions { selection_bias: Some(vec![0.0, 0.0, 0.9]), ..plain(Scores::Sigmoid, 1) };
        let (experts, weights) = one(&options, &[1.0, 2.0, -1.0]);
        assert_eq!(experts, [2]);
        assert!((weights[0] - 1.0 / (1.0 + 1_f32.exp())).abs() < 1e-6);
    }

    #[test]
    fn only_the_best_groups_are_chosen_from() {
        let options = RouterOptions { groups: Some(GroupLimit { count: 3, keep: 1 }), ..plain(Scores::Sigmoid, 2) };
        // The single best expert is in group 0, but group 2 has the best two together.
        let (experts, _) = one(&options, &[3.0, -9.0, 0.0, 0.1, 2.0, 2.1]);
        assert_eq!(experts, [4, 5]);
    }

    #[test]
    fn equal_scores_take_the_lower_index_and_nan_takes_no_slot_twice() {
        assert_eq!(one(&plain(Scores::Softmax, 2), &[1.0, 2.0, 2.0, 2.0]).0, [1, 2]);
        assert_eq!(one(&plain(Scores::Softmax, 2), &[f32::NAN; 4]).0, [0, 1]);
    }

    proptest! {
        #[test]
        fn chooses_what_a_full_sort_chooses(
            logits in prop::collection::vec(-8.0_f32..8.0, 2..80), top_k in 1_usize..8, normalise: bool, sigmoid: bool,
        ) {
            let kind = if sigmoid { Scores::Sigmoid } else { Scores::Softmax };
            let top_k = top_k.min(logits.len());
            let options = RouterOptions { normalise, scale: 2.5, ..plain(kind, top_k) };
            let (experts, weights) = one(&options, &logits);
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
            let total: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
            let exact = |x: f32| match kind {
                Scores::Softmax => f64::from(x).exp() / total,
                Scores::Sigmoid => 1.0 / (1.0 + (-f64::from(x)).exp()),
            };
            let sum: f64 = if normalise { order[..top_k].iter().map(|e| exact(logits[*e])).sum() } else { 1.0 };
            for (expert, weight) in experts.iter().zip(&weights) {
                let expected = exact(logits[*expert as usize]) / sum * 2.5;
                prop_assert!((f64::from(*weight) - expected).abs() < 1e-5 * expected.max(1e-3));
            }
            let lowest = experts.iter().map(|e| exact(logits[*e as usize])).fold(f64::INFINITY, f64::min);
            prop_assert!(lowest >= exact(logits[order[top_k - 1]]) * (1.0 - 1e-6));
        }
    }
}
