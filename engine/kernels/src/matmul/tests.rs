use proptest::prelude::*;

use super::*;
use crate::{
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
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
        for format in [Format::F32, Format::Bf16] {
            let layout = Layout { format, n, k };
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
