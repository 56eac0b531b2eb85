use proptest::prelude::*;

use super::*;
use crate::{
    buffer::Buffer,
    test_support::{bits, values},
};

/// Queries, keys and values of one sequence, which lies in scattered blocks.
struct Case {
    layout: AttentionLayout,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    block_table: Vec<u32>,
}

const SCALE: f32 = 0.3;

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

    fn with(&self, dtype: KvDtype) -> Self {
        Self {
            layout: AttentionLayout { dtype, ..self.layout },
            queries: self.queries.clone(),
            keys: self.keys.clone(),
            values: self.values.clone(),
            block_table: self.block_table.clone(),
        }
    }

    fn tokens(&self) -> usize {
        self.queries.len() / (self.layout.num_heads * self.layout.head_dim)
    }

    /// Where key/value head `kv_head` of `token` starts.
    fn at(&self, token: usize, kv_head: usize) -> usize {
        (token * self.layout.num_kv_heads + kv_head) * self.layout.head_dim
    }

    /// All tokens, `chunk` at a time, in blocks that another sequence filled with NaN before.
    fn run(&self, isa: Isa, threads: usize, chunk: usize) -> Vec<f32> {
        let (q, kv) = (self.layout.num_heads * self.layout.head_dim, self.layout.num_kv_heads * self.layout.head_dim);
        let pool = Pool::new(threads);
        let mut cache = self.cache();
        let nan = vec![f32::NAN; self.block_table.len() * BLOCK_TOKENS * kv];
        let gone = PagedSequence {
            first_row: 0,
            rows: self.block_table.len() * BLOCK_TOKENS,
            context_len: self.block_table.len() * BLOCK_TOKENS,
            block_table: &self.block_table,
        };
        write_kv(&pool, &self.layout, &[gone], &nan, &nan, &mut cache);
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
            write_kv(&pool, &self.layout, &[sequence], &self.keys[rows.clone()], &self.values[rows], &mut cache);
            let queries = &self.queries[start * q..end * q];
            let input = AttentionInput { layout: self.layout, scale: SCALE, sequences: &[sequence], queries };
            paged_attention(&pool, isa, &input, &cache, &mut out[start * q..end * q]);
        }
        out
    }

    fn cache(&self) -> Buffer {
        Buffer::zeroed((2 * self.block_table.len() + 1) * self.layout.block_bytes()).expect("memory")
    }

    /// The equation in f64, for one row and head.
    fn exact(&self, row: usize, head: usize) -> Vec<f64> {
        let AttentionLayout { num_heads, num_kv_heads, head_dim, .. } = self.layout;
        let kv_head = head / (num_heads / num_kv_heads);
        let query = &self.queries[(row * num_heads + head) * head_dim..][..head_dim];
        let scores: Vec<f64> = (0..=row)
            .map(|token| {
                let key = &self.keys[self.at(token, kv_head)..][..head_dim];
                f64::from(SCALE) * query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
            })
            .collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |max, score| max.max(*score));
        let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        let value = |token: usize, i: usize| f64::from(self.values[self.at(token, kv_head) + i]);
        (0..head_dim).map(|i| (0..=row).map(|token| weights[token] / total * value(token, i)).sum()).collect()
    }

    /// How far one row and head may be off, when keys and values are off by the share `stored` of the largest of
    /// their token, and what is multiplied is rounded by the share `rounded`.
    ///
    /// A score is off by at most d = scale · Σ |query| · (stored · max |key| + 2 · rounded · |key|), so a weight by the
    /// factor e^(2d) after normalising, and the result by that, and the rounding of weights and values, of the largest
    /// value.
    fn bound(&self, row: usize, head: usize, stored: f64, rounded: f64) -> f64 {
        let AttentionLayout { num_heads, num_kv_heads, head_dim, .. } = self.layout;
        let kv_head = head / (num_heads / num_kv_heads);
        let query = &self.queries[(row * num_heads + head) * head_dim..][..head_dim];
        let largest = |values: &[f32]| values.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
        let (mut score, mut value) = (0.0_f64, 0.0_f64);
        for token in 0..=row {
            let key = &self.keys[self.at(token, kv_head)..][..head_dim];
            let off = |(q, k): (&f32, &f32)| {
                f64::from(q.abs()) * (stored * largest(key) + 2.0 * rounded * f64::from(k.abs()))
            };
            score = score.max(f64::from(SCALE) * query.iter().zip(key).map(off).sum::<f64>());
            value = value.max(largest(&self.values[self.at(token, kv_head)..][..head_dim]));
        }
        value * ((2.0 * score).exp_m1() + stored + 2.0 * rounded)
    }
}

const DTYPES: [(KvDtype, f64, f64); 3] = [
    // f32: the sums' own rounding.
    (KvDtype::F32, 0.0, 2e-6),
    // bf16: half a unit in the last of 8 bits.
    (KvDtype::Bf16, 0.0, 1.0 / 256.0),
    // int8: half a step of the largest / 127; queries and weights as bf16.
    (KvDtype::Int8, 0.5 / 127.0, 1.0 / 256.0),
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn equals_the_equation_in_every_chunking(
        kv_heads in 1_usize..4, group in 1_usize..15, head_dim in 1_usize..70, tokens in 1_usize..150,
        chunk in 1_usize..150, seed in 0_u64..1000,
    ) {
        let layout =
            AttentionLayout { num_heads: kv_heads * group, num_kv_heads: kv_heads, head_dim, dtype: KvDtype::F32 };
        let mut case = Case::new(layout, tokens, seed);
        // A row of zeros and an outlier, of keys and of values.
        let row = kv_heads * head_dim;
        for (token, factor) in [(tokens / 3, 0.0), (tokens / 2, 300.0)] {
            case.keys[token * row..(token + 1) * row].iter_mut().for_each(|x| *x *= factor);
            case.values[(tokens - 1 - token) * row..][..row].iter_mut().for_each(|x| *x *= factor);
        }
        for (dtype, stored, rounded) in DTYPES {
            let case = case.with(dtype);
            for isa in Isa::available() {
                let whole = case.run(isa, 2, tokens);
                prop_assert_eq!(bits(&whole), bits(&case.run(isa, 1, chunk)), "{} {}", isa, dtype);
                for (row, head) in [(0, 0), (tokens / 2, layout.num_heads - 1), (tokens - 1, 0)] {
                    let at = (row * layout.num_heads + head) * head_dim;
                    let bound = case.bound(row, head, stored, rounded);
                    for (found, exact) in whole[at..].iter().zip(case.exact(row, head)) {
                        let error = (f64::from(*found) - exact).abs();
                        prop_assert!(error <= bound, "{isa} {dtype}: {found} against {exact}, bound {bound}");
                    }
                }
            }
        }
    }

    /// Sequences of a batch don't see each other, and neither do the rows of one step.
    #[test]
    fn a_batch_changes_no_bit(first in 1_usize..80, second in 1_usize..80, seed in 0_u64..1000) {
        for (dtype, ..) in DTYPES {
            let layout = AttentionLayout { num_heads: 6, num_kv_heads: 2, head_dim: 24, dtype };
            let (q, kv) = (6 * 24, 2 * 24);
            let cases = [Case::new(layout, first, seed), Case::new(layout, second, seed + 9)];
            let mut tables = cases.each_ref().map(|case| case.block_table.clone());
            tables[1].iter_mut().for_each(|block| *block -= 1);
            let [queries, keys, values] = [
                [&cases[0].queries, &cases[1].queries].map(|x| x.clone()).concat(),
                [&cases[0].keys, &cases[1].keys].map(|x| x.clone()).concat(),
                [&cases[0].values, &cases[1].values].map(|x| x.clone()).concat(),
            ];
            let sequences = [
                PagedSequence { first_row: 0, rows: first, context_len: first, block_table: &tables[0] },
                PagedSequence { first_row: first, rows: second, context_len: second, block_table: &tables[1] },
            ];
            prop_assert_eq!((queries.len(), keys.len()), ((first + second) * q, (first + second) * kv));
            let mut cache = Buffer::zeroed(16 * layout.block_bytes()).expect("memory");
            let pool = Pool::new(2);
            write_kv(&pool, &layout, &sequences, &keys, &values, &mut cache);
            let input = AttentionInput { layout, scale: SCALE, sequences: &sequences, queries: &queries };
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; queries.len()];
                paged_attention(&pool, isa, &input, &cache, &mut out);
                let alone = cases.each_ref().map(|case| case.run(isa, 1, 1)).concat();
                prop_assert_eq!(bits(&out), bits(&alone), "{} {}", isa, dtype);
            }
        }
    }
}

#[test]
fn a_nan_reaches_the_rows_that_see_it_and_no_other() {
    for (dtype, ..) in DTYPES {
        let layout = AttentionLayout { num_heads: 3, num_kv_heads: 1, head_dim: 20, dtype };
        for (token, in_keys) in [(21, true), (21, false), (38, false), (0, true)] {
            let clean = Case::new(layout, 40, 7);
            let mut case = clean.with(dtype);
            let target = if in_keys { &mut case.keys } else { &mut case.values };
            target[token * 20 + 5] = f32::NAN;
            for isa in Isa::available() {
                let (expected, found) = (clean.run(isa, 1, 40), case.run(isa, 1, 40));
                for (row, (expected, found)) in expected.chunks(60).zip(found.chunks(60)).enumerate() {
                    let sees = row >= token;
                    if !sees {
                        assert_eq!(bits(expected), bits(found), "{isa} {dtype}: row {row} sees token {token}");
                    } else if in_keys || dtype == KvDtype::Int8 {
                        assert!(found.iter().all(|x| x.is_nan()), "{isa} {dtype}: row {row}, NaN in {token}");
                    } else {
                        let heads = found.chunks(20);
                        assert!(heads.clone().all(|head| head[5].is_nan()), "{isa} {dtype}: row {row}, NaN in {token}");
                    }
                }
            }
        }
    }
}

#[test]
fn int8_takes_a_byte_a_value_and_a_scale_a_token() {
    let layout = |dtype| AttentionLayout { num_heads: 8, num_kv_heads: 2, head_dim: 128, dtype };
    assert_eq!(layout(KvDtype::F32).block_bytes(), 2 * 2 * 128 * 16 * 4);
    assert_eq!(layout(KvDtype::Bf16).block_bytes(), 2 * 2 * 128 * 16 * 2);
    assert_eq!(layout(KvDtype::Int8).block_bytes(), 2 * 2 * 16 * (128 + 4));
}
