//! How fast a model's experts are read: by way of a store of their own, past what lies in memory.

use std::time::{Duration, Instant};

use anyhow::Result;
use cadre_engine::{
    experts::{ExpertStore, Lane},
    model::ModelInfo,
};
use cadre_models::UnopenedExperts;

use crate::plan::Reads;

/// Experts that are asked for at once, and how long each number is tried.
const TOGETHER: [usize; 5] = [1, 2, 4, 8, 16];
const TIME: Duration = Duration::from_millis(150);
/// How long experts are read before any are timed, and then the same ones again: what is read for the first time since a
/// machine began may have to come from further away, and a run reads its experts many times.
const FIRST_TIME: Duration = Duration::from_millis(500);
/// Slots to read into.
const SLOT_BYTES: usize = 256 << 20;

/// Reads experts, one group after the other, so many of them that none lies in memory.
pub struct Reader {
    store: ExpertStore,
    groups: Groups,
    /// The largest group.
    most: usize,
}

impl Reader {
    /// Opens the experts of a model, and reads those that will be timed.
    ///
    /// # Errors
    /// When memory can't be had, or the experts can't be read.
    pub fn open(experts: UnopenedExperts, info: &ModelInfo) -> Result<Self> {
        let (slot_bytes, count) = (experts.slot_bytes().max(1), experts.count());
        let most = TOGETHER.into_iter().fold(1, usize::max).min(SLOT_BYTES / slot_bytes).min(count / 2);
        let layers: Vec<usize> = info.moe_layers.iter().map(|layer| layer.experts).collect();
        let most = most.min(layers.iter().copied().max().unwrap_or(1)).max(1);
        let mut groups = Groups::new(layers);
        let store = experts.open(most)?;
        let (mut read, begun) = (0, Instant::now());
        while read < 2 * most || (begun.elapsed() < FIRST_TIME && read < count) {
            let Some((layer, group)) = groups.next(most) else { break };
            fetch(&store, layer, &group)?;
            read += group.len();
        }
        groups.end_here();
        Ok(Self { store, groups, most })
    }

    /// Times them, by how many are asked for at once.
    ///
    /// # Errors
    /// When the experts can't be read.
    pub fn measure(&mut self) -> Result<Vec<Reads>> {
        let mut all = Vec::new();
        for experts in TOGETHER.into_iter().filter(|experts| *experts <= self.most) {
            let (mut bytes, mut seconds, mut times) = (0, 0.0, 0);
            let begun = Instant::now();
            while begun.elapsed() < TIME {
                let Some((layer, group)) = self.groups.next(experts) else { break };
                let before = self.store.counters();
                let start = Instant::now();
                fetch(&self.store, layer, &group)?;
                let (took, fetched) = (start.elapsed(), self.store.counters().since(&before));
                // Those that lay in a slot tell nothing.
                if fetched.misses() == experts as u64 {
                    (bytes, seconds, times) = (bytes + fetched.fetched_bytes, seconds + took.as_secs_f64(), times + 1);
                }
            }
            if let Some(bytes) = bytes.checked_div(times) {
                all.push(Reads { experts, bytes, seconds: seconds / times as f64 });
            }
        }
        Ok(all)
    }
}

fn fetch(store: &ExpertStore, layer: usize, experts: &[usize]) -> Result<()> {
    let mut visit = store.visit(layer, experts, Lane::Scan);
    while !visit.landed()?.is_empty() {}
    Ok(())
}

/// Goes through the experts of all layers, again and again.
#[derive(Debug, Clone)]
struct Groups {
    layers: Vec<usize>,
    layer: usize,
    expert: usize,
    /// Whether it has begun anew.
    wrapped: bool,
}

impl Groups {
    /// Layers of so many experts each.
    fn new(layers: Vec<usize>) -> Self {
        Self { layers, layer: 0, expert: 0, wrapped: false }
    }

    /// The next so many of one layer; none if no layer has so many.
    fn next(&mut self, experts: usize) -> Option<(usize, Vec<usize>)> {
        for _ in 0..=self.layers.len() {
            let (layer, first) = (self.layer, self.expert);
            if first + experts <= *self.layers.get(layer)? {
                self.expert += experts;
                return Some((layer, (first..first + experts).collect()));
            }
            (self.layer, self.expert) = ((layer + 1) % self.layers.len(), 0);
            self.wrapped |= self.layer == 0;
        }
        None
    }

    /// Begins anew, and goes no further than it came.
    fn end_here(&mut self) {
        if !self.wrapped {
            self.layers.truncate(self.layer + 1);
            if let Some(last) = self.layers.last_mut() {
                *last = self.expert;
            }
        }
        (self.layer, self.expert) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_go_through_all_layers_and_stay_within_one() {
        let mut groups = Groups::new(vec![3, 1, 4]);
        let mut next = |experts| groups.next(experts);
        assert_eq!(next(2), Some((0, vec![0, 1])));
        assert_eq!(next(2), Some((2, vec![0, 1])));
        assert_eq!(next(1), Some((2, vec![2])));
        assert_eq!(next(4), Some((2, vec![0, 1, 2, 3])));
        assert_eq!(next(1), Some((0, vec![0])));
        assert_eq!(next(5), None);
    }

    #[test]
    fn groups_go_no_further_than_they_once_came() {
        let mut groups = Groups::new(vec![3, 4, 4]);
        let taken: Vec<_> = (0..3).map(|_| groups.next(2).unwrap()).collect();
        groups.end_here();
        for group in &taken {
            assert_eq!(groups.next(2).as_ref(), Some(group));
        }
        assert_eq!(groups.next(2).as_ref(), taken.first());
        // Those that came round go on everywhere.
        let mut groups = Groups::new(vec![1, 2]);
        for _ in 0..3 {
            groups.next(2).unwrap();
        }
        groups.end_here();
        assert_eq!(groups.layers, [1, 2]);
    }
}
