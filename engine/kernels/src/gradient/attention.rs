//! Causal attention over whole sequences of one flat token axis, without a cache, and its backward pass.
//!
//! A task is one sequence and one key/value head. Keys and values are laid out as panels, so that all products but the
//! sums over queries are tiles of [`crate::matmul`]. A block of queries sees its scores of all keys at once: the softmax
//! needs no running maximum, and the backward pass makes the probabilities again, to the same bits.

use std::ops::Range;

use super::{
    exp_in_place,
    product::{Strided, add_product_here},
};
use crate::{
    activation::LANES,
    format::{Format, PANEL},
    isa::{Isa, for_each_width},
    matmul::{Sums, new_sums, walk_panels},
    norm::tree,
    pool::Pool,
    shared::SharedSlice,
};

/// Queries that are worked on together.
const QUERIES: usize = 48;

/// The heads of queries, keys and values: `[tokens, heads · head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads, each of which serves as many query heads in a row.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Scores are multiplied by it.
    pub scale: f32,
}

impl Heads {
    fn query_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    fn check(&self, sequences: &[Range<usize>], [query, key, value]: [&[f32]; 3]) {
        let tokens = query.len() / self.query_width();
        let mut end = 0;
        for sequence in sequences {
            assert!(end <= sequence.start && sequence.start <= sequence.end, "sequences {sequences:?}");
            end = sequence.end;
        }
        assert!(end <= tokens && self.num_heads.is_multiple_of(self.num_kv_heads), "{end} tokens of {self:?}");
        let sizes = (query.len(), key.len(), value.len());
        let kv = tokens * self.kv_width();
        assert_eq!(sizes, (tokens * self.query_width(), kv, kv), "queries, keys and values of {tokens} tokens");
    }
}

/// `out[t] = Σ over the keys up to t of its sequence of softmax(scale · q · k) · v`, for each query head. `sequences` are
/// the rows of each, ascending; rows of none stay as they are. `query` and `out` are `[tokens, num_heads · head_dim]`,
/// `key` and `value` `[tokens, num_kv_heads · head_dim]`.
///
/// # Panics
/// When the sizes don't match.
pub fn attention(pool: &Pool, isa: Isa, heads: Heads, sequences: &[Range<usize>], qkv: [&[f32]; 3], out: &mut [f32]) {
    heads.check(sequences, qkv);
    assert_eq!(out.len(), qkv[0].len(), "outputs");
    let target = SharedSlice::new(out);
    pool.run(sequences.len() * heads.num_kv_heads, |task| {
        let part = Part::new(heads, &sequences[task / heads.num_kv_heads], task % heads.num_kv_heads);
        let values = Panels::of_inputs(part.kv(qkv[2]));
        let mut block = Block::new(isa, &part, qkv);
        for (head, queries) in part.blocks() {
            block.probabilities(&part, head, &queries, qkv[0]);
            let place = |row| part.query_place(head, queries.start + row);
            let rows = block.scores.rows(queries.len(), queries.end);
            block.tile.multiply(&rows, &values, heads.head_dim, |row, columns, sums| {
                // SAFETY: each task has its own rows and heads.
                unsafe { target.part(place(row) + columns.start, sums.len()) }.copy_from_slice(sums);
            });
        }
    });
}

/// The gradients of queries, keys and values, of their sizes, from that of the output.
///
/// # Panics
/// When the sizes don't match.
pub fn attention_backward(
    pool: &Pool,
    isa: Isa,
    heads: Heads,
    sequences: &[Range<usize>],
    qkv: [&[f32]; 3],
    output_gradient: &[f32],
    gradients: [&mut [f32]; 3],
) {
    heads.check(sequences, qkv);
    assert_eq!(output_gradient.len(), qkv[0].len(), "gradient of the output");
    let sizes = gradients.each_ref().map(|gradient| gradient.len());
    assert_eq!(sizes, qkv.map(<[f32]>::len), "gradients of queries, keys and values");
    let [of_query, of_key, of_value] = gradients.map(SharedSlice::new);
    let dim = heads.head_dim;
    pool.run(sequences.len() * heads.num_kv_heads, |task| {
        let part = Part::new(heads, &sequences[task / heads.num_kv_heads], task % heads.num_kv_heads);
        let keys = Panels::of_inputs(part.kv(qkv[1]));
        let values = Panels::of_outputs(part.kv(qkv[2]));
        let mut block = Block::new(isa, &part, qkv);
        let mut of_scores = Scores::new(part.len);
        let (mut key_sums, mut value_sums) = (vec![0.0; part.len * dim], vec![0.0; part.len * dim]);
        for (head, queries) in part.blocks() {
            block.probabilities(&part, head, &queries, qkv[0]);
            let place = |row| part.query_place(head, queries.start + row);
            let outputs: Vec<_> = (0..queries.len()).map(|row| &output_gradient[place(row)..][..dim]).collect();
            block.tile.multiply(&outputs, &values, queries.end, |row, columns, sums| {
                of_scores.row_mut(row, queries.end)[columns].copy_from_slice(sums);
            });
            for (row, query) in queries.clone().enumerate() {
                let scores = block.scores.row(row, queries.end);
                softmax_backward(isa, heads.scale, scores, query + 1, of_scores.row_mut(row, queries.end));
            }
            let rows = of_scores.rows(queries.len(), queries.end);
            block.tile.multiply(&rows, &keys, dim, |row, columns, sums| {
                // SAFETY: each task has its own rows and heads.
                unsafe { of_query.part(place(row) + columns.start, sums.len()) }.copy_from_slice(sums);
            });
            let (rows, end) = (queries.clone(), queries.end * dim);
            let query = part.head(qkv[0], heads.query_width(), head).rows(rows.clone());
            let output = part.head(output_gradient, heads.query_width(), head).rows(rows);
            add_product_here(isa, block.scores.matrix(&queries).transposed(), output, &mut value_sums[..end]);
            add_product_here(isa, of_scores.matrix(&queries).transposed(), query, &mut key_sums[..end]);
        }
        for (sums, target) in [(key_sums, &of_key), (value_sums, &of_value)] {
            for (token, sums) in sums.chunks_exact(dim).enumerate() {
                let place = (part.start + token) * heads.kv_width() + part.kv_head * dim;
                // SAFETY: each task has its own rows and heads.
                unsafe { target.part(place, dim) }.copy_from_slice(sums);
            }
        }
    });
}

/// One sequence and one key/value head.
struct Part {
    heads: Heads,
    kv_head: usize,
    /// The sequence's first row.
    start: usize,
    /// Its rows.
    len: usize,
}

impl Part {
    fn new(heads: Heads, sequence: &Range<usize>, kv_head: usize) -> Self {
        Self { heads, kv_head, start: sequence.start, len: sequence.len() }
    }

    /// The query heads that the key/value head serves, with blocks of queries each.
    fn blocks(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let (group, len) = (self.heads.num_heads / self.heads.num_kv_heads, self.len);
        let heads = self.kv_head * group..(self.kv_head + 1) * group;
        heads.flat_map(move |head| (0..len).step_by(QUERIES).map(move |start| (head, start..len.min(start + QUERIES))))
    }

    /// Where a query's head begins.
    fn query_place(&self, head: usize, query: usize) -> usize {
        (self.start + query) * self.heads.query_width() + head * self.heads.head_dim
    }

    /// One head of the sequence's tokens, `[tokens, head_dim]`.
    fn head<'a>(&self, values: &'a [f32], width: usize, head: usize) -> Strided<'a> {
        let dim = self.heads.head_dim;
        let all = Strided::new(values, values.len() / width, width);
        all.rows(self.start..self.start + self.len).columns(head * dim..(head + 1) * dim)
    }

    /// The same of keys or values.
    fn kv<'a>(&self, values: &'a [f32]) -> Strided<'a> {
        self.head(values, self.heads.kv_width(), self.kv_head)
    }
}

/// f32 panels of 16 outputs: `[inputs][16]`, padded with zeros.
struct Panels {
    values: Vec<f32>,
    /// Inputs of a panel.
    inputs: usize,
    outputs: usize,
}

impl Panels {
    /// Tokens `[tokens, width]` are the outputs: for products with rows of their width.
    fn of_outputs(tokens: Strided<'_>) -> Self {
        let (count, inputs) = tokens.size();
        let mut values = vec![0.0; count.next_multiple_of(PANEL) * inputs];
        for token in 0..count {
            let panel = &mut values[token / PANEL * PANEL * inputs..][..PANEL * inputs];
            panel
                .chunks_exact_mut(PANEL)
                .zip(tokens.row(token))
                .for_each(|(places, value)| places[token % PANEL] = *value);
        }
        Self { values, inputs, outputs: count }
    }

    /// Tokens `[tokens, width]` are the inputs: for sums over tokens.
    fn of_inputs(tokens: Strided<'_>) -> Self {
        let (count, outputs) = tokens.size();
        let mut values = vec![0.0; outputs.next_multiple_of(PANEL) * count];
        for (panel, values) in values.chunks_exact_mut((PANEL * count).max(1)).enumerate() {
            let columns = panel * PANEL..outputs.min((panel + 1) * PANEL);
            for (token, places) in values.chunks_exact_mut(PANEL).enumerate() {
                places[..columns.len()].copy_from_slice(&tokens.row(token)[columns.clone()]);
            }
        }
        Self { values, inputs: count, outputs }
    }
}

/// What multiplies, and the room for a tile's results.
struct Tile {
    isa: Isa,
    sums: Box<Sums>,
}

impl Tile {
    /// Gives `store` the products of rows with the panels, as far as the rows have inputs, in the first `width` outputs.
    fn multiply(
        &mut self,
        rows: &[&[f32]],
        panels: &Panels,
        width: usize,
        mut store: impl FnMut(usize, Range<usize>, &[f32]),
    ) {
        let Some(inputs) = rows.first().map(|row| row.len()) else { return };
        assert!(inputs <= panels.inputs && rows.iter().all(|row| row.len() == inputs), "inputs of a product");
        assert!(width <= panels.outputs, "outputs of a product");
        let pointers: Vec<_> = rows.iter().map(|row| row.as_ptr().cast()).collect();
        let panel = |index: usize| panels.values[index * PANEL * panels.inputs..].as_ptr().cast();
        let count = width.div_ceil(PANEL);
        // SAFETY: rows of `inputs` f32 values, and panels of at least as many inputs.
        unsafe {
            walk_panels(
                self.isa,
                Format::F32,
                inputs,
                &pointers,
                0..count,
                panel,
                &mut self.sums,
                |row, panel, sums| {
                    let columns = panel * PANEL..width.min((panel + sums.len()) * PANEL);
                    store(row, columns.clone(), &sums.as_flattened()[..columns.len()]);
                },
            );
        }
    }
}

/// A value for each query of a block and each key.
struct Scores {
    values: Vec<f32>,
    stride: usize,
}

impl Scores {
    fn new(keys: usize) -> Self {
        Self { values: vec![0.0; QUERIES * keys], stride: keys }
    }

    fn row(&self, row: usize, keys: usize) -> &[f32] {
        &self.values[row * self.stride..][..keys]
    }

    fn row_mut(&mut self, row: usize, keys: usize) -> &mut [f32] {
        &mut self.values[row * self.stride..][..keys]
    }

    fn rows(&self, count: usize, keys: usize) -> Vec<&[f32]> {
        (0..count).map(|row| self.row(row, keys)).collect()
    }

    /// `[queries, keys up to the last of them]`
    fn matrix(&self, queries: &Range<usize>) -> Strided<'_> {
        Strided::new(&self.values, QUERIES, self.stride).rows(0..queries.len()).columns(0..queries.end)
    }
}

/// A block of queries against the keys.
struct Block {
    tile: Tile,
    keys: Panels,
    scores: Scores,
}

impl Block {
    fn new(isa: Isa, part: &Part, qkv: [&[f32]; 3]) -> Self {
        let tile = Tile { isa, sums: Box::new(new_sums()) };
        let keys = Panels::of_outputs(part.kv(qkv[1]));
        Self { tile, keys, scores: Scores::new(part.len) }
    }

    /// The probabilities of the keys up to each query; 0 behind it.
    fn probabilities(&mut self, part: &Part, head: usize, queries: &Range<usize>, query: &[f32]) {
        let row = |index| &query[part.query_place(head, index)..][..part.heads.head_dim];
        let (rows, scores) = (queries.clone().map(row).collect::<Vec<_>>(), &mut self.scores);
        self.tile.multiply(&rows, &self.keys, queries.end, |row, columns, sums| {
            scores.row_mut(row, queries.end)[columns].copy_from_slice(sums);
        });
        for (row, index) in queries.clone().enumerate() {
            softmax(self.tile.isa, part.heads.scale, index + 1, self.scores.row_mut(row, queries.end));
        }
    }
}

for_each_width! {
    /// `softmax(scale · scores)` of the first `keys`; the rest becomes 0.
    fn softmax(scale: f32, keys: usize, scores: &mut [f32]) {
        let (scores, hidden) = scores.split_at_mut(keys);
        hidden.fill(0.0);
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let factor = 1.0 / exp_in_place(scores, |score| (score - max) * scale);
        scores.iter_mut().for_each(|score| *score *= factor);
    }
}

for_each_width! {
    /// The gradient of the scores in place of that of the first `keys` probabilities; the rest becomes 0.
    fn softmax_backward(scale: f32, probabilities: &[f32], keys: usize, gradient: &mut [f32]) {
        let (gradient, hidden) = gradient.split_at_mut(keys);
        hidden.fill(0.0);
        let mut sums = [0.0; LANES];
        for (probabilities, gradient) in probabilities[..keys].chunks(LANES).zip(gradient.chunks(LANES)) {
            sums.iter_mut().zip(probabilities).zip(gradient).for_each(|((sum, p), g)| *sum += p * g);
        }
        let mean = tree(sums, |a, b| a + b);
        gradient.iter_mut().zip(probabilities).for_each(|(g, p)| *g = p * (*g - mean) * scale);
    }
}
