//! The router's choice, after its matmul: softmax top-8 of 128 (Qwen3-MoE) and group-limited sigmoid top-8 of 256
//! (Ling 2.0), for a prefill chunk of 512 tokens.

use cadre_kernels::router::{GroupLimit, RouterOptions, Scores, route};
use criterion::{Criterion, Throughput};

const TOKENS: usize = 512;

fn choose(c: &mut Criterion) {
    let softmax = RouterOptions {
        scores: Scores::Softmax,
        top_k: 8,
        selection_bias: None,
        groups: None,
        normalise: true,
        scale: 1.0,
    };
    let grouped = RouterOptions {
        scores: Scores::Sigmoid,
        selection_bias: Some(vec![0.01; 256]),
        groups: Some(GroupLimit { count: 8, keep: 4 }),
        scale: 2.5,
        ..softmax.clone()
    };
    let mut group = c.benchmark_group("route");
    group.throughput(Throughput::Elements(TOKENS as u64));
    for (name, options, count) in [("softmax_128", softmax, 128), ("grouped_sigmoid_256", grouped, 256)] {
        let logits: Vec<f32> = (0..TOKENS * count).map(|i| ((i * 7919) % 1009) as f32 * 0.01 - 5.0).collect();
        let (mut experts, mut weights) = (vec![0; TOKENS * 8], vec![0.0; TOKENS * 8]);
        group.bench_function(name, |b| b.iter(|| route(&options, &logits, &mut experts, &mut weights)));
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    choose(&mut criterion);
    criterion.final_summary();
}
