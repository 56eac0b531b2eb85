//! From the fused projection of a token to its queries, keys and values, in one pass over each row: bias, norm, clip
//! and position, in this order, each where the architecture has it.

use crate::{
    norm::{for_row_chunks, rms_norm_in_place},
    pool::Pool,
    rope::rotate,
    shared::SharedSlice,
};

/// What to do to a row `[query heads | key heads | value heads]`.
#[derive(Debug, Clone, Copy)]
pub struct QkvOptions<'a> {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the row, if there is one.
    pub bias: Option<&'a [f32]>,
    /// RMS norms of queries and keys.
    pub norm: Option<QkNorm<'a>>,
    /// Bound of all values' absolute value.
    pub clip: Option<f32>,
}

/// RMS norms of queries and keys. A weight of one head's width norms each head by itself; one of the whole width norms
/// all heads together.
#[derive(Debug, Clone, Copy)]
pub struct QkNorm<'a> {
    /// Weight of the queries' norm.
    pub query: &'a [f32],
    /// Weight of the keys' norm.
    pub key: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

/// Cosines and sines by position: `[positions, rotary_dim / 2]` each.
#[derive(Debug, Clone, Copy)]
pub struct RopeTable<'a> {
    /// Half of the places that turn.
    pub half: usize,
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

/// Where the three parts go: `[tokens, heads · head_dim]` each.
#[derive(Debug)]
pub struct QkvOut<'a> {
    /// Queries.
    pub query: &'a mut [f32],
    /// Keys.
    pub key: &'a mut [f32],
    /// Values.
    pub value: &'a mut [f32],
}

/// Splits `x` `[positions.len(), (num_heads + 2 · num_kv_heads) · head_dim]`.
///
/// # Panics
/// When a slice has not the size that the options need, or a position lies outside of the table.
pub fn split_qkv(
    pool: &Pool,
    options: &QkvOptions<'_>,
    table: &RopeTable<'_>,
    positions: &[u32],
    x: &[f32],
    out: QkvOut<'_>,
) {
    let (q, kv) = (options.num_heads * options.head_dim, options.num_kv_heads * options.head_dim);
    let width = q + 2 * kv;
    let tokens = positions.len();
    assert_eq!(x.len(), tokens * width, "projection of {tokens} tokens by {width}");
    assert_eq!(
        (out.query.len(), out.key.len(), out.value.len()),
        (tokens * q, tokens * kv, tokens * kv),
        "outputs of {tokens} tokens"
    );
    let (query, key, value) = (SharedSlice::new(out.query), SharedSlice::new(out.key), SharedSlice::new(out.value));
    for_row_chunks(pool, tokens, width, |rows| {
        for row in rows {
            // SAFETY: each row belongs to one task.
            let parts = unsafe { [query.part(row * q, q), key.part(row * kv, kv), value.part(row * kv, kv)] };
            let position = positions[row] as usize;
            let angles = position * table.half..(position + 1) * table.half;
            split_row(
                options,
                &x[row * width..(row + 1) * width],
                parts,
                &table.cos[angles.clone()],
                &table.sin[angles],
            );
        }
    });
}

fn split_row(options: &QkvOptions<'_>, x: &[f32], parts: [&mut [f32]; 3], cos: &[f32], sin: &[f32]) {
    let norms = [options.norm.map(|norm| norm.query), options.norm.map(|norm| norm.key), None];
    let eps = options.norm.map_or(0.0, |norm| norm.eps);
    let mut start = 0;
    for (index, (part, norm)) in parts.into_iter().zip(norms).enumerate() {
        let range = start..start + part.len();
        start = range.end;
        part.copy_from_slice(&x[range.clone()]);
        if let Some(bias) = options.bias {
            part.iter_mut().zip(&bias[range]).for_each(|(x, bias)| *x += bias);
        }
        if let Some(weight) = norm {
            part.chunks_exact_mut(weight.len()).for_each(|x| rms_norm_in_place(x, weight, eps));
        }
        if let Some(bound) = options.clip {
            part.iter_mut().for_each(|x| *x = x.clamp(-bound, bound));
        }
        if index < 2 {
            part.chunks_exact_mut(options.head_dim).for_each(|head| rotate(head, cos, sin));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::values;

    #[test]
    fn bias_norm_clip_and_rope_come_in_this_order() {
        let (heads, kv_heads, head_dim) = (3, 1, 4);
        let width = (heads + 2 * kv_heads) * head_dim;
        let (x, bias) = (values(2 * width, 1), values(width, 2));
        let (query_weight, key_weight) = (values(head_dim, 3), values(head_dim, 4));
        let options = QkvOptions {
            num_heads: heads,
            num_kv_heads: kv_heads,
            head_dim,
            bias: Some(&bias),
            norm: Some(QkNorm { query: &query_weight, key: &key_weight, eps: 1e-5 }),
            clip: Some(0.4),
        };
        let (cos, sin) = (values(6, 5), values(6, 6));
        let table = RopeTable { half: 1, cos: &cos, sin: &sin };
        let (mut query, mut key, mut value) = (vec![0.0; 24], vec![0.0; 8], vec![0.0; 8]);
        let out = QkvOut { query: &mut query, key: &mut key, value: &mut value };
        split_qkv(&Pool::new(2), &options, &table, &[5, 2], &x, out);

        for (token, position) in [5, 2].into_iter().enumerate() {
            let row: Vec<f32> = x[token * width..(token + 1) * width].iter().zip(&bias).map(|(x, b)| x + b).collect();
            for (head, found) in query[token * 12..(token + 1) * 12].chunks(head_dim).enumerate() {
                let x = &row[head * head_dim..(head + 1) * head_dim];
                let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f32>() / 4.0 + 1e-5).sqrt();
                let normed: Vec<f32> =
                    x.iter().zip(&query_weight).map(|(x, w)| (x * scale * w).clamp(-0.4, 0.4)).collect();
                let (c, s) = (cos[position], sin[position]);
                let expected = [normed[0] * c - normed[1] * s, normed[1] * c + normed[0] * s, normed[2], normed[3]];
                for (found, expected) in found.iter().zip(expected) {
                    assert!((found - expected).abs() < 1e-6, "{found} against {expected}");
                }
            }
            let expected: Vec<f32> = row[16..].iter().map(|x| x.clamp(-0.4, 0.4)).collect();
            assert_eq!(&value[token * 4..(token + 1) * 4], expected);
        }
    }
}
