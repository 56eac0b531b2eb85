//! From logits to a drawn token: temperature, min-p, top-k, top-p, the draw.
//!
//! Every token has a weight, the exponential of its tempered distance from the best one; a filter sets the weights of
//! what it drops to 0. Sums go over all ids in ascending order and in f64, so they depend on the logits alone.
//! Nothing sorts the vocabulary: top-k takes the best in one pass, top-p sorts as many of the best as it takes
//! to reach its mass.

use super::{by_rank, list_best};
use crate::request::SamplingParams;

/// Tokens that top-p sorts first, and how many times more if their mass doesn't suffice.
const FIRST_SORTED: usize = 64;
const MORE_SORTED: usize = 8;

/// The weights of one row; memory is kept from row to row.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// `[vocab]`; 0 is dropped.
    weights: Vec<f32>,
    /// The best of them, while a filter looks for its bound.
    order: Vec<u32>,
}

impl Selection {
    /// Weighs `logits`, whose highest is that of `best`, and drops what `params` drop.
    pub(super) fn weigh(&mut self, logits: &[f32], best: u32, params: &SamplingParams) {
        let highest = logits[best as usize];
        let weight = |&logit: &f32| ((logit - highest) / params.temperature).exp();
        self.weights.clear();
        self.weights.extend(logits.iter().map(weight));
        if params.min_p > 0.0 {
            self.drop_below(params.min_p);
        }
        if params.top_k > 0 {
            self.keep_top_k(logits, params.top_k as usize);
        }
        if params.top_p < 1.0 {
            self.keep_top_p(logits, params.top_p);
        }
    }

    /// The token at `uniform`, a number in `[0, 1)`, of the summed weights by ascending id.
    pub(super) fn draw(&self, uniform: f64) -> Option<u32> {
        let target = uniform * self.total();
        let mut sum = 0.0;
        let mut last = None;
        for (token, &weight) in self.weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
            sum += f64::from(weight);
            last = Some(token as u32);
            if sum > target {
                break;
            }
        }
        last
    }

    fn total(&self) -> f64 {
        self.weights.iter().map(|&weight| f64::from(weight)).sum()
    }

    /// min-p: the best token's weight is 1, so the bound is `min_p` itself.
    fn drop_below(&mut self, min_p: f32) {
        for weight in self.weights.iter_mut().filter(|weight| **weight < min_p) {
            *weight = 0.0;
        }
    }

    fn keep_top_k(&mut self, logits: &[f32], k: usize) {
        let mut order = std::mem::take(&mut self.order);
        list_best(logits, self.kept(), k, &mut order);
        if let Some(&last) = order.iter().max_by(|a, b| by_rank(logits)(a, b)) {
            self.drop_after(logits, last);
        }
        self.order = order;
    }

    /// Keeps the best tokens up to the one with which their mass reaches `top_p` of what earlier filters left.
    fn keep_top_p(&mut self, logits: &[f32], top_p: f32) {
        let goal = f64::from(top_p) * self.total();
        let mut order = std::mem::take(&mut self.order);
        let mut count = FIRST_SORTED;
        loop {
            list_best(logits, self.kept(), count, &mut order);
            order.sort_unstable_by(by_rank(logits));
            if let Some(last) = self.reaching(goal, &order) {
                self.drop_after(logits, last);
                break;
            }
            if order.len() < count {
                break; // That was all of them.
            }
            count *= MORE_SORTED;
        }
        self.order = order;
    }

    /// The token of `order` with which their weights, summed in this order, reach `goal`.
    fn reaching(&self, goal: f64, order: &[u32]) -> Option<u32> {
        let mut mass = 0.0;
        let reaches = |token: &&u32| {
            mass += f64::from(self.weights[**token as usize]);
            mass >= goal
        };
        order.iter().find(reaches).copied()
    }

    /// The tokens that no filter has dropped, ascending.
    fn kept(&self) -> impl Iterator<Item = u32> {
        self.weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0).map(|(token, _)| token as u32)
    }

    /// Drops everything that ranks after `last`.
    fn drop_after(&mut self, logits: &[f32], last: u32) {
        let rank = by_rank(logits);
        for (token, weight) in self.weights.iter_mut().enumerate() {
            if rank(&(token as u32), &last).is_gt() {
                *weight = 0.0;
            }
        }
    }
}
