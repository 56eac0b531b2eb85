//! The backward pass of [`crate::qkv`].

use crate::{
    isa::Isa,
    norm::{for_row_chunks, rms_norm_in_place},
    pool::Pool,
    qkv::{QkvOptions, RopeTable},
    rope::rotate_back,
    shared::SharedSlice,
};

/// The gradients of what a fused projection was split into: `[tokens, heads · head_dim]` each.
#[derive(Debug, Clone, Copy)]
pub struct QkvGradients<'a> {
    /// Of the queries.
    pub query: &'a [f32],
    /// Of the keys.
    pub key: &'a [f32],
    /// Of the values.
    pub value: &'a [f32],
}

/// The gradient of the fused projection `x` `[tokens, (num_heads + 2 · num_kv_heads) · head_dim]` into `out` of the same
/// size. The gradient of the bias is its sum over the tokens. `norm_gradients`, if wanted, are those of the weights of
/// the queries' and the keys' norm, and grow.
///
/// # Panics
/// When a slice has not the size that the options need, or a position lies outside of the table.
#[allow(clippy::too_many_arguments, reason = "what a split has, and the gradients on both sides")]
pub fn split_qkv_backward(
    pool: &Pool,
    isa: Isa,
    options: &QkvOptions<'_>,
    table: &RopeTable<'_>,
    positions: &[u32],
    x: &[f32],
    gradients: QkvGradients<'_>,
    out: &mut [f32],
    norm_gradients: Option<[&mut [f32]; 2]>,
) {
    let (q, kv) = (options.num_heads * options.head_dim, options.num_kv_heads * options.head_dim);
    let (width, tokens) = (q + 2 * kv, positions.len());
    assert_eq!((x.len(), out.len()), (tokens * width, tokens * width), "projection of {tokens} tokens by {width}");
    let QkvGradients { query, key, value } = gradients;
    assert_eq!(
        (query.len(), key.len(), value.len()),
        (tokens * q, tokens * kv, tokens * kv),
        "gradients of {tokens} tokens"
    );
    let angles = |row: usize| {
        let angles = positions[row] as usize * table.half..(positions[row] as usize + 1) * table.half;
        (&table.cos[angles.clone()], &table.sin[angles])
    };
    let parts = [(0, q, query), (q, kv, key), (q + kv, kv, value)];
    let target = SharedSlice::new(out);
    for_row_chunks(pool, tokens, width, |rows| {
        for row in rows {
            let x = &x[row * width..(row + 1) * width];
            for (index, (start, len, gradient)) in parts.into_iter().enumerate() {
                // SAFETY: each row belongs to one task.
                let out = unsafe { target.part(row * width + start, len) };
                out.copy_from_slice(&gradient[row * len..(row + 1) * len]);
                of_part(isa, options, index, &x[start..start + len], start, angles(row), out);
            }
        }
    });
    let (Some(norm), Some(norm_gradients)) = (options.norm, norm_gradients) else { return };
    // Twice the work of the norms: only full fine-tuning asks for it.
    for ((start, len, gradient), (weight, sums)) in
        parts.into_iter().zip([norm.query, norm.key].into_iter().zip(norm_gradients))
    {
        let index = usize::from(start > 0);
        let (mut normed, mut rest) = (vec![0.0; len], vec![0.0; len]);
        let ones = vec![1.0; weight.len()];
        for row in 0..tokens {
            biased(options, &x[row * width + start..][..len], start, &mut normed);
            rest.copy_from_slice(&gradient[row * len..(row + 1) * len]);
            normed.chunks_exact_mut(weight.len()).for_each(|x| rms_norm_in_place(x, weight, norm.eps));
            before_rope(options, index, &normed, angles(row), &mut rest);
            biased(options, &x[row * width + start..][..len], start, &mut normed);
            for (x, dy) in normed.chunks_exact_mut(weight.len()).zip(rest.chunks_exact(weight.len())) {
                rms_norm_in_place(x, &ones, norm.eps);
                sums.iter_mut().zip(x).zip(dy).for_each(|((sum, x), dy)| *sum += dy * *x);
            }
        }
    }
}

/// A part of a projection's row with its bias.
fn biased(options: &QkvOptions<'_>, x: &[f32], start: usize, out: &mut [f32]) {
    out.copy_from_slice(x);
    if let Some(bias) = options.bias {
        out.iter_mut().zip(&bias[start..]).for_each(|(x, bias)| *x += bias);
    }
}

/// Takes a gradient back over the rotation and the clip; `normed` is what was clipped.
fn before_rope(
    options: &QkvOptions<'_>,
    index: usize,
    normed: &[f32],
    (cos, sin): (&[f32], &[f32]),
    gradient: &mut [f32],
) {
    if index < 2 {
        gradient.chunks_exact_mut(options.head_dim).for_each(|head| rotate_back(head, cos, sin));
    }
    if let Some(bound) = options.clip {
        let outside = gradient.iter_mut().zip(normed).filter(|(_, x)| x.abs() > bound);
        outside.for_each(|(gradient, _)| *gradient = 0.0);
    }
}

/// Queries (0), keys (1) or values (2) of one row: `gradient` of the part becomes that of the projection.
fn of_part(
    isa: Isa,
    options: &QkvOptions<'_>,
    index: usize,
    x: &[f32],
    start: usize,
    angles: (&[f32], &[f32]),
    gradient: &mut [f32],
) {
    let weight =
        options.norm.and_then(|norm| [Some(norm.query), Some(norm.key), None][index].map(|weight| (weight, norm.eps)));
    let mut normed = Vec::new();
    if weight.is_some() || options.clip.is_some() {
        normed = vec![0.0; x.len()];
        biased(options, x, start, &mut normed);
    }
    let Some((weight, eps)) = weight else { return before_rope(options, index, &normed, angles, gradient) };
    let inputs = normed.clone();
    if options.clip.is_some() {
        normed.chunks_exact_mut(weight.len()).for_each(|x| rms_norm_in_place(x, weight, eps));
    }
    before_rope(options, index, &normed, angles, gradient);
    let of_normed = gradient.to_vec();
    gradient.fill(0.0);
    super::norm::inputs(isa, &inputs, weight, eps, &of_normed, gradient);
}
