use cadre_kernels::{
    ffn::{GroupedFfn, WeightedRow},
    router::{self, RouterOptions},
};

use super::{forward_only, output, rows_of, with_slice};
use crate::{
    Error, Result, Tensor,
    compute::Compute,
    experts::{ExpertStore, Lane, Lease, StoredExperts},
    nn::{Experts, matrices},
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

    /// The rows of each of `count` experts, ascending.
    fn by_expert(&self, count: usize) -> Vec<Vec<WeightedRow>> {
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

/// The weighted sum of each token's experts: `x` and the result are `[tokens, hidden]`. An expert's weights are read
/// once, however many tokens use it; the sum is taken in ascending expert index.
///
/// # Errors
/// When `x` has another width than the experts, or a gradient is wanted.
pub fn grouped_ffn(compute: &Compute, x: &Tensor, experts: &Experts, routes: &Routes) -> Result<Tensor> {
    forward_only("grouped_ffn", &[x])?;
    let layout = experts.layout();
    let tokens = rows_of("input of grouped_ffn", x, layout.hidden)?;
    let rows = routes.by_expert(experts.count());
    let groups: Vec<_> = rows
        .iter()
        .enumerate()
        .filter(|(_, rows)| !rows.is_empty())
        .map(|(expert, rows)| experts.group(expert, rows))
        .collect();
    let mut out = vec![0.0; tokens * layout.hidden];
    with_slice(x, |x| {
        cadre_kernels::ffn::grouped_ffn(&compute.pool, compute.isa, layout, x, &groups, &mut out);
        Ok(())
    })?;
    output(out, layout.hidden)
}

/// Experts of a prompt's step that are computed while as many others are read.
const SCAN_PART: usize = 16;

/// [`grouped_ffn`] of experts in the store, bit for bit: those that are in memory begin, the others follow as they are
/// read. What doesn't fit at once comes in parts, one read while the one before computes.
///
/// # Errors
/// When an expert can't be read; and as for [`grouped_ffn`].
pub fn stored_ffn(
    compute: &Compute,
    x: &Tensor,
    experts: &StoredExperts,
    routes: &Routes,
    lane: Lane,
) -> Result<Tensor> {
    forward_only("stored_ffn", &[x])?;
    let layout = experts.layout();
    let tokens = rows_of("input of stored_ffn", x, layout.hidden)?;
    let (store, layer) = experts.place()?;
    let rows = routes.by_expert(experts.count());
    let used: Vec<usize> = (0..rows.len()).filter(|&expert| !rows[expert].is_empty()).collect();
    let groups: Vec<&[WeightedRow]> = used.iter().map(|&expert| rows[expert].as_slice()).collect();
    // Two parts are held at a time; what a scan holds, it has taken from decode.
    let part = match lane {
        Lane::Decode if used.len() <= store.slots() => used.len(),
        Lane::Decode => store.slots() / 2,
        Lane::Scan => SCAN_PART.min(store.slots() / 2),
    }
    .max(1);
    let mut out = vec![0.0; tokens * layout.hidden];
    with_slice(x, |x| {
        let mut ffn = GroupedFfn::new(&compute.pool, compute.isa, layout, x, &groups);
        let mut begun = 0;
        let mut next = None;
        while begun < used.len() || next.is_some() {
            let (start, mut lease) = match next.take() {
                Some(begun) => begun,
                None => begin(store, layer, &used, &mut begun, part, lane),
            };
            if begun < used.len() && part < used.len() {
                next = Some(begin(store, layer, &used, &mut begun, part, lane));
            }
            loop {
                let landed = lease.landed().map_err(|error| {
                    let needing = &rows[error.id.expert as usize];
                    Error::Fetch { error, rows: needing.iter().map(|row| row.row).collect() }
                })?;
                if landed.is_empty() {
                    break;
                }
                let bytes: Vec<_> = landed.iter().map(|&index| lease.bytes(index)).collect();
                let weights: Vec<_> = landed
                    .iter()
                    .zip(&bytes)
                    .map(|(&index, bytes)| (start + index, matrices(&layout, bytes)[0]))
                    .collect();
                ffn.gate_up(&weights);
            }
            let bytes: Vec<_> = (0..lease.len()).map(|index| lease.bytes(index)).collect();
            let weights: Vec<_> =
                bytes.iter().enumerate().map(|(index, bytes)| (start + index, matrices(&layout, bytes)[1])).collect();
            ffn.add_down(&weights, &mut out);
        }
        Ok(())
    })?;
    output(out, layout.hidden)
}

/// Leases up to `part` more of the experts in `used`; says with which it begins.
fn begin<'a>(
    store: &'a ExpertStore,
    layer: usize,
    used: &[usize],
    begun: &mut usize,
    part: usize,
    lane: Lane,
) -> (usize, Lease<'a>) {
    let start = *begun;
    let lease = store.lease(layer, &used[start..used.len().min(start + part)], lane);
    *begun += lease.len();
    (start, lease)
}
