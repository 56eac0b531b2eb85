use proptest::prelude::*;

use super::*;
use crate::{
    format::SUPER_BLOCK,
    format::pack,
    test_support::{bits, values},
};

fn product(pool: &Pool, isa: Isa, layout: Layout, x: &[f32], w: &[f32]) -> Vec<f32> {
    let mut bytes = crate::buffer::Buffer::<u8>::zeroed(layout.bytes()).unwrap();
    pack(layout, w, &mut bytes);
    let mut y = vec![f32::NAN; x.len() / layout.k * layout.n];
    matmul(pool, isa, x, &Packed::new(layout, &bytes), &mut y);
    y
}

/// Formats whose tiers agree bit for bit.
const INTEGER: &[Format] = &[Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K, Format::Mxfp4];

/// Weights whose rows differ in size, with a few values far out.
fn spread(rows: usize, k: usize, seed: u64) -> Vec<f32> {
    let mut w = values(rows * k, seed);
    for (index, w) in w.iter_mut().enumerate() {
        let far = if (index as u64 ^ seed).is_multiple_of(37) { 30.0 } else { 1.0 };
        *w *= far * 2_f32.powi((index / k % 9) as i32 - 4);
    }
    w
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn integer_formats_have_the_same_bits_on_every_tier(
        rows in 1_usize..40, n in 1_usize..70, k in 1_usize..700, seed: u64,
    ) {
        let pool = Pool::new(2);
        let (x, w) = (spread(rows, k, seed), spread(n, k, seed ^ 7));
        for format in INTEGER {
            let layout = Layout { format: *format, n, k };
            let contract = product(&pool, Isa::Portable, layout, &x, &w);
            for isa in Isa::available() {
                let y = product(&pool, isa, layout, &x, &w);
                prop_assert_eq!(bits(&y), bits(&contract), "{} {}", isa, format);
            }
        }
    }

    #[test]
    fn integer_formats_multiply_the_values_that_they_unpack_to(
        rows in 1_usize..20, n in 1_usize..40, k in 1_usize..600, seed: u64,
    ) {
        let pool = Pool::new(2);
        let (x, w) = (spread(rows, k, seed), spread(n, k, seed ^ 7));
        for format in INTEGER {
            let layout = Layout { format: *format, n, k };
            let mut bytes = vec![0; layout.bytes()];
            pack(layout, &w, &mut bytes);
            let packed = Packed::new(layout, &bytes);
            let y = product(&pool, Isa::detect(), layout, &x, &w);
            let block = if matches!(format, Format::Q4K | Format::Q6K) { SUPER_BLOCK } else { 32 };
            let mut weights = vec![0.0; k];
            for column in 0..n {
                packed.unpack_row(column, &mut weights);
                for (row, x) in x.chunks_exact(k).enumerate() {
                    // An activation is off by half of its block's step at most; the f32 sums by k roundings.
                    let (mut exact, mut bound) = (0.0, 1e-20);
                    for (x, w) in x.chunks(block).zip(weights.chunks(block)) {
                        let step = f64::from(x.iter().fold(0_f32, |most, x| most.max(x.abs()))) / 127.0;
                        for (x, w) in x.iter().zip(w) {
                            exact += f64::from(*x) * f64::from(*w);
                            let rounding = 4.0 * k as f64 * f64::from(f32::EPSILON) * f64::from(x.abs());
                            bound += f64::from(w.abs()) * (step * 0.501 + rounding);
                        }
                        // A part's minimum cancels against its quants: what is rounded is larger than the difference.
                        let largest = w.iter().fold(0_f32, |most, w| most.max(w.abs()));
                        bound += f64::from(largest) * step * 127.0 * block as f64 * 1e-5;
                    }
                    let y = f64::from(y[row * n + column]);
                    prop_assert!((y - exact).abs() <= bound, "{format}: {y} against {exact}, bound {bound}");
                }
            }
        }
    }

    #[test]
    fn a_broken_activation_breaks_its_row_alone(k in 1_usize..300, at in 0_usize..300, infinite: bool) {
        let pool = Pool::new(1);
        let mut x = values(2 * k, 3);
        x[at % k] = if infinite { f32::NEG_INFINITY } else { f32::NAN };
        for format in INTEGER {
            for isa in Isa::available() {
                let layout = Layout { format: *format, n: 3, k };
                let y = product(&pool, isa, layout, &x, &values(3 * k, 5));
                prop_assert!(y[..3].iter().all(|y| y.is_nan()) && y[3..].iter().all(|y| y.is_finite()), "{isa} {format}");
            }
        }
    }

    #[test]
    fn every_tier_is_near_the_exact_product(rows in 1_usize..40, n in 1_usize..300, k in 1_usize..200, seed: u64) {
        let pool = Pool::new(2);
        let (x, w) = (values(rows * k, seed), values(n * k, seed ^ 7));
        for format in [Format::F32, Format::Bf16] {
            let layout = Layout { format, n, k };
            for isa in Isa::available() {
                let y = product(&pool, isa, layout, &x, &w);
                for (index, y) in y.iter().enumerate() {
                    let (row, column) = (index / n, index % n);
                    let terms = x[row * k..].iter().zip(&w[column * k..]).take(k);
                    let round = |v: f32| f64::from(if format == Format::Bf16 { half::bf16::from_f32(v).to_f32() } else { v });
                    let (exact, size) = terms.fold((0.0, 0.0), |(sum, size), (x, w)| {
                        let term = round(*x) * round(*w);
                        (sum + term, size + term.abs())
                    });
                    // k roundings of a sum of at most `size`.
                    let bound = size * k as f64 * f64::from(f32::EPSILON) + 1e-30;
                    prop_assert!((f64::from(*y) - exact).abs() <= bound, "{isa} {format}: {y} against {exact} at {index}");
                }
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_in_any_batch(rows in 2_usize..300, n in 1_usize..150, k in 1_usize..80, seed: u64) {
        let (one, two) = (Pool::new(1), Pool::new(2));
        let (x, w) = (values(rows * k, seed), values(n * k, seed ^ 7));
        for format in Format::ALL {
            let layout = Layout { format: *format, n, k };
            for isa in Isa::available() {
                let together = product(&two, isa, layout, &x, &w);
                for row in [0, rows / 2, rows - 1] {
                    let alone = product(&one, isa, layout, &x[row * k..(row + 1) * k], &w);
                    prop_assert_eq!(bits(&alone), bits(&together[row * n..(row + 1) * n]), "{} {}", isa, format);
                }
            }
        }
    }
}

// NEON's tests run under an emulator, whose times say nothing.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_vector_tier_multiplies_faster_than_the_portable_one() {
    for isa in Isa::available().into_iter().filter(|isa| *isa != Isa::Portable) {
        assert!(multiplies_faster(isa, Isa::Portable) && !multiplies_faster(Isa::Portable, isa), "{isa}");
    }
}
