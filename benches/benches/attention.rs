//! Attention over the paged cache: one decode step over a long context, and a prefill chunk; with bf16 keys and values.

use cadre_kernels::{
    attention::{AttentionInput, AttentionLayout, BLOCK_TOKENS, PagedSequence, paged_attention},
    isa::Isa,
    pool::Pool,
};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;

const LAYOUT: AttentionLayout = AttentionLayout { num_heads: 16, num_kv_heads: 4, head_dim: 128 };

fn attend(c: &mut Criterion) {
    let pool = Pool::new(std::thread::available_parallelism().map_or(1, usize::from));
    let isa = Isa::detect();
    let mut group = c.benchmark_group("paged_attention");
    for (name, rows, context_len) in
        [("decode", 1, 2048), ("decode", 1, 8192), ("prefill", 512, 512), ("prefill", 512, 2048)]
    {
        let blocks = context_len / BLOCK_TOKENS;
        let block_table: Vec<u32> = (0..blocks as u32).rev().collect();
        let cache = vec![bf16::from_f32(0.1); blocks * LAYOUT.block_len()];
        let width = LAYOUT.num_heads * LAYOUT.head_dim;
        let queries = vec![0.1; rows * width];
        let mut out = vec![0.0; rows * width];
        let sequence = PagedSequence { first_row: 0, rows, context_len, block_table: &block_table };
        // Two products of head_dim per query head and visible key.
        let visible = rows * context_len - rows * (rows - 1) / 2;
        group.throughput(Throughput::Elements((2 * visible * width) as u64));
        group.bench_function(BenchmarkId::new(name, context_len), |b| {
            let input = AttentionInput { layout: LAYOUT, scale: 0.088, sequences: &[sequence], queries: &queries };
            b.iter(|| paged_attention(&pool, isa, &input, &cache, &mut out));
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    attend(&mut criterion);
    criterion.final_summary();
}
