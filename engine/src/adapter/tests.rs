use std::sync::Arc;

use candle_core::Device;
use proptest::prelude::*;

use super::*;
use crate::{
    Tensor,
    compute::Compute,
    model::{SequenceRows, StepBatch},
    nn::{ExpertPart, Experts, FfnLayout, Format, Module},
    ops::{Routes, add_adapters, grouped_ffn},
    train::{
        parameters::{Parameter, Parameters},
        places::PlaceInfo,
        trained::{Adapter, Trained},
    },
};

const EXPERTS: usize = 3;
const HIDDEN: usize = 32;
/// Not a whole number of panels.
const INTERMEDIATE: usize = 40;

fn value(seed: usize) -> f32 {
    (seed * 2_654_435_761 % 1009) as f32 / 1009.0 - 0.5
}

/// The modules of one layer's experts, and of its router.
fn places() -> Vec<PlaceInfo> {
    let info = |place, inputs, rows: &[usize]| {
        let module = |(index, rows): (usize, &usize)| Module { name: format!("{place:?}.{index}"), rows: *rows };
        PlaceInfo { place, inputs, format: Format::F32, modules: rows.iter().enumerate().map(module).collect() }
    };
    let expert = |expert| {
        let [gate_up, down] = FfnPlace::Routed(0).matrices(expert);
        [info(gate_up, HIDDEN, &[INTERMEDIATE, INTERMEDIATE]), info(down, INTERMEDIATE, &[HIDDEN])]
    };
    (0..EXPERTS).flat_map(expert).chain([info(Place::Router { layer: 0 }, HIDDEN, &[EXPERTS])]).collect()
}

/// What an adapter adds to one matrix, `[outputs, inputs]`, in f64.
type Deltas = Vec<(Place, Vec<f64>)>;

/// Adapters of ranks 1 to 3 of each module, or, if `fused`, of gate and up together.
fn adapter(seed: usize, fused: bool) -> (Arc<LoadedAdapter>, Deltas) {
    let (mut trained, mut parameters) = (Trained::default(), Parameters::default());
    let mut deltas = Vec::new();
    for (index, info) in places().into_iter().enumerate() {
        let mut delta = vec![0.0; info.outputs() * info.inputs];
        let modules: Vec<usize> =
            if fused { vec![info.outputs()] } else { info.modules.iter().map(|module| module.rows).collect() };
        let mut start = 0;
        for (module, rows) in modules.into_iter().enumerate() {
            let rank = 1 + (seed + index + module) % 3;
            let numbers =
                |from: usize, count| (0..count).map(|at| value(seed * 71 + index * 13 + module + from + at)).collect();
            let mut push = |shape: [usize; 2], values: Vec<f32>| {
                let name = format!("{index}.{module}");
                parameters.push(Parameter { name, shape: shape.to_vec(), values }).unwrap()
            };
            let (a, b): (Vec<f32>, Vec<f32>) = (numbers(0, rank * info.inputs), numbers(997, rows * rank));
            let scale = 0.5 + module as f32;
            for row in 0..rows {
                for input in 0..info.inputs {
                    let product =
                        |at| f64::from(b[row * rank + at]) * f64::from(a[at * info.inputs + input]) * f64::from(scale);
                    delta[(start + row) * info.inputs + input] = (0..rank).map(product).sum();
                }
            }
            let (a, b) = (push([rank, info.inputs], a), push([rows, rank], b));
            trained.of_mut(info.place).adapters.push(Adapter { rows: start..start + rows, a, b, rank, scale });
            start += rows;
        }
        deltas.push((info.place, delta));
    }
    (Arc::new(LoadedAdapter::new("test", &trained, parameters, &places()).unwrap()), deltas)
}

fn expert_value(expert: usize, part: ExpertPart, row: usize, column: usize) -> f32 {
    value(expert * 977 + part as usize * 337 + row * 131 + column)
}

fn experts(compute: &Compute, format: Format) -> Experts {
    let layout = FfnLayout { format, hidden: HIDDEN, intermediate: INTERMEDIATE };
    Experts::from_rows(compute, layout, EXPERTS, |expert, part, rows, out| {
        let width = out.len() / rows.len();
        let each = out.iter_mut().enumerate();
        each.for_each(|(at, x)| *x = expert_value(expert, part, rows.start + at / width, at % width));
        Ok::<(), crate::Error>(())
    })
    .unwrap()
}

/// A sequence of some tokens, with adapter 0, 1 or none.
type Sequence = (usize, Option<usize>);

fn batch(sequences: &[Sequence], adapters: &[Arc<LoadedAdapter>]) -> StepBatch {
    let mut batch = StepBatch::default();
    for (tokens, adapter) in sequences {
        let start = batch.token_ids.len();
        batch.token_ids.resize(start + tokens, 0);
        batch.sequences.push(SequenceRows {
            rows: start..start + tokens,
            context_len: *tokens,
            block_table: vec![0],
            adapter: adapter.map(|index| Arc::clone(&adapters[index])),
        });
    }
    batch
}

/// The numbers of row `token` of sequence `sequence`.
fn inputs(sequence: usize, tokens: usize) -> Vec<f32> {
    (0..tokens * HIDDEN).map(|at| value(sequence * 4099 + at)).collect()
}

fn tensor(values: Vec<f32>) -> Tensor {
    let rows = values.len() / HIDDEN;
    Tensor::from_vec(values, (rows, HIDDEN), &Device::Cpu).unwrap()
}

/// Two of the experts for each token.
fn routes(sequence: usize, tokens: usize) -> Routes {
    let mut routes = Routes { top_k: 2, experts: Vec::new(), weights: Vec::new() };
    for token in 0..tokens {
        let left_out = (sequence + token) % EXPERTS;
        routes.experts.extend((0..EXPERTS as u32).filter(|expert| *expert as usize != left_out));
        routes.weights.extend([0.3, 0.6]);
    }
    routes
}

/// The feed-forward of sequences in one step, row after row.
fn outputs(
    compute: &Compute,
    experts: &Experts,
    adapters: &[Arc<LoadedAdapter>],
    sequences: &[(usize, Sequence)],
) -> Vec<f32> {
    let lengths: Vec<Sequence> = sequences.iter().map(|(_, sequence)| *sequence).collect();
    let batch = batch(&lengths, adapters);
    let rows = RowAdapters::of(&batch);
    let mut all = Routes { top_k: 2, experts: Vec::new(), weights: Vec::new() };
    let mut x = Vec::new();
    for (number, (tokens, _)) in sequences {
        let Routes { experts, weights, .. } = routes(*number, *tokens);
        all.experts.extend(experts);
        all.weights.extend(weights);
        x.extend(inputs(*number, *tokens));
    }
    let out = grouped_ffn(compute, &tensor(x), experts, &all, Some((&rows, FfnPlace::Routed(0)))).unwrap();
    out.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// Also those that have no adapter: they get what a model without adapters makes of them.
    #[test]
    fn a_neighbours_adapter_changes_no_bit(
        sequences in prop::collection::vec((1_usize..30, prop::option::of(0_usize..2)), 1..8),
        format in prop::sample::select(vec![Format::F32, Format::Bf16, Format::Q8_0]),
    ) {
        let adapters = [adapter(1, false).0, adapter(2, true).0];
        let compute = Compute::new(3);
        let experts = experts(&compute, format);
        let numbered: Vec<_> = sequences.into_iter().enumerate().collect();
        let mixed = outputs(&compute, &experts, &adapters, &numbered);
        let mut rest = mixed.as_slice();
        for (number, (tokens, adapter)) in numbered {
            let (own, others) = rest.split_at(tokens * HIDDEN);
            rest = others;
            let one = Compute::new(1);
            let alone = match adapter {
                Some(_) => outputs(&one, &experts, &adapters, &[(number, (tokens, adapter))]),
                None => {
                    let x = tensor(inputs(number, tokens));
                    let out = grouped_ffn(&one, &x, &experts, &routes(number, tokens), None).unwrap();
                    out.flatten_all().unwrap().to_vec1().unwrap()
                }
            };
            prop_assert_eq!(bits(own), bits(&alone));
        }
    }
}

/// What a matrix with an adapter merged into it makes of a row, in f64.
fn product(delta: &[f64], weight: impl Fn(usize, usize) -> f32, x: &[f64]) -> Vec<f64> {
    let row = |(row, delta): (usize, &[f64])| {
        let term = |(column, (x, delta)): (usize, (&f64, &f64))| x * (f64::from(weight(row, column)) + delta);
        x.iter().zip(delta).enumerate().map(term).sum()
    };
    delta.chunks_exact(x.len()).enumerate().map(row).collect()
}

#[test]
fn a_row_gets_what_merged_weights_make_of_it() {
    let compute = Compute::new(2);
    let experts = experts(&compute, Format::F32);
    for fused in [false, true] {
        let (own, deltas) = adapter(5, fused);
        let delta = |place| &deltas.iter().find(|(of, _)| *of == place).unwrap().1;
        let found = outputs(&compute, &experts, &[own], &[(7, (4, None)), (9, (5, Some(0)))]);
        let Routes { experts, weights, .. } = routes(9, 5);
        for (token, x) in inputs(9, 5).chunks_exact(HIDDEN).enumerate() {
            let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let mut expected = vec![0.0; HIDDEN];
            for slot in 2 * token..2 * token + 2 {
                let expert = experts[slot] as usize;
                let [gate_up, down] = FfnPlace::Routed(0).matrices(expert).map(delta);
                let half = |row: usize| if row < INTERMEDIATE { ExpertPart::Gate } else { ExpertPart::Up };
                let both =
                    product(gate_up, |row, column| expert_value(expert, half(row), row % INTERMEDIATE, column), &x);
                let inner: Vec<f64> = (0..INTERMEDIATE)
                    .map(|at| both[at] / (1.0 + (-both[at]).exp()) * both[INTERMEDIATE + at])
                    .collect();
                let out = product(down, |row, column| expert_value(expert, ExpertPart::Down, row, column), &inner);
                expected.iter_mut().zip(out).for_each(|(sum, out)| *sum += f64::from(weights[slot]) * out);
            }
            let largest = expected.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
            let found = &found[(4 + token) * HIDDEN..][..HIDDEN];
            for (found, expected) in found.iter().zip(&expected) {
                assert!((f64::from(*found) - expected).abs() <= 1e-5 * largest, "{found}, expected {expected}");
            }
        }
    }
}

#[test]
fn a_matrix_that_no_adapter_changes_is_left_as_it_is() {
    let compute = Compute::new(1);
    let adapters = [adapter(1, false).0];
    let batch = batch(&[(2, None), (1, Some(0))], &adapters);
    let rows = RowAdapters::of(&batch);
    let (x, y) = (tensor(inputs(0, 3)), tensor(inputs(1, 3)));
    let head = add_adapters(&compute, &rows, Place::Head, &x, y.clone()).unwrap();
    assert_eq!(head.to_vec2::<f32>().unwrap(), y.to_vec2::<f32>().unwrap());
    let logits = Tensor::zeros((3, EXPERTS), candle_core::DType::F32, &Device::Cpu).unwrap();
    let router = add_adapters(&compute, &rows, Place::Router { layer: 0 }, &x, logits).unwrap();
    let router = router.to_vec2::<f32>().unwrap();
    assert_eq!(router[..2], [[0.0; EXPERTS]; 2]);
    assert!(router[2].iter().all(|x| *x != 0.0), "{router:?}");
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let (mut trained, mut parameters) = (Trained::default(), Parameters::default());
    let mut push = |shape: [usize; 2]| {
        let values = vec![1.0; shape[0] * shape[1]];
        parameters.push(Parameter { name: "one".into(), shape: shape.to_vec(), values }).unwrap()
    };
    let (a, b) = (push([1, 8]), push([8, 1]));
    let place = Place::AttentionOutput { layer: 3 };
    trained.of_mut(place).adapters.push(Adapter { rows: 0..8, a, b, rank: 1, scale: 1.0 });
    let error = LoadedAdapter::new("mine", &trained, parameters, &places()).unwrap_err().to_string();
    assert!(error.contains("mine") && error.contains("layer: 3"), "{error}");
}

#[test]
fn each_load_is_an_adapter_of_its_own() {
    let (one, two) = (adapter(1, false).0, adapter(1, false).0);
    assert_eq!((one.name(), one.bytes()), (two.name(), two.bytes()));
    assert_ne!(one, two);
    // Per expert 3 modules, of ranks 1 to 3, and the router; gate|up is padded to whole panels.
    assert!(one.bytes() > 4 * (EXPERTS * 3 * (HIDDEN + INTERMEDIATE)) as u64, "{}", one.bytes());
}
