//! Causal attention over paged keys and values, with an online softmax (Milakov and Gimelshein, arXiv:1805.02867).
//!
//! A block holds [`BLOCK_TOKENS`] tokens of one layer: for each key/value head the keys `[head_dim][16]` (a register is
//! one place of 16 keys), then for each head the values `[16][head_dim]`. A query walks the blocks of its sequence in
//! order, one block at a time, whatever else is in the batch: its result depends on nothing else. All query heads of a
//! group, and the rows of a prefill chunk, share each block's keys and values while they are in the nearest cache.

#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use half::bf16;

use crate::{
    activation::{LANES, exp},
    isa::Isa,
    norm::tree,
    pool::Pool,
    shared::SharedSlice,
};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = LANES;
/// Rows of a prefill chunk that one task takes: enough to share each block, few enough to spread over the threads.
const TASK_ROWS: usize = 16;

/// The sizes of a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionLayout {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; each serves `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttentionLayout {
    /// Values in one block: keys and values of 16 tokens.
    #[must_use]
    pub fn block_len(&self) -> usize {
        2 * self.num_kv_heads * self.head_dim * BLOCK_TOKENS
    }

    fn head_len(&self) -> usize {
        self.head_dim * BLOCK_TOKENS
    }

    fn keys_at(&self, block: u32, kv_head: usize) -> usize {
        block as usize * self.block_len() + kv_head * self.head_len()
    }

    fn values_at(&self, block: u32, kv_head: usize) -> usize {
        self.keys_at(block, kv_head) + self.block_len() / 2
    }
}

/// How the cache stores a value.
pub trait KvValue: Copy + Send + Sync {
    /// Rounds to the stored form.
    fn from_f32(value: f32) -> Self;
    /// Widens.
    fn to_f32(self) -> f32;
}

impl KvValue for f32 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl KvValue for bf16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// One sequence's rows of the batch.
#[derive(Debug, Clone, Copy)]
pub struct PagedSequence<'a> {
    /// Index of its first row in the batch.
    pub first_row: usize,
    /// The rows' positions, ascending without gaps: the last is `context_len - 1`.
    pub rows: usize,
    /// Tokens in the cache, this step's included.
    pub context_len: usize,
    /// The blocks that hold them.
    pub block_table: &'a [u32],
}

impl PagedSequence<'_> {
    fn first_position(&self) -> usize {
        self.context_len - self.rows
    }
}

/// Writes the keys and values `[rows, num_kv_heads · head_dim]` of the batch's rows to the cache of one layer.
///
/// # Panics
/// When a slice has not the size that the layout needs, or a block lies outside of the cache.
pub fn write_kv<T: KvValue>(
    layout: &AttentionLayout,
    sequences: &[PagedSequence<'_>],
    keys: &[f32],
    values: &[f32],
    cache: &mut [T],
) {
    let width = layout.num_kv_heads * layout.head_dim;
    for sequence in sequences {
        for index in 0..sequence.rows {
            let position = sequence.first_position() + index;
            let (block, place) = (sequence.block_table[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
            let row = sequence.first_row + index;
            for head in 0..layout.num_kv_heads {
                let source = row * width + head * layout.head_dim;
                let start = layout.keys_at(block, head);
                let target = cache[start..start + layout.head_len()].chunks_exact_mut(BLOCK_TOKENS);
                for (target, key) in target.zip(&keys[source..source + layout.head_dim]) {
                    target[place] = T::from_f32(*key);
                }
                let start = layout.values_at(block, head) + place * layout.head_dim;
                let target = &mut cache[start..start + layout.head_dim];
                for (target, value) in target.iter_mut().zip(&values[source..]) {
                    *target = T::from_f32(*value);
                }
            }
        }
    }
}

/// The queries of a batch, and what they attend to.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInput<'a> {
    /// The sizes.
    pub layout: AttentionLayout,
    /// What scores are multiplied with.
    pub scale: f32,
    /// The sequences that the rows belong to.
    pub sequences: &'a [PagedSequence<'a>],
    /// `[rows, num_heads · head_dim]`
    pub queries: &'a [f32],
}

/// `out[row, head] = softmax(scale · query · keys) · values` over the row's position and all before it in its
/// sequence; `out` is `[rows, num_heads · head_dim]`.
///
/// # Panics
/// When a slice has not the size that the layout needs, or a block lies outside of the cache.
pub fn paged_attention<T: KvValue>(pool: &Pool, isa: Isa, input: &AttentionInput<'_>, cache: &[T], out: &mut [f32]) {
    assert_eq!(input.queries.len(), out.len(), "queries and outputs");
    let kv_heads = input.layout.num_kv_heads;
    let tasks: Vec<Task<'_>> = input
        .sequences
        .iter()
        .flat_map(|sequence| {
            (0..sequence.rows).step_by(TASK_ROWS).flat_map(move |start| {
                let rows = start..sequence.rows.min(start + TASK_ROWS);
                (0..kv_heads).map(move |kv_head| Task { sequence, rows: rows.clone(), kv_head })
            })
        })
        .collect();
    let target = SharedSlice::new(out);
    pool.run(tasks.len(), |index| {
        // The last rows of a chunk see the most keys: start with them, so that the ends of the threads meet.
        let task = &tasks[tasks.len() - 1 - index];
        // SAFETY: a tier other than portable exists only where `Isa::available` found it.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 => avx512::attend(task, input, cache, &target),
                _ => attend::<T, Portable>(task, input, cache, &target),
            }
        }
    });
}

/// The rows of one sequence and one key/value head that a thread takes together.
struct Task<'a> {
    sequence: &'a PagedSequence<'a>,
    rows: Range<usize>,
    kv_head: usize,
}

/// The two products of attention over one block, for `Q` queries at a time, which share the loads of the block. Each
/// query's sums are taken in ascending place and in ascending token, whatever `Q` is.
trait Products {
    /// `scores[q][token] = Σ over places of queries[q][place] · keys[place][token]`, `queries` `[Q, places]`, `keys`
    /// `[places, 16]`.
    ///
    /// # Safety
    /// The machine has the tier's instructions.
    unsafe fn scores<const Q: usize>(queries: &[f32], keys: &[f32]) -> [[f32; LANES]; Q];

    /// `sums[q][place] += Σ over tokens of weights[q][token] · values[token][place]`, `values` `[16, places]`, `sums`
    /// `[Q, places]`.
    ///
    /// # Safety
    /// The machine has the tier's instructions.
    unsafe fn add_values<const Q: usize>(weights: &[[f32; LANES]; Q], values: &[f32], sums: &mut [f32]);
}

/// The contract of the products, in plain Rust.
struct Portable;

impl Products for Portable {
    unsafe fn scores<const Q: usize>(queries: &[f32], keys: &[f32]) -> [[f32; LANES]; Q] {
        let mut scores = [[0.0; LANES]; Q];
        for (query, scores) in queries.chunks_exact(keys.len() / LANES).zip(&mut scores) {
            for (x, keys) in query.iter().zip(keys.chunks_exact(LANES)) {
                scores.iter_mut().zip(keys).for_each(|(score, key)| *score += x * key);
            }
        }
        scores
    }

    unsafe fn add_values<const Q: usize>(weights: &[[f32; LANES]; Q], values: &[f32], sums: &mut [f32]) {
        let places = values.len() / LANES;
        for (weights, sums) in weights.iter().zip(sums.chunks_exact_mut(places)) {
            for (weight, values) in weights.iter().zip(values.chunks_exact(places)) {
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += weight * value);
            }
        }
    }
}

/// # Safety
/// No two tasks on one `out` share rows and heads; the machine has the tier's instructions.
#[inline(always)]
unsafe fn attend<T: KvValue, P: Products>(
    task: &Task<'_>,
    input: &AttentionInput<'_>,
    cache: &[T],
    out: &SharedSlice<f32>,
) {
    let (layout, scale, queries) = (&input.layout, input.scale, input.queries);
    let head_dim = layout.head_dim;
    let group = layout.num_heads / layout.num_kv_heads;
    let width = layout.num_heads * head_dim;
    let count = task.rows.len() * group;
    let offset = |query: usize| {
        (task.sequence.first_row + task.rows.start + query / group) * width
            + (task.kv_head * group + query % group) * head_dim
    };
    let scaled: Vec<f32> =
        (0..count).flat_map(|query| queries[offset(query)..][..head_dim].iter().map(|x| x * scale)).collect();
    let mut states = vec![State { max: f32::NEG_INFINITY, sum: 0.0 }; count];
    let mut sums = vec![0.0; count * head_dim];
    let (mut keys, mut values) = (vec![0.0; layout.head_len()], vec![0.0; layout.head_len()]);
    let position = |query: usize| task.sequence.first_position() + task.rows.start + query / group;
    let last = position(count - 1);
    for (index, block) in task.sequence.block_table[..=last / BLOCK_TOKENS].iter().enumerate() {
        let start = index * BLOCK_TOKENS;
        widen(&cache[layout.keys_at(*block, task.kv_head)..], &mut keys);
        // What lies past the last position was never written, or by a sequence that is gone: not even its weight of
        // zero may carry a NaN into the sum.
        let (seen, unseen) = values.split_at_mut(BLOCK_TOKENS.min(last + 1 - start) * head_dim);
        widen(&cache[layout.values_at(*block, task.kv_head)..], seen);
        unseen.fill(0.0);
        // Rows whose position lies before the block see nothing of it.
        let first = (0..count).step_by(group).find(|query| position(*query) >= start).unwrap_or(count);
        let mut query = first;
        while query < count {
            let visible = |q: usize| (position(query + q) + 1 - start).min(BLOCK_TOKENS);
            let places = query * head_dim..;
            let tile = Tile { queries: &scaled[places.clone()], keys: &keys, values: &values };
            let (states, sums) = (&mut states[query..], &mut sums[places]);
            // SAFETY: the caller promises the instructions.
            query += unsafe {
                match count - query {
                    8.. => tile.attend::<8, P>(visible, states, sums),
                    4.. => tile.attend::<4, P>(visible, states, sums),
                    2.. => tile.attend::<2, P>(visible, states, sums),
                    _ => tile.attend::<1, P>(visible, states, sums),
                }
            };
        }
    }
    for (query, state) in states.iter().enumerate() {
        // SAFETY: the caller's promise.
        let out = unsafe { out.part(offset(query), head_dim) };
        for (out, sum) in out.iter_mut().zip(&sums[query * head_dim..]) {
            *out = sum / state.sum;
        }
    }
}

#[inline(always)]
fn widen<T: KvValue>(stored: &[T], out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(stored) {
        *out = value.to_f32();
    }
}

/// The running softmax of one query.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
}

/// Some queries `[.., head_dim]` and one block's keys `[head_dim, 16]` and values `[16, head_dim]`.
struct Tile<'a> {
    queries: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
}

impl Tile<'_> {
    /// Takes the block into the states and sums `[head_dim]` of the first `Q` queries, of which query `q` sees
    /// `visible(q)` tokens. Returns `Q`.
    ///
    /// # Safety
    /// The machine has the tier's instructions.
    #[inline(always)]
    unsafe fn attend<const Q: usize, P: Products>(
        &self,
        visible: impl Fn(usize) -> usize,
        states: &mut [State],
        sums: &mut [f32],
    ) -> usize {
        let head_dim = self.values.len() / LANES;
        let sums = &mut sums[..Q * head_dim];
        // SAFETY: the caller's promise.
        let scores = unsafe { P::scores::<Q>(&self.queries[..Q * head_dim], self.keys) };
        let mut weights = [[0.0; LANES]; Q];
        for (q, mut scores) in scores.into_iter().enumerate() {
            scores[visible(q)..].fill(f32::NEG_INFINITY);
            let shrink;
            (weights[q], shrink) = states[q].add(scores);
            if shrink != 1.0 {
                sums[q * head_dim..(q + 1) * head_dim].iter_mut().for_each(|sum| *sum *= shrink);
            }
        }
        // SAFETY: the caller's promise.
        unsafe { P::add_values::<Q>(&weights, self.values, sums) };
        Q
    }
}

impl State {
    /// Takes 16 further scores: their weights, and what the weights before must be multiplied with.
    #[inline(always)]
    fn add(&mut self, scores: [f32; LANES]) -> ([f32; LANES], f32) {
        let max = self.max.max(tree(scores, f32::max));
        let weights = exp(scores.map(|score| score - max));
        let shrink = if max > self.max { exp([self.max - max; LANES])[0] } else { 1.0 };
        self.max = max;
        self.sum = self.sum * shrink + tree(weights, |a, b| a + b);
        (weights, shrink)
    }
}

#[cfg(test)]
mod tests;
