//! The spike guard: a step whose loss or gradient norm jumps is skipped, and its batch is tried again later.
//!
//! Skip, mix in again, and lower the learning rate if that doesn't help is the Ling report's (arXiv:2503.05139), which
//! gives no detector. The detector is EDiT's (arXiv:2412.07210): the one-sided z-score against a running mean and
//! deviation. Three things are ours:
//! - The averages forget at [`ALPHA`] only once they have seen 1/[`ALPHA`] values, and until then weigh all alike, so
//!   that a short warm-up knows the deviation too.
//! - A spike counts in the averages as a value at the threshold. A run whose loss stays higher, say on other data, is
//!   accepted after some steps (11 for a hundred deviations) instead of being skipped for ever.
//! - A batch that spikes twice is dropped, and named: most likely its data are broken.
//!
//! The guard reads no clock and logs nothing: a [`Judgement`] says all that it decided. Its state is numbers.

use std::fmt;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// What a new value weighs in the running mean and deviation; EDiT's.
const ALPHA: f64 = 0.02;

/// The least deviation, as a part of the mean: what repeats itself exactly may still rise a little.
const LEAST_DEVIATION: f64 = 0.01;

/// A skipped batch is tried again after 1 to so many steps.
const RETRY_WITHIN: u64 = 32;

/// So many spikes …
const BURST: usize = 3;

/// … in so many steps lower the learning rate, as does a batch that spikes again.
const BURST_STEPS: u64 = 20;

/// What lowering multiplies the learning rate with.
const LOWERED: f64 = 0.5;

/// The learning rate is lowered no further than this, however often.
const LOWEST: f64 = 0.125;

/// Steps after which a lowered learning rate is restored.
const LOWERED_STEPS: u64 = 20;

/// After so many skipped steps in a row the run isn't worth going on with. A rise of ten thousand deviations that stays is
/// accepted after 29.
const MOST_SKIPPED: u64 = 50;

/// What a guard is told once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GuardOptions {
    /// Deviations above the mean from which a value is a spike.
    pub threshold: f64,
    /// Steps in which the averages are learned and only what isn't finite is a spike.
    pub warmup_steps: u64,
    /// Decides when skipped batches are tried again.
    pub seed: u64,
}

impl Default for GuardOptions {
    /// Six deviations: of 10,000 steps of noise, 0.2 are skipped in error where the logarithms of the gradients' norms
    /// scatter by 0.2, 1.6 at 0.3 and 11 at 0.5; with five deviations two to four times as many. EDiT's 120 steps of
    /// warm-up are more than a small fine-tuning run has.
    fn default() -> Self {
        Self { threshold: 6.0, warmup_steps: 30, seed: 0 }
    }
}

/// What a step found, before it changes a weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observed {
    /// The batch's loss.
    pub loss: f64,
    /// The norm of its gradients, before clipping.
    pub gradient_norm: f64,
}

/// What to do with a step, and what there is to tell.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    /// What to do.
    pub verdict: Verdict,
    /// What was decided, in order; mostly nothing.
    pub events: Vec<Event>,
}

/// What to do with a step's gradients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// Update, with the schedule's learning rate times this factor.
    Apply {
        /// 1, unless spikes lowered it.
        learning_rate_factor: f64,
    },
    /// Don't update.
    Skip,
    /// Don't update, and end the run: hardly a step was fit for a long time.
    Stop,
}

/// A decision.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A batch spiked: its update is skipped.
    Skipped {
        /// The batch's examples.
        examples: Vec<u64>,
        /// What was too high.
        spike: Spike,
        /// The step from which [`Guard::due`] hands it out again.
        retry_step: u64,
    },
    /// A batch that was tried again is ordinary now.
    Recovered {
        /// The batch's examples.
        examples: Vec<u64>,
    },
    /// A batch that was tried again spiked again: it is skipped and won't come back.
    Dropped {
        /// The batch's examples.
        examples: Vec<u64>,
        /// What was too high.
        spike: Spike,
    },
    /// The learning rate is lowered from the next update on.
    LearningRateLowered {
        /// What it is multiplied with.
        factor: f64,
        /// The first step that has the whole again.
        until_step: u64,
    },
    /// The learning rate is the schedule's again.
    LearningRateRestored,
}

/// What can spike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// The loss.
    Loss,
    /// The gradients' norm.
    GradientNorm,
}

/// A value that is too high, or none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spike {
    /// Whose it is.
    pub measure: Measure,
    /// The value.
    pub value: f64,
    /// The running mean.
    pub mean: f64,
    /// The running deviation.
    pub deviation: f64,
}

/// A running mean and deviation.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Running {
    /// The values seen.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// The mean square of the distance from it.
    pub variance: f64,
}

impl Running {
    fn add(&mut self, value: f64) {
        self.count += 1;
        let alpha = ALPHA.max(1.0 / self.count as f64);
        let distance = value - self.mean;
        self.mean += alpha * distance;
        self.variance = (1.0 - alpha) * (self.variance + alpha * distance * distance);
    }

    fn deviation(&self) -> f64 {
        self.variance.sqrt().max(LEAST_DEVIATION * self.mean.abs())
    }
}

/// A skipped batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptBatch {
    /// Its examples.
    pub examples: Vec<u64>,
    /// The step from which it is tried again.
    pub retry_step: u64,
}

/// All that a guard remembers: a checkpoint that restores it goes on as if nothing had been.
#[derive(Debug, Clone, PartialEq)]
pub struct GuardState {
    /// The steps judged.
    pub steps: u64,
    /// Of the loss.
    pub loss: Running,
    /// Of the gradients' norm.
    pub gradient_norm: Running,
    /// Skipped batches, in the order in which they were.
    pub kept: Vec<KeptBatch>,
    /// The batches ever skipped; the next one's delay follows from it.
    pub skipped: u64,
    /// The latest steps that spiked.
    pub recent_spikes: Vec<u64>,
    /// The steps without an update since the last one.
    pub skipped_in_a_row: u64,
    /// What the learning rate is multiplied with.
    pub learning_rate_factor: f64,
    /// The step at which that ends.
    pub lowered_until: u64,
}

/// The guard.
#[derive(Debug, Clone)]
pub struct Guard {
    options: GuardOptions,
    state: GuardState,
}

impl Guard {
    /// One that has seen nothing.
    #[must_use]
    pub fn new(options: GuardOptions) -> Self {
        let state = GuardState {
            steps: 0,
            loss: Running::default(),
            gradient_norm: Running::default(),
            kept: Vec::new(),
            skipped: 0,
            recent_spikes: Vec::new(),
            skipped_in_a_row: 0,
            learning_rate_factor: 1.0,
            lowered_until: 0,
        };
        Self { options, state }
    }

    /// One that goes on from where another stood.
    #[must_use]
    pub fn from_state(options: GuardOptions, state: GuardState) -> Self {
        Self { options, state }
    }

    /// What a checkpoint stores.
    #[must_use]
    pub fn state(&self) -> &GuardState {
        &self.state
    }

    /// The skipped batch that the next step shall try again, in place of a new one.
    #[must_use]
    pub fn due(&self) -> Option<&[u64]> {
        let now = self.state.steps;
        self.state.kept.iter().find(|kept| kept.retry_step <= now).map(|kept| kept.examples.as_slice())
    }

    /// Judges a step of the batch with these examples. The batch of [`Guard::due`] is known by them.
    pub fn judge(&mut self, examples: &[u64], observed: Observed) -> Judgement {
        let step = self.state.steps;
        self.state.steps += 1;
        let mut events = Vec::new();
        if self.state.learning_rate_factor < 1.0 && step >= self.state.lowered_until {
            self.state.learning_rate_factor = 1.0;
            events.push(Event::LearningRateRestored);
        }
        let spike = self.spike(observed);
        self.learn(observed);
        let is_retry = self.take_kept(step, examples);
        let examples = examples.to_vec();
        let Some(spike) = spike else {
            if is_retry {
                events.push(Event::Recovered { examples });
            }
            self.state.skipped_in_a_row = 0;
            let learning_rate_factor = self.state.learning_rate_factor;
            return Judgement { verdict: Verdict::Apply { learning_rate_factor }, events };
        };
        events.push(if is_retry {
            Event::Dropped { examples, spike }
        } else {
            let retry_step = self.keep(step, examples.clone());
            Event::Skipped { examples, spike, retry_step }
        });
        if self.is_burst(step) || is_retry {
            events.push(self.lower_learning_rate(step));
        }
        self.state.skipped_in_a_row += 1;
        let verdict = if self.state.skipped_in_a_row < MOST_SKIPPED { Verdict::Skip } else { Verdict::Stop };
        Judgement { verdict, events }
    }

    /// The running values with what a step found of each.
    fn measures(&mut self, observed: Observed) -> [(Measure, &mut Running, f64); 2] {
        let GuardState { loss, gradient_norm, .. } = &mut self.state;
        [(Measure::Loss, loss, observed.loss), (Measure::GradientNorm, gradient_norm, observed.gradient_norm)]
    }

    fn spike(&mut self, observed: Observed) -> Option<Spike> {
        let GuardOptions { threshold, warmup_steps, .. } = self.options;
        self.measures(observed).into_iter().find_map(|(measure, running, value)| {
            let (mean, deviation) = (running.mean, running.deviation());
            let is_high = running.count >= warmup_steps && value > mean + threshold * deviation;
            (is_high || !value.is_finite()).then_some(Spike { measure, value, mean, deviation })
        })
    }

    /// A step that isn't finite teaches nothing, a spike no more than the highest value that is none.
    fn learn(&mut self, observed: Observed) {
        let GuardOptions { threshold, warmup_steps, .. } = self.options;
        if !observed.loss.is_finite() || !observed.gradient_norm.is_finite() {
            return;
        }
        for (_, running, value) in self.measures(observed) {
            let is_warm = running.count >= warmup_steps;
            let highest = if is_warm { running.mean + threshold * running.deviation() } else { f64::INFINITY };
            running.add(value.min(highest));
        }
    }

    /// Forgets the batch if it was kept and its time has come; whether it was.
    fn take_kept(&mut self, step: u64, examples: &[u64]) -> bool {
        let is_it = |kept: &KeptBatch| kept.retry_step <= step && kept.examples == examples;
        let place = self.state.kept.iter().position(is_it);
        place.map(|place| self.state.kept.remove(place)).is_some()
    }

    /// Keeps a batch until the step that is returned.
    fn keep(&mut self, step: u64, examples: Vec<u64>) -> u64 {
        let mut random = ChaCha8Rng::seed_from_u64(self.options.seed);
        random.set_stream(self.state.skipped);
        self.state.skipped += 1;
        let retry_step = step + 1 + random.next_u64() % RETRY_WITHIN;
        self.state.kept.push(KeptBatch { examples, retry_step });
        retry_step
    }

    /// Notes that a step spiked; whether that makes a burst, which then is over.
    fn is_burst(&mut self, step: u64) -> bool {
        let recent = &mut self.state.recent_spikes;
        recent.retain(|earlier| earlier + BURST_STEPS > step);
        recent.push(step);
        let is_burst = recent.len() >= BURST;
        if is_burst {
            recent.clear();
        }
        is_burst
    }

    fn lower_learning_rate(&mut self, step: u64) -> Event {
        let state = &mut self.state;
        state.learning_rate_factor = (state.learning_rate_factor * LOWERED).max(LOWEST);
        state.lowered_until = step + 1 + LOWERED_STEPS;
        Event::LearningRateLowered { factor: state.learning_rate_factor, until_step: state.lowered_until }
    }
}

impl fmt::Display for Spike {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { measure, value, mean, deviation } = self;
        let measure = match measure {
            Measure::Loss => "loss",
            Measure::GradientNorm => "gradient norm",
        };
        write!(f, "{measure} {value:.4} where {mean:.4} ± {deviation:.4} is usual")
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Skipped { examples, spike, retry_step } => {
                write!(
                    f,
                    "{spike}: the update is skipped, examples {examples:?} are tried again from step {retry_step}"
                )
            }
            Self::Recovered { examples } => write!(f, "examples {examples:?} were tried again and are ordinary now"),
            Self::Dropped { examples, spike } => {
                write!(f, "{spike}, again: examples {examples:?} are dropped, look at their data")
            }
            Self::LearningRateLowered { factor, until_step } => {
                write!(f, "the learning rate is multiplied with {factor} until step {until_step}")
            }
            Self::LearningRateRestored => write!(f, "the learning rate is the schedule's again"),
        }
    }
}

#[cfg(test)]
mod tests;
