//! Whether tokens are drawn as often as their probability says. Seeds are fixed, so this either holds or doesn't.

use super::*;

const DRAWS: usize = 20_000;

/// Draws by `next` and gives Pearson's chi-square against `probabilities`.
fn chi_square(probabilities: &[f64], mut next: impl FnMut(usize) -> u32) -> f64 {
    let mut counts = vec![0_u32; probabilities.len()];
    (0..DRAWS).for_each(|at| counts[next(at) as usize] += 1);
    let term = |(&count, probability): (&u32, &f64)| {
        let expected = probability * DRAWS as f64;
        (f64::from(count) - expected).powi(2) / expected
    };
    counts.iter().zip(probabilities).map(term).sum()
}

fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let weights: Vec<f64> = logits.iter().map(|logit| f64::from(logit / temperature).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// The 99.9th percentile for 7 degrees of freedom.
const BOUND: f64 = 24.3;

const LOGITS: [f32; 8] = [0.0, 1.0, -1.0, 2.0, 0.5, 0.5, -0.5, 1.5];

fn params(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 0.8, seed, ..SamplingParams::default() }
}

#[test]
fn tokens_come_as_often_as_they_should_over_seeds_choices_and_places() {
    let probabilities = softmax(&LOGITS, 0.8);
    let over_seeds = chi_square(&probabilities, |at| chosen(&LOGITS, &sequence(request(params(at as u64)), 0, &[])));
    let over_choices = chi_square(&probabilities, |at| chosen(&LOGITS, &sequence(request(params(1)), at as u32, &[])));
    let mut long = sequence(request(params(2)), 0, &[]);
    let over_places = chi_square(&probabilities, |_| {
        let token = chosen(&LOGITS, &long);
        long.push_token(token);
        token
    });
    let all = [over_seeds, over_choices, over_places];
    assert!(all.iter().all(|statistic| *statistic < BOUND), "{all:?}");
}

#[test]
fn neighbouring_draws_are_independent() {
    let mut sampler = sampler();
    let mut pair = |seed: u64| {
        let params = SamplingParams { seed, ..SamplingParams::default() };
        let mut tokens = [0, 1].map(|place| {
            let sequence = sequence(request(params.clone()), 0, &vec![0; place]);
            sampler.sample(&[0.0; 4], &sequence).expect("a token").token
        });
        tokens[0] *= 4;
        tokens[0] + tokens[1]
    };
    let statistic = chi_square(&[1.0 / 16.0; 16], |at| pair(at as u64));
    assert!(statistic < 37.7, "{statistic}: the 99.9th percentile for 15 degrees of freedom");
}
