//! Dropout (Srivastava et al., JMLR 15, 2014). Which values are dropped is a function of a row's key and the column: whoever
//! needs the mask again computes it again, and nobody keeps it.

use crate::{norm::for_row_chunks, pool::Pool, shared::SharedSlice};

/// `x / (1 - rate)`, and 0 in the place of each value with probability `rate`: `x` and `out` are `[keys.len(), width]`,
/// `keys` one number a row.
///
/// # Panics
/// When the sizes don't match.
pub fn dropout(pool: &Pool, rate: f32, keys: &[u32], x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "as many values as before");
    assert!(x.is_empty() || x.len().is_multiple_of(keys.len().max(1)), "rows of {} values", x.len());
    let width = x.len() / keys.len().max(1);
    let (dropped, scale) = ((f64::from(rate) * 2f64.powi(32)) as u32, 1.0 / (1.0 - rate));
    let target = SharedSlice::new(out);
    for_row_chunks(pool, keys.len(), width, |range| {
        for row in range {
            // SAFETY: each row belongs to one task.
            let out = unsafe { target.part(row * width, width) };
            let x = &x[row * width..][..width];
            for ((out, x), column) in out.iter_mut().zip(x).zip(0..) {
                *out = if mix(keys[row] ^ column) < dropped { 0.0 } else { x * scale };
            }
        }
    });
}

/// Wellons' `lowbias32`: each bit of the argument changes each bit of the result about half of the time.
#[inline(always)]
fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ x >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dropped(rate: f32, keys: &[u32], width: usize, threads: usize) -> Vec<f32> {
        let x = vec![1.0; keys.len() * width];
        let mut out = vec![f32::NAN; x.len()];
        dropout(&Pool::new(threads), rate, keys, &x, &mut out);
        out
    }

    #[test]
    fn a_part_is_dropped_and_the_mean_stays() {
        let keys: Vec<u32> = (0..1000).map(|row: u32| row.wrapping_mul(0x9e37_79b9)).collect();
        for rate in [0.1, 0.5, 0.9] {
            let out = dropped(rate, &keys, 200, 2);
            let (count, sum) = (out.len() as f32, out.iter().sum::<f32>());
            let zeros = out.iter().filter(|value| **value == 0.0).count() as f32;
            // Four deviations of so many draws.
            let bound = 4.0 * (rate * (1.0 - rate) / count).sqrt();
            assert!((zeros / count - rate).abs() < bound, "{zeros} of {count} at {rate}");
            assert!((sum / count - 1.0).abs() < bound / (1.0 - rate), "{sum} of {count} at {rate}");
            // No column and no row has a mask of its own.
            for column in 0..200 {
                let zeros = out.iter().skip(column).step_by(200).filter(|value| **value == 0.0).count() as f32;
                assert!((zeros / 1000.0 - rate).abs() < 6.0 * (rate * (1.0 - rate) / 1000.0).sqrt());
            }
        }
    }

    #[test]
    fn a_mask_depends_on_key_and_column_only() {
        let whole = dropped(0.3, &[7, 8, 9], 33, 3);
        assert_eq!(whole[33..66], dropped(0.3, &[8], 33, 1));
        assert_ne!(whole[..33], whole[33..66]);
        assert!(dropped(0.0, &[7], 33, 1).iter().all(|value| *value == 1.0));
        assert!(dropped(0.3, &[], 33, 1).is_empty());
    }
}
