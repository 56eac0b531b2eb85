//! How long the parts of a model's steps take on this machine: measured with made-up weights in the model's own shapes
//! and formats, of a few layers, so that nothing has to be loaded. What is timed is the code that serves.

use std::time::Instant;

use cadre_kernels::{buffer::AllocError, format::PANEL};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use super::{
    Attention, Decoder, DenseFfn, Experts, Ffn, FfnLayout, HeadNorms, Layout, Linear, Matrix, MoeFfn, RouterOptions,
};
use crate::{
    Result, Tensor,
    compute::Compute,
    kv::{KvCache, KvDtype, blocks::BLOCK_SIZE},
    model::{Model, SequenceRows, StepBatch, StepContext},
    ops::{self, Routes},
};

/// The context of a sequence that decodes.
const DECODE_CONTEXT: usize = 32;
/// Bytes of the part of the head that is made up: more than the caches next to a core hold.
const HEAD_BYTES: usize = 128 << 20;
/// Rows of the made-up embedding.
const EMBEDDING_ROWS: usize = 256;

/// What one step took, as measured on the made-up layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTimes {
    /// Tokens of the step.
    pub tokens: usize,
    /// Seconds in all layers together for all but routed experts: norms, attention, routers, shared and dense
    /// feed-forwards.
    pub layer_seconds: f64,
    /// Seconds for the head.
    pub head_seconds: f64,
    /// Rows of the head.
    pub head_rows: usize,
    /// Seconds for one expert of those that the step used; 0 for a model without.
    pub expert_seconds: f64,
    /// Tokens that used such an expert, on average.
    pub rows_per_expert: f64,
}

/// Some layers of a model, made up.
pub struct Probe<'a> {
    compute: &'a Compute,
    decoder: &'a Decoder,
    kv_dtype: KvDtype,
    embedding: Matrix,
    layers: Vec<ProbeLayer<'a>>,
    dense: Option<DenseFfn>,
    head: Matrix,
    random: Random,
}

/// Attention and, if the model has such layers, what experts come with.
struct ProbeLayer<'a> {
    attention: Attention,
    moe: Option<ProbeMoe<'a>>,
}

struct ProbeMoe<'a> {
    options: &'a RouterOptions,
    router: Matrix,
    shared: Option<DenseFfn>,
    experts: Experts,
}

impl<'a> Probe<'a> {
    /// Makes up as many layers of `decoder` as fit into `bytes`, at least one; of a layer with more than that, fewer
    /// experts. Takes about so many bytes more for the head and one dense feed-forward.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn new(compute: &'a Compute, decoder: &'a Decoder, kv_dtype: KvDtype, bytes: usize) -> Result<Self> {
        let parts = &decoder.parts;
        let first = &parts.layers[0];
        let moe = parts.layers.iter().find_map(|layer| match &layer.ffn {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense(_) => None,
        });
        let dense = parts.layers.iter().find_map(|layer| match &layer.ffn {
            Ffn::Dense(dense) => Some(dense.weights.layout()),
            Ffn::Moe(_) => None,
        });
        let layer = || -> Result<ProbeLayer<'a>> {
            let moe = moe.map(|moe| made_up_moe(compute, moe, bytes)).transpose()?;
            Ok(ProbeLayer { attention: made_up_attention(compute, &first.attention)?, moe })
        };
        let mut layers = vec![layer()?];
        let layer_bytes = layers[0].attention.bytes() + layers[0].moe.as_ref().map_or(0, |moe| moe.experts.bytes());
        while layers.len() < parts.layers.len() && (layers.len() + 1) * layer_bytes <= bytes {
            layers.push(layer()?);
        }
        let hidden = decoder.info().hidden_size;
        let Layout { format, n, k } = parts.head.as_ref().unwrap_or(&parts.embedding).layout();
        let most_rows = HEAD_BYTES / Layout { format, n: PANEL, k }.bytes().max(1) * PANEL;
        let embedding = Layout { format: super::Format::F32, n: EMBEDDING_ROWS, k: hidden };
        Ok(Self {
            compute,
            decoder,
            kv_dtype,
            embedding: made_up_matrix(compute, embedding)?,
            layers,
            dense: dense.map(|layout| made_up_dense(compute, layout)).transpose()?,
            head: made_up_matrix(compute, Layout { format, n: n.min(most_rows.max(PANEL)), k })?,
            random: Random(ChaCha8Rng::seed_from_u64(0)),
        })
    }

    /// Times a step in which so many sequences decode.
    ///
    /// # Errors
    /// When an op fails.
    pub fn decode(&mut self, sequences: usize) -> Result<StepTimes> {
        self.step(sequences, 1, DECODE_CONTEXT)
    }

    /// Times a step that begins a prompt with so many tokens.
    ///
    /// # Errors
    /// When an op fails.
    pub fn prefill(&mut self, tokens: usize) -> Result<StepTimes> {
        self.step(1, tokens, tokens)
    }

    fn step(&mut self, sequences: usize, rows: usize, context: usize) -> Result<StepTimes> {
        let info = self.decoder.info();
        let batch = self.batch(sequences, rows, context);
        let tokens = batch.token_ids.len();
        let blocks = sequences * context.div_ceil(BLOCK_SIZE);
        let mut kv = KvCache::new(self.layers.len(), info.num_kv_heads, info.head_dim, blocks, self.kv_dtype)?;
        let x = ops::embed(&self.embedding, &batch.token_ids)?;
        let moe_layers = info.moe_layers.len();
        let mut clock = Clock::default();
        let (mut used, mut rows_used) = (0, 0);
        for index in 0..self.layers.len() {
            let routes = self.layers[index].moe.as_ref().map(|moe| self.random.routes(tokens, moe));
            let lane = batch.lane();
            let mut step = StepContext { compute: self.compute, batch: &batch, kv: &mut kv, routes: None, lane };
            let hidden = self.attend(&mut step, index, &x, &mut clock)?;
            if let Some((moe, (routes, distinct))) = self.layers[index].moe.as_ref().zip(routes) {
                self.experts(moe, &routes, &hidden, &mut clock)?;
                used += distinct;
                rows_used += routes.experts.len();
            }
            if let Some(dense) = &self.dense {
                let start = Instant::now();
                ops::add(self.compute, &hidden, &dense.forward(self.compute, &hidden, None)?)?;
                clock.dense += start.elapsed().as_secs_f64();
            }
        }
        let rows: Vec<u32> = batch.logit_rows.clone();
        let start = Instant::now();
        let last = ops::select_rows(&x, &rows)?;
        ops::linear(self.compute, &last, &self.head, None)?;
        let head = start.elapsed().as_secs_f64();

        let each = |seconds: f64, layers: usize| seconds / self.layers.len() as f64 * layers as f64;
        let layers = info.num_layers;
        Ok(StepTimes {
            tokens,
            layer_seconds: each(clock.attention, layers)
                + each(clock.router, moe_layers)
                + each(clock.dense, layers - moe_layers),
            head_seconds: head * info.vocab_size as f64 / self.head.layout().n as f64,
            head_rows: rows.len(),
            expert_seconds: clock.experts / f64::from(u32::try_from(used).unwrap_or(u32::MAX).max(1)),
            rows_per_expert: rows_used as f64 / used.max(1) as f64,
        })
    }

    fn attend(&self, step: &mut StepContext<'_>, index: usize, x: &Tensor, clock: &mut Clock) -> Result<Tensor> {
        let first = &self.decoder.parts.layers[0];
        let start = Instant::now();
        let normed = first.attention_norm.forward(self.compute, x)?;
        let attended = self.layers[index].attention.forward(step, &self.decoder.parts.rope, index, &normed)?;
        let normed = first.ffn_norm.forward(self.compute, &ops::add(self.compute, x, &attended)?)?;
        clock.attention += start.elapsed().as_secs_f64();
        Ok(normed)
    }

    fn experts(&self, moe: &ProbeMoe<'_>, routes: &Routes, x: &Tensor, clock: &mut Clock) -> Result<()> {
        let start = Instant::now();
        // The choice is computed and not used: made-up routers choose too unevenly.
        ops::route(&ops::linear(self.compute, x, &moe.router, None)?, moe.options)?;
        let shared = moe.shared.as_ref().map(|shared| shared.forward(self.compute, x, None)).transpose()?;
        let routed = Instant::now();
        clock.router += (routed - start).as_secs_f64();
        let sum = ops::grouped_ffn(self.compute, x, &moe.experts, routes, None)?;
        clock.experts += routed.elapsed().as_secs_f64();
        let start = Instant::now();
        ops::add(self.compute, shared.as_ref().unwrap_or(x), &sum)?;
        clock.router += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// `rows` tokens at the end of each sequence.
    fn batch(&mut self, sequences: usize, rows: usize, context: usize) -> StepBatch {
        let blocks = context.div_ceil(BLOCK_SIZE);
        let mut batch = StepBatch::default();
        for sequence in 0..sequences {
            batch.token_ids.extend((0..rows).map(|_| self.random.below(EMBEDDING_ROWS) as u32));
            batch.positions.extend((context - rows..context).map(|position| position as u32));
            batch.sequences.push(SequenceRows {
                rows: sequence * rows..(sequence + 1) * rows,
                context_len: context,
                block_table: (sequence * blocks..(sequence + 1) * blocks).map(|block| block as u32).collect(),
                adapter: None,
            });
            batch.logit_rows.push(((sequence + 1) * rows - 1) as u32);
        }
        batch
    }
}

/// Seconds by part, over the made-up layers.
#[derive(Default)]
struct Clock {
    attention: f64,
    router: f64,
    experts: f64,
    dense: f64,
}

fn made_up_attention(compute: &Compute, like: &Attention) -> Result<Attention> {
    let output = made_up_matrix(compute, like.output.weight.layout())?;
    Ok(Attention {
        config: like.config,
        qkv: made_up_matrix(compute, like.qkv.layout())?,
        qkv_bias: like.qkv_bias.clone(),
        norms: like.norms.as_ref().map(|HeadNorms { modules, query, key, eps }| HeadNorms {
            modules: modules.clone(),
            query: query.clone(),
            key: key.clone(),
            eps: *eps,
        }),
        output: Linear::new(output, like.output.bias.clone()),
    })
}

fn made_up_moe<'a>(compute: &Compute, like: &'a MoeFfn, bytes: usize) -> Result<ProbeMoe<'a>> {
    let (layout, count) = (like.experts.layout(), like.experts.count());
    let most = bytes / super::expert_bytes(&layout).max(1);
    let shared = like.shared.as_ref().map(|shared| made_up_dense(compute, shared.weights.layout()));
    Ok(ProbeMoe {
        options: &like.options,
        router: made_up_matrix(compute, like.router.layout())?,
        shared: shared.transpose()?,
        experts: made_up_experts(compute, layout, count.min(most.max(like.options.top_k)))?,
    })
}

fn made_up_dense(compute: &Compute, layout: FfnLayout) -> Result<DenseFfn> {
    Ok(DenseFfn { weights: made_up_experts(compute, layout, 1)? })
}

/// All panels are the same one.
fn made_up_matrix(compute: &Compute, layout: Layout) -> Result<Matrix> {
    let panel = Matrix::from_rows(compute, Layout { n: PANEL, ..layout }, |rows, out| {
        numbers(rows.start, out);
        Ok::<(), AllocError>(())
    })?;
    let matrix = Matrix::from_packed(compute, layout, |offset, out| {
        fill(out, panel.data(), offset);
        Ok::<(), AllocError>(())
    })?;
    Ok(matrix)
}

/// All experts are the same one.
fn made_up_experts(compute: &Compute, layout: FfnLayout, count: usize) -> Result<Experts> {
    let one = Experts::from_rows(compute, layout, 1, |_, part, rows, out| {
        numbers(rows.start + 7 * part as usize, out);
        Ok::<(), AllocError>(())
    })?;
    let experts = Experts::from_packed(compute, layout, count, |_, offset, out| {
        fill(out, one.data(), offset);
        Ok::<(), AllocError>(())
    })?;
    Ok(experts)
}

/// Small numbers of both signs.
fn numbers(start: usize, out: &mut [f32]) {
    for (index, value) in out.iter_mut().enumerate() {
        let number = (start as u32).wrapping_mul(977).wrapping_add(index as u32).wrapping_mul(2_654_435_761) >> 16;
        *value = (number as f32 / 65_536.0 - 0.5) * 0.1;
    }
}

/// Repeats `pattern`; `out` begins at its byte `offset`, counted over the repetitions.
fn fill(out: &mut [u8], pattern: &[u8], offset: usize) {
    let mut from = offset % pattern.len();
    let mut rest = out;
    while !rest.is_empty() {
        let take = rest.len().min(pattern.len() - from);
        let (now, later) = rest.split_at_mut(take);
        now.copy_from_slice(&pattern[from..from + take]);
        rest = later;
        from = 0;
    }
}

/// Random numbers, the same each time.
struct Random(ChaCha8Rng);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        (self.0.next_u64() % end.max(1) as u64) as usize
    }

    /// Each token's experts, evenly chosen, and how many different ones that makes.
    fn routes(&mut self, tokens: usize, moe: &ProbeMoe<'_>) -> (Routes, usize) {
        let (count, top_k) = (moe.experts.count(), moe.options.top_k);
        let mut all: Vec<u32> = (0..count as u32).collect();
        let mut routes = Routes { top_k, experts: Vec::new(), weights: vec![1.0 / top_k as f32; tokens * top_k] };
        let mut seen = vec![false; count];
        for _ in 0..tokens {
            for place in 0..top_k {
                let other = place + self.below(count - place);
                all.swap(place, other);
            }
            let mut chosen = all[..top_k].to_vec();
            chosen.sort_unstable();
            chosen.iter().for_each(|expert| seen[*expert as usize] = true);
            routes.experts.extend(chosen);
        }
        (routes, seen.into_iter().filter(|seen| *seen).count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_repeat_from_any_offset() {
        let mut out = [0; 7];
        fill(&mut out, &[1, 2, 3], 4);
        assert_eq!(out, [2, 3, 1, 2, 3, 1, 2]);
    }
}
