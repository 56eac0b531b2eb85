use std::f64::consts::PI;

use super::*;

const APPLY: Verdict = Verdict::Apply { learning_rate_factor: 1.0 };

fn guard() -> Guard {
    Guard::new(GuardOptions::default())
}

/// Noise of the standard normal distribution.
struct Noise(ChaCha8Rng);

impl Noise {
    fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    fn uniform(&mut self) -> f64 {
        ((self.0.next_u64() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (2.0 * PI * self.uniform()).cos()
    }

    /// A step of a run whose loss scatters by 0.1 around `loss`, its gradient norms by `scatter` in their logarithms.
    fn step(&mut self, loss: f64, scatter: f64) -> Observed {
        Observed { loss: loss + 0.1 * self.normal(), gradient_norm: (scatter * self.normal()).exp() }
    }
}

/// A guard that knows a loss of 2 ± 0.1 and a norm of 1 ± 0.2.
fn warm_guard(noise: &mut Noise) -> Guard {
    let mut guard = guard();
    for example in 0..100 {
        assert_eq!(guard.judge(&[example], noise.step(2.0, 0.2)).verdict, APPLY, "example {example}");
    }
    guard
}

const SPIKE: Observed = Observed { loss: 6.0, gradient_norm: 1.0 };
const ORDINARY: Observed = Observed { loss: 2.0, gradient_norm: 1.0 };

fn due(guard: &Guard) -> Option<Vec<u64>> {
    guard.due().map(<[u64]>::to_vec)
}

/// Ordinary steps until a batch is due; the batch, and how many steps that took.
fn until_due(guard: &mut Guard) -> (Vec<u64>, u64) {
    for steps in 0..=RETRY_WITHIN {
        if let Some(examples) = due(guard) {
            return (examples, steps);
        }
        let judgement = guard.judge(&[1_000_000], ORDINARY);
        assert!(matches!(judgement.verdict, Verdict::Apply { .. }), "{judgement:?}");
    }
    panic!("nothing is due after {RETRY_WITHIN} steps: {:?}", guard.state().kept);
}

#[test]
fn a_spike_of_either_measure_is_skipped_and_nothing_else() {
    let mut noise = Noise::new(1);
    let high_norm = Observed { loss: 2.0, gradient_norm: 9.0 };
    for (observed, measure) in [(SPIKE, Measure::Loss), (high_norm, Measure::GradientNorm)] {
        let mut guard = warm_guard(&mut noise);
        for index in 0..200u64 {
            let injected = [17, 80, 81, 160].contains(&index);
            let judgement = guard.judge(&[index, index + 1], if injected { observed } else { noise.step(2.0, 0.2) });
            if !injected {
                assert!(matches!(judgement.verdict, Verdict::Apply { .. }), "{index}: {judgement:?}");
                continue;
            }
            assert_eq!(judgement.verdict, Verdict::Skip, "{index}");
            let [Event::Skipped { examples, spike, retry_step }] = &judgement.events[..] else {
                panic!("{index}: {:?}", judgement.events)
            };
            assert_eq!(examples, &[index, index + 1]);
            assert_eq!(spike.measure, measure);
            assert!((spike.mean - if measure == Measure::Loss { 2.0 } else { 1.0 }).abs() < 0.5, "{spike:?}");
            assert!((101 + index..=100 + index + RETRY_WITHIN).contains(retry_step), "{index}: {retry_step}");
        }
        assert_eq!(guard.state().skipped, 4);
    }
}

/// Low values are never spikes.
#[test]
fn a_fall_is_welcome() {
    let mut guard = warm_guard(&mut Noise::new(2));
    assert_eq!(guard.judge(&[7], Observed { loss: 0.0, gradient_norm: 0.0 }).verdict, APPLY);
}

#[test]
fn a_batch_that_recovers_comes_back_once() {
    let mut guard = warm_guard(&mut Noise::new(3));
    guard.judge(&[7, 8], SPIKE);
    assert_eq!(due(&guard), None, "not at once");
    let (examples, _) = until_due(&mut guard);
    assert_eq!(examples, [7, 8]);
    let judgement = guard.judge(&examples, ORDINARY);
    assert_eq!(judgement, Judgement { verdict: APPLY, events: vec![Event::Recovered { examples: vec![7, 8] }] });
    assert_eq!(guard.state().kept, []);
}

#[test]
fn a_batch_that_spikes_again_is_dropped_and_the_learning_rate_lowered_for_a_while() {
    let mut guard = warm_guard(&mut Noise::new(4));
    guard.judge(&[7, 8], SPIKE);
    let (examples, _) = until_due(&mut guard);
    let step = guard.state().steps;
    let judgement = guard.judge(&examples, SPIKE);
    assert_eq!(judgement.verdict, Verdict::Skip);
    let [Event::Dropped { examples, .. }, Event::LearningRateLowered { factor: 0.5, until_step }] =
        &judgement.events[..]
    else {
        panic!("{:?}", judgement.events)
    };
    assert_eq!((&examples[..], *until_step), (&[7, 8][..], step + 1 + LOWERED_STEPS));
    for _ in 0..LOWERED_STEPS {
        let judgement = guard.judge(&[9], ORDINARY);
        assert_eq!(judgement, Judgement { verdict: Verdict::Apply { learning_rate_factor: 0.5 }, events: vec![] });
    }
    let judgement = guard.judge(&[9], ORDINARY);
    assert_eq!(judgement, Judgement { verdict: APPLY, events: vec![Event::LearningRateRestored] });
    assert_eq!(due(&guard), None);
}

#[test]
fn spikes_close_together_lower_the_learning_rate_and_spikes_apart_do_not() {
    let lowered = |apart: u64| {
        let mut guard = warm_guard(&mut Noise::new(5));
        let mut lowered = Vec::new();
        for index in 0..100 {
            // Every batch is a new one: what is kept stays where it is.
            let observed = if index % apart == 0 { SPIKE } else { ORDINARY };
            for event in guard.judge(&[index], observed).events {
                if let Event::LearningRateLowered { factor, .. } = event {
                    lowered.push((index, factor));
                }
            }
        }
        lowered
    };
    assert_eq!(lowered(BURST_STEPS), []);
    let lowered = lowered(9);
    assert_eq!(lowered[0], (18, 0.5));
    assert_eq!(lowered[1].0, 45);
}

#[test]
fn the_learning_rate_is_not_lowered_for_ever() {
    let mut guard = warm_guard(&mut Noise::new(6));
    let factors: Vec<f64> = (0..40)
        .flat_map(|index| guard.judge(&[index], Observed { loss: f64::NAN, gradient_norm: 1.0 }).events)
        .filter_map(|event| if let Event::LearningRateLowered { factor, .. } = event { Some(factor) } else { None })
        .collect();
    assert_eq!(factors[..3], [0.5, 0.25, 0.125]);
    assert!(factors[3..].iter().all(|factor| *factor == LOWEST), "{factors:?}");
}

#[test]
fn what_is_not_finite_is_a_spike_from_the_first_step_and_teaches_nothing() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for observed in [Observed { loss: value, gradient_norm: 1.0 }, Observed { loss: 2.0, gradient_norm: value }] {
            let mut new = guard();
            assert_eq!(new.judge(&[0], observed).verdict, Verdict::Skip, "{observed:?}");
            let mut warm = warm_guard(&mut Noise::new(7));
            let before = warm.state().clone();
            assert_eq!(warm.judge(&[0], observed).verdict, Verdict::Skip, "{observed:?}");
            assert_eq!((warm.state().loss, warm.state().gradient_norm), (before.loss, before.gradient_norm));
        }
    }
}

#[test]
fn damage_that_stays_ends_the_run() {
    let mut guard = warm_guard(&mut Noise::new(8));
    let mut verdicts = Vec::new();
    for index in 0..MOST_SKIPPED {
        let examples = due(&guard).unwrap_or_else(|| vec![index]);
        verdicts.push(guard.judge(&examples, Observed { loss: f64::NAN, gradient_norm: f64::NAN }).verdict);
    }
    assert_eq!(verdicts.pop(), Some(Verdict::Stop));
    assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Skip));
}

/// Other data, and a loss that stays higher: the figures of the module's head and of [`MOST_SKIPPED`].
#[test]
fn a_loss_that_stays_higher_is_accepted() {
    for (deviations, most) in [(7.0, 3), (100.0, 12), (10_000.0, 32)] {
        let mut noise = Noise::new(9);
        let mut guard = warm_guard(&mut noise);
        let observed: Vec<Observed> = (0..200).map(|_| noise.step(2.0 + 0.1 * deviations, 0.2)).collect();
        let verdicts: Vec<Verdict> =
            observed.iter().zip(0..).map(|(observed, index)| guard.judge(&[index], *observed).verdict).collect();
        let skips = verdicts.iter().filter(|verdict| **verdict == Verdict::Skip).count();
        println!("{skips} skips for {deviations} deviations");
        assert_eq!(verdicts[0], Verdict::Skip);
        assert!(skips <= most, "{skips} skips for {deviations} deviations");
        assert!(verdicts[100..].iter().all(|verdict| matches!(verdict, Verdict::Apply { .. })), "{verdicts:?}");
    }
}

/// The figures of [`GuardOptions::default`].
#[test]
fn noise_and_drift_give_few_false_alarms() {
    const STEPS: u64 = 10_000;
    const RUNS: u64 = 10;
    for (scatter, most) in [(0.2, 1.0), (0.3, 2.5), (0.5, 15.0)] {
        // A loss that falls, one that stays, and one that rises by a deviation every 200 steps.
        for drift in [-1e-4, 0.0, 5e-4] {
            let mut alarms = 0;
            for seed in 0..RUNS {
                let mut noise = Noise::new(100 + seed);
                let mut guard = guard();
                for step in 0..STEPS {
                    guard.judge(&[step], noise.step(4.0 + drift * step as f64, scatter));
                }
                alarms += guard.state().skipped;
            }
            let rate = alarms as f64 / RUNS as f64;
            println!("scatter {scatter}, drift {drift}: {rate} false alarms in {STEPS} steps");
            assert!(rate <= most, "scatter {scatter}, drift {drift}: {rate} in {STEPS} steps");
        }
    }
}

#[test]
fn a_restored_guard_decides_as_the_one_that_went_on() {
    // Bad batches stay bad, some other spikes pass; all that a guard can decide happens.
    let run = |restored_at: Option<u64>| {
        let mut noise = Noise::new(10);
        let options = GuardOptions { seed: 5, ..GuardOptions::default() };
        let mut guard = Guard::new(options);
        let mut judgements = Vec::new();
        for step in 0..600 {
            if restored_at == Some(step) {
                guard = Guard::from_state(options, guard.state().clone());
            }
            let mut observed = noise.step(2.0, 0.2);
            let examples = due(&guard).unwrap_or_else(|| vec![step]);
            let (is_new, is_bad) = (examples == [step], examples[0] % 60 == 50);
            if is_bad || (is_new && step % 45 == 44) {
                observed.loss += 5.0;
            }
            judgements.push((examples.clone(), guard.judge(&examples, observed)));
        }
        (judgements, guard.state().clone())
    };
    let whole = run(None);
    let happened = |is_it: fn(&Event) -> bool| whole.0.iter().flat_map(|(_, one)| &one.events).any(is_it);
    assert!(happened(|event| matches!(event, Event::Recovered { .. })));
    assert!(happened(|event| matches!(event, Event::Dropped { .. })));
    assert!(happened(|event| matches!(event, Event::LearningRateRestored)));
    for restored_at in [1, 29, 46, 51, 60, 137, 333, 599] {
        assert!(run(Some(restored_at)) == whole, "restored at {restored_at}");
    }
}

#[test]
fn seeds_mix_batches_in_at_different_steps() {
    let delays = |seed: u64| -> Vec<u64> {
        let mut guard = Guard::new(GuardOptions { seed, ..GuardOptions::default() });
        (0..20).map(|step| guard.keep(step, vec![step]) - step).collect()
    };
    assert_eq!(delays(1), delays(1));
    assert_ne!(delays(1), delays(2));
    let of_one = delays(1);
    assert!(of_one.iter().all(|delay| (1..=RETRY_WITHIN).contains(delay)), "{of_one:?}");
    assert!(of_one.iter().any(|delay| *delay != of_one[0]), "{of_one:?}");
}

#[test]
fn an_event_is_a_sentence() {
    let spike = Spike { measure: Measure::Loss, value: 6.0, mean: 2.0, deviation: 0.1 };
    let event = Event::Skipped { examples: vec![3, 4], spike, retry_step: 17 };
    assert_eq!(
        event.to_string(),
        "loss 6.0000 where 2.0000 ± 0.1000 is usual: the update is skipped, examples [3, 4] are tried again from step 17"
    );
}
