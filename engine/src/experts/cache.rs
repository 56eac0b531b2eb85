//! The books of the expert slots: which slot holds which expert, and which is given up next. No I/O, no weights, no
//! locks.
//!
//! One pool of slots serves all layers. [`SlotCache::acquire`] finds an expert's slot or gives it one, and pins it
//! until [`SlotCache::release`]; a pinned slot is never given up. Otherwise the expert goes whose last use in decode
//! is longest ago, with two corrections:
//!
//! - *Admission.* Each expert has a count of its uses in decode, which ages and outlives its eviction. A newcomer that
//!   is rarer than the one it replaces is the next to go; one that is as frequent stays as if it were always there.
//! - *Scans.* A prompt or a scored text uses nearly every expert once and says little about what decode needs. Its
//!   accesses move nothing and count nothing, and what they bring in is the next to go.
//!
//! Invariants:
//! - An expert is in at most one slot, and a slot holds at most one expert.
//! - A slot is in exactly one of three places: free (empty and unpinned), in the recency list (it holds an expert), or
//!   pinned outside of the list. A scan's pin leaves the slot in the list, so that it keeps its place there; an eviction
//!   that comes across it takes it out, and on release it comes back to the same end. So each pin is passed over at
//!   most once, and every operation takes constant time on average.

#[cfg(test)]
mod tests;

use crate::{Error, Result, recency::Recency};

/// What one use adds to an expert's count, so large that old counts differ after some halvings.
const USE: u32 = 256;

/// Uses per expert, on average over all, after which every count is halved. On made-up traces (`cache_simulator`) any
/// choice from 3 to 60 gives the same hit rate within 2 points; more loses where topics change, less with batches.
const ROUND_USES: u64 = 10;

/// A routed expert of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertId {
    /// Its layer, counting those with routed experts from 0.
    pub layer: u32,
    /// Its number within the layer.
    pub expert: u32,
}

/// What an expert is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// A step that decodes: what it uses will likely be used again.
    Decode,
    /// Prefill or scoring, which goes through the experts in order.
    Scan,
}

/// A slot that is pinned for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acquired {
    /// The slot.
    pub slot: usize,
    /// Whether the slot was already given to the expert. If not, the caller reads its weights into it.
    pub hit: bool,
}

/// Accesses of one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerCounters {
    /// Those that found the expert in a slot.
    pub hits: u64,
    /// Those that gave it one.
    pub misses: u64,
}

/// Accesses since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Hits and misses by layer.
    pub layers: Vec<LayerCounters>,
    /// Experts that lost their slot to another.
    pub evictions: u64,
}

impl Counters {
    /// Accesses that found the expert in a slot.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.layers.iter().map(|layer| layer.hits).sum()
    }

    /// Accesses that gave the expert a slot.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.layers.iter().map(|layer| layer.misses).sum()
    }
}

/// A count that ages: `count` as it stood in round `round`, and half of it in each round after.
#[derive(Debug, Clone, Copy, Default)]
struct Frequency {
    count: u32,
    round: u64,
}

impl Frequency {
    fn in_round(self, round: u64) -> u32 {
        u32::try_from(round - self.round).ok().and_then(|rounds| self.count.checked_shr(rounds)).unwrap_or(0)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Expert {
    slot: Option<u32>,
    frequency: Frequency,
}

/// The end of the recency list to which a slot comes back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum End {
    #[default]
    Oldest,
    Newest,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The index of the expert that it holds.
    expert: Option<usize>,
    pins: u32,
    listed: bool,
    /// Where it goes on the last release if it is not in the list.
    returns_to: End,
}

/// The books of all expert slots.
#[derive(Debug)]
pub struct SlotCache {
    /// The index of each layer's first expert in `experts`, and last the number of all experts.
    first_expert: Vec<usize>,
    experts: Vec<Expert>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    recency: Recency,
    /// Accesses of [`Lane::Decode`]: the clock by which counts age.
    uses: u64,
    counters: Counters,
}

impl SlotCache {
    /// Books of `slots` free slots for a model whose layers have so many routed experts each.
    #[must_use]
    pub fn new(slots: usize, experts_per_layer: &[usize]) -> Self {
        let ids = 0..u32::try_from(slots).unwrap_or(u32::MAX);
        let mut first_expert = vec![0];
        first_expert.extend(experts_per_layer.iter().scan(0, |end, experts| {
            *end += experts;
            Some(*end)
        }));
        Self {
            first_expert,
            experts: vec![Expert::default(); experts_per_layer.iter().sum()],
            slots: vec![Slot::default(); ids.len()],
            free: ids.clone().rev().collect(),
            recency: Recency::new(ids.len()),
            uses: 0,
            counters: Counters { layers: vec![LayerCounters::default(); experts_per_layer.len()], evictions: 0 },
        }
    }

    /// Finds an expert's slot or gives it one, and pins it until [`release`](Self::release). Nothing, and nothing
    /// counted, if every slot is pinned: release some and ask again.
    pub fn acquire(&mut self, id: ExpertId, lane: Lane) -> Option<Acquired> {
        let index = self.index(id);
        let held = self.experts[index].slot;
        let hit = held.is_some();
        let (slot, evicted) = match held {
            Some(slot) => (slot, None),
            None => self.take_slot()?,
        };
        let layer = &mut self.counters.layers[id.layer as usize];
        if hit {
            layer.hits += 1;
        } else {
            layer.misses += 1;
            self.experts[index].slot = Some(slot);
            self.slots[slot as usize] = Slot { expert: Some(index), ..Slot::default() };
        }
        if lane == Lane::Decode {
            self.count_use(index);
            self.unlist(slot);
            let rarer = evicted.is_some_and(|evicted| self.frequency(index) < self.frequency(evicted));
            self.slots[slot as usize].returns_to = if rarer { End::Oldest } else { End::Newest };
        }
        self.slots[slot as usize].pins += 1;
        Some(Acquired { slot: slot as usize, hit })
    }

    /// Takes back one pin of a slot.
    pub fn release(&mut self, slot: usize) {
        let entry = &mut self.slots[slot];
        debug_assert!(entry.pins > 0, "slot {slot} is released but nobody pins it");
        entry.pins = entry.pins.saturating_sub(1);
        if entry.pins > 0 || entry.listed {
            return;
        }
        entry.listed = entry.expert.is_some();
        match (entry.expert, entry.returns_to) {
            (None, _) => self.free.push(slot as u32),
            (Some(_), End::Oldest) => self.recency.push_oldest(slot as u32),
            (Some(_), End::Newest) => self.recency.push_newest(slot as u32),
        }
    }

    /// Empties a pinned slot because its weights could not be read: its expert is missing again at once, and the slot
    /// is free after its last release. Those who share it may each say so.
    pub fn discard(&mut self, slot: usize) {
        debug_assert!(self.slots[slot].pins > 0, "slot {slot} is discarded but nobody pins it");
        self.unlist(slot as u32);
        if let Some(index) = self.slots[slot].expert.take() {
            self.experts[index].slot = None;
        }
    }

    /// Whether an expert has a slot.
    #[must_use]
    pub fn contains(&self, id: ExpertId) -> bool {
        self.experts[self.index(id)].slot.is_some()
    }

    /// Accesses since the start.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// How often decode used each expert, aged, as `[layer][expert]`: what [`seed`](Self::seed) takes at the next start.
    #[must_use]
    pub fn profile(&self) -> Vec<Vec<u32>> {
        let layer = |range: &[usize]| (range[0]..range[1]).map(|index| self.frequency(index)).collect();
        self.first_expert.windows(2).map(layer).collect()
    }

    /// Sets the counts of all experts.
    ///
    /// # Errors
    /// If `profile` is of a model with other layers or numbers of experts.
    pub fn seed(&mut self, profile: &[Vec<u32>]) -> Result<()> {
        let expected: Vec<usize> = self.first_expert.windows(2).map(|range| range[1] - range[0]).collect();
        let found: Vec<usize> = profile.iter().map(Vec::len).collect();
        if found != expected {
            return Err(Error::Shape { what: "a routing profile's experts by layer".into(), expected, found });
        }
        let round = self.round();
        for (expert, &count) in self.experts.iter_mut().zip(profile.iter().flatten()) {
            expert.frequency = Frequency { count, round };
        }
        Ok(())
    }

    fn index(&self, id: ExpertId) -> usize {
        self.first_expert[id.layer as usize] + id.expert as usize
    }

    /// Counts age by the uses of all experts together, not by steps: a step of a large batch tells more.
    fn round(&self) -> u64 {
        self.uses / (ROUND_USES * self.experts.len() as u64)
    }

    fn frequency(&self, index: usize) -> u32 {
        self.experts[index].frequency.in_round(self.round())
    }

    fn count_use(&mut self, index: usize) {
        self.uses += 1;
        let count = self.frequency(index).saturating_add(USE);
        self.experts[index].frequency = Frequency { count, round: self.round() };
    }

    /// An unpinned slot outside of the list and the expert that lost it, if one did.
    fn take_slot(&mut self) -> Option<(u32, Option<usize>)> {
        if let Some(slot) = self.free.pop() {
            return Some((slot, None));
        }
        while let Some(slot) = self.recency.oldest() {
            self.unlist(slot);
            let entry = &mut self.slots[slot as usize];
            if entry.pins > 0 {
                entry.returns_to = End::Oldest;
                continue;
            }
            let evicted = entry.expert.take();
            if let Some(index) = evicted {
                self.experts[index].slot = None;
                self.counters.evictions += 1;
            }
            return Some((slot, evicted));
        }
        None
    }

    fn unlist(&mut self, slot: u32) {
        if std::mem::take(&mut self.slots[slot as usize].listed) {
            self.recency.remove(slot);
        }
    }
}
