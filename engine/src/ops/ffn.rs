use cadre_kernels::{
    ffn::{GroupedFfn, WeightedRow},
    format::Packed,
    gradient::gated_silu,
    matmul::matmul,
    router::{self, RouterOptions},
    rows,
    slots::SlotReader,
};

use super::{forward_only, output, rows_of, with_slice};
use crate::{
    Error, Result, Tensor,
    adapter::{FfnPlace, RowAdapters},
    compute::Compute,
    experts::{Lane, StoredExperts, Visit},
    nn::{Experts, FfnLayout, matrices},
    train::places::Place,
};

/// Which experts each token uses: `[tokens, top_k]`, a token's experts in ascending index.
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    /// Experts of each token.
    pub top_k: usize,
    /// Their indices.
    pub experts: Vec<u32>,
    /// The weights of their outputs.
    pub weights: Vec<f32>,
}

impl Routes {
    /// All of `tokens` use expert 0 with weight 1: a dense layer.
    #[must_use]
    pub fn dense(tokens: usize) -> Self {
        Self { top_k: 1, experts: vec![0; tokens], weights: vec![1.0; tokens] }
    }

    /// The experts of `count` that any token uses, those of the largest weights together first.
    pub(crate) fn most_used(&self, count: usize) -> Vec<usize> {
        let mut sums = vec![0.0; count];
        for (expert, weight) in self.experts.iter().zip(&self.weights) {
            sums[*expert as usize] += weight;
        }
        let mut used: Vec<usize> = (0..count).filter(|&expert| sums[expert] > 0.0).collect();
        used.sort_by(|&one, &other| sums[other].total_cmp(&sums[one]));
        used
    }

    /// The rows that use an expert, ascending.
    fn rows_of(&self, expert: u32) -> impl Iterator<Item = u32> {
        let rows = self.experts.chunks_exact(self.top_k).enumerate();
        rows.filter(move |(_, experts)| experts.contains(&expert)).map(|(row, _)| row as u32)
    }

    /// The rows of each of `count` experts, ascending.
    pub(crate) fn by_expert(&self, count: usize) -> Vec<Vec<WeightedRow>> {
        let mut groups = vec![Vec::new(); count];
        for (index, (expert, weight)) in self.experts.iter().zip(&self.weights).enumerate() {
            let row = (index / self.top_k) as u32;
            groups[*expert as usize].push(WeightedRow { row, weight: *weight });
        }
        groups
    }
}

/// The router's choice from its logits `[tokens, experts]`.
///
/// # Errors
/// When a gradient is wanted.
pub fn route(logits: &Tensor, options: &RouterOptions) -> Result<Routes> {
    forward_only("route", &[logits])?;
    let tokens = logits.dims().first().copied().unwrap_or(0);
    let top_k = options.top_k;
    let mut routes = Routes { top_k, experts: vec![0; tokens * top_k], weights: vec![0.0; tokens * top_k] };
    with_slice(logits, |logits| {
        router::route(options, logits, &mut routes.experts, &mut routes.weights);
        Ok(())
    })?;
    Ok(routes)
}

/// The adapters of the rows, and which of a layer's feed-forwards is computed.
pub type FfnAdapters<'a> = (&'a RowAdapters<'a>, FfnPlace);

/// The weighted sum of each token's experts: `x` and the result are `[tokens, hidden]`. An expert's weights are read
/// once, however many tokens use it; the sum is taken in ascending expert index.
///
/// # Errors
/// When `x` has another width than the experts, or a gradient is wanted.
pub fn grouped_ffn(
    compute: &Compute,
    x: &Tensor,
    experts: &Experts,
    routes: &Routes,
    adapters: Option<FfnAdapters<'_>>,
) -> Result<Tensor> {
    forward_only("grouped_ffn", &[x])?;
    let layout = experts.layout();
    let tokens = rows_of("input of grouped_ffn", x, layout.hidden)?;
    let mut rows = routes.by_expert(experts.count());
    let adapted = take_adapted(&mut rows, adapters);
    let groups: Vec<_> = rows
        .iter()
        .enumerate()
        .filter(|(_, rows)| !rows.is_empty())
        .map(|(expert, rows)| experts.group(expert, rows))
        .collect();
    let mut out = rows::zeros(&compute.pool, tokens * layout.hidden);
    with_slice(x, |x| {
        if !groups.is_empty() {
            cadre_kernels::ffn::grouped_ffn(&compute.pool, compute.isa, layout, x, &groups, &mut out);
        }
        adapted.iter().for_each(|group| group.add(compute, layout, experts.expert(group.expert), x, &mut out));
        Ok(())
    })?;
    output(out, layout.hidden)
}

/// [`grouped_ffn`] of experts in the store, bit for bit: those that are in memory begin, the others follow as they are
/// read.
///
/// # Errors
/// When an expert can't be read; and as for [`grouped_ffn`].
pub fn stored_ffn(
    compute: &Compute,
    x: &Tensor,
    experts: &StoredExperts,
    routes: &Routes,
    adapters: Option<FfnAdapters<'_>>,
    lane: Lane,
) -> Result<Tensor> {
    forward_only("stored_ffn", &[x])?;
    let layout = experts.layout();
    let tokens = rows_of("input of stored_ffn", x, layout.hidden)?;
    let (store, layer) = experts.place()?;
    let mut rows = routes.by_expert(experts.count());
    let used: Vec<usize> = (0..rows.len()).filter(|&expert| !rows[expert].is_empty()).collect();
    let adapted = take_adapted(&mut rows, adapters);
    let groups: Vec<&[WeightedRow]> = used.iter().map(|&expert| rows[expert].as_slice()).collect();
    let fused = |indices: &[usize]| -> Vec<usize> {
        indices.iter().copied().filter(|&index| !groups[index].is_empty()).collect()
    };
    let mut out = rows::zeros(&compute.pool, tokens * layout.hidden);
    with_slice(x, |x| {
        let mut ffn = GroupedFfn::new(&compute.pool, compute.isa, layout, x, &groups);
        let mut visit = store.visit(layer, &used, lane);
        // Those whose first half is computed; the sums follow in the experts' order.
        let mut computed = vec![false; used.len()];
        let mut summed = 0;
        loop {
            let landed = visit.landed().map_err(|error| {
                let rows = routes.rows_of(error.id.expert).collect();
                Error::Fetch { error, rows }
            })?;
            if landed.is_empty() {
                break;
            }
            ffn.gate_up(&weights(&layout, &held(&visit, &fused(&landed)), 0));
            landed.iter().for_each(|&index| computed[index] = true);
            let next: Vec<usize> = (summed..used.len()).take_while(|&index| computed[index]).collect();
            ffn.add_down(&weights(&layout, &held(&visit, &fused(&next)), 1), &mut out);
            for &index in &next {
                if let Some(group) = adapted.iter().find(|group| group.expert == used[index]) {
                    group.add(compute, layout, &visit.bytes(index), x, &mut out);
                }
            }
            visit.release(summed..summed + next.len());
            summed += next.len();
        }
        Ok(())
    })?;
    output(out, layout.hidden)
}

/// Rows of one expert whose adapters change the feed-forward.
struct AdaptedGroup<'a> {
    expert: usize,
    rows: Vec<WeightedRow>,
    adapters: RowAdapters<'a>,
    places: [Place; 2],
}

/// Takes the rows whose adapters change the feed-forward out of those of each expert: the fused kernel has no place for
/// what is added before the activation. The groups are in ascending expert index.
fn take_adapted<'a>(rows: &mut [Vec<WeightedRow>], adapters: Option<FfnAdapters<'a>>) -> Vec<AdaptedGroup<'a>> {
    let Some((adapters, ffn)) = adapters.filter(|(adapters, ffn)| adapters.adapt_ffn(*ffn)) else { return Vec::new() };
    let take = |(expert, rows): (usize, &mut Vec<WeightedRow>)| {
        let taken: Vec<_> = rows.extract_if(.., |row| adapters.adapts_row(row.row as usize, ffn)).collect();
        let own = adapters.select(taken.iter().map(|row| row.row as usize));
        let group = AdaptedGroup { expert, rows: taken, adapters: own, places: ffn.matrices(expert) };
        (!group.rows.is_empty()).then_some(group)
    };
    rows.iter_mut().enumerate().filter_map(take).collect()
}

impl AdaptedGroup<'_> {
    /// `out[row] += weight · ffn(x[row])` with the expert's packed `bytes`, one matrix after the other.
    fn add(&self, compute: &Compute, layout: FfnLayout, bytes: &[u8], x: &[f32], out: &mut [f32]) {
        let Compute { pool, isa } = compute;
        let FfnLayout { hidden, intermediate, .. } = layout;
        let [gate_up, down] = matrices(&layout, bytes);
        let tokens = self.rows.len();
        let mut inputs = rows::zeros(pool, tokens * hidden);
        rows::gather(pool, x, hidden, &self.rows, &mut inputs);
        let mut gated = rows::zeros(pool, tokens * gate_up.layout().n);
        matmul(pool, *isa, &inputs, &gate_up, &mut gated);
        self.adapters.add(compute, self.places[0], &inputs, &mut gated);
        let mut inner = rows::zeros(pool, tokens * intermediate);
        gated_silu(pool, *isa, intermediate, &gated, &mut inner);
        let mut outputs = rows::zeros(pool, tokens * hidden);
        matmul(pool, *isa, &inner, &down, &mut outputs);
        self.adapters.add(compute, self.places[1], &inner, &mut outputs);
        rows::scatter_add(pool, &outputs, hidden, &self.rows, out);
    }
}

/// The bytes of experts that have landed, by their index in the visit.
fn held<'a>(visit: &'a Visit<'_>, indices: &[usize]) -> Vec<(usize, SlotReader<'a>)> {
    indices.iter().map(|&index| (index, visit.bytes(index))).collect()
}

/// gate|up (part 0) or down (part 1) of packed experts.
fn weights<'a>(layout: &FfnLayout, experts: &'a [(usize, SlotReader<'_>)], part: usize) -> Vec<(usize, Packed<'a>)> {
    experts.iter().map(|(index, bytes)| (*index, matrices(layout, bytes)[part])).collect()
}
