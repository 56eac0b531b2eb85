//! Replays a trace against a policy. Of a layer's experts those that are there are used first, so none of them goes for another.

use std::{cmp::Reverse, collections::BTreeSet};

use cadre_engine::experts::{ExpertId, Lane, SlotCache};

use crate::trace::Trace;

/// What decides which expert goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The one used longest ago.
    Lru,
    /// The one used least often since it came in.
    Lfu,
    /// The one used least often since the start.
    LfuGhosts,
    /// What cadre does.
    SlotCache,
    /// The one whose next use in decode is furthest away: no policy can do better.
    Belady,
}

impl Policy {
    pub const ALL: [Self; 5] = [Self::Lru, Self::Lfu, Self::LfuGhosts, Self::SlotCache, Self::Belady];

    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "LRU",
            Self::Lfu => "LFU",
            Self::LfuGhosts => "LFU + ghosts",
            Self::SlotCache => "SlotCache",
            Self::Belady => "Belady",
        }
    }
}

/// A trace and how to count on it.
pub struct Replay<'a> {
    pub trace: &'a Trace,
    /// A step of more tokens is a prompt: it goes through the cache, and is not counted.
    pub decode_tokens: usize,
    /// Steps at the start that fill the cache, and are not counted.
    pub warm_up: usize,
}

/// One layer of one step, as a policy sees it.
struct Access<'a> {
    step: usize,
    layer: usize,
    experts: &'a [u32],
    lane: Lane,
}

impl Replay<'_> {
    /// The share of decode's accesses that find their expert in one of `slots` slots.
    pub fn hit_rate(&self, policy: Policy, slots: usize) -> f64 {
        let (layers, experts) = (self.trace.layers(), self.trace.experts_per_layer);
        if policy == Policy::SlotCache {
            let mut cache = SlotCache::new(slots, &vec![experts; layers]);
            return self.count(|access| slot_cache_hits(&mut cache, access));
        }
        let next_uses = if policy == Policy::Belady { self.next_uses() } else { Vec::new() };
        let mut ranked = Ranked::new(policy, slots, layers * experts);
        self.count(|access| {
            // A prompt can't help the optimum: it would go through a slot that is empty anyway.
            if policy == Policy::Belady && access.lane == Lane::Scan {
                return 0;
            }
            let next_use = |at: usize| next_uses.get(access.step).map_or(0, |layers| layers[access.layer][at]);
            let wanted = access.experts.iter().enumerate();
            let wanted = wanted.map(|(at, &expert)| (access.layer * experts + expert as usize, next_use(at)));
            ranked.hits(access.step, &wanted.collect::<Vec<_>>())
        })
    }

    fn lane(&self, tokens: usize) -> Lane {
        if tokens > self.decode_tokens { Lane::Scan } else { Lane::Decode }
    }

    fn count(&self, mut hits: impl FnMut(&Access) -> usize) -> f64 {
        let (mut hit, mut wanted) = (0, 0);
        for (step, entry) in self.trace.steps.iter().enumerate() {
            let lane = self.lane(entry.tokens);
            for (layer, experts) in entry.experts.iter().enumerate() {
                let found = hits(&Access { step, layer, experts, lane });
                if step >= self.warm_up && lane == Lane::Decode {
                    hit += found;
                    wanted += experts.len();
                }
            }
        }
        hit as f64 / wanted.max(1) as f64
    }

    /// For each step, layer and expert in it, the step in which decode uses it next.
    fn next_uses(&self) -> Vec<Vec<Vec<usize>>> {
        let never = self.trace.steps.len();
        let mut next = vec![vec![never; self.trace.experts_per_layer]; self.trace.layers()];
        let mut uses: Vec<Vec<Vec<usize>>> = Vec::with_capacity(never);
        for (step, entry) in self.trace.steps.iter().enumerate().rev() {
            let of_layer = |(next, experts): (&mut Vec<usize>, &Vec<u32>)| {
                let of_expert = |&expert: &u32| {
                    let known = next[expert as usize];
                    if self.lane(entry.tokens) == Lane::Decode {
                        next[expert as usize] = step;
                    }
                    known
                };
                experts.iter().map(of_expert).collect()
            };
            uses.push(next.iter_mut().zip(&entry.experts).map(of_layer).collect());
        }
        uses.reverse();
        uses
    }
}

/// As a visit of the engine does: those that are there are taken first, the others in ascending order.
fn slot_cache_hits(cache: &mut SlotCache, access: &Access) -> usize {
    let wanted: Vec<usize> = access.experts.iter().map(|&expert| expert as usize).collect();
    let layer = access.layer as u32;
    cache.begin(layer, &wanted, access.lane);
    let (present, missing): (Vec<_>, Vec<_>) =
        access.experts.iter().map(|&expert| ExpertId { layer, expert }).partition(|&id| cache.contains(id));
    // One by one, so that nothing but what is there is held against those that come.
    let mut held: Vec<usize> = present.iter().filter_map(|&id| Some(cache.acquire(id, access.lane)?.slot)).collect();
    for id in missing {
        if let Some(acquired) = cache.acquire(id, access.lane) {
            cache.release(acquired.slot);
        } else if let Some(slot) = held.pop() {
            cache.release(slot);
        }
    }
    held.into_iter().for_each(|slot| cache.release(slot));
    present.len()
}

/// The lowest goes first: how often, when.
type Rank = (u64, Reverse<usize>, usize);

/// A cache whose experts stand in the order of a rank.
struct Ranked {
    policy: Policy,
    slots: usize,
    order: BTreeSet<(Rank, usize)>,
    ranks: Vec<Option<Rank>>,
    uses: Vec<u64>,
}

impl Ranked {
    fn new(policy: Policy, slots: usize, experts: usize) -> Self {
        Self { policy, slots, order: BTreeSet::new(), ranks: vec![None; experts], uses: vec![0; experts] }
    }

    /// Uses experts, given with the step of their next use; how many of them were there. Those are held until the others have
    /// come, one after the other.
    fn hits(&mut self, step: usize, wanted: &[(usize, usize)]) -> usize {
        let (mut held, missing): (Vec<_>, Vec<_>) =
            wanted.iter().copied().partition(|&(expert, _)| self.ranks[expert].is_some());
        for &(expert, _) in &held {
            if let Some(rank) = self.ranks[expert] {
                self.order.remove(&(rank, expert));
            }
        }
        for &(expert, _) in &missing {
            if self.policy != Policy::LfuGhosts {
                self.uses[expert] = 0;
            }
        }
        for &(expert, _) in wanted {
            self.uses[expert] += 1;
        }
        let hits = held.len();
        for new in missing {
            if held.len() == self.slots {
                held.pop().into_iter().for_each(|kept| self.enter(step, kept));
            }
            self.shrink(self.slots - held.len() - 1);
            self.enter(step, new);
        }
        held.into_iter().for_each(|kept| self.enter(step, kept));
        hits
    }

    /// Puts an expert, given with the step of its next use, into its place in the order.
    fn enter(&mut self, step: usize, (expert, next_use): (usize, usize)) {
        let rank = match self.policy {
            Policy::Belady => (0, Reverse(next_use), step),
            Policy::Lfu | Policy::LfuGhosts => (self.uses[expert], Reverse(0), step),
            Policy::Lru | Policy::SlotCache => (0, Reverse(0), step),
        };
        self.ranks[expert] = Some(rank);
        self.order.insert((rank, expert));
    }

    fn shrink(&mut self, most: usize) {
        while self.order.len() > most {
            if let Some((_, gone)) = self.order.pop_first() {
                self.ranks[gone] = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Step;

    fn trace(steps: &[(usize, &[u32])]) -> Trace {
        let step = |&(tokens, experts): &(usize, &[u32])| Step { tokens, experts: vec![experts.to_vec()] };
        Trace { experts_per_layer: 8, steps: steps.iter().map(step).collect() }
    }

    fn hit_rates(trace: &Trace, slots: usize) -> [f64; 5] {
        let replay = Replay { trace, decode_tokens: 1, warm_up: 0 };
        Policy::ALL.map(|policy| replay.hit_rate(policy, slots))
    }

    /// 0 1 2 in turn over two slots: LRU never hits; the optimum keeps one of them, and hits every second time.
    #[test]
    fn a_cycle_longer_than_the_cache_is_lrus_worst_case() {
        let steps: Vec<(usize, &[u32])> = (0..60).map(|at| (1, [&[0][..], &[1], &[2]][at % 3])).collect();
        let [lru, _, _, _, belady] = hit_rates(&trace(&steps), 2);
        assert_eq!((lru, belady), (0.0, 29.0 / 60.0));
    }

    /// Only counts that outlive eviction tell that 0 is used more often than those that pass by.
    #[test]
    fn ghost_counters_keep_what_is_used_often() {
        let round: [&[u32]; 6] = [&[0], &[1], &[2], &[0], &[3], &[4]];
        let steps: Vec<(usize, &[u32])> = (0..60).map(|at| (1, round[at % 6])).collect();
        let [lru, lfu, ghosts, _, belady] = hit_rates(&trace(&steps), 2);
        assert_eq!((lru, lfu), (0.0, 0.0));
        assert!(ghosts > 0.25 && ghosts <= belady, "{ghosts} {belady}");
    }

    #[test]
    fn a_prompt_is_not_counted_and_flushes_lru_but_not_the_slot_cache() {
        let prompt: &[u32] = &[2, 3, 4, 5, 6, 7];
        let steps = [(1, &[0, 1][..]), (1, &[0, 1]), (9, prompt), (1, &[0, 1])];
        let [lru, .., slot_cache, belady] = hit_rates(&trace(&steps), 3);
        assert_eq!((lru, slot_cache, belady), (2.0 / 6.0, 4.0 / 6.0, 4.0 / 6.0));
    }

    #[test]
    fn no_policy_beats_the_optimum_and_every_slot_for_every_expert_always_hits() {
        let steps: Vec<Vec<u32>> = (0..200_u32).map(|at| vec![at * at % 7, 7]).collect();
        let steps: Vec<(usize, &[u32])> = steps.iter().map(|experts| (1, &experts[..])).collect();
        let trace = trace(&steps);
        for slots in 2..8 {
            let rates = hit_rates(&trace, slots);
            assert!(rates.iter().all(|&rate| rate <= rates[4]), "{slots} slots: {rates:?}");
        }
        let replay = Replay { trace: &trace, decode_tokens: 1, warm_up: 100 };
        assert!(Policy::ALL.iter().all(|&policy| replay.hit_rate(policy, 8) == 1.0));
    }
}
