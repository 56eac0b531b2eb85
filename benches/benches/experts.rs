//! The expert-grouped feed-forward: rows per expert from 1 (decode) to 64 (prefill), shapes of a 1-billion-parameter
//! model. Throughput is in weight bytes for few rows and in multiply-adds for many.

use cadre_engine::{
    Tensor,
    compute::Compute,
    nn::{Experts, FfnLayout, Format},
    ops::{Routes, grouped_ffn},
};
use cadre_kernels::buffer::AllocError;
use criterion::{BenchmarkId, Criterion, Throughput};

const LAYOUT: FfnLayout = FfnLayout { format: Format::Bf16, hidden: 1024, intermediate: 256 };
const EXPERTS: usize = 64;
const TOP_K: usize = 8;

/// Tokens spread evenly: token `t` uses experts `t`, `t + 8`, …
fn routes(tokens: usize) -> Routes {
    let mut experts: Vec<u32> = Vec::new();
    for token in 0..tokens {
        let mut own: Vec<u32> = (0..TOP_K).map(|k| ((token + k * EXPERTS / TOP_K) % EXPERTS) as u32).collect();
        own.sort_unstable();
        experts.extend(own);
    }
    Routes { top_k: TOP_K, weights: vec![0.125; experts.len()], experts }
}

fn grouped(c: &mut Criterion) {
    let compute = Compute::new(std::thread::available_parallelism().map_or(1, usize::from));
    let experts = Experts::from_rows(&compute, LAYOUT, EXPERTS, |expert, _, rows, out| {
        out.iter_mut().enumerate().for_each(|(i, x)| *x = ((expert + rows.start + i) % 13) as f32 * 0.01 - 0.06);
        Ok::<_, AllocError>(())
    });
    let Ok(experts) = experts else { return };
    let mut group = c.benchmark_group("grouped_ffn");
    for tokens in [1, 8, 32, 128, 512] {
        let x: Vec<f32> = (0..tokens * LAYOUT.hidden).map(|i| (i % 17) as f32 * 0.1 - 0.8).collect();
        let Ok(x) = Tensor::from_vec(x, (tokens, LAYOUT.hidden), &candle_core::Device::Cpu) else { return };
        let routes = routes(tokens);
        if tokens <= 8 {
            let used = (tokens * TOP_K).min(EXPERTS) * (LAYOUT.gate_up().bytes() + LAYOUT.down().bytes());
            group.throughput(Throughput::Bytes(used as u64));
        } else {
            let multiply_adds = tokens * TOP_K * 3 * LAYOUT.hidden * LAYOUT.intermediate;
            group.throughput(Throughput::Elements(multiply_adds as u64));
        }
        group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
            b.iter(|| grouped_ffn(&compute, &x, &experts, &routes, None));
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    grouped(&mut criterion);
    criterion.final_summary();
}
