//! Choosing tokens from the logits of a vocabulary of 151,936 (Qwen3): greedy, with the filters that chat clients send,
//! from peaked and flat rows, and for a batch of 32 on two threads.

use std::sync::Arc;

use cadre_engine::{
    compute::Compute,
    request::{Priority, Request, SamplingParams, StopParams},
    sampler::{BatchSampler, SampleRow, Sampler},
    sequence::{RequestId, Sequence, SequenceId},
};
use cadre_kernels::isa::Isa;
use criterion::Criterion;

const VOCAB: usize = 151_936;

const BATCH: usize = 32;

fn sequence(sampling: SamplingParams, logprobs: Option<u32>) -> Sequence {
    let stop = StopParams {
        max_tokens: 16,
        min_tokens: 0,
        eos_token_ids: vec![1],
        ignore_eos: false,
        stop_token_ids: Vec::new(),
    };
    let request = Request {
        prompt: vec![5; 100],
        n: 1,
        sampling,
        stop,
        logprobs,
        scoring: None,
        routed_experts_from: None,
        adapter: None,
        priority: Priority::Interactive,
    };
    Sequence::new(
        SequenceId { request: RequestId { priority: Priority::Interactive, number: 1 }, choice: 0 },
        Arc::new(request),
    )
}

/// A number in `[0, 1)` for each place of each seed.
fn uniform(at: usize, seed: u64) -> f32 {
    let mixed =
        (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed.wrapping_mul(0xbf58_476d_1ce4_e5b9));
    let mixed = (mixed ^ mixed >> 31).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed >> 40) as f32 / (1_u64 << 24) as f32
}

/// Logits in `[0, 1)`: top_p 0.9 keeps most of them.
fn flat() -> Vec<f32> {
    (0..VOCAB).map(|at| uniform(at, 0)).collect()
}

/// A bell of noise from 0 to 12, out of which 31 tokens rise by `rise` to `rise + 6`.
fn bell(rise: f32) -> Vec<f32> {
    let noise = |at| (0..4).map(|seed| uniform(at, seed)).sum::<f32>() * 3.0;
    let peak = |at: usize| if at.is_multiple_of(5003) { rise + 6.0 * uniform(at, 9) } else { 0.0 };
    (0..VOCAB).map(|at| noise(at) + peak(at)).collect()
}

fn sample(c: &mut Criterion) {
    // The noise has a hundred-thousandth of the peaked row's mass, and two thirds of the mixed one's.
    let (flat, mixed, peaked) = (flat(), bell(4.0), bell(16.0));
    let plain = SamplingParams::default();
    let greedy = SamplingParams { temperature: 0.0, ..plain.clone() };
    let top_p = SamplingParams { top_p: 0.9, ..plain.clone() };
    let top_k = SamplingParams { top_k: 50, ..plain.clone() };
    let filtered = SamplingParams { temperature: 0.7, top_k: 40, top_p: 0.95, min_p: 0.05, ..plain.clone() };
    let penalised = SamplingParams { repetition_penalty: 1.1, presence_penalty: 0.5, ..filtered.clone() };
    let mut group = c.benchmark_group("sample");
    for (name, row, sampling, logprobs) in [
        ("greedy", &peaked, greedy.clone(), None),
        ("greedy_logprobs_5", &peaked, greedy.clone(), Some(5)),
        ("temperature", &peaked, plain.clone(), None),
        ("top_p_peaked", &peaked, top_p.clone(), None),
        ("top_p_mixed", &mixed, top_p.clone(), None),
        ("top_p_flat", &flat, top_p.clone(), None),
        ("top_k_50", &peaked, top_k, None),
        ("top_k_top_p_min_p", &peaked, filtered, None),
        ("penalties", &peaked, penalised, None),
    ] {
        let (mut sampler, sequence) = (Sampler::new(Isa::detect()), sequence(sampling, logprobs));
        group.bench_function(name, |b| b.iter(|| sampler.sample(row, &sequence)));
    }
    group.sample_size(10);
    for (name, row, sampling) in [
        ("rows_32_greedy", &peaked, greedy),
        ("rows_32_temperature", &peaked, plain),
        ("rows_32_top_p_flat", &flat, top_p),
    ] {
        // Rows of their own memory, as the model's are.
        let logits = row.repeat(BATCH);
        let (sampler, sequence) = (BatchSampler::new(Compute::new(2)), sequence(sampling, None));
        let rows = logits.chunks(VOCAB).map(|logits| SampleRow { logits, sequence: &sequence });
        let rows: Vec<_> = rows.collect();
        group.bench_function(name, |b| b.iter(|| sampler.sample(&rows)));
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    sample(&mut criterion);
    criterion.final_summary();
}
