//! The walk of one task over the blocks of its sequence.

use std::{array::from_fn, marker::PhantomData, mem::take, ops::Range};

use super::{
    AttentionInput, BLOCK_TOKENS, PagedSequence,
    storage::{Head, Stored, head_bytes},
};
use crate::{
    activation::{LANES, exp},
    norm::tree,
    shared::SharedSlice,
};

/// Blocks that a query takes in one step, with one look at its maximum and one load of its sums.
pub(super) const STEP_BLOCKS: usize = 4;
pub(super) const STEP_TOKENS: usize = STEP_BLOCKS * BLOCK_TOKENS;

/// The scores of one query in one step.
pub(super) type Scores = [[f32; LANES]; STEP_BLOCKS];
/// The weights of one query in one step.
pub(super) type Weights<T> = [T; STEP_TOKENS];

/// The rows of one sequence and one key/value head that a thread takes together.
pub(super) struct Task<'a> {
    pub sequence: &'a PagedSequence<'a>,
    pub rows: Range<usize>,
    pub kv_head: usize,
}

/// The two products of attention over the blocks of a step, for `Q` queries at a time, which share the loads. Each
/// query's sums are taken in ascending place and in ascending token, one chain of additions each, whatever `Q` is.
pub(super) trait Products {
    /// What is multiplied, in panels as [`super::storage`] has them.
    type Operand: Copy + Default;

    /// `scores[q][block][token] = Σ over places of queries[q][place] · keys[block][place, token]` for `queries`
    /// `[Q, places]` and each block of `keys`.
    ///
    /// # Safety
    /// The machine has the tier's instructions.
    unsafe fn scores<const Q: usize>(queries: &[Self::Operand], keys: &[&[Self::Operand]], scores: &mut [Scores; Q]);

    /// `sums[q][place] += Σ over tokens of weights[q][token] · values[token / 16][place, token % 16]` for `Q` queries'
    /// `weights`, and `sums` `[Q, places]`. The first token is even; a value outside of `tokens` has no effect.
    ///
    /// # Safety
    /// The machine has the tier's instructions.
    unsafe fn add_values<const Q: usize>(
        weights: &[Weights<Self::Operand>],
        tokens: Range<usize>,
        values: &[&[Self::Operand]],
        sums: &mut [f32],
    );

    /// Rounds to what is multiplied.
    ///
    /// # Safety
    /// The machine has the tier's instructions.
    unsafe fn round(values: [f32; LANES]) -> [Self::Operand; LANES];

    /// Takes further scores into the softmax and turns them into weights. Returns what the weights before must be
    /// multiplied with.
    ///
    /// # Safety
    /// The machine has the tier's instructions.
    unsafe fn softmax(state: &mut State, scores: &mut [[f32; LANES]]) -> f32;

    /// Asks for memory that is soon read.
    fn prefetch(bytes: &[u8]);
}

/// How a panel of stored values becomes one of operands.
pub(super) trait Expand<T>: Products {
    /// Whether the operands are the stored values themselves.
    const STORED: bool;

    /// The operands: `stored` itself, or else `scratch`, which is as long.
    ///
    /// # Safety
    /// The machine has the tier's instructions.
    unsafe fn expand<'a>(stored: &'a [T], scratch: &'a mut [Self::Operand]) -> &'a [Self::Operand];
}

/// # Safety
/// No two tasks on one `out` share rows and heads; the machine has the tier's instructions.
#[inline(always)]
pub(super) unsafe fn attend<T: Stored, P: Expand<T>>(
    task: &Task<'_>,
    input: &AttentionInput<'_>,
    cache: &[u8],
    out: &SharedSlice<f32>,
) {
    let layout = &input.layout;
    let (head_dim, places) = (layout.head_dim, layout.padded_dim());
    let group = layout.num_heads / layout.num_kv_heads;
    let width = layout.num_heads * head_dim;
    let count = task.rows.len() * group;
    let offset = |query: usize| {
        (task.sequence.first_row + task.rows.start + query / group) * width
            + (task.kv_head * group + query % group) * head_dim
    };
    let position = |query: usize| task.sequence.first_position() + task.rows.start + query / group;
    let last = position(count - 1);

    let mut queries = vec![P::Operand::default(); count * places];
    for (query, padded) in queries.chunks_exact_mut(places).enumerate() {
        let source = &input.queries[offset(query)..][..head_dim];
        for (source, padded) in source.chunks(LANES).zip(padded.chunks_exact_mut(LANES)) {
            let scaled = from_fn(|i| source.get(i).map_or(0.0, |x| x * input.scale));
            // SAFETY: the caller's promise.
            padded.copy_from_slice(&unsafe { P::round(scaled) });
        }
    }
    let mut states = vec![State { max: f32::NEG_INFINITY, sums: [0.0; LANES] }; count];
    let mut sums = vec![0.0; count * places];
    let room = if P::STORED { 0 } else { layout.keys_len() };
    let mut scratch = vec![P::Operand::default(); 2 * STEP_BLOCKS * room];

    let table = &task.sequence.block_table[..=last / BLOCK_TOKENS];
    for (step, blocks) in table.chunks(STEP_BLOCKS).enumerate() {
        let start = step * STEP_TOKENS;
        if task.rows.len() == 1 {
            // One row waits for memory. 16 heads over 8 times 2048 bf16 tokens: 33 GB/s with, 25 without (Zen 4, two
            // threads); 80 became 57 where all was in the last cache, where a model's layers never find it.
            for block in table.iter().skip(start / BLOCK_TOKENS + STEP_BLOCKS).take(STEP_BLOCKS) {
                P::prefetch(head_bytes(layout, cache, *block, task.kv_head));
            }
        }
        let mut keys: [&[P::Operand]; STEP_BLOCKS] = [&[]; STEP_BLOCKS];
        let (mut values, mut scales) = (keys, [[1.0; STEP_TOKENS]; 2]);
        let mut rest = &mut scratch[..];
        for (index, block) in blocks.iter().enumerate() {
            let head = Head::<T>::new(layout, cache, *block, task.kv_head);
            let (for_keys, tail) = take(&mut rest).split_at_mut(room);
            let (for_values, tail) = tail.split_at_mut(room);
            rest = tail;
            // SAFETY: the caller promises the instructions.
            (keys[index], values[index]) =
                unsafe { (P::expand(head.keys, for_keys), P::expand(head.values, for_values)) };
            if T::SCALED {
                for (scales, stored) in scales.iter_mut().zip(head.scales.chunks_exact(BLOCK_TOKENS)) {
                    scales[index * BLOCK_TOKENS..][..BLOCK_TOKENS].copy_from_slice(stored);
                }
            }
        }
        let [key_scales, value_scales] = scales;
        // Rows whose position lies before the step see nothing of it.
        let first = (0..count).step_by(group).find(|query| position(*query) >= start).unwrap_or(count);
        let mut query = first;
        while query < count {
            let tile = Tile::<T, P> {
                queries: &queries[query * places..],
                keys: &keys,
                values: &values,
                scales: [&key_scales, &value_scales],
                stored: PhantomData,
            };
            let visible = |q: usize| (position(query + q) + 1 - start).min(STEP_TOKENS);
            let (states, sums) = (&mut states[query..], &mut sums[query * places..]);
            // SAFETY: the caller promises the instructions.
            query += unsafe {
                match count - query {
                    12.. => tile.attend::<12>(places, visible, states, sums),
                    8.. => tile.attend::<8>(places, visible, states, sums),
                    4.. => tile.attend::<4>(places, visible, states, sums),
                    2.. => tile.attend::<2>(places, visible, states, sums),
                    _ => tile.attend::<1>(places, visible, states, sums),
                }
            };
        }
    }
    for (query, state) in states.iter().enumerate() {
        // SAFETY: the caller's promise.
        let out = unsafe { out.part(offset(query), head_dim) };
        let total = tree(state.sums, |a, b| a + b);
        for (out, sum) in out.iter_mut().zip(&sums[query * places..]) {
            *out = sum / total;
        }
    }
}

/// Some queries `[.., places]` and the panels of one step, with the scales of its tokens' keys and values.
struct Tile<'a, T, P: Products> {
    queries: &'a [P::Operand],
    keys: &'a [&'a [P::Operand]; STEP_BLOCKS],
    values: &'a [&'a [P::Operand]; STEP_BLOCKS],
    scales: [&'a [f32; STEP_TOKENS]; 2],
    stored: PhantomData<T>,
}

impl<T: Stored, P: Products> Tile<'_, T, P> {
    /// Takes the step into the states and sums `[places]` of the first `Q` queries, of which query `q` sees
    /// `visible(q)` tokens, not fewer than the one before. Returns `Q`.
    ///
    /// # Safety
    /// The machine has the tier's instructions.
    #[inline(always)]
    unsafe fn attend<const Q: usize>(
        &self,
        places: usize,
        visible: impl Fn(usize) -> usize,
        states: &mut [State],
        sums: &mut [f32],
    ) -> usize {
        let sums = &mut sums[..Q * places];
        let (fewest, most) = (visible(0), visible(Q - 1));
        let blocks = most.div_ceil(BLOCK_TOKENS);
        let mut scores = [[[f32::NEG_INFINITY; LANES]; STEP_BLOCKS]; Q];
        // SAFETY: the caller's promise.
        unsafe { P::scores::<Q>(&self.queries[..Q * places], &self.keys[..blocks], &mut scores) };
        let mut weights = [[P::Operand::default(); STEP_TOKENS]; Q];
        for (q, scores) in scores.iter_mut().enumerate() {
            let visible = visible(q);
            if T::SCALED {
                scale(scores, self.scales[0]);
            }
            scores.as_flattened_mut()[visible..].fill(f32::NEG_INFINITY);
            // SAFETY: the caller's promise.
            let shrink = unsafe { P::softmax(&mut states[q], &mut scores[..blocks]) };
            if shrink != 1.0 {
                sums[q * places..(q + 1) * places].iter_mut().for_each(|sum| *sum *= shrink);
            }
            if T::SCALED {
                scale(scores, self.scales[1]);
            }
            for (weights, scores) in weights[q].chunks_exact_mut(LANES).zip(&scores[..blocks]) {
                // SAFETY: the caller's promise.
                weights.copy_from_slice(&unsafe { P::round(*scores) });
            }
            // What lies past the last position was never written, or by a sequence that is gone: not even a weight
            // of zero may carry a NaN from there into the sum.
            weights[q][visible..].fill(P::Operand::default());
        }
        // The tokens that all queries of the tile see, then each one's own.
        let common = if fewest == most { most } else { fewest - fewest % 2 };
        // SAFETY: the caller's promise.
        unsafe { P::add_values::<Q>(&weights, 0..common, self.values, sums) };
        for (q, sums) in sums.chunks_exact_mut(places).enumerate() {
            if visible(q) > common {
                // SAFETY: the caller's promise.
                unsafe { P::add_values::<1>(&weights[q..=q], common..visible(q), self.values, sums) };
            }
        }
        Q
    }
}

#[inline(always)]
fn scale(scores: &mut Scores, scales: &[f32; STEP_TOKENS]) {
    for (score, scale) in scores.as_flattened_mut().iter_mut().zip(scales) {
        *score *= scale;
    }
}

/// The running softmax of one query: its largest score, and the sum of its weights, one part a place in the block.
#[derive(Clone, Copy)]
pub(super) struct State {
    pub max: f32,
    pub sums: [f32; LANES],
}

/// [`Products::softmax`] in plain loops, for the tier that it is compiled into: what calls a closure from a function of the
/// library, such as `map`, is called without the tier's instructions.
#[inline(always)]
pub(super) fn softmax(state: &mut State, scores: &mut [[f32; LANES]]) -> f32 {
    // A NaN loses here: the weights have it anyway.
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut highest = [state.max; LANES];
    for scores in &*scores {
        highest.iter_mut().zip(scores).for_each(|(highest, score)| *highest = larger(*highest, *score));
    }
    let max = highest.into_iter().fold(state.max, larger);
    let shrink = if max > state.max { exp([state.max - max; LANES])[0] } else { 1.0 };
    state.max = max;
    let mut sums = state.sums;
    for sum in &mut sums {
        *sum *= shrink;
    }
    for scores in scores {
        for score in &mut *scores {
            *score -= max;
        }
        *scores = exp(*scores);
        for (sum, weight) in sums.iter_mut().zip(&*scores) {
            *sum += weight;
        }
    }
    state.sums = sums;
    shrink
}
