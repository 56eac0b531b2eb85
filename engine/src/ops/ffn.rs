use cadre_kernels::{
    ffn::WeightedRow,
    router::{self, RouterOptions},
};

use super::{forward_only, output, rows_of, with_slice};
use crate::{Result, Tensor, compute::Compute, nn::Experts};

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
