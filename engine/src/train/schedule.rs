//! The learning rate of each step, as the schedules of transformers' `get_scheduler` define it.

/// How the learning rate goes on after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// It stays (`constant_with_warmup`).
    Constant,
    /// A line down to 0 (`linear`).
    Linear,
    /// Half a cosine down to 0 (`cosine`).
    Cosine,
    /// Warm-up, stable, decay: it stays, and falls in a line to 0 in the last tenth of all steps (`warmup_stable_decay`
    /// with `decay_type="linear"`). A tenth is what MiniCPM found to be enough (Hu et al., arXiv:2404.06395); the line is
    /// Hägele et al.'s cooldown (arXiv:2405.18392), which unlike MiniCPM's exponential ends at 0.
    Wsd,
    /// One over the root of the step (`inverse_sqrt`); its time scale is the warm-up, or 10,000 steps without one.
    InverseSqrt,
}

/// What part of all steps [`Shape::Wsd`] decays in.
const DECAY_RATIO: f64 = 0.1;

/// The time scale of [`Shape::InverseSqrt`] without a warm-up, in steps.
const TIME_SCALE: u64 = 10_000;

/// The learning rate as a function of the step alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// How it goes on after warm-up.
    pub shape: Shape,
    /// The highest learning rate.
    pub peak: f64,
    /// What part of all steps the learning rate rises in, in a line from 0. Rounded up to whole steps.
    pub warmup_ratio: f64,
    /// All steps of the run.
    pub steps: u64,
}

impl Schedule {
    /// The learning rate of a step, the first of which is 0. As in transformers that one has the learning rate 0 if there
    /// is a warm-up.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        let warmup = self.part(self.warmup_ratio);
        self.peak * if step < warmup { step as f64 / warmup as f64 } else { self.after_warmup(step, warmup) }
    }

    fn after_warmup(&self, step: u64, warmup: u64) -> f64 {
        // What is left of the way from `start` to the end.
        let left_since = |start: u64| {
            let way = self.steps.saturating_sub(start).max(1);
            self.steps.saturating_sub(step) as f64 / way as f64
        };
        match self.shape {
            Shape::Constant => 1.0,
            Shape::Linear => left_since(warmup),
            Shape::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * left_since(warmup)).cos()),
            Shape::Wsd => {
                let decay_start = self.steps.saturating_sub(self.part(DECAY_RATIO)).max(warmup);
                left_since(decay_start).min(1.0)
            }
            Shape::InverseSqrt => {
                let scale = if warmup == 0 { TIME_SCALE } else { warmup };
                let shifted = step - warmup + scale;
                (scale as f64 / shifted as f64).sqrt()
            }
        }
    }

    /// So many of all steps, rounded up.
    fn part(&self, ratio: f64) -> u64 {
        (self.steps as f64 * ratio).ceil() as u64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPES: [Shape; 5] = [Shape::Constant, Shape::Linear, Shape::Cosine, Shape::Wsd, Shape::InverseSqrt];

    /// Made with transformers 5.24.0:
    ///
    /// ```python
    /// for name in ["constant_with_warmup", "linear", "cosine", "warmup_stable_decay", "inverse_sqrt"]:
    ///     optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
    ///     extra = {"num_decay_steps": 4, "decay_type": "linear"} if name == "warmup_stable_decay" else None
    ///     schedule = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=40,
    ///                              scheduler_specific_kwargs=extra)
    ///     for step in range(41):
    ///         print(step, schedule.get_last_lr()[0])
    ///         optimizer.step()
    ///         schedule.step()
    /// ```
    #[test]
    #[rustfmt::skip]
    fn it_gives_transformers_values() {
        let steps = [0, 1, 3, 4, 5, 20, 36, 37, 39, 40];
        let expected = [
            (Shape::Constant, [0.0, 5e-5, 1.5e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4]),
            (Shape::Linear, [0.0, 5e-5, 1.5e-4, 2e-4, 0.0001944444444, 0.0001111111111, 2.222222222e-05, 1.666666667e-05, 5.555555556e-06, 0.0]),
            (Shape::Cosine, [0.0, 5e-5, 1.5e-4, 2e-4, 0.0001996194698, 0.0001173648178, 6.030737921e-06, 3.407417371e-06, 3.805301908e-07, 0.0]),
            (Shape::Wsd, [0.0, 5e-5, 1.5e-4, 2e-4, 2e-4, 2e-4, 2e-4, 1.5e-4, 5e-5, 0.0]),
            (Shape::InverseSqrt, [0.0, 5e-5, 1.5e-4, 2e-4, 0.0001788854382, 8.94427191e-05, 6.666666667e-05, 6.575959492e-05, 6.405126152e-05, 6.32455532e-05]),
        ];
        for (shape, rates) in expected {
            let schedule = Schedule { shape, peak: 2e-4, warmup_ratio: 0.1, steps: 40 };
            for (step, rate) in steps.into_iter().zip(rates) {
                let found = schedule.at(step);
                assert!((found - rate).abs() < 1e-13, "{shape:?} at {step}: {found} against {rate}");
            }
        }
    }

    #[test]
    fn without_a_warmup_the_first_step_has_the_highest_rate() {
        for shape in SHAPES {
            let schedule = Schedule { shape, peak: 3.0, warmup_ratio: 0.0, steps: 20 };
            assert_eq!(schedule.at(0), 3.0, "{shape:?}");
        }
        let schedule = Schedule { shape: Shape::InverseSqrt, peak: 1.0, warmup_ratio: 0.0, steps: 20 };
        assert_eq!(schedule.at(30_000), 0.5);
    }

    proptest! {
        #[test]
        fn it_rises_to_the_peak_and_never_rises_again(
            shape in prop::sample::select(SHAPES.to_vec()),
            steps in 1u64..300,
            warmup_ratio in 0.0f64..=1.0,
        ) {
            let schedule = Schedule { shape, peak: 1.0, warmup_ratio, steps };
            let warmup = (steps as f64 * warmup_ratio).ceil() as u64;
            for step in 0..steps + 5 {
                let (now, next) = (schedule.at(step), schedule.at(step + 1));
                prop_assert!((0.0..=1.0).contains(&now), "{now} at {step}");
                if step < warmup && warmup < steps {
                    prop_assert!(next > now, "{now} then {next} at {step} of the warm-up");
                } else if step >= warmup {
                    prop_assert!(next <= now, "{now} then {next} at {step}");
                }
            }
            if warmup < steps {
                prop_assert_eq!(schedule.at(warmup), 1.0);
            }
        }
    }
}
