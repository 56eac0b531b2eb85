//! Attention over the paged cache, 16 query and 4 key/value heads of 128: prefill chunks, and decode steps of one and
//! of many sequences, with each type of keys and values.

use cadre_kernels::{
    attention::{AttentionInput, AttentionLayout, BLOCK_TOKENS, KvDtype, PagedSequence, paged_attention, write_kv},
    buffer::{AllocError, Buffer},
    isa::Isa,
    pool::Pool,
};
use criterion::{BenchmarkId, Criterion, Throughput};

/// Sequences, rows of each, and tokens in the cache of each.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 2048),
    (1, 1, 8192),
    (8, 1, 2048),
    (32, 1, 256),
    (32, 1, 2048),
    (1, 128, 128),
    (1, 512, 512),
    (1, 512, 2048),
    (1, 2048, 2048),
];

fn attend(c: &mut Criterion, dtype: KvDtype) -> Result<(), AllocError> {
    let layout = AttentionLayout { num_heads: 16, num_kv_heads: 4, head_dim: 128, dtype };
    let pool = Pool::new(std::thread::available_parallelism().map_or(1, usize::from));
    let isa = Isa::detect();
    let mut group = c.benchmark_group(format!("paged_attention/{dtype}"));
    for (count, rows, context_len) in SHAPES {
        let blocks = context_len / BLOCK_TOKENS;
        // Neighbours in a sequence are not neighbours in the cache.
        let tables: Vec<Vec<u32>> =
            (0..count).map(|index| (0..blocks).rev().map(|block| (block * count + index) as u32).collect()).collect();
        let mut cache = Buffer::zeroed(count * blocks * layout.block_bytes())?;
        let width = layout.num_heads * layout.head_dim;
        let tokens = vec![0.1; context_len * layout.num_kv_heads * layout.head_dim];
        for block_table in &tables {
            let sequence = PagedSequence { first_row: 0, rows: context_len, context_len, block_table };
            write_kv(&pool, &layout, &[sequence], &tokens, &tokens, &mut cache);
        }
        let sequences: Vec<_> = tables
            .iter()
            .enumerate()
            .map(|(index, block_table)| PagedSequence { first_row: index * rows, rows, context_len, block_table })
            .collect();
        let queries = vec![0.1; count * rows * width];
        let mut out = vec![0.0; queries.len()];
        let name = if rows == 1 { "decode" } else { "prefill" };
        // A decode step reads the cache; a prefill multiplies, twice head_dim per query head and visible key.
        let visible = count * (rows * context_len - rows * (rows - 1) / 2);
        group.throughput(match rows {
            1 => Throughput::Bytes(cache.len() as u64),
            _ => Throughput::Elements((2 * visible * width) as u64),
        });
        group.bench_function(BenchmarkId::new(name, format!("{count}x{rows}@{context_len}")), |b| {
            let input = AttentionInput { layout, scale: 0.088, sequences: &sequences, queries: &queries };
            b.iter(|| paged_attention(&pool, isa, &input, &cache, &mut out));
        });
    }
    group.finish();
    Ok(())
}

fn main() -> Result<(), AllocError> {
    let mut criterion = Criterion::default().configure_from_args();
    for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
        attend(&mut criterion, dtype)?;
    }
    criterion.final_summary();
    Ok(())
}
