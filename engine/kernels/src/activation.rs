//! Activation functions, sixteen values at a time: plain arithmetic that the compiler turns into vectors of whatever
//! width the caller's tier has, with the same bits on each.

/// Values that are worked on together.
pub(crate) const LANES: usize = 16;

/// e^x. Cody and Waite's reduction to |r| ≤ ln 2 / 2, then the Cephes polynomial: at most 2 units in the last place
/// off between -87 and 88; 0 below, infinity above.
#[inline(always)]
pub(crate) fn exp(x: [f32; LANES]) -> [f32; LANES] {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding and subtracting 1.5 · 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let mut out = [0.0; LANES];
    for (out, x) in out.iter_mut().zip(x) {
        let clamped = x.clamp(-87.3, 88.7);
        let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
        let power = shifted - ROUND;
        let r = clamped - power * LN2_HIGH - power * LN2_LOW;
        let mut p = 1.987_569_1e-4;
        p = p * r + 1.398_199_9e-3;
        p = p * r + 8.333_452e-3;
        p = p * r + 4.166_579_6e-2;
        p = p * r + 0.166_666_65;
        p = p * r + 0.5;
        p = p * r * r + r + 1.0;
        // The integer lies in the low bits of `shifted`; it becomes the exponent of 2^power in two halves, since
        // 2^128 alone does not fit.
        let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let half = exponent >> 1;
        let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
        let value = p * scale(half) * scale(exponent - half);
        let value = if x < -87.3 { 0.0 } else { value };
        let value = if x > 88.7 { f32::INFINITY } else { value };
        *out = if x.is_nan() { x } else { value };
    }
    out
}

/// `silu(gate) · up`, silu(x) = x / (1 + e^-x).
#[inline(always)]
pub(crate) fn silu_mul(gate: [f32; LANES], up: [f32; LANES]) -> [f32; LANES] {
    // A loop in place of `map`, which would be called, without the tier's instructions.
    let mut negated = gate;
    for x in &mut negated {
        *x = -*x;
    }
    let exps = exp(negated);
    let mut out = [0.0; LANES];
    for (((out, gate), up), exp) in out.iter_mut().zip(gate).zip(up).zip(exps) {
        *out = gate / (1.0 + exp) * up;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for step in -870_000..880_000 {
            let x = step as f32 * 1e-4;
            let (exact, found) = (f64::from(x).exp(), f64::from(exp([x; LANES])[0]));
            let bound = exact * 2.0 * f64::from(f32::EPSILON);
            assert!((found - exact).abs() <= bound, "exp({x}): {found} against {exact}");
        }
    }

    #[test]
    fn exp_has_sane_ends() {
        assert_eq!(exp([f32::NEG_INFINITY; LANES])[0], 0.0);
        assert_eq!(exp([-1e30; LANES])[0], 0.0);
        assert_eq!(exp([0.0; LANES])[0], 1.0);
        assert_eq!(exp([f32::INFINITY; LANES])[0], f32::INFINITY);
        assert!(exp([f32::NAN; LANES])[0].is_nan());
    }

    #[test]
    fn silu_of_large_values_is_linear_or_zero() {
        let up = [2.0; LANES];
        assert_eq!(silu_mul([100.0; LANES], up)[0], 200.0);
        assert_eq!(silu_mul([-200.0; LANES], up)[0], 0.0);
        assert_eq!(silu_mul([0.0; LANES], up)[0], 0.0);
    }
}
