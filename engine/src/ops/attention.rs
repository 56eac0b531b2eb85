use cadre_kernels::{
    qkv::{QkvOptions, QkvOut},
    rows::zeros,
};

use super::{forward_only, output, rows_of, with_slice};
use crate::{Result, Tensor, compute::Compute, kv::AttentionIo, model::StepContext, nn::Rope};

/// Splits the fused projection `[tokens, (heads + 2 · kv_heads) · head_dim]` into queries, keys and values, with bias,
/// norm, clip and position on the way.
///
/// # Errors
/// When `x` has another width, or a gradient is wanted.
pub fn split_qkv(
    compute: &Compute,
    x: &Tensor,
    positions: &[u32],
    options: &QkvOptions<'_>,
    rope: &Rope,
) -> Result<[Tensor; 3]> {
    forward_only("split_qkv", &[x])?;
    let (q, kv) = (options.num_heads * options.head_dim, options.num_kv_heads * options.head_dim);
    let tokens = rows_of("fused projection", x, q + 2 * kv)?;
    let [mut query, mut key, mut value] = [q, kv, kv].map(|width| zeros(&compute.pool, tokens * width));
    with_slice(x, |x| {
        let out = QkvOut { query: &mut query, key: &mut key, value: &mut value };
        rope.with_table(positions, |table| {
            cadre_kernels::qkv::split_qkv(&compute.pool, options, table, positions, x, out);
        });
        Ok(())
    })?;
    Ok([output(query, q)?, output(key, kv)?, output(value, kv)?])
}

/// Causal attention of the batch over the paged cache of `layer`, to which the batch's keys and values are written first.
///
/// # Errors
/// When the queries don't fit the cache, or a gradient is wanted.
pub fn attention(step: &mut StepContext<'_>, layer: usize, scale: f32, qkv: &[Tensor; 3]) -> Result<Tensor> {
    let [query, key, value] = qkv;
    forward_only("attention", &[query, key, value])?;
    let mut out = zeros(&step.compute.pool, query.elem_count());
    with_slice(query, |queries| {
        with_slice(key, |keys| {
            with_slice(value, |values| {
                let io = AttentionIo { scale, queries, keys, values, out: &mut out };
                step.kv.attend(step.compute, step.batch, layer, io)
            })
        })
    })?;
    output(out, query.dims().last().copied().unwrap_or(1))
}
