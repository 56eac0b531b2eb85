//! Choosing one token from the logits of a vocabulary of 151,936 (Qwen3): greedy, and with the filters that chat
//! clients send.

use std::sync::Arc;

use cadre_engine::{
    request::{Request, SamplingParams, StopParams},
    sampler::Sampler,
    sequence::{Sequence, SequenceId},
};
use criterion::Criterion;

const VOCAB: usize = 151_936;

fn sequence(sampling: SamplingParams, logprobs: Option<u32>) -> Sequence {
    let stop = StopParams {
        max_tokens: 16,
        min_tokens: 0,
        eos_token_ids: vec![1],
        ignore_eos: false,
        stop_token_ids: Vec::new(),
    };
    let request = Request { prompt: vec![5; 100], n: 1, sampling, stop, logprobs, prompt_logprobs: None };
    Sequence::new(SequenceId { request: 1, choice: 0 }, Arc::new(request))
}

fn sample(c: &mut Criterion) {
    let logits: Vec<f32> = (0..VOCAB).map(|i| ((i * 7919) % 100_003) as f32 * 1e-4).collect();
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let filtered =
        SamplingParams { temperature: 0.7, top_k: 40, top_p: 0.95, min_p: 0.05, ..SamplingParams::default() };
    let penalised = SamplingParams { repetition_penalty: 1.1, presence_penalty: 0.5, ..filtered.clone() };
    let mut group = c.benchmark_group("sample");
    for (name, sampling, logprobs) in [
        ("greedy", greedy.clone(), None),
        ("greedy_top_logprobs_20", greedy, Some(20)),
        ("temperature", SamplingParams::default(), None),
        ("top_k_top_p_min_p", filtered, None),
        ("penalties", penalised, None),
    ] {
        let (mut sampler, sequence) = (Sampler::default(), sequence(sampling, logprobs));
        group.bench_function(name, |b| b.iter(|| sampler.sample(&logits, &sequence)));
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    sample(&mut criterion);
    criterion.final_summary();
}
