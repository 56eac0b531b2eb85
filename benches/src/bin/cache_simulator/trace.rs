//! Routing traces: which experts each step used, read from a file or made up.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use anyhow::{Context, ensure};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use serde::Deserialize;

/// The tokens of a step, and for each layer the experts that they used, each once.
#[derive(Debug, Deserialize)]
pub struct Step {
    pub tokens: usize,
    pub experts: Vec<Vec<u32>>,
}

/// Steps in their order.
#[derive(Debug)]
pub struct Trace {
    pub experts_per_layer: usize,
    pub steps: Vec<Step>,
}

impl Trace {
    /// Reads JSON lines, one a step. The largest number in it tells how many experts a layer has, unless `experts` does.
    pub fn read(path: &Path, experts: Option<usize>) -> anyhow::Result<Self> {
        let file = File::open(path).with_context(|| format!("{} can't be opened", path.display()))?;
        let mut steps: Vec<Step> = Vec::new();
        for (index, line) in BufReader::new(file).lines().enumerate() {
            let place = || format!("{}, line {}", path.display(), index + 1);
            let step: Step = serde_json::from_str(&line.with_context(place)?).with_context(place)?;
            let layers = steps.first().map_or(step.experts.len(), |first| first.experts.len());
            ensure!(
                step.experts.len() == layers,
                "{}: expected {layers} layers, found {}",
                place(),
                step.experts.len()
            );
            steps.push(step);
        }
        let largest = steps.iter().flat_map(|step| step.experts.iter().flatten()).max();
        let least = largest.with_context(|| format!("{} names no expert", path.display()))?;
        let least = *least as usize + 1;
        let experts_per_layer = experts.unwrap_or(least);
        ensure!(least <= experts_per_layer, "expected {experts_per_layer} experts a layer, found number {}", least - 1);
        Ok(Self { experts_per_layer, steps })
    }

    pub fn layers(&self) -> usize {
        self.steps.first().map_or(0, |step| step.experts.len())
    }
}

/// What a made-up trace is like. Of the defaults LRU gets 81 % at a quarter of the experts and the optimum 91 %; on traces
/// of Qwen3-30B-A3B others measured 80 and 93 %.
#[derive(Debug, Clone, clap::Args)]
pub struct Synthetic {
    /// Layers with routed experts.
    #[arg(long, default_value_t = 48)]
    layers: usize,
    /// Experts of a layer.
    #[arg(long, default_value_t = 128)]
    experts: usize,
    /// Experts that a token uses.
    #[arg(long, default_value_t = 8)]
    top_k: usize,
    /// Steps.
    #[arg(long, default_value_t = 2000)]
    steps: usize,
    /// Sequences that decode together.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Exponent of the popularity: 0 for uniform routing.
    #[arg(long, default_value_t = 2.0)]
    skew: f64,
    /// The share of a token's experts that come from its sequence's last four tokens.
    #[arg(long, default_value_t = 0.3)]
    locality: f64,
    /// Tokens after which a sequence has another topic, which is half of what popularity depends on.
    #[arg(long, default_value_t = 2000)]
    topic_tokens: usize,
    /// A prompt comes every so many steps; 0 for none.
    #[arg(long, default_value_t = 0)]
    prompt_every: usize,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 512)]
    prompt_tokens: usize,
    /// Seed of the draws.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Tokens that locality looks back on.
const RECENT_TOKENS: usize = 4;

impl Synthetic {
    /// Draws a trace. Its sizes must leave a token something to choose from.
    pub fn draw(&self) -> anyhow::Result<Trace> {
        ensure!(self.top_k >= 1 && self.top_k <= self.experts, "expected top-k of 1 to {}", self.experts);
        ensure!((0.0..1.0).contains(&self.locality), "expected a locality of 0 to below 1, found {}", self.locality);
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let base: Vec<Vec<usize>> = (0..self.layers).map(|_| permutation(self.experts, &mut rng)).collect();
        let mut sequences: Vec<Sequence> = (0..self.batch).map(|_| Sequence::default()).collect();
        let mut steps = Vec::new();
        for at in 1..=self.steps {
            let sets = sequences.iter_mut().map(|sequence| sequence.token(self, &base, &mut rng));
            steps.push(Step { tokens: self.batch, experts: union(sets, self.layers) });
            if self.prompt_every > 0 && at % self.prompt_every == 0 {
                let mut prompt = Sequence::default();
                let sets = (0..self.prompt_tokens).map(|_| prompt.token(self, &base, &mut rng));
                steps.push(Step { tokens: self.prompt_tokens, experts: union(sets, self.layers) });
            }
        }
        Ok(Trace { experts_per_layer: self.experts, steps })
    }
}

/// A sequence of tokens under way: its topic and what it used last.
#[derive(Default)]
struct Sequence {
    tokens: usize,
    /// For each layer the running sum of the experts' popularity.
    popularity: Vec<Vec<f64>>,
    /// For each layer the experts of the last tokens, the newest last.
    recent: Vec<Vec<u32>>,
}

impl Sequence {
    fn token(&mut self, of: &Synthetic, base: &[Vec<usize>], rng: &mut ChaCha8Rng) -> Vec<Vec<u32>> {
        if self.tokens == 0 {
            // Sequences start somewhere within a topic, so that they don't all change it in the same step.
            self.tokens = below(of.topic_tokens, rng);
            self.recent = vec![Vec::new(); of.layers];
        }
        if self.popularity.is_empty() || self.tokens.is_multiple_of(of.topic_tokens.max(1)) {
            self.popularity = base.iter().map(|ranks| popularity(ranks, of.skew, rng)).collect();
        }
        self.tokens += 1;
        (0..of.layers).map(|layer| self.choose(layer, of, rng)).collect()
    }

    fn choose(&mut self, layer: usize, of: &Synthetic, rng: &mut ChaCha8Rng) -> Vec<u32> {
        let (popularity, recent) = (&self.popularity[layer], &mut self.recent[layer]);
        let mut chosen: Vec<u32> = Vec::new();
        while chosen.len() < of.top_k {
            let expert = if !recent.is_empty() && unit(rng) < of.locality {
                recent[below(recent.len(), rng)]
            } else {
                let wanted = unit(rng) * popularity[popularity.len() - 1];
                popularity.partition_point(|&sum| sum <= wanted).min(popularity.len() - 1) as u32
            };
            if !chosen.contains(&expert) {
                chosen.push(expert);
            }
        }
        recent.extend(&chosen);
        recent.drain(..recent.len().saturating_sub(RECENT_TOKENS * of.top_k));
        chosen
    }
}

/// Running sums of popularity, of which the model's own ranks and a new topic's are one half each.
fn popularity(ranks: &[usize], skew: f64, rng: &mut ChaCha8Rng) -> Vec<f64> {
    let topic = permutation(ranks.len(), rng);
    let weights =
        ranks.iter().zip(topic).map(|(&base, topic)| ((base + 1) as f64 * (topic + 1) as f64).powf(-skew / 2.0));
    weights
        .scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        })
        .collect()
}

/// For each layer, each expert that any of `sets` has, once, in ascending order.
fn union(sets: impl Iterator<Item = Vec<Vec<u32>>>, layers: usize) -> Vec<Vec<u32>> {
    let mut all = vec![Vec::new(); layers];
    for set in sets {
        all.iter_mut().zip(set).for_each(|(all, layer)| all.extend(layer));
    }
    for layer in &mut all {
        layer.sort_unstable();
        layer.dedup();
    }
    all
}

fn permutation(count: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    for end in (1..count).rev() {
        order.swap(end, below(end + 1, rng));
    }
    order
}

fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

fn below(count: usize, rng: &mut ChaCha8Rng) -> usize {
    (unit(rng) * count as f64) as usize
}
