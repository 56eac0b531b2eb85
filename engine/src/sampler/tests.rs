mod statistics;
mod twin;

use std::sync::Arc;

use super::{row::Rank, *};
use crate::{
    request::{Priority, Request, StopParams},
    sequence::{RequestId, SequenceId},
};

fn request(sampling: SamplingParams) -> Request {
    let stop = StopParams {
        max_tokens: 1000,
        min_tokens: 0,
        eos_token_ids: vec![0],
        ignore_eos: false,
        stop_token_ids: vec![1],
    };
    Request {
        prompt: vec![2, 2, 3],
        n: 1,
        sampling,
        stop,
        logprobs: None,
        scoring: None,
        routed_experts_from: None,
        adapter: None,
        priority: Priority::Interactive,
    }
}

fn sequence(request: Request, choice: u32, generated: &[u32]) -> Sequence {
    let mut sequence = Sequence::new(
        SequenceId { request: RequestId { priority: Priority::Interactive, number: 1 }, choice },
        Arc::new(request),
    );
    generated.iter().for_each(|&token| sequence.push_token(token));
    sequence
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

/// The logits as they are when a token is chosen.
fn processed(row: &[f32], sequence: &Sequence) -> Vec<f32> {
    let mut logits = row.to_vec();
    constraints::apply(&mut logits, sequence);
    assert!(logits == row || constraints::any(sequence), "what would be left out");
    logits
}

fn sampler() -> Sampler {
    Sampler::new(Isa::detect())
}

fn chosen(row: &[f32], sequence: &Sequence) -> u32 {
    sampler().sample(row, sequence).expect("a token").token
}

const BANNED: f32 = f32::NEG_INFINITY;

#[test]
fn greedy_takes_the_highest_and_of_equal_ones_the_lowest_id() {
    let sequence = sequence(request(greedy()), 0, &[]);
    assert_eq!(chosen(&[1.0, 3.0, 2.0, 3.0], &sequence), 1);
    assert_eq!(chosen(&[-0.0, 0.0], &sequence), 0);
    let nearly = SamplingParams { temperature: 1e-6, ..SamplingParams::default() };
    assert_eq!(chosen(&[1.0, 1.0], &self::sequence(request(nearly), 0, &[])), 0);
}

#[test]
fn ranks_order_logits_then_ids_and_give_both_back() {
    let best_first = [f32::MAX, 2.0, 1.0, 1e-40, 0.0, -0.0, -1e-40, -1.0, -2.0, f32::MIN, f32::NEG_INFINITY];
    let ranks = best_first.map(|logit| [Rank::of(logit, 3), Rank::of(logit, u32::MAX)]);
    assert!(ranks[4] == ranks[5], "the zeros are equal");
    assert!(ranks[..5].concat().is_sorted_by(|a, b| a < b) && ranks[5..].concat().is_sorted_by(|a, b| a < b));
    for (ranks, logit) in ranks.into_iter().zip(best_first) {
        assert_eq!(ranks.map(|rank| (rank.logit(), rank.token())), [(logit, 3), (logit, u32::MAX)]);
    }
}

#[test]
fn only_allowed_tokens_stay() {
    let params = SamplingParams { allowed_token_ids: Some(vec![2, 0, 99]), ..greedy() };
    assert_eq!(processed(&[1.0, 2.0, 3.0], &sequence(request(params), 0, &[])), [1.0, BANNED, 3.0]);
}

#[test]
fn a_bad_word_is_banned_where_it_would_be_completed_in_the_continuation() {
    let params = SamplingParams { bad_words: vec![vec![1], vec![2, 3], vec![9, 2, 0], vec![]], ..greedy() };
    let after = |generated: &[u32]| processed(&[1.0; 4], &sequence(request(params.clone()), 0, generated));
    assert_eq!(after(&[]), [1.0, BANNED, 1.0, 1.0], "the prompt's end does not count");
    assert_eq!(after(&[2]), [1.0, BANNED, 1.0, BANNED]);
    assert_eq!(after(&[9, 2]), [BANNED, BANNED, 1.0, BANNED]);
}

#[test]
fn before_min_tokens_nothing_may_end_the_continuation() {
    let mut request = request(greedy());
    request.stop.min_tokens = 2;
    assert_eq!(processed(&[1.0; 3], &sequence(request.clone(), 0, &[5])), [BANNED, BANNED, 1.0]);
    assert_eq!(processed(&[1.0; 3], &sequence(request, 0, &[5, 5])), [1.0; 3]);
}

#[test]
fn bias_comes_before_the_penalties() {
    let params =
        SamplingParams { logit_bias: [(2, 3.0), (3, -3.0), (50, 1.0)].into(), repetition_penalty: 2.0, ..greedy() };
    assert_eq!(processed(&[1.0, 1.0, 1.0, 1.0, 0.5], &sequence(request(params), 0, &[4])), [1.0, 1.0, 2.0, -4.0, 0.25]);
}

#[test]
fn presence_and_frequency_count_generated_tokens_only() {
    let params = SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..greedy() };
    assert_eq!(processed(&[1.0; 4], &sequence(request(params), 0, &[0, 1, 1])), [0.25, 0.0, 1.0, 1.0]);
}

#[test]
fn what_is_dropped_is_never_drawn() {
    let row = [2.0, 1.9, 1.8, 1.7, -1.0];
    let drawn = |params: &SamplingParams| {
        let tokens =
            (0..400).map(|seed| chosen(&row, &sequence(request(SamplingParams { seed, ..params.clone() }), 0, &[])));
        tokens.collect::<std::collections::BTreeSet<u32>>().into_iter().collect::<Vec<_>>()
    };
    let all = SamplingParams::default();
    assert_eq!(drawn(&all), [0, 1, 2, 3, 4]);
    assert_eq!(drawn(&SamplingParams { top_k: 2, ..all.clone() }), [0, 1]);
    assert_eq!(drawn(&SamplingParams { top_p: 0.5, ..all.clone() }), [0, 1]);
    assert_eq!(drawn(&SamplingParams { top_p: 1e-9, ..all.clone() }), [0]);
    assert_eq!(drawn(&SamplingParams { min_p: 0.5, ..all.clone() }), [0, 1, 2, 3]);
    // top-p takes its share of what top-k left, not of everything.
    assert_eq!(drawn(&SamplingParams { top_k: 2, top_p: 0.5, ..all }), [0]);
}

#[test]
fn a_draw_depends_on_seed_choice_and_place_alone() {
    let row: Vec<f32> = (0..1000).map(|id| (id % 7) as f32 * 0.1).collect();
    let params = SamplingParams { seed: 42, ..SamplingParams::default() };
    let generate = |sampler: &mut Sampler, seed: u64, choice: u32| {
        let mut sequence = sequence(request(SamplingParams { seed, ..params.clone() }), choice, &[]);
        for _ in 0..8 {
            let token = sampler.sample(&row, &sequence).expect("a token").token;
            sequence.push_token(token);
        }
        sequence.generated().to_vec()
    };
    let mut sampler = sampler();
    let alone = generate(&mut sampler, 42, 0);
    let _other = generate(&mut sampler, 7, 3);
    assert_eq!(generate(&mut sampler, 42, 0), alone);
    assert_ne!(generate(&mut sampler, 42, 1), alone);
    assert_ne!(generate(&mut sampler, 43, 0), alone);
    // Resumed in the middle, as after a preemption, the stream goes on where it was.
    assert_eq!(chosen(&row, &sequence(request(params.clone()), 0, &alone[..5])), alone[5]);
}

#[test]
fn draws_are_pinned() {
    let draws: Vec<f64> = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (u64::MAX, 0, 0)]
        .map(|(seed, choice, place)| {
            let params = SamplingParams { seed, ..SamplingParams::default() };
            draw(&params, &sequence(request(params.clone()), choice, &vec![0; place]))
        })
        .to_vec();
    assert_eq!(draws, PINNED, "changing these changes what every seeded request generates");
}

const PINNED: [f64; 4] = [0.7090754154265618, 0.46592172228961015, 0.755531016687046, 0.6840841488189228];

#[test]
fn logprobs_are_those_of_the_raw_logits() {
    let row = [0.0, 2.0_f32.ln(), 5.0_f32.ln(), 2.0_f32.ln()];
    let params = SamplingParams { logit_bias: [(0, 50.0)].into(), ..greedy() };
    let sampled = sampler().sample(&row, &sequence(Request { logprobs: Some(3), ..request(params) }, 0, &[]));
    let sampled = sampled.expect("a token");
    let logprobs = sampled.logprobs.expect("they were asked for");
    assert_eq!((sampled.token, logprobs.rank), (0, 4));
    assert!((logprobs.logprob - 0.1_f32.ln()).abs() < 1e-6);
    let ids: Vec<_> = logprobs.top.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [2, 1, 3]);
    assert!((logprobs.top[0].1 - 0.5_f32.ln()).abs() < 1e-6);
}

#[test]
fn a_score_has_as_many_tokens_as_asked_for_and_as_there_are() {
    let mut sampler = sampler();
    for (top, given) in [(0, 0), (2, 2), (4, 4), (u32::MAX, 4)] {
        assert_eq!(sampler.score(&[1.0, 2.0, 3.0, 4.0], 2, top).expect("a score").top.len(), given);
    }
    let unknown = SampleError::UnknownToken { token: 4, vocab_size: 4 };
    assert_eq!(sampler.score(&[1.0; 4], 4, 1), Err(unknown));
}

#[test]
fn extreme_logits_have_finite_logprobs() {
    let score = sampler().score(&[f32::MAX, f32::MIN, 0.0], 1, 3).expect("a score");
    assert!(score.top.iter().all(|(_, logprob)| logprob.is_finite()), "{score:?}");
    assert_eq!(score.top[0], (0, 0.0));
}

#[test]
fn what_is_not_finite_is_an_error() {
    let plain = sequence(request(greedy()), 0, &[]);
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = sampler().sample(&[0.0, value, value], &plain).expect_err("an error");
        assert!(matches!(error, SampleError::NotFinite { token: 1, .. }), "{error}");
    }
    let biased = SamplingParams { logit_bias: [(2, f32::NAN)].into(), ..greedy() };
    let error = sampler().sample(&[0.0; 3], &sequence(request(biased), 0, &[])).expect_err("an error");
    assert!(matches!(error, SampleError::NotFinite { token: 2, .. }), "{error}");
}

#[test]
fn constraints_that_leave_nothing_are_an_error() {
    let params = SamplingParams { allowed_token_ids: Some(vec![0]), bad_words: vec![vec![0]], ..greedy() };
    let error = sampler().sample(&[0.0; 3], &sequence(request(params), 0, &[]));
    assert_eq!(error, Err(SampleError::NothingAllowed { vocab_size: 3 }));
    let nothing = sampler().sample(&[], &sequence(request(greedy()), 0, &[]));
    assert_eq!(nothing, Err(SampleError::NothingAllowed { vocab_size: 0 }));
}
