//! The activation of the gated feed-forward, `silu(gate) · up`, on gate and up as [`crate::ffn`] packs them: 16 columns
//! of gate, then the same columns of up.

use crate::{
    activation,
    format::PANEL,
    isa::{Isa, for_each_width},
    norm::for_row_chunks,
    pool::Pool,
    shared::SharedSlice,
};

/// `inner[row] = silu(gate[row]) · up[row]`: `gate_up` is `[rows, 2 · padded]` with `padded` the `intermediate` rounded
/// up to whole panels, `inner` `[rows, intermediate]`.
///
/// # Panics
/// When the sizes don't match.
pub fn gated_silu(pool: &Pool, isa: Isa, intermediate: usize, gate_up: &[f32], inner: &mut [f32]) {
    let (rows, width) = sizes(intermediate, gate_up, inner);
    let target = SharedSlice::new(inner);
    for_row_chunks(pool, rows, width, |rows| {
        // SAFETY: each row belongs to one task.
        let inner = unsafe { target.part(rows.start * intermediate, rows.len() * intermediate) };
        forward(isa, intermediate, &gate_up[rows.start * width..rows.end * width], inner);
    });
}

/// The gradient of gate and up from that of `inner`, and `inner` again: `inner_gradient` becomes `inner · scale[row]`,
/// `gate_up` its own gradient times `scale[row]`. `dots[row]` is Σ of `inner · inner_gradient`.
///
/// # Panics
/// When the sizes don't match.
pub fn gated_silu_backward(
    pool: &Pool,
    isa: Isa,
    intermediate: usize,
    scale: &[f32],
    gate_up: &mut [f32],
    inner_gradient: &mut [f32],
    dots: &mut [f32],
) {
    let (rows, width) = sizes(intermediate, gate_up, inner_gradient);
    assert_eq!((scale.len(), dots.len()), (rows, rows), "scales and dots of {rows} rows");
    let (gates, inners) = (SharedSlice::new(gate_up), SharedSlice::new(inner_gradient));
    let dots = SharedSlice::new(dots);
    for_row_chunks(pool, rows, width, |rows| {
        // SAFETY: each row belongs to one task.
        let (gate_up, inner, dots) = unsafe {
            (
                gates.part(rows.start * width, rows.len() * width),
                inners.part(rows.start * intermediate, rows.len() * intermediate),
                dots.part(rows.start, rows.len()),
            )
        };
        backward(isa, intermediate, &scale[rows], gate_up, inner, dots);
    });
}

/// Rows, and the width of gate and up.
fn sizes(intermediate: usize, gate_up: &[f32], inner: &[f32]) -> (usize, usize) {
    let (rows, width) = (inner.len() / intermediate, 2 * intermediate.next_multiple_of(PANEL));
    assert_eq!((gate_up.len(), inner.len()), (rows * width, rows * intermediate), "gate|up and inner of {rows} rows");
    (rows, width)
}

for_each_width! {
    fn forward(intermediate: usize, gate_up: &[f32], inner: &mut [f32]) {
        let width = 2 * intermediate.next_multiple_of(PANEL);
        for (gate_up, inner) in gate_up.chunks_exact(width).zip(inner.chunks_exact_mut(intermediate)) {
            for (pair, inner) in gate_up.as_chunks::<{ 2 * PANEL }>().0.iter().zip(inner.chunks_mut(PANEL)) {
                let (mut gate, mut up) = ([0.0; PANEL], [0.0; PANEL]);
                gate.copy_from_slice(&pair[..PANEL]);
                up.copy_from_slice(&pair[PANEL..]);
                inner.copy_from_slice(&activation::silu_mul(gate, up)[..inner.len()]);
            }
        }
    }
}

for_each_width! {
    fn backward(intermediate: usize, scale: &[f32], gate_up: &mut [f32], inner: &mut [f32], dots: &mut [f32]) {
        let width = 2 * intermediate.next_multiple_of(PANEL);
        let rows = gate_up.chunks_exact_mut(width).zip(inner.chunks_exact_mut(intermediate));
        for (((gate_up, inner), scale), dot) in rows.zip(scale).zip(dots) {
            let mut sums = [0.0; PANEL];
            for (pair, inner) in gate_up.as_chunks_mut::<{ 2 * PANEL }>().0.iter_mut().zip(inner.chunks_mut(PANEL)) {
                let (gate, up) = pair.split_at_mut(PANEL);
                let mut gradient = [0.0; PANEL];
                gradient[..inner.len()].copy_from_slice(inner);
                let mut negative = [0.0; PANEL];
                negative.iter_mut().zip(&*gate).for_each(|(negative, gate)| *negative = -gate);
                let exps = activation::exp(negative);
                let mut values = [0.0; PANEL];
                for i in 0..PANEL {
                    let sigmoid = 1.0 / (1.0 + exps[i]);
                    let silu = gate[i] * sigmoid;
                    let value = silu * up[i];
                    sums[i] += value * gradient[i];
                    let scaled = gradient[i] * scale;
                    // silu'(x) = sigmoid(x) · (1 + x · (1 - sigmoid(x)))
                    let slope = sigmoid + silu * (1.0 - sigmoid);
                    gate[i] = scaled * up[i] * slope;
                    up[i] = scaled * silu;
                    values[i] = value * scale;
                }
                inner.copy_from_slice(&values[..inner.len()]);
            }
            *dot = crate::norm::tree(sums, |a, b| a + b);
        }
    }
}
