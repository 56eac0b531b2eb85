use proptest::prelude::*;

use super::*;
use crate::test_support::{bits, values};

/// Queries, keys and values of one sequence, and the cache that holds it in scattered blocks.
struct Case {
    layout: AttentionLayout,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    block_table: Vec<u32>,
}

impl Case {
    fn new(layout: AttentionLayout, tokens: usize, seed: u64) -> Self {
        let blocks = tokens.div_ceil(BLOCK_TOKENS) as u32;
        Self {
            layout,
            queries: values(tokens * layout.num_heads * layout.head_dim, seed),
            keys: values(tokens * layout.num_kv_heads * layout.head_dim, seed + 1),
            values: values(tokens * layout.num_kv_heads * layout.head_dim, seed + 2),
            block_table: (0..blocks).map(|block| (blocks - 1 - block) * 2 + 1).collect(),
        }
    }

    fn tokens(&self) -> usize {
        self.queries.len() / (self.layout.num_heads * self.layout.head_dim)
    }

    /// All tokens, `chunk` at a time.
    fn run<T: KvValue>(&self, isa: Isa, threads: usize, chunk: usize) -> Vec<f32> {
        let (q, kv) = (self.layout.num_heads * self.layout.head_dim, self.layout.num_kv_heads * self.layout.head_dim);
        let mut cache = vec![T::from_f32(f32::NAN); (2 * self.block_table.len() + 1) * self.layout.block_len()];
        // Memory that was never written is zero, as in the real cache: NaN there would be another bug's.
        cache.fill(T::from_f32(0.0));
        let mut out = vec![f32::NAN; self.queries.len()];
        for start in (0..self.tokens()).step_by(chunk) {
            let end = self.tokens().min(start + chunk);
            let sequence = PagedSequence {
                first_row: 0,
                rows: end - start,
                context_len: end,
                block_table: &self.block_table[..end.div_ceil(BLOCK_TOKENS)],
            };
            let rows = start * kv..end * kv;
            write_kv(&self.layout, &[sequence], &self.keys[rows.clone()], &self.values[rows], &mut cache);
            let queries = &self.queries[start * q..end * q];
            let input = AttentionInput { layout: self.layout, scale: 0.3, sequences: &[sequence], queries };
            paged_attention(&Pool::new(threads), isa, &input, &cache, &mut out[start * q..end * q]);
        }
        out
    }

    /// The equation in f64, for one row and head.
    fn exact(&self, row: usize, head: usize) -> Vec<f64> {
        let AttentionLayout { num_heads, num_kv_heads, head_dim } = self.layout;
        let kv_head = head / (num_heads / num_kv_heads);
        let query = &self.queries[(row * num_heads + head) * head_dim..][..head_dim];
        let at = |token: usize| (token * num_kv_heads + kv_head) * head_dim;
        let weights: Vec<f64> = (0..=row)
            .map(|token| {
                let key = &self.keys[at(token)..][..head_dim];
                (0.3 * query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()).exp()
            })
            .collect();
        let total: f64 = weights.iter().sum();
        (0..head_dim)
            .map(|i| (0..=row).map(|token| weights[token] / total * f64::from(self.values[at(token) + i])).sum())
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn equals_the_equation_in_every_chunking(
        kv_heads in 1_usize..4, group in 1_usize..5, head_dim in 1_usize..40, tokens in 1_usize..70,
        chunk in 1_usize..70, seed in 0_u64..1000,
    ) {
        let layout = AttentionLayout { num_heads: kv_heads * group, num_kv_heads: kv_heads, head_dim };
        let case = Case::new(layout, tokens, seed);
        for isa in Isa::available() {
            let whole = case.run::<f32>(isa, 2, tokens);
            prop_assert_eq!(bits(&whole), bits(&case.run::<f32>(isa, 1, chunk)), "{} f32", isa);
            let bf16_whole = case.run::<bf16>(isa, 2, tokens);
            prop_assert_eq!(bits(&bf16_whole), bits(&case.run::<bf16>(isa, 1, chunk)), "{} bf16", isa);
            for (row, head) in [(0, 0), (tokens / 2, layout.num_heads - 1), (tokens - 1, 0)] {
                let at = (row * layout.num_heads + head) * head_dim;
                for (i, exact) in case.exact(row, head).into_iter().enumerate() {
                    prop_assert!((f64::from(whole[at + i]) - exact).abs() < 1e-5, "{isa} f32: {} {exact}", whole[at + i]);
                    // Keys and values in (-1, 1) rounded to 8 bits; scores of up to 40 places.
                    prop_assert!((f64::from(bf16_whole[at + i]) - exact).abs() < 0.03, "{isa} bf16: {exact}");
                }
            }
        }
    }
}
