//! Stochastic routing warm-up (the Ling report, arXiv:2503.05139): in the first steps, noise takes a part in the choice of
//! experts, so that each of them gets tokens before the routers have their preferences.
//!
//! In step i of W steps of warm-up, `a·s + (1 - a)·(μ + σ·ε)` with a = i / W takes the place of a router's logits s in all that
//! follows: the choice, the weights of the chosen, the routers' losses. So the gradient of s is a times that of the mixture. The report
//! leaves open what s, μ and σ are of:
//! - s are logits: normal noise has no bounds, and scores have.
//! - μ and σ are those of a layer, over all its experts and all tokens of the steps before that were applied. Means of single experts would
//!   keep the imbalance. While there were no such steps, there is no noise.
//!
//! ε is a function of the seed, the step, the layer, the token's number in the step and the expert: as for
//! [`Dropout`](super::Dropout), nothing is kept, and nothing changes however a step is computed.

use super::{
    places::Place,
    random::{key, mix, normal},
};

/// What takes part in the choice of experts in one step.
#[derive(Debug, Clone, PartialEq)]
pub struct RoutingNoise {
    /// What of the logits is the router's own: a, from 0 to 1.
    pub share: f32,
    /// The run's.
    pub seed: u64,
    /// The step's number.
    pub step: u64,
    /// For each layer what its router's logits were before; layers without are left as they are.
    pub before: Vec<LogitMoments>,
}

/// Sums over the logits of a router.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LogitMoments {
    /// How many.
    pub count: u64,
    /// Their sum.
    pub sum: f64,
    /// The sum of their squares.
    pub squares: f64,
}

impl LogitMoments {
    pub(super) fn of(logits: &[f32]) -> Self {
        let values = logits.iter().copied().map(f64::from);
        let (sum, squares) = values.fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
        Self { count: logits.len() as u64, sum, squares }
    }

    /// Adds those of more logits.
    pub fn add(&mut self, other: Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.squares += other.squares;
    }

    /// Mean and deviation, if there were logits.
    fn normal(&self) -> Option<[f32; 2]> {
        let count = self.count as f64;
        let mean = self.sum / count;
        (self.count > 0).then(|| [mean as f32, (self.squares / count - mean * mean).max(0.0).sqrt() as f32])
    }
}

impl RoutingNoise {
    /// That of a step of a warm-up of `steps`; `None` after it. `before` as in the field of this name.
    #[must_use]
    pub fn of_step(step: u64, steps: u64, seed: u64, before: &[LogitMoments]) -> Option<Self> {
        let share = step as f32 / steps as f32;
        (step < steps).then(|| Self { share, seed, step, before: before.to_vec() })
    }

    fn normal(&self, layer: usize) -> Option<[f32; 2]> {
        self.before.get(layer).and_then(LogitMoments::normal)
    }

    /// What the gradient of the layer's own logits is of that of the mixture.
    pub(super) fn gradient_factor(&self, layer: usize) -> f32 {
        if self.normal(layer).is_some() { self.share } else { 1.0 }
    }

    /// Mixes the layer's logits, `experts` a token; the first token has this number in the step.
    pub(super) fn mix(&self, layer: usize, first_token: usize, experts: usize, logits: &mut [f32]) {
        let Some([mean, deviation]) = self.normal(layer) else { return };
        let key = key(self.seed, self.step, Place::Router { layer });
        for (token, logits) in logits.chunks_exact_mut(experts).enumerate() {
            let token = mix(key ^ (first_token + token) as u64);
            for (expert, logit) in logits.iter_mut().enumerate() {
                let noise = mean + deviation * normal(mix(token ^ expert as u64));
                *logit = self.share * *logit + (1.0 - self.share) * noise;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPERTS: usize = 32;
    const TOKENS: usize = 2000;

    /// A router that prefers its first experts, and what noise of this share makes of its logits from token `first` on.
    fn mixed(share: f32, first: usize) -> (Vec<f32>, Vec<f32>) {
        let logit = |index: usize| 2.0 - (index % EXPERTS) as f32 / 8.0;
        let logits: Vec<f32> = (first * EXPERTS..TOKENS * EXPERTS).map(logit).collect();
        let before = vec![LogitMoments::default(), LogitMoments::of(&logits)];
        let mut out = logits.clone();
        RoutingNoise { share, seed: 1, step: 2, before }.mix(1, first, EXPERTS, &mut out);
        (logits, out)
    }

    #[test]
    fn noise_has_the_mean_and_deviation_of_the_logits_and_prefers_no_expert() {
        let (logits, noise) = mixed(0.0, 0);
        let [expected, found] = [&logits, &noise].map(|values| LogitMoments::of(values).normal().unwrap());
        let bound = 4.0 * expected[1] / (logits.len() as f32).sqrt();
        assert!((0..2).all(|index| (expected[index] - found[index]).abs() < bound), "{expected:?}, {found:?}");
        for expert in 0..EXPERTS {
            let mean = noise.iter().skip(expert).step_by(EXPERTS).sum::<f32>() / TOKENS as f32;
            assert!((mean - expected[0]).abs() < 5.0 * expected[1] / (TOKENS as f32).sqrt(), "{expert}: {mean}");
        }
        let (_, half) = mixed(0.5, 0);
        let mean = |(logit, noise): (&f32, &f32)| 0.5 * logit + 0.5 * noise;
        assert_eq!(half, logits.iter().zip(&noise).map(mean).collect::<Vec<_>>());
    }

    #[test]
    fn noise_follows_the_token() {
        // The division into batches changes the moments a little, so the same ones are given here.
        let before = vec![LogitMoments { count: 1, sum: 0.0, squares: 1.0 }];
        let noise = RoutingNoise { share: 0.25, seed: 1, step: 2, before };
        let mixed = |noise: &RoutingNoise, first: usize, tokens: usize| {
            let mut logits = vec![1.0; tokens * 4];
            noise.mix(0, first, 4, &mut logits);
            logits
        };
        let whole = mixed(&noise, 0, 8);
        assert_eq!(mixed(&noise, 5, 3), whole[5 * 4..]);
        for other in [RoutingNoise { seed: 2, ..noise.clone() }, RoutingNoise { step: 3, ..noise.clone() }] {
            assert!(mixed(&other, 0, 8).iter().zip(&whole).all(|(one, other)| one != other));
        }
        let unknown = RoutingNoise { before: Vec::new(), ..noise.clone() };
        assert!(mixed(&unknown, 0, 8) == [1.0; 32] && unknown.gradient_factor(0) == 1.0);
        assert_eq!(noise.gradient_factor(0), 0.25);
    }

    #[test]
    fn the_routers_share_rises_to_all() {
        let of = |step: u64| RoutingNoise::of_step(step, 4, 1, &[]).map(|noise| noise.share);
        assert_eq!([0, 1, 3, 4, 5].map(of), [Some(0.0), Some(0.25), Some(0.75), None, None]);
        assert!(RoutingNoise::of_step(0, 0, 1, &[]).is_none());
    }

    #[test]
    fn moments_add_up() {
        let mut sums = LogitMoments::default();
        assert!(sums.normal().is_none());
        [&[1.0, 2.0][..], &[3.0, 6.0]].into_iter().for_each(|logits| sums.add(LogitMoments::of(logits)));
        assert_eq!(sums.normal(), Some([3.0, 3.5f32.sqrt()]));
    }
}
