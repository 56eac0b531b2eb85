use proptest::prelude::*;

use super::*;
use crate::train::parameters::Parameter;

const OPTIONS: AdamWOptions = AdamWOptions { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

fn parameters(of: &[(&[usize], &[f32])]) -> Parameters {
    let mut all = Parameters::default();
    for (index, (shape, values)) in of.iter().enumerate() {
        let name = format!("parameter {index}");
        all.push(Parameter { name, shape: shape.to_vec(), values: values.to_vec() }).unwrap();
    }
    all
}

fn gradients(all: &Parameters, of: &[&[f32]]) -> Gradients {
    let mut ids = Parameters::default();
    let ids: Vec<_> = all.iter().map(|parameter| ids.push(parameter.clone()).unwrap()).collect();
    let mut gradients = Gradients::zeros_like(all);
    for (id, values) in ids.into_iter().zip(of) {
        gradients.of(id).copy_from_slice(values);
    }
    gradients
}

fn values(all: &Parameters) -> Vec<f32> {
    all.iter().flat_map(|parameter| parameter.values.clone()).collect()
}

/// Numbers between -1 and 1 that look random.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mix = |index: u64| (index + 1).wrapping_mul(seed.wrapping_mul(2) + 0x9E37_79B9_7F4A_7C15) >> 40;
    (0..count as u64).map(|index| mix(index) as f32 / (1u32 << 23) as f32 - 1.0).collect()
}

#[track_caller]
fn assert_near(found: &[f32], expected: &[f64], relative: f64) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let bound = relative * expected.abs().max(1e-3);
        assert!((f64::from(*found) - expected).abs() <= bound, "{found} against {expected}");
    }
}

/// Made with torch 2.15.0:
///
/// ```python
/// matrix = torch.nn.Parameter(torch.tensor([[0.5, -1.25], [2.0, 0.03125]]))
/// vector = torch.nn.Parameter(torch.tensor([1.0, -0.75, 0.0]))
/// optimizer = torch.optim.AdamW(
///     [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}],
///     betas=(0.9, 0.95), eps=1e-8, foreach=False)
/// for step in range(1, 11):
///     matrix.grad = torch.tensor([[3.0 / step, -0.5], [0.25 * step, 1e-4]])
///     vector.grad = torch.tensor([(-1.0) ** step, 0.125 * (step - 5), 2.0])
///     norm = torch.nn.utils.clip_grad_norm_([matrix, vector], 1.0)
///     for group in optimizer.param_groups:
///         group["lr"] = 0.01 * step
///     optimizer.step()
///     print(step, norm.item(), matrix.flatten().tolist() + vector.tolist())
/// print(optimizer.state)
/// ```
#[test]
#[rustfmt::skip]
fn it_gives_torchs_values() {
    let expected = [
        (1, 3.816084384918213, [0.489500016, -1.23874998, 1.98800004, 0.0212225653, 1.00999999, -0.74000001, -0.0100000007]),
        (2, 2.809025764465332, [0.468981117, -1.21641684, 1.96560514, 0.0013308879, 1.00596905, -0.719995856, -0.0298555605]),
        (10, 3.461303949356079, [0.0398628116, -0.648767054, 1.38095653, -0.504383504, 1.0206306, -0.630916834, -0.547093511]),
    ];
    let first = [0.150307551, -0.108621269, 0.337386578, 2.17242541e-05, 0.0114252623, 0.0329166986, 0.434485078];
    let second = [0.0427495912, 0.0114586651, 0.112543978, 4.58346583e-10, 0.0458346605, 0.00533724716, 0.183338642];

    let mut all = parameters(&[(&[2, 2], &[0.5, -1.25, 2.0, 0.03125]), (&[3], &[1.0, -0.75, 0.0])]);
    let mut optimizer = AdamW::new(OPTIONS, &all);
    for step in 1..=10i32 {
        let at = step as f32;
        let sign = if step % 2 == 0 { 1.0 } else { -1.0 };
        let matrix = [3.0 / at, -0.5, 0.25 * at, 1e-4];
        let mut gradients = gradients(&all, &[&matrix, &[sign, 0.125 * (at - 5.0), 2.0]]);
        let norm = gradients.clip(1.0);
        optimizer.update(&Pool::new(1), &mut all, &gradients, 0.01 * f64::from(step)).unwrap();
        if let Some((_, expected_norm, expected)) = expected.iter().find(|(of, ..)| *of == step) {
            assert!((norm / expected_norm - 1.0).abs() < 1e-6, "step {step}: norm {norm}");
            assert_near(&values(&all), expected, 2e-6);
        }
    }
    let state = optimizer.state();
    assert_eq!(state.updates, 10);
    assert_near(&state.first_moments.concat(), &first, 1e-5);
    assert_near(&state.second_moments.concat(), &second, 1e-5);
}

/// One number's way through AdamW in f64, written from the paper.
fn twin(mut value: f64, gradients: &[f64], learning_rates: &[f64], weight_decay: f64) -> f64 {
    let (mut m, mut v) = (0.0, 0.0);
    for (index, (g, learning_rate)) in gradients.iter().zip(learning_rates).enumerate() {
        let t = index as i32 + 1;
        m = OPTIONS.beta1 * m + (1.0 - OPTIONS.beta1) * g;
        v = OPTIONS.beta2 * v + (1.0 - OPTIONS.beta2) * g * g;
        let m_hat = m / (1.0 - OPTIONS.beta1.powi(t));
        let v_hat = v / (1.0 - OPTIONS.beta2.powi(t));
        value -= learning_rate * (m_hat / (v_hat.sqrt() + OPTIONS.eps) + weight_decay * value);
    }
    value
}

#[test]
fn fifty_updates_follow_the_paper_in_f64() {
    const STEPS: usize = 50;
    let (rows, width) = (7, 5);
    let count = rows * width;
    let start = noise(count, 1);
    let mut all = parameters(&[(&[rows, width], &start), (&[count], &start)]);
    let mut optimizer = AdamW::new(OPTIONS, &all);
    // Gradients of all sizes, some of them 0 throughout.
    let of_step = |step: usize| -> Vec<f32> {
        let values = noise(count, 100 + step as u64).into_iter().enumerate();
        values
            .map(|(index, value)| if index % 11 == 10 { 0.0 } else { value * 10f32.powi(index as i32 % 9 - 6) })
            .collect()
    };
    let learning_rates: Vec<f64> = (0..STEPS).map(|step| 0.02 / (step + 1) as f64).collect();
    for (step, learning_rate) in learning_rates.iter().enumerate() {
        let gradient = of_step(step);
        let gradients = gradients(&all, &[&gradient, &gradient]);
        optimizer.update(&Pool::new(2), &mut all, &gradients, *learning_rate).unwrap();
    }
    let end_of = |weight_decay: f64| -> Vec<f64> {
        let of = |index: usize| -> Vec<f64> { (0..STEPS).map(|step| f64::from(of_step(step)[index])).collect() };
        let end = |(index, value): (usize, &f32)| twin(f64::from(*value), &of(index), &learning_rates, weight_decay);
        start.iter().enumerate().map(end).collect()
    };
    let (decayed, plain) = (end_of(OPTIONS.weight_decay), end_of(0.0));
    assert!(decayed.iter().zip(&plain).all(|(a, b)| (a - b).abs() > 1e-5), "a test that sees whether vectors decay");
    assert_near(&values(&all), &[decayed, plain].concat(), 5e-6);
}

#[test]
fn what_belongs_to_other_parameters_is_refused() {
    let all = parameters(&[(&[2, 2], &[1.0; 4]), (&[3], &[1.0; 3])]);
    let other = parameters(&[(&[2, 2], &[1.0; 4]), (&[4], &[1.0; 4])]);
    let fewer = parameters(&[(&[2, 2], &[1.0; 4])]);
    let mut optimizer = AdamW::new(OPTIONS, &all);
    let update = |optimizer: &mut AdamW, mut all: Parameters, gradients: &Parameters| {
        let before = all.clone();
        let gradients = Gradients::zeros_like(gradients);
        let error = optimizer.update(&Pool::new(1), &mut all, &gradients, 0.1).unwrap_err();
        assert_eq!(all, before);
        error.to_string()
    };
    let error = update(&mut optimizer, all.clone(), &other);
    assert_eq!(error, "the gradient of parameter 1: expected shape [3], found [4]");
    let error = update(&mut optimizer, fewer.clone(), &fewer);
    assert_eq!(error, "the optimizer's moments: the number of parameters: expected shape [1], found [2]");
    let error = AdamW::from_state(OPTIONS, &other, optimizer.state().clone()).unwrap_err().to_string();
    assert_eq!(error, "the optimizer's first moments of parameter 1: expected shape [4], found [3]");
    assert_eq!(optimizer.state().updates, 0);
}

#[test]
fn rates_that_could_make_a_weight_infinite_are_refused_and_none_below_does() {
    let all = parameters(&[(&[1, 3], &[3e30, -1.0, 0.0])]);
    for (learning_rate, weight_decay) in [(1e300, 0.1), (1.5, 0.1), (-0.1, 0.1), (f64::NAN, 0.1), (0.1, 1e300)] {
        let mut optimizer = AdamW::new(AdamWOptions { weight_decay, ..OPTIONS }, &all);
        let mut changed = all.clone();
        let gradients = Gradients::zeros_like(&all);
        assert!(optimizer.update(&Pool::new(1), &mut changed, &gradients, learning_rate).is_err());
        assert_eq!((&changed, optimizer.state().updates), (&all, 0));
    }
    let (mut all, mut optimizer) = (all.clone(), AdamW::new(AdamWOptions { weight_decay: 1.0, ..OPTIONS }, &all));
    for step in 0..200 {
        let sign = if step % 3 == 0 { -1.0 } else { 1.0 };
        let gradients = gradients(&all, &[&[sign * 1e18, 1e-38 * sign, sign * 10f32.powi(step % 19)]]);
        optimizer.update(&Pool::new(1), &mut all, &gradients, 1.0).unwrap();
        assert!(values(&all).iter().all(|value| value.is_finite()), "step {step}");
    }
    assert!(values(&all).iter().all(|value| value.abs() < 100.0), "{:?}", values(&all));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn threads_and_a_restored_state_change_no_bit(
        sizes in prop::collection::vec(prop_oneof![1usize..40, CHUNK - 2..CHUNK + 3, 2 * CHUNK..3 * CHUNK], 1..4),
        threads in 2usize..5,
        restored_at in 0usize..6,
    ) {
        let start: Vec<Vec<f32>> = sizes.iter().map(|size| noise(*size, *size as u64)).collect();
        let shapes: Vec<Vec<usize>> = sizes.iter().map(|size| vec![1; size % 2].into_iter().chain([*size]).collect()).collect();
        let start: Vec<(&[usize], &[f32])> = shapes.iter().zip(&start).map(|(a, b)| (&a[..], &b[..])).collect();
        let run = |pool: &Pool, restored_at: Option<usize>| {
            let mut all = parameters(&start);
            let mut optimizer = AdamW::new(OPTIONS, &all);
            for step in 0..6 {
                if restored_at == Some(step) {
                    optimizer = AdamW::from_state(OPTIONS, &all, optimizer.state().clone()).unwrap();
                }
                let of_step: Vec<Vec<f32>> = sizes.iter().map(|size| noise(*size, 7 + step as u64)).collect();
                let of_step: Vec<&[f32]> = of_step.iter().map(Vec::as_slice).collect();
                let gradients = gradients(&all, &of_step);
                optimizer.update(pool, &mut all, &gradients, 0.01).unwrap();
            }
            (all, optimizer.state().clone())
        };
        let alone = run(&Pool::new(1), None);
        let together = run(&Pool::new(threads), Some(restored_at));
        prop_assert!(alone == together, "not the same bits");
    }
}
