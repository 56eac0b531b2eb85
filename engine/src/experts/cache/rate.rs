/// Steps after which a use weighs half in what is known of the moment: about a sentence.
const FAST_HALF_LIFE: f32 = 8.0;

/// The same for what lasts. On made-up traces (`cache_simulator`) halves of 100 to 1000 steps, and of 8 to 20 for the
/// moment, give the same hit rates within two points; either one alone loses up to ten.
const SLOW_HALF_LIFE: f32 = 300.0;

/// How often an expert is used, in uses per step: the mean of two averages that forget at different speeds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rate {
    fast: f32,
    slow: f32,
    /// The step of the last use, in which the averages stood so.
    step: u32,
}

impl Rate {
    /// One that is known from elsewhere.
    pub(super) fn known(rate: f32, step: u32) -> Self {
        let rate = rate.clamp(0.0, 1.0);
        Self { fast: rate, slow: rate, step }
    }

    /// A use in `step`.
    pub(super) fn count_use(&mut self, step: u32) {
        let (fast, slow) = self.aged(step);
        *self = Self { fast: fast + 1.0 - keeps(FAST_HALF_LIFE, 1), slow: slow + 1.0 - keeps(SLOW_HALF_LIFE, 1), step };
    }

    /// Uses per step as of `step`.
    pub(super) fn at(self, step: u32) -> f32 {
        let (fast, slow) = self.aged(step);
        0.5 * (fast + slow)
    }

    /// What lasts of it.
    pub(super) fn lasting(self, step: u32) -> f32 {
        self.aged(step).1
    }

    fn aged(self, step: u32) -> (f32, f32) {
        let steps = step.saturating_sub(self.step);
        (self.fast * keeps(FAST_HALF_LIFE, steps), self.slow * keeps(SLOW_HALF_LIFE, steps))
    }
}

/// What is left of an average after so many steps.
fn keeps(half_life: f32, steps: u32) -> f32 {
    (-(steps as f32) / half_life).exp2()
}
