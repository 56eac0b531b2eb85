//! The backward pass of [`crate::norm`].

use crate::{
    activation::LANES,
    isa::{Isa, for_each_width},
    norm::{for_row_chunks, sum_of_squares, tree},
    pool::Pool,
    shared::SharedSlice,
};

/// Adds to `input_gradient` the gradient of an RMS norm's input `x` from that of its output; all `[rows, weight.len()]`.
/// With `y = x · s · weight`, `s = 1 / sqrt(mean(x²) + eps)`: `dx = s · (g - x · s² · mean(g · x))`, `g = dy · weight`.
/// `weight_gradient`, if wanted, grows by Σ over rows of `dy · x · s`.
///
/// # Panics
/// When the sizes don't match.
#[allow(clippy::too_many_arguments, reason = "what a norm has, and the three gradients")]
pub fn rms_norm_backward(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    output_gradient: &[f32],
    input_gradient: &mut [f32],
    weight_gradient: Option<&mut [f32]>,
) {
    let width = weight.len();
    assert!(x.len().is_multiple_of(width), "{} values in rows of {width}", x.len());
    assert_eq!((output_gradient.len(), input_gradient.len()), (x.len(), x.len()), "gradients of the norm");
    let target = SharedSlice::new(input_gradient);
    for_row_chunks(pool, x.len() / width, width, |rows| {
        let range = rows.start * width..rows.end * width;
        // SAFETY: each row belongs to one task.
        let input_gradient = unsafe { target.part(range.start, range.len()) };
        inputs(isa, &x[range.clone()], weight, eps, &output_gradient[range], input_gradient);
    });
    if let Some(weight_gradient) = weight_gradient {
        for (x, dy) in x.chunks_exact(width).zip(output_gradient.chunks_exact(width)) {
            let scale = 1.0 / (sum_of_squares(x) / width as f32 + eps).sqrt();
            weight_gradient.iter_mut().zip(x).zip(dy).for_each(|((sum, x), dy)| *sum += dy * x * scale);
        }
    }
}

for_each_width! {
    pub(super) fn inputs(x: &[f32], weight: &[f32], eps: f32, output_gradient: &[f32], input_gradient: &mut [f32]) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(output_gradient.chunks_exact(width));
        for ((x, dy), dx) in rows.zip(input_gradient.chunks_exact_mut(width)) {
            let scale = 1.0 / (sum_of_squares(x) / width as f32 + eps).sqrt();
            let mean = dot(dy, x, weight) / width as f32 * scale * scale;
            for (((dx, dy), x), weight) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
                *dx += (dy * weight - x * mean) * scale;
            }
        }
    }
}

/// Σ a · b · c, in sixteen running sums.
#[inline(always)]
fn dot(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sums = [0.0; LANES];
    for ((a, b), c) in a.chunks(LANES).zip(b.chunks(LANES)).zip(c.chunks(LANES)) {
        sums.iter_mut().zip(a).zip(b).zip(c).for_each(|(((sum, a), b), c)| *sum += a * b * c);
    }
    tree(sums, |a, b| a + b)
}
