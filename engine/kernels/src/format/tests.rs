use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::test_support::{bits, values};

const INTEGER: [Format; 5] = [Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K, Format::Mxfp4];

/// Rows and columns of the fixtures.
const FIXTURE: (usize, usize) = (8, 512);

fn fixture(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/formats");
    std::fs::read(folder.join(name)).unwrap()
}

fn fixture_values(name: &str) -> Vec<f32> {
    fixture(name).chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn packed(layout: Layout, values: &[f32]) -> Vec<u8> {
    // Packing does not count on zeroed memory.
    let mut bytes = vec![0xa5; layout.bytes()];
    pack(layout, values, &mut bytes);
    bytes
}

fn unpacked(layout: Layout, bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; layout.n * layout.k];
    for (row, out) in values.chunks_exact_mut(layout.k).enumerate() {
        Packed::new(layout, bytes).unpack_row(row, out);
    }
    values
}

/// What a format makes of `values` in rows of `k`.
fn rounded(format: Format, k: usize, values: &[f32]) -> Vec<f32> {
    let layout = Layout { format, n: values.len() / k, k };
    unpacked(layout, &packed(layout, values))
}

/// The weights that share a scale, and how far a value may come out from its source, as a share of the greatest
/// magnitude among them.
fn bound(format: Format) -> (usize, f32) {
    match format {
        Format::F32 => (1, 0.0),
        Format::Bf16 => (1, 1.0 / 256.0),
        // Half a step of 1/127; the scale is rounded too.
        Format::Q8_0 => (BLOCK, 1.0 / 220.0),
        // A step of 1/8: the end of the range opposite to the greatest is cut off.
        Format::Q4_0 => (BLOCK, 1.0 / 7.9),
        // From the greatest code, 6, to twice the least that takes this scale, 8.
        Format::Mxfp4 => (BLOCK, 1.0 / 4.0),
        // A step of 1/7 where the range goes both ways; scales and minima are rounded to 1/63.
        Format::Q4K => (SUPER_BLOCK, 0.2),
        // A step of 1/31, cut off as above; scales are rounded to 1/128.
        Format::Q6K => (SUPER_BLOCK, 1.0 / 24.0),
    }
}

fn mean_square(errors: impl Iterator<Item = f32>) -> f64 {
    errors.map(|error| f64::from(error).powi(2)).sum()
}

#[test]
fn gguf_blocks_keep_their_values_bit_for_bit() {
    let (n, k) = FIXTURE;
    for format in INTEGER {
        let layout = Layout { format, n, k };
        let mut panel = vec![0xa5; layout.bytes()];
        pack_gguf_panel(format, k, &fixture(&format!("{format}.blocks")), &mut panel);
        let expected = fixture_values(&format!("{format}.values"));
        assert_eq!(bits(&unpacked(layout, &panel)), bits(&expected), "{format}");
    }
}

#[test]
fn a_gguf_row_may_end_within_a_unit_of_its_format() {
    for (format, block_bytes) in [(Format::Q8_0, 34), (Format::Q4_0, 18), (Format::Mxfp4, 17)] {
        // Three blocks: a pair and half of one.
        let layout = Layout { format, n: 1, k: 3 * BLOCK };
        let mut panel = vec![0xa5; layout.bytes()];
        pack_gguf_panel(format, layout.k, &fixture(&format!("{format}.blocks"))[..3 * block_bytes], &mut panel);
        let mut expected = fixture_values(&format!("{format}.values"))[..layout.k].to_vec();
        expected.resize(format.padded_k(layout.k), 0.0);
        assert_eq!(unpacked(Layout { k: expected.len(), ..layout }, &panel), expected, "{format}");
    }
}

#[test]
fn weights_become_the_blocks_that_gguf_makes_of_them() {
    let (_, k) = FIXTURE;
    let weights = fixture_values("weights.values");
    for format in [Format::Q8_0, Format::Q4_0, Format::Mxfp4] {
        let mut ours = vec![0; format.panel_bytes(k)];
        let mut expected = ours.clone();
        pack_panel(format, k, &weights, &mut ours);
        pack_gguf_panel(format, k, &fixture(&format!("{format}.quantised")), &mut expected);
        assert!(ours == expected, "{format}");
    }
}

#[test]
fn k_formats_lose_no_more_than_in_llama_cpp() {
    let (n, k) = FIXTURE;
    let weights = fixture_values("weights.values");
    for format in [Format::Q4K, Format::Q6K] {
        let ours = rounded(format, k, &weights);
        let mut panel = vec![0; format.panel_bytes(k)];
        pack_gguf_panel(format, k, &fixture(&format!("{format}.quantised")), &mut panel);
        let theirs = unpacked(Layout { format, n, k }, &panel);
        for (index, row) in weights.chunks_exact(k).enumerate() {
            let error = |rounded: &[f32]| mean_square(row.iter().zip(&rounded[index * k..]).map(|(a, b)| a - b)).sqrt();
            let (ours, theirs) = (error(&ours), error(&theirs));
            assert!(ours <= 1.03 * theirs, "{format}, row {index}: {ours} against {theirs}");
        }
    }
}

#[test]
fn a_weight_that_is_not_finite_does_not_become_a_number() {
    let k = 320;
    for &format in Format::ALL {
        let (block, _) = bound(format);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 31, 95, 255, 319] {
                let mut weights = values(k, 3);
                let sound = rounded(format, k, &weights);
                weights[at] = bad;
                let out = rounded(format, k, &weights);
                assert!(!out[at].is_finite(), "{format}: {bad} became {}", out[at]);
                let others = (0..k).filter(|other| other / block != at / block);
                others.for_each(|other| assert_eq!(out[other], sound[other], "{format}: {bad} at {at}, {other}"));
            }
        }
    }
}

#[test]
fn a_weight_beyond_the_range_of_an_f16_scale_does_not_become_a_number() {
    for format in [Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K] {
        for great in [1e9, -1e9, 1e20, f32::MAX, f32::MIN] {
            let mut weights = values(256, 3);
            weights[100] = great;
            let out = rounded(format, 256, &weights);
            assert!(!out[100].is_finite(), "{format}: {great} became {}", out[100]);
        }
    }
    let mut weights = values(256, 3);
    weights[100] = f32::MAX;
    assert!(rounded(Format::Mxfp4, 256, &weights)[100] > 0.7 * f32::MAX);
}

#[test]
fn weights_too_small_for_a_scale_become_zero() {
    for format in INTEGER {
        for small in [1e-9, -1e-12, 1e-37, -1e-40, f32::from_bits(1)] {
            let weights: Vec<f32> = values(256, 5).iter().map(|value| value * small).collect();
            for (out, weight) in rounded(format, 256, &weights).iter().zip(&weights) {
                // mxfp4 reaches far down.
                assert!(out.abs() <= 2.0 * small.abs() && out * weight >= 0.0, "{format}: {weight:e} became {out:e}");
            }
        }
    }
}

#[test]
fn constant_rows_keep_their_value() {
    for format in INTEGER {
        let share = match format {
            // At worst just below 8, which becomes 6.
            Format::Mxfp4 => 0.25,
            // A super-block's parts may choose scales that are not multiples of one number.
            Format::Q4K | Format::Q6K => 0.01,
            _ => 0.001,
        };
        for constant in [0.0, -0.0, 1.0, -1.0, 0.3, -0.017, 1e-2, 4000.0] {
            for k in [1, 40, 256, 300] {
                let out = rounded(format, k, &vec![constant; k]);
                let close = |value: &f32| (value - constant).abs() <= share * constant.abs();
                assert!(out.iter().all(close), "{format}: {constant} became {out:?}");
            }
        }
    }
}

#[test]
fn packed_sizes_stay_near_the_nominal_ones() {
    let nominal_bits = |format| match format {
        Format::F32 => 32.0,
        Format::Bf16 => 16.0,
        Format::Q8_0 => 8.5,
        Format::Q4_0 | Format::Q4K => 4.5,
        Format::Q6K => 6.5625,
        Format::Mxfp4 => 4.25,
    };
    for &format in Format::ALL {
        for k in (256..=8192).step_by(256).chain([1408, 768, 2880]) {
            let nominal = (PANEL * k) as f64 * nominal_bits(format) / 8.0;
            let share = format.panel_bytes(k) as f64 / nominal;
            // 1.031 is q4_k with half a super-block at the end of 1408; of whole ones it takes 1.028.
            let limit = if k.is_multiple_of(SUPER_BLOCK) { 1.03 } else { 1.031 };
            assert!((1.0..=limit).contains(&share), "{format}, k {k}: {share}");
        }
    }
}

#[test]
fn names_lead_back_to_formats() {
    for &format in Format::ALL {
        assert_eq!(format.to_string().parse(), Ok(format));
    }
    let error = "q5_k".parse::<Format>().unwrap_err().to_string();
    assert!(error.contains("q5_k") && error.contains("mxfp4"), "{error}");
}

proptest! {
    #[test]
    fn every_value_stays_within_its_formats_bound(n in 1_usize..70, k in 1_usize..600, size in 1.0_f32..100.0, seed: u64) {
        // Cubes: most are small, a few are great.
        let weights: Vec<f32> = values(n * k, seed).iter().map(|value| size * value.powi(3)).collect();
        for &format in Format::ALL {
            let (block, share) = bound(format);
            let out = rounded(format, k, &weights);
            for (weights, out) in weights.chunks_exact(k).zip(out.chunks_exact(k)) {
                for (weights, out) in weights.chunks(block).zip(out.chunks(block)) {
                    let greatest = weights.iter().fold(0.0, |greatest: f32, weight| greatest.max(weight.abs()));
                    // An f16 scale is a multiple of 2^-24; that of q6_k counts up to 128 × 32 times.
                    let limit = share * greatest + if share > 0.0 && block > 1 { 2.5e-4 } else { 0.0 };
                    for (weight, out) in weights.iter().zip(out) {
                        prop_assert!((weight - out).abs() <= limit, "{format}: {weight} became {out} beside {greatest}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_alone_and_beside_others(n in 1_usize..40, k in 1_usize..600, seed: u64) {
        let weights = values(n * k, seed);
        for &format in Format::ALL {
            let together = rounded(format, k, &weights);
            for row in [0, n / 2, n - 1].map(|row| row * k..(row + 1) * k) {
                prop_assert_eq!(bits(&rounded(format, k, &weights[row.clone()])), bits(&together[row]), "{}", format);
            }
        }
    }

    #[test]
    fn padding_is_zero(n in 1_usize..40, k in 1_usize..600, seed: u64) {
        let weights = values(n * k, seed);
        for &format in Format::ALL {
            let bytes = packed(Layout { format, n, k }, &weights);
            // The same bytes, read as a matrix that is all there.
            let whole = Layout { format, n: n.next_multiple_of(PANEL), k: format.padded_k(k) };
            for (row, values) in unpacked(whole, &bytes).chunks_exact(whole.k).enumerate() {
                // The minimum of a q4_k part holds for its padding too.
                let first = if row >= n { 0 } else if format == Format::Q4K { k.next_multiple_of(BLOCK) } else { k };
                prop_assert!(values[first.min(whole.k)..].iter().all(|value| *value == 0.0), "{format}: row {row}");
            }
        }
    }

    #[test]
    fn every_machine_packs_the_same_bits(k in 1_usize..600, size in 1e-7_f32..1e3, seed: u64) {
        let weights: Vec<f32> = values(3 * k, seed).iter().map(|value| size * value.powi(3)).collect();
        for &format in Format::ALL {
            let mut portable = vec![0; format.panel_bytes(k)];
            let mut best = portable.clone();
            pack_rows(format, k, &weights, &mut portable);
            pack_panel(format, k, &weights, &mut best);
            prop_assert!(portable == best, "{format}");
        }
    }

    #[test]
    fn f32_and_bf16_keep_every_bf16(n in 1_usize..70, k in 1_usize..70, seed: u64) {
        let weights: Vec<f32> =
            values(n * k, seed).iter().map(|value| half::bf16::from_f32(*value).to_f32()).collect();
        for format in [Format::F32, Format::Bf16] {
            prop_assert_eq!(rounded(format, k, &weights), &weights[..], "{}", format);
        }
    }
}
