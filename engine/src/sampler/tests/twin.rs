//! The sampler against a straightforward twin that sorts the whole vocabulary.

use cadre_kernels::logits::{Weighing, weigh};
use proptest::prelude::*;

use super::*;

/// Temperature, min-p, top-k, top-p and the draw, by the definitions.
fn twin(logits: &[f32], params: &SamplingParams, uniform: f64) -> u32 {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
    let best = logits[ids[0] as usize];
    // The kernels' exponential, which differs from the standard library's by up to two units in the last place.
    let mut weights = vec![0.0; logits.len()];
    let weighing = Weighing { highest: best, temperature: params.temperature, least_weight: 0.0 };
    weigh(Isa::Portable, weighing, f32::NEG_INFINITY, logits, &mut weights);
    let weight = |id: u32| weights[id as usize];
    let mass = |ids: &[u32]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids.iter().map(|&id| f64::from(weight(id))).sum::<f64>()
    };
    ids.retain(|&id| weight(id) > 0.0 && weight(id) >= params.min_p);
    if params.top_k > 0 {
        ids.truncate(params.top_k as usize);
    }
    if params.top_p < 1.0 {
        let goal = f64::from(params.top_p) * mass(&ids);
        let mut sum = 0.0;
        let reaches = |id: &u32| {
            sum += f64::from(weight(*id));
            sum >= goal
        };
        let kept = ids.iter().position(reaches).map_or(ids.len(), |at| at + 1);
        ids.truncate(kept);
    }
    let target = uniform * mass(&ids);
    ids.sort_unstable();
    let mut sum = 0.0;
    let passes = |id: &&u32| {
        sum += f64::from(weight(**id));
        sum > target
    };
    *ids.iter().find(passes).or(ids.last()).expect("a token")
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    // Whole numbers give ties, fractions don't.
    let value = prop_oneof![(-8_i8..8).prop_map(f32::from), -20.0_f32..20.0];
    prop_oneof![prop::collection::vec(value, 1..400), long_logits()]
}

/// Rows of several blocks: flat and wide ones, with many ties or few.
fn long_logits() -> impl Strategy<Value = Vec<f32>> {
    let step = prop_oneof![Just(0.5_f32), Just(1e-4_f32)];
    (400_u32..3000, 0.0_f32..30.0, step, any::<u32>()).prop_map(|(len, spread, step, seed)| {
        let uniform = |at: u32| ((at ^ seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32;
        (0..len).map(|at| (uniform(at) * uniform(at.wrapping_mul(77)) * spread / step).round() * step - 9.0).collect()
    })
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let top_p = prop_oneof![Just(1.0_f32), 0.01_f32..1.0];
    let min_p = prop_oneof![Just(0.0_f32), 0.0_f32..1.0];
    (0.05_f32..3.0, 0_u32..450, top_p, min_p, any::<u64>()).prop_map(|(temperature, top_k, top_p, min_p, seed)| {
        SamplingParams { temperature, top_k, top_p, min_p, seed, ..SamplingParams::default() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]
    #[test]
    fn chooses_what_the_twin_chooses(logits in logits(), params in params(), place in 0_usize..5) {
        let sequence = sequence(request(params.clone()), 0, &vec![2; place]);
        prop_assert_eq!(chosen(&logits, &sequence), twin(&logits, &params, draw(&params, &sequence)));
    }

    #[test]
    fn scores_as_a_full_sort_does(logits in logits(), token in any::<prop::sample::Index>(), top in 0_u32..30) {
        let token = token.index(logits.len());
        let score = sampler().score(&logits, token as u32, top).expect("a score");
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let mut ids: Vec<usize> = (0..logits.len()).collect();
        ids.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        prop_assert_eq!(score.rank as usize, 1 + ids.iter().position(|&id| id == token).expect("its place"));
        let expected = |id: usize| f64::from(logits[id]) - sum.ln();
        prop_assert!((f64::from(score.logprob) - expected(token)).abs() < 1e-5);
        prop_assert_eq!(score.top.len(), (top as usize).min(logits.len()));
        for (&(id, logprob), wanted) in score.top.iter().zip(ids) {
            prop_assert_eq!(id as usize, wanted);
            prop_assert!((f64::from(logprob) - expected(wanted)).abs() < 1e-5);
        }
    }

    #[test]
    fn never_panics_on_any_bits(
        bits in prop::collection::vec(any::<u32>(), 0..40),
        shape in (any::<f32>(), any::<u32>(), any::<f32>(), any::<f32>()),
        penalties in (any::<f32>(), any::<f32>(), any::<f32>()),
    ) {
        let logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let (temperature, top_k, top_p, min_p) = shape;
        let (presence_penalty, frequency_penalty, repetition_penalty) = penalties;
        let params = SamplingParams {
            temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty,
            ..SamplingParams::default()
        };
        let request = Request { logprobs: Some(5), ..request(params) };
        if let Ok(sampled) = sampler().sample(&logits, &sequence(request, 0, &[2, 30])) {
            prop_assert!((sampled.token as usize) < logits.len());
        }
    }
}
