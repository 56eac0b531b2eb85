//! From logits to a drawn token: temperature, min-p, top-k, top-p, the draw.
//!
//! Every token has a weight, the exponential of its tempered distance from the best one. Weights are not stored: a pass
//! computes them block by block and keeps each block's sum; what is dropped weighs 0. Sums go over ascending ids and in
//! f64, so they depend on the logits alone.
//!
//! top-k and top-p keep all tokens up to one, in the order of rank. top-k finds that one with a list of the best. top-p
//! adds up the weights in 2048 buckets of distance from the best, and looks for it in the bucket where its mass is
//! reached, halving the bucket's list. Nothing sorts the vocabulary.

use cadre_kernels::logits::{self, BLOCK, BUCKETS, Distance, PLACES, Weighing};

use super::row::{Rank, Row};
use crate::request::SamplingParams;

/// Lists up to this length are sorted.
const SHORT: usize = 64;

/// The lightest weight that is not 0 is just above e^-88.
const LONGEST_DISTANCE: f64 = 88.0;

/// Working memory of a draw, kept from row to row.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// The sum of each block's weights.
    sums: Vec<f64>,
    /// The sum of each bucket's weights.
    buckets: Vec<f64>,
    /// The best tokens, or those of one bucket.
    list: Vec<Rank>,
}

/// The tokens that the filters have left.
#[derive(Clone, Copy)]
struct Kept<'a> {
    row: Row<'a>,
    weighing: Weighing,
    /// The last one in the order of rank, or anything after it.
    last: Rank,
}

impl Selection {
    /// The token at `uniform`, a number in `[0, 1)`, of the summed weights of what `params` keep. `highest` is the row's
    /// highest logit. `None` if nothing is kept.
    pub(super) fn draw(&mut self, row: Row<'_>, highest: f32, params: &SamplingParams, uniform: f64) -> Option<u32> {
        let &SamplingParams { temperature, min_p, top_k, top_p, .. } = params;
        let weighing = Weighing { highest, temperature, least_weight: min_p.max(0.0) };
        let mut kept = Kept { row, weighing, last: Rank::of(f32::NEG_INFINITY, u32::MAX) };
        if top_k > 0 && (top_k as usize) < row.logits.len() {
            row.list_best(top_k as usize, &mut self.list);
            kept.last = self.list.iter().copied().max()?;
        }
        self.sum_up(kept);
        if top_p < 1.0
            && let Some(last) = self.reaching(kept, top_p)
        {
            kept.last = last;
            self.sum_up(kept);
        }
        self.pick(kept, uniform)
    }

    fn sum_up(&mut self, kept: Kept<'_>) {
        let mut weights = [0.0; BLOCK];
        let bar = kept.last.logit();
        let sum = |(start, peak, logits)| if peak < bar { 0.0 } else { kept.weigh(start, logits, &mut weights) };
        self.sums.clear();
        self.sums.extend(kept.row.blocks().map(sum));
    }

    fn total(&self) -> f64 {
        self.sums.iter().sum()
    }

    fn pick(&self, kept: Kept<'_>, uniform: f64) -> Option<u32> {
        let target = uniform * self.total();
        let (mut found, mut mass) = (None, 0.0);
        for (block, &sum) in kept.row.blocks().zip(&self.sums).filter(|(_, sum)| **sum > 0.0) {
            found = Some((block, mass));
            mass += sum;
            if mass > target {
                break;
            }
        }
        let ((start, _, logits), mut mass) = found?;
        let mut weights = [0.0; BLOCK];
        kept.weigh(start, logits, &mut weights);
        let mut last = None;
        for (token, &weight) in (start as u32..).zip(&weights).filter(|(_, weight)| **weight > 0.0) {
            mass += f64::from(weight);
            last = Some(token);
            if mass > target {
                break;
            }
        }
        last
    }

    /// The token with which the weights, summed from the best one on, reach `top_p` of all that is kept.
    fn reaching(&mut self, kept: Kept<'_>, top_p: f32) -> Option<Rank> {
        let top_p = f64::from(top_p.max(0.0));
        let total = self.total();
        // All that is lighter than this has together less than the mass that may be lost, half of it: so the token is
        // not among it. In a peaked row that is nearly everything.
        let light = (1.0 - top_p) * total / (2 * kept.row.logits.len()) as f64;
        let distance = (-light.ln()).min(LONGEST_DISTANCE);
        let Weighing { highest, temperature, .. } = kept.weighing;
        let lowest = (f64::from(highest) - f64::from(temperature) * distance) as f32;
        let kept = Kept { last: kept.last.min(Rank::of(lowest, u32::MAX)), ..kept };
        let scale = BUCKETS as f32 / (temperature * distance as f32);
        let distance = Distance { highest, scale };
        self.fill_buckets(kept, distance);
        let mut missing = top_p * total;
        let reaches = |mass: &f64| {
            let reaches = *mass >= missing;
            missing -= if reaches { 0.0 } else { *mass };
            reaches
        };
        let bucket = self.buckets[..BUCKETS].iter().position(reaches)?;
        self.list_bucket(kept, distance, bucket as u32);
        kept.reaching(&mut self.list, missing)
    }

    fn fill_buckets(&mut self, kept: Kept<'_>, distance: Distance) {
        self.buckets.clear();
        self.buckets.resize(PLACES, 0.0);
        let (mut weights, mut buckets) = ([0.0; BLOCK], [0; BLOCK]);
        for (start, logits) in kept.blocks() {
            kept.weigh(start, logits, &mut weights);
            kept.buckets(distance, logits, &mut buckets);
            for (&bucket, &weight) in buckets.iter().zip(&weights).take(logits.len()) {
                self.buckets[bucket as usize] += f64::from(weight);
            }
        }
    }

    fn list_bucket(&mut self, kept: Kept<'_>, distance: Distance, bucket: u32) {
        self.list.clear();
        let mut buckets = [0; BLOCK];
        for (start, logits) in kept.blocks() {
            kept.buckets(distance, logits, &mut buckets);
            let inside = (start as u32..).zip(logits).zip(&buckets).filter(|(_, other)| **other == bucket);
            self.list
                .extend(inside.map(|((token, &logit), _)| Rank::of(logit, token)).filter(|rank| *rank <= kept.last));
        }
    }
}

impl<'a> Kept<'a> {
    /// The first id and the logits of each block of which anything is kept.
    fn blocks(self) -> impl Iterator<Item = (usize, &'a [f32])> {
        let blocks = self.row.blocks().filter(move |(_, peak, _)| *peak >= self.last.logit());
        blocks.map(|(start, _, logits)| (start, logits))
    }

    fn buckets(&self, distance: Distance, logits: &[f32], buckets: &mut [u32; BLOCK]) {
        logits::buckets(self.row.isa, distance, self.last.logit(), logits, &mut buckets[..logits.len()]);
    }

    /// The weights of the block that starts with token `start`, and their sum.
    fn weigh(&self, start: usize, logits: &[f32], weights: &mut [f32; BLOCK]) -> f64 {
        let bar = self.last.logit();
        // Up to the last token's id a logit equal to its own ranks before it, from there on after it.
        let split = (self.last.token() as usize + 1).clamp(start, start + logits.len()) - start;
        let (before, after) = weights[..logits.len()].split_at_mut(split);
        let sum = logits::weigh(self.row.isa, self.weighing, bar, &logits[..split], before);
        sum + logits::weigh(self.row.isa, self.weighing, bar.next_up(), &logits[split..], after)
    }

    /// The token of `list` with which the weights, summed from the best one on, reach `missing`; the last one if none
    /// does. Reorders the list.
    fn reaching(&self, mut list: &mut [Rank], mut missing: f64) -> Option<Rank> {
        let (mut logits, mut weights) = ([0.0; BLOCK], [0.0; BLOCK]);
        let mut weigh = |ranks: &[Rank], weights: &mut [f32; BLOCK]| {
            logits.iter_mut().zip(ranks).for_each(|(logit, rank)| *logit = rank.logit());
            let (logits, weights) = (&logits[..ranks.len()], &mut weights[..ranks.len()]);
            logits::weigh(self.row.isa, self.weighing, f32::NEG_INFINITY, logits, weights)
        };
        while list.len() > SHORT {
            let middle = list.len() / 2;
            list.select_nth_unstable(middle);
            let (better, rest) = list.split_at_mut(middle);
            let mass: f64 = better.chunks(BLOCK).map(|ranks| weigh(ranks, &mut weights)).sum();
            if mass >= missing {
                list = better;
            } else {
                missing -= mass;
                list = rest;
            }
        }
        list.sort_unstable();
        weigh(list, &mut weights);
        let mut mass = 0.0;
        let reaches = |(_, weight): &(&Rank, &f32)| {
            mass += f64::from(**weight);
            mass >= missing
        };
        let found = list.iter().zip(&weights).find(reaches).map(|(rank, _)| *rank);
        found.or(list.last().copied())
    }
}
