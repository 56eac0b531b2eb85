//! Each backward pass against finite differences of the forward pass in f64, or against the sum that it stands for.

use super::*;
use crate::{
    format::{Format, Layout, PANEL, Packed, pack},
    isa::Isa,
    matmul::matmul,
    pool::Pool,
    qkv::{QkNorm, QkvOptions, QkvOut, RopeTable, split_qkv},
    router::{RouterOptions, Scores, weigh_chosen},
    test_support::{bits, values},
};

fn tiers(test: impl Fn(Isa)) {
    Isa::available().into_iter().for_each(test);
}

/// Compares `gradient` with central differences of `f`, whose argument is `x`.
fn check(what: &str, x: &[f32], gradient: &[f32], f: impl Fn(&[f32]) -> f64) {
    let largest = gradient.iter().fold(0.0_f32, |max, g| max.max(g.abs()));
    assert!(largest > 0.0, "{what}: no gradient");
    for index in 0..x.len() {
        let step = 1e-2;
        let at = |delta: f32| {
            let mut moved = x.to_vec();
            moved[index] += delta;
            (f(&moved), f64::from(moved[index]))
        };
        let ((above, high), (below, low)) = (at(step), at(-step));
        let slope = (above - below) / (high - low);
        let found = f64::from(gradient[index]);
        assert!((slope - found).abs() < 2e-3 * f64::from(largest) + 1e-5, "{what}[{index}]: {found} against {slope}");
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[test]
fn transposed_weights_are_the_rows_as_columns() {
    tiers(|isa| {
        let pool = Pool::new(2);
        for (n, k) in [(1, 1), (16, 16), (17, 33), (40, 70), (96, 128), (5, 300)] {
            for format in Format::ALL {
                let layout = Layout { format: *format, n, k };
                let mut bytes = vec![0; layout.bytes()];
                pack(layout, &values(n * k, 1), &mut bytes);
                let weights = Packed::new(layout, &bytes);
                let mut room = Transposed::default();
                // Something larger was there before.
                let other = Layout { format: Format::F32, n: 300, k: 301 };
                room.fill(&pool, isa, &Packed::new(other, &vec![255; other.bytes()])).unwrap();
                for panels in [0..layout.panels(), layout.panels() / 2..layout.panels()] {
                    let turned = room.fill_panels(&pool, isa, &weights, panels.clone()).unwrap();
                    let rows = panels.start * PANEL..n.min(panels.end * PANEL);
                    assert_eq!((turned.layout().n, turned.layout().k), (k, rows.len()));
                    let (mut row, mut column) = (vec![0.0; k], vec![0.0; rows.len()]);
                    for (place, index) in rows.clone().enumerate() {
                        weights.unpack_row(index, &mut row);
                        for (input, value) in row.iter().enumerate() {
                            turned.unpack_row(input, &mut column);
                            let expected = match format {
                                Format::F32 | Format::Bf16 => *value,
                                _ => half::bf16::from_f32(*value).to_f32(),
                            };
                            assert_eq!(column[place].to_bits(), expected.to_bits(), "{layout:?} {panels:?}");
                        }
                    }
                    // The padding multiplies to nothing.
                    let ones = vec![1.0; rows.len()];
                    let mut sums = vec![0.0; k];
                    matmul(&pool, Isa::detect(), &ones, &turned, &mut sums);
                    assert!(sums.iter().all(|sum| sum.is_finite()), "{layout:?} {panels:?}");
                }
            }
        }
    });
}

#[test]
fn products_of_any_strides_add_up_in_the_order_of_the_inputs() {
    tiers(|isa| {
        let sizes =
            [(3, 0, 5), (1, 1, 1), (7, 5, 64), (13, 300, 130), (50, 513, 65), (25, 40, 8), (49, 9, 24), (9, 70, 48)];
        for (rows, inputs, columns) in sizes {
            let (a, b) = (values(rows * inputs, 1), values(inputs * columns, 2));
            let before = values(rows * columns, 3);
            let turned: Vec<f32> = (0..rows * inputs).map(|place| a[place % rows * inputs + place / rows]).collect();
            let right = Strided::new(&b, inputs, columns);
            let product = |threads, left| {
                let mut out = before.clone();
                add_product(&Pool::new(threads), isa, left, right, &mut out);
                out
            };
            let out = product(3, Strided::new(&a, rows, inputs));
            assert_eq!(bits(&out), bits(&product(1, Strided::new(&turned, inputs, rows).transposed())));
            for (place, found) in out.iter().enumerate() {
                let (i, j) = (place / columns, place % columns);
                let sum: f64 = (0..inputs).map(|k| f64::from(a[i * inputs + k]) * f64::from(b[k * columns + j])).sum();
                let expected = sum + f64::from(before[place]);
                assert!(
                    (f64::from(*found) - expected).abs() < 1e-4,
                    "{isa} {rows} {inputs} {columns}: {found} {expected}"
                );
            }
            // A part of the columns on both sides, each in its own place.
            if columns > 3 && inputs > 3 {
                let mut part = vec![0.0; rows * (columns - 3)];
                let left = Strided::new(&a, rows, inputs).columns(1..inputs);
                add_product(&Pool::new(2), isa, left, right.rows(1..inputs).columns(2..columns - 1), &mut part);
                let sum: f64 = (1..inputs).map(|k| f64::from(a[k]) * f64::from(b[k * columns + 2])).sum();
                assert!((f64::from(part[0]) - sum).abs() < 1e-4, "{isa} {rows} {inputs} {columns}");
            }
        }
    });
}

#[test]
fn the_gradient_of_the_gated_silu() {
    tiers(|isa| {
        for intermediate in [1_usize, 16, 21] {
            let pool = Pool::new(2);
            let width = 2 * intermediate.next_multiple_of(PANEL);
            let (gate_up, wanted) = (values(3 * width, 1), values(3 * intermediate, 2));
            let scale = [0.5, 2.0, -1.0];
            let mut inner = vec![0.0; 3 * intermediate];
            gated_silu(&pool, isa, intermediate, &gate_up, &mut inner);
            let (mut gradient, mut of_inner, mut dots) = (gate_up.clone(), wanted.clone(), vec![0.0; 3]);
            gated_silu_backward(&pool, isa, intermediate, &scale, &mut gradient, &mut of_inner, &mut dots);
            let value = |gate_up: &[f32]| {
                let mut inner = vec![0.0; 3 * intermediate];
                gated_silu(&pool, isa, intermediate, gate_up, &mut inner);
                let rows = inner.chunks(intermediate).zip(wanted.chunks(intermediate)).zip(scale);
                rows.map(|((inner, wanted), scale)| dot(inner, wanted) * f64::from(scale)).sum()
            };
            check("gate|up", &gate_up, &gradient, value);
            for row in 0..3 {
                let range = row * intermediate..(row + 1) * intermediate;
                let expected = dot(&inner[range.clone()], &wanted[range.clone()]);
                assert!((f64::from(dots[row]) - expected).abs() < 1e-5);
                for index in range {
                    assert!((of_inner[index] - inner[index] * scale[row]).abs() < 1e-6);
                }
            }
        }
    });
}

#[test]
fn the_gradient_of_the_norm() {
    tiers(|isa| {
        for width in [1, 16, 37] {
            let pool = Pool::new(2);
            let (x, weight, wanted) = (values(4 * width, 1), values(width, 2), values(4 * width, 3));
            let value = |x: &[f32], weight: &[f32]| {
                let mut out = vec![0.0; x.len()];
                crate::norm::rms_norm(&pool, x, weight, 1e-1, &mut out);
                dot(&out, &wanted)
            };
            let (mut of_x, mut of_weight) = (vec![0.0; x.len()], vec![0.0; width]);
            rms_norm_backward(&pool, isa, &x, &weight, 1e-1, &wanted, &mut of_x, Some(&mut of_weight));
            check("x", &x, &of_x, |x| value(x, &weight));
            check("weight", &weight, &of_weight, |weight| value(&x, weight));
            let before = of_x.clone();
            rms_norm_backward(&pool, isa, &x, &weight, 1e-1, &wanted, &mut of_x, None);
            assert!(of_x.iter().zip(before).all(|(after, before)| (after - 2.0 * before).abs() < 1e-5), "it adds");
        }
    });
}

#[test]
fn the_gradient_of_the_split_projection() {
    tiers(|isa| {
        let (heads, kv_heads, head_dim) = (4, 2, 6);
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let width = q + 2 * kv;
        let pool = Pool::new(2);
        let positions = [3, 0];
        let (x, bias) = (values(2 * width, 1), values(width, 2));
        let angles = values(8, 3);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
        let table = RopeTable { half: 2, cos: &cos, sin: &sin };
        let wanted = [values(2 * q, 4), values(2 * kv, 5), values(2 * kv, 6)];
        for (per_head, clip, biased) in [(true, None, true), (false, Some(0.9), false), (true, Some(0.7), true)] {
            let widths = if per_head { [head_dim, head_dim] } else { [q, kv] };
            let weights = widths.map(|width| values(width, 7).iter().map(|w| w + 1.5).collect::<Vec<_>>());
            let plain = QkvOptions {
                num_heads: heads,
                num_kv_heads: kv_heads,
                head_dim,
                bias: biased.then_some(bias.as_slice()),
                norm: None,
                clip,
            };
            let value = |x: &[f32], query: &[f32], key: &[f32]| {
                let mut parts = [vec![0.0; 2 * q], vec![0.0; 2 * kv], vec![0.0; 2 * kv]];
                let [first, second, third] = &mut parts;
                let out = QkvOut { query: first, key: second, value: third };
                let options = QkvOptions { norm: Some(QkNorm { query, key, eps: 1e-2 }), ..plain };
                split_qkv(&pool, &options, &table, &positions, x, out);
                parts.iter().zip(&wanted).map(|(part, wanted)| dot(part, wanted)).sum()
            };
            let gradients = QkvGradients { query: &wanted[0], key: &wanted[1], value: &wanted[2] };
            let mut of_x = vec![0.0; x.len()];
            let mut of_weights = widths.map(|width| vec![0.0; width]);
            let [of_query, of_key] = &mut of_weights;
            let norm = QkNorm { query: &weights[0], key: &weights[1], eps: 1e-2 };
            split_qkv_backward(
                &pool,
                isa,
                &QkvOptions { norm: Some(norm), ..plain },
                &table,
                &positions,
                &x,
                gradients,
                &mut of_x,
                Some([of_query, of_key]),
            );
            if clip.is_none() {
                check("x", &x, &of_x, |x| value(x, &weights[0], &weights[1]));
                check("query norm", &weights[0], &of_weights[0], |weight| value(&x, weight, &weights[1]));
                check("key norm", &weights[1], &of_weights[1], |weight| value(&x, &weights[0], weight));
            } else {
                // Differences across a kink mean nothing; most places are far from one.
                let slope = |index: usize| {
                    let at = |delta: f32| {
                        let mut moved = x.clone();
                        moved[index] += delta;
                        value(&moved, &weights[0], &weights[1])
                    };
                    (at(1e-3) - at(-1e-3)) / 2e-3
                };
                let good = (0..x.len()).filter(|index| (slope(*index) - f64::from(of_x[*index])).abs() < 2e-2).count();
                assert!(good * 10 >= x.len() * 9, "{good} of {}", x.len());
            }
        }
    });
}

#[test]
fn the_gradient_of_attention() {
    tiers(|isa| {
        for (num_heads, num_kv_heads, head_dim) in [(2, 1, 5), (4, 4, 16), (6, 2, 18)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim, scale: 0.6 };
            let tokens = 8;
            // Row 5 belongs to nobody.
            let sequences = [0..1, 1..5, 6..8];
            let (q, kv) = (num_heads * head_dim, num_kv_heads * head_dim);
            let parts = [values(tokens * q, 1), values(tokens * kv, 2), values(tokens * kv, 3)];
            let wanted: Vec<f32> = values(tokens * q, 4)
                .iter()
                .enumerate()
                .map(|(place, w)| if place / q == 5 { 0.0 } else { *w })
                .collect();
            let pool = Pool::new(2);
            let value = |parts: [&[f32]; 3]| {
                let mut out = vec![0.0; tokens * q];
                attention(&pool, isa, heads, &sequences, parts, &mut out);
                dot(&out, &wanted)
            };
            let slices = parts.each_ref().map(Vec::as_slice);
            let mut gradients = [vec![0.0; tokens * q], vec![0.0; tokens * kv], vec![0.0; tokens * kv]];
            let [first, second, third] = &mut gradients;
            attention_backward(&pool, isa, heads, &sequences, slices, &wanted, [first, second, third]);
            for part in 0..3 {
                check(["query", "key", "value"][part], &parts[part], &gradients[part], |x| {
                    let mut moved = slices;
                    moved[part] = x;
                    value(moved)
                });
            }
        }
    });
}

#[test]
fn attention_over_sequences_is_softmax_of_the_scores() {
    tiers(|isa| {
        let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 24, scale: 0.2 };
        let sequences = [0..130, 130..147];
        let parts = [values(147 * 96, 1), values(147 * 48, 2), values(147 * 48, 3)];
        let slices = parts.each_ref().map(Vec::as_slice);
        let mut out = vec![0.0; 147 * 96];
        attention(&Pool::new(2), isa, heads, &sequences, slices, &mut out);
        for (row, head) in [(0, 0), (60, 3), (129, 1), (130, 2), (146, 3)] {
            let first = if row < 130 { 0 } else { 130 };
            let query = &parts[0][row * 96 + head * 24..][..24];
            let scores: Vec<f64> =
                (first..=row).map(|key| dot(query, &parts[1][key * 48 + head / 2 * 24..][..24]) * 0.2).collect();
            let total: f64 = scores.iter().map(|score| score.exp()).sum();
            for place in 0..24 {
                let exact: f64 = scores
                    .iter()
                    .zip(first..)
                    .map(|(score, key)| score.exp() / total * f64::from(parts[2][key * 48 + head / 2 * 24 + place]))
                    .sum();
                let found = f64::from(out[row * 96 + head * 24 + place]);
                assert!((found - exact).abs() < 1e-5, "{isa} row {row} head {head}: {found} against {exact}");
            }
        }
    });
}

#[test]
fn the_gradient_of_the_router_and_its_losses() {
    let (rows, count, top_k) = (3, 6, 2);
    let logits = values(rows * count, 1);
    let experts = [0, 4, 1, 2, 3, 5];
    let wanted = values(rows * top_k, 2);
    let balance = values(count, 3);
    for (kind, normalise) in [(Scores::Softmax, false), (Scores::Softmax, true), (Scores::Sigmoid, true)] {
        let options = RouterOptions { scores: kind, top_k, selection_bias: None, groups: None, normalise, scale: 1.5 };
        for losses in [RouterLosses::default(), RouterLosses { balance: &balance, z: 0.3 }] {
            let value = |logits: &[f32]| {
                let mut weights = vec![0.0; rows * top_k];
                weigh_chosen(&options, logits, &experts, &mut weights);
                let mut probabilities = vec![0.0; count];
                let squares = scores(kind, logits, &mut probabilities);
                let balanced: f64 = probabilities.iter().zip(losses.balance).map(|(p, b)| p * f64::from(*b)).sum();
                dot(&weights, &wanted) + balanced + squares * f64::from(losses.z)
            };
            let mut gradient = vec![f32::NAN; logits.len()];
            route_backward(&options, &logits, &experts, &wanted, losses, &mut gradient);
            check("logits", &logits, &gradient, value);
        }
    }
}

#[test]
fn the_gradient_of_cross_entropy() {
    tiers(|isa| {
        let (rows, vocab) = (3, 37);
        let logits: Vec<f32> = values(rows * vocab, 1).iter().map(|x| x * 4.0).collect();
        let (targets, weights) = ([5, 36, 0], [1.0, 0.25, 0.0]);
        let of = |logits: &[f32]| {
            let (mut gradient, mut losses) = (logits.to_vec(), vec![0.0; rows]);
            cross_entropy(&Pool::new(2), isa, &mut gradient, &targets, &weights, &mut losses);
            (gradient, losses)
        };
        let (gradient, losses) = of(&logits);
        check("logits", &logits, &gradient, |logits| dot(&of(logits).1, &weights));
        for (row, loss) in losses.iter().enumerate() {
            let logits = &logits[row * vocab..(row + 1) * vocab];
            let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
            let exact = sum.ln() - f64::from(logits[targets[row] as usize]);
            assert!((f64::from(*loss) - exact).abs() < 1e-5);
        }
        // Far from each other, and still finite.
        let (gradient, losses) = of(&[vec![-1e4; vocab - 1], vec![1e4], vec![0.0; 2 * vocab]].concat());
        assert!(losses[0] == 2e4 && gradient.iter().all(|g| g.is_finite()), "{losses:?}");
    });
}
