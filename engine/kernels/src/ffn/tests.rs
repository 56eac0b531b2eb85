use proptest::prelude::*;

use super::*;
use crate::{
    buffer::Buffer,
    format::pack_panel,
    test_support::{bits, values},
};

/// Plain weights and their packed twin.
struct Expert {
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    gate_up_packed: Buffer,
    down_packed: Buffer,
}

impl Expert {
    fn new(layout: FfnLayout, seed: u64) -> Self {
        let size = layout.hidden * layout.intermediate;
        let part = |part| values(size, seed * 3 + part);
        let (gate, up, down) = (part(0), part(1), part(2));
        let mut gate_up_packed = Buffer::zeroed(layout.gate_up().bytes()).unwrap();
        let mut panels = gate_up_packed.chunks_exact_mut(layout.gate_up().panel_bytes());
        for (gate, up) in gate.chunks(PANEL * layout.hidden).zip(up.chunks(PANEL * layout.hidden)) {
            for rows in [gate, up] {
                pack_panel(layout.format, layout.hidden, rows, panels.next().unwrap());
            }
        }
        let mut down_packed = Buffer::zeroed(layout.down().bytes()).unwrap();
        crate::format::pack(layout.down(), &down, &mut down_packed);
        Self { gate, up, down, gate_up_packed, down_packed }
    }

    fn group<'a>(&'a self, layout: FfnLayout, rows: &'a [WeightedRow]) -> Group<'a> {
        Group {
            gate_up: Packed::new(layout.gate_up(), &self.gate_up_packed),
            down: Packed::new(layout.down(), &self.down_packed),
            rows,
        }
    }

    /// The published equation in f64.
    fn exact(&self, layout: FfnLayout, x: &[f32]) -> Vec<f64> {
        let dot = |w: &[f32], x: &[f64]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
        let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
        let inner: Vec<f64> = (0..layout.intermediate)
            .map(|i| {
                let row = i * layout.hidden..(i + 1) * layout.hidden;
                let (gate, up) = (dot(&self.gate[row.clone()], &x), dot(&self.up[row], &x));
                gate / (1.0 + (-gate).exp()) * up
            })
            .collect();
        self.down.chunks(layout.intermediate).map(|row| dot(row, &inner)).collect()
    }
}

fn run(threads: usize, isa: Isa, layout: FfnLayout, x: &[f32], groups: &[Group<'_>]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    grouped_ffn(&Pool::new(threads), isa, layout, x, groups, &mut out);
    out
}

/// More columns than a task takes, more rows than it takes at a time, and neither a whole number of blocks.
#[test]
fn wide_experts_and_many_rows_give_a_row_what_it_gets_alone() {
    let (hidden, intermediate, rows) = (640, 1700, 100);
    let x = values(rows * hidden, 5);
    for format in Format::ALL {
        let layout = FfnLayout { format: *format, hidden, intermediate };
        let experts = [Expert::new(layout, 1), Expert::new(layout, 2)];
        let weighted = |row: usize| WeightedRow { row: row as u32, weight: 0.7 };
        let chosen: [Vec<_>; 2] = [(0..rows).map(weighted).collect(), (0..rows).step_by(3).map(weighted).collect()];
        let groups: Vec<_> = experts.iter().zip(&chosen).map(|(e, rows)| e.group(layout, rows)).collect();
        let mut contract: Option<Vec<f32>> = None;
        for isa in Isa::available().into_iter().rev() {
            // Portable code is slow; what it gives for one row is what it gives for all.
            let together = (isa != Isa::Portable).then(|| run(2, isa, layout, &x, &groups));
            for row in [0, 51, 99] {
                let alone_rows: [Vec<_>; 2] = chosen.each_ref().map(|rows| {
                    rows.iter().filter(|r| r.row as usize == row).map(|r| WeightedRow { row: 0, ..*r }).collect()
                });
                let alone: Vec<_> = experts.iter().zip(&alone_rows).map(|(e, rows)| e.group(layout, rows)).collect();
                let alone = run(1, isa, layout, &x[row * hidden..(row + 1) * hidden], &alone);
                if let Some(together) = &together {
                    assert_eq!(bits(&alone), bits(&together[row * hidden..(row + 1) * hidden]), "{isa} {format}");
                }
                // Integer formats have the same bits on every tier.
                let of_another_tier = contract.as_ref().map(|all| &all[row * hidden..(row + 1) * hidden]);
                if let Some(expected) = of_another_tier.filter(|_| !matches!(format, Format::F32 | Format::Bf16)) {
                    assert_eq!(bits(&alone), bits(expected), "{isa} {format}");
                }
            }
            contract = contract.or(together);
        }
    }
}

#[test]
fn adds_to_what_is_there_and_leaves_rows_of_no_group() {
    let layout = FfnLayout { format: Format::F32, hidden: 48, intermediate: 32 };
    let (expert, x, pool) = (Expert::new(layout, 1), values(2 * layout.hidden, 5), Pool::new(2));
    let rows = [WeightedRow { row: 1, weight: 0.7 }];
    let mut out = vec![1.0; x.len()];
    grouped_ffn(&pool, Isa::Portable, layout, &x, &[expert.group(layout, &rows)], &mut out);
    let alone = run(2, Isa::Portable, layout, &x, &[expert.group(layout, &rows)]);
    assert_eq!(out[..layout.hidden], [1.0; 48]);
    assert!(out[layout.hidden..].iter().zip(&alone[layout.hidden..]).all(|(out, alone)| *out == 1.0 + alone));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn equals_the_equation_and_ignores_neighbours(
        hidden in 1_usize..70, intermediate in 1_usize..70, rows in 1_usize..30, seed in 0_u64..1000,
        routes in prop::collection::vec(prop::collection::vec(any::<bool>(), 30), 1..5),
    ) {
        let x = values(rows * hidden, seed);
        for format in [Format::F32, Format::Bf16] {
            let layout = FfnLayout { format, hidden, intermediate };
            let experts: Vec<_> = (0..routes.len()).map(|e| Expert::new(layout, seed + e as u64)).collect();
            let chosen: Vec<Vec<_>> = routes.iter().enumerate().map(|(e, uses)| {
                (0..rows).filter(|row| uses[*row]).map(|row| WeightedRow { row: row as u32, weight: 0.3 + e as f32 }).collect()
            }).collect();
            let groups: Vec<_> = experts.iter().zip(&chosen).map(|(e, rows)| e.group(layout, rows)).collect();
            for isa in Isa::available() {
                let out = run(2, isa, layout, &x, &groups);
                let row = rows / 2;
                let alone_rows: Vec<Vec<_>> = chosen.iter().map(|rows| {
                    rows.iter().filter(|r| r.row as usize == row).map(|r| WeightedRow { row: 0, ..*r }).collect()
                }).collect();
                let alone: Vec<_> = experts.iter().zip(&alone_rows).map(|(e, rows)| e.group(layout, rows)).collect();
                let x_row = &x[row * hidden..(row + 1) * hidden];
                prop_assert_eq!(bits(&run(1, isa, layout, x_row, &alone)), bits(&out[row * hidden..(row + 1) * hidden]));

                let mut exact = vec![0.0; hidden];
                for (expert, rows) in experts.iter().zip(&alone_rows) {
                    for route in rows {
                        let output = expert.exact(layout, x_row);
                        exact.iter_mut().zip(output).for_each(|(sum, y)| *sum += f64::from(route.weight) * y);
                    }
                }
                // Values are in (-1, 1), so an output's sum has terms of about hidden · intermediate / 9 at random signs;
                // each is off by a few roundings.
                let experts = alone_rows.iter().flatten().map(|route| f64::from(route.weight)).sum::<f64>();
                let scale = experts * (hidden as f64).max(4.0) * (intermediate as f64).sqrt().max(2.0);
                let unit = if format == Format::Bf16 { 0.01 } else { 1e-5 };
                for (y, exact) in out[row * hidden..].iter().zip(&exact) {
                    prop_assert!((f64::from(*y) - exact).abs() <= unit * scale, "{isa} {format}: {y} against {exact}");
                }
            }
        }
    }
}
