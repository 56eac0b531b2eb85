//! The books of the expert slots: which slot holds which expert, and which is given up next. No I/O, no weights, no
//! locks.
//!
//! One pool of slots serves all layers. A layer of a step begins with [`SlotCache::begin`]; [`SlotCache::acquire`] then
//! finds an expert's slot or gives it one, and pins it until [`SlotCache::release`]; a pinned slot is never given up.
//! Otherwise the expert goes whose next use in decode is expected last: layers take turns, so one of the layer just
//! computed is a whole step away, and one that decode uses in every fourth step is three steps further. How often it is
//! used is known of every expert, in a slot or not, so a newcomer that is rarely used goes before what stood there
//! before it: no other admission is needed, and a step that wants more experts than there are slots keeps those that it
//! has instead of chasing through all.
//!
//! A scan (a prompt or a scored text) uses nearly every expert once and says little about what decode needs. Its
//! accesses count nothing, and what they bring in is the next to go. One that goes layer by layer comes back to a layer for
//! each part of its tokens, so the experts of that layer and of the next one stay before others, and of the others those of
//! the layer just done go first: they are wanted last.
//!
//! Invariants:
//! - An expert is in at most one slot, and a slot holds at most one expert.
//! - A slot is free exactly if it is empty and unpinned.
//! - Every operation takes constant time, but for those that go through a layer's experts or all of them: the expert
//!   that goes is the best of a random sample. Drawn badly, that costs a read, never a token.

mod rate;
#[cfg(test)]
mod tests;

use std::ops::Range;

use rate::Rate;

use crate::{Error, Result};

/// Slots that are looked at for the one to give up. On made-up traces (`cache_simulator`) looking at all gains half a
/// point of hit rate, looking at 16 loses one to three.
const SAMPLE: usize = 64;

/// Uses per step above which an expert of the next layer is read ahead: more likely needed than not.
const AHEAD_RATE: f32 = 0.5;

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
    /// Prefill, which goes through the experts in order.
    Scan,
    /// Scoring layer by layer: one part of the tokens after the other uses a layer's experts, then comes the next layer.
    LayerMajor,
}

/// Which experts of a layer that comes next are read before it says what it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ahead<'a> {
    /// All, for a scan.
    All,
    /// Those that decode uses more often than not, most used first.
    Frequent,
    /// These, which decode will likely use, in this order.
    Predicted(&'a [usize]),
}

/// A slot that is pinned for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acquired {
    /// The slot.
    pub slot: usize,
    /// Whether the caller must see to it that the expert's weights are read into it.
    pub is_new: bool,
}

/// Accesses of one layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerCounters {
    /// Those that found the expert in a slot.
    pub hits: u64,
    /// Those for which it was read, when it was wanted or ahead of that.
    pub misses: u64,
}

/// Accesses since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    /// Hits and misses by layer.
    pub layers: Vec<LayerCounters>,
    /// Experts that lost their slot to another.
    pub evictions: u64,
    /// Misses whose expert had been read ahead.
    pub ahead_used: u64,
    /// Experts that were read ahead and lost their slot before they were used.
    pub ahead_wasted: u64,
}

impl Counters {
    /// Accesses that found the expert in a slot.
    #[must_use]
    pub fn hits(&self) -> u64 {
        self.layers.iter().map(|layer| layer.hits).sum()
    }

    /// Accesses for which the expert was read.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.layers.iter().map(|layer| layer.misses).sum()
    }
}

#[derive(Debug, Clone, Copy)]
struct Expert {
    layer: u32,
    slot: Option<u32>,
    rate: Rate,
    /// The value of `begun` when it was wanted last, until it was acquired; one more if it was predicted then.
    wanted_in: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// The index of the expert that it holds.
    expert: Option<usize>,
    pins: u32,
    /// A scan brought its expert in, and decode has not used it.
    scanned: bool,
    /// It stands in the stack of those that scans brought in, rightly or not.
    stacked: bool,
    /// Its expert was read ahead, and nobody has used it.
    ahead: bool,
}

/// The books of all expert slots.
#[derive(Debug)]
pub struct SlotCache {
    /// The index of each layer's first expert in `experts`, and last the number of all experts.
    first_expert: Vec<usize>,
    experts: Vec<Expert>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots that scans brought in, the last one on top; those that are no longer are passed over.
    scanned: Vec<u32>,
    /// Steps of decode that each layer has seen: the clock of its experts' rates.
    steps: Vec<u32>,
    /// The layer that is being computed, and for whom.
    layer: u32,
    lane: Lane,
    /// Twice how often [`SlotCache::begin`] was called: a number between is what is predicted for the next time.
    begun: u64,
    /// Slots with a pin.
    pinned: usize,
    random: u64,
    counters: Counters,
}

impl SlotCache {
    /// Books of `slots` free slots for a model whose layers have so many routed experts each.
    #[must_use]
    pub fn new(slots: usize, experts_per_layer: &[usize]) -> Self {
        let ids = 0..u32::try_from(slots).unwrap_or(u32::MAX);
        let mut first_expert = vec![0];
        let mut experts = Vec::new();
        for (layer, &count) in experts_per_layer.iter().enumerate() {
            let expert = Expert { layer: layer as u32, slot: None, rate: Rate::default(), wanted_in: 0 };
            experts.extend(std::iter::repeat_n(expert, count));
            first_expert.push(experts.len());
        }
        let layers = vec![LayerCounters::default(); experts_per_layer.len()];
        Self {
            first_expert,
            experts,
            slots: vec![Slot::default(); ids.len()],
            free: ids.rev().collect(),
            scanned: Vec::new(),
            steps: vec![0; experts_per_layer.len()],
            layer: 0,
            lane: Lane::Decode,
            begun: 0,
            pinned: 0,
            random: 1,
            counters: Counters { layers, ..Counters::default() },
        }
    }

    /// A step comes to a layer, and wants these experts of it.
    pub fn begin(&mut self, layer: u32, experts: &[usize], lane: Lane) {
        self.layer = layer;
        self.lane = lane;
        self.begun += 2;
        let step = &mut self.steps[layer as usize];
        if lane == Lane::Decode {
            *step = step.saturating_add(1);
        }
        for &expert in experts {
            let expert = &mut self.experts[self.first_expert[layer as usize] + expert];
            expert.wanted_in = self.begun;
            if lane == Lane::Decode {
                expert.rate.count_use(*step);
            }
        }
    }

    /// Finds an expert's slot or gives it one, and pins it until [`release`](Self::release). Nothing, and nothing
    /// counted, if every slot is pinned: release some and ask again.
    pub fn acquire(&mut self, id: ExpertId, lane: Lane) -> Option<Acquired> {
        let index = self.index(id);
        let held = self.experts[index].slot;
        let slot = match held {
            Some(slot) => slot,
            None => {
                let slot = self.take_slot(None)?;
                self.give(slot, index, lane);
                slot
            }
        };
        self.experts[index].wanted_in = 0;
        self.pin(slot);
        let entry = &mut self.slots[slot as usize];
        if lane == Lane::Decode {
            entry.scanned = false;
        }
        let was_ahead = std::mem::take(&mut entry.ahead);
        let layer = &mut self.counters.layers[id.layer as usize];
        if held.is_some() && !was_ahead {
            layer.hits += 1;
        } else {
            layer.misses += 1;
            self.counters.ahead_used += u64::from(was_ahead);
        }
        Some(Acquired { slot: slot as usize, is_new: held.is_none() })
    }

    /// Takes back one pin of a slot.
    pub fn release(&mut self, slot: usize) {
        let entry = &mut self.slots[slot];
        debug_assert!(entry.pins > 0, "slot {slot} is released but nobody pins it");
        entry.pins = entry.pins.saturating_sub(1);
        if entry.pins > 0 {
            return;
        }
        self.pinned -= 1;
        if entry.expert.is_none() {
            self.free.push(slot as u32);
        } else if entry.scanned && !std::mem::replace(&mut entry.stacked, true) {
            self.scanned.push(slot as u32);
        }
    }

    /// Empties a pinned slot because its weights could not be read, or are not wanted any more: its expert is missing
    /// again at once, and the slot is free after its last release. Those who share it may each say so.
    pub fn discard(&mut self, slot: usize) {
        debug_assert!(self.slots[slot].pins > 0, "slot {slot} is discarded but nobody pins it");
        let entry = &mut self.slots[slot];
        (entry.scanned, entry.ahead) = (false, false);
        if let Some(index) = entry.expert.take() {
            self.experts[index].slot = None;
        }
    }

    /// Experts of the layer that comes next that have no slot and should be read before it says what it wants, the most
    /// urgent first.
    pub fn ahead(&mut self, layer: u32, which: Ahead<'_>) -> Vec<ExpertId> {
        let first = self.first_expert[layer as usize];
        let all = first..self.first_expert[layer as usize + 1];
        let mut wanted: Vec<usize> = match which {
            Ahead::All => all.collect(),
            Ahead::Frequent => self.used_above(AHEAD_RATE, all),
            Ahead::Predicted(experts) => {
                let predicted: Vec<usize> = experts.iter().map(|expert| first + expert).collect();
                // Those that have a slot keep it until that layer has come.
                predicted.iter().for_each(|&index| self.experts[index].wanted_in = self.begun + 1);
                predicted
            }
        };
        wanted.retain(|&index| self.experts[index].slot.is_none());
        wanted.into_iter().map(|index| self.id(index)).collect()
    }

    /// Gives an expert that is wanted soon a slot, in decode and layer by layer only if what it displaces is wanted later;
    /// pinned until its weights are there. None: it has one, or there is none for it.
    pub fn take_ahead(&mut self, id: ExpertId, lane: Lane) -> Option<usize> {
        let index = self.index(id);
        let slot = match lane {
            Lane::Decode => {
                let no_sooner = Some(self.steps_to_use(index));
                self.place(index, lane, |cache| cache.take_slot(no_sooner))
            }
            Lane::Scan => self.place(index, lane, |cache| cache.take_slot(None)),
            Lane::LayerMajor => self.place(index, lane, Self::take_spare),
        }?;
        self.slots[slot].ahead = true;
        Some(slot)
    }

    /// At most `most` experts that decode is known to use, most used first.
    #[must_use]
    pub fn most_used(&self, most: usize) -> Vec<ExpertId> {
        let used = self.used_above(0.0, 0..self.experts.len());
        used.into_iter().take(most).map(|index| self.id(index)).collect()
    }

    /// Gives an expert a slot that holds nothing, or what a scan left, before anybody wants it; pinned until its weights are
    /// there. None: it has one, or there is none for it.
    pub fn preload(&mut self, id: ExpertId) -> Option<usize> {
        self.place(self.index(id), Lane::Decode, Self::take_spare)
    }

    /// Slots that may be given away.
    #[must_use]
    pub fn unpinned(&self) -> usize {
        self.slots.len() - self.pinned
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

    /// How often decode uses each expert, in uses per 65,536 steps, as `[layer][expert]`: what [`seed`](Self::seed)
    /// takes at the next start.
    #[must_use]
    pub fn profile(&self) -> Vec<Vec<u32>> {
        let of = |index: usize| self.experts[index].rate.lasting(self.steps[self.experts[index].layer as usize]);
        let layer = |range: &[usize]| (range[0]..range[1]).map(|index| (of(index) * PROFILE_STEPS) as u32).collect();
        self.first_expert.windows(2).map(layer).collect()
    }

    /// Sets how often decode uses each expert.
    ///
    /// # Errors
    /// If `profile` is of a model with other layers or numbers of experts.
    pub fn seed(&mut self, profile: &[Vec<u32>]) -> Result<()> {
        let expected: Vec<usize> = self.first_expert.windows(2).map(|range| range[1] - range[0]).collect();
        let found: Vec<usize> = profile.iter().map(Vec::len).collect();
        if found != expected {
            return Err(Error::Shape { what: "a routing profile's experts by layer".into(), expected, found });
        }
        for (expert, &uses) in self.experts.iter_mut().zip(profile.iter().flatten()) {
            expert.rate = Rate::known(uses as f32 / PROFILE_STEPS, self.steps[expert.layer as usize]);
        }
        Ok(())
    }

    fn index(&self, id: ExpertId) -> usize {
        self.first_expert[id.layer as usize] + id.expert as usize
    }

    fn id(&self, index: usize) -> ExpertId {
        let layer = self.experts[index].layer;
        ExpertId { layer, expert: (index - self.first_expert[layer as usize]) as u32 }
    }

    /// Those of `indices` that decode uses more often than `least`, most used first.
    fn used_above(&self, least: f32, indices: Range<usize>) -> Vec<usize> {
        let rates = indices.map(|index| (self.rate(index), index));
        let mut used: Vec<_> = rates.filter(|(rate, _)| *rate > least).collect();
        used.sort_by(|(one, _), (other, _)| other.total_cmp(one));
        used.into_iter().map(|(_, index)| index).collect()
    }

    /// Whether the layer that is being computed wants an expert and has not acquired it, or the next one is predicted to.
    fn is_wanted(&self, index: usize) -> bool {
        self.begun > 0 && self.experts[index].wanted_in >= self.begun
    }

    /// Uses per step of decode.
    fn rate(&self, index: usize) -> f32 {
        let expert = &self.experts[index];
        expert.rate.at(self.steps[expert.layer as usize])
    }

    /// Whether tokens that go layer by layer are at its layer, or come to it next.
    fn is_at_hand(&self, index: usize) -> bool {
        self.lane == Lane::LayerMajor && (self.layer..=self.layer + 1).contains(&self.experts[index].layer)
    }

    /// Steps until decode is expected to use an expert: the way to its layer, and the steps in which it is not used.
    fn steps_to_use(&self, index: usize) -> f32 {
        if self.is_wanted(index) {
            return 0.0;
        }
        let expert = &self.experts[index];
        let layers = self.steps.len() as u32;
        let way = (expert.layer + layers - self.layer - 1) % layers + 1;
        way as f32 / layers as f32 + 1.0 / self.rate(index).max(f32::EPSILON) - 1.0
    }

    fn give(&mut self, slot: u32, index: usize, lane: Lane) {
        self.experts[index].slot = Some(slot);
        let entry = &mut self.slots[slot as usize];
        (entry.expert, entry.scanned, entry.ahead) = (Some(index), lane != Lane::Decode, false);
    }

    /// Gives an expert that has no slot the one that `take` takes, pinned.
    fn place(&mut self, index: usize, lane: Lane, take: impl FnOnce(&mut Self) -> Option<u32>) -> Option<usize> {
        if self.experts[index].slot.is_some() {
            return None;
        }
        let slot = take(self)?;
        self.give(slot, index, lane);
        self.pin(slot);
        Some(slot as usize)
    }

    /// An empty, unpinned slot, which is no longer free. If an expert that decode uses must go for it, its next use is later
    /// than `no_sooner`, in steps.
    fn take_slot(&mut self, no_sooner: Option<f32>) -> Option<u32> {
        if let Some(slot) = self.take_spare() {
            return Some(slot);
        }
        // What tokens that go layer by layer come back to, if there is nothing else.
        if let Some(slot) = self.pop_scanned(Self::is_wanted) {
            self.evict(slot);
            return Some(slot);
        }
        let (slot, steps) = self.latest_used()?;
        if no_sooner.is_some_and(|least| steps <= least) {
            return None;
        }
        self.evict(slot);
        Some(slot)
    }

    /// The same, if one holds nothing, or what a scan left.
    fn take_spare(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        let slot = self.pop_scanned(|cache, index| cache.is_wanted(index) || cache.is_at_hand(index))?;
        self.evict(slot);
        Some(slot)
    }

    fn evict(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        self.counters.evictions += 1;
        self.counters.ahead_wasted += u64::from(entry.ahead);
        if let Some(index) = entry.expert.take() {
            self.experts[index].slot = None;
        }
    }

    fn pin(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        self.pinned += usize::from(entry.pins == 0);
        entry.pins += 1;
    }

    /// The last one that a scan brought in and is not to be kept.
    fn pop_scanned(&mut self, keep: impl Fn(&Self, usize) -> bool) -> Option<u32> {
        let mut kept = Vec::new();
        let mut found = None;
        while let Some(slot) = self.scanned.pop() {
            let entry = self.slots[slot as usize];
            // Pinned ones come back with their release.
            let left = entry.expert.filter(|_| entry.scanned && entry.pins == 0);
            if left.is_some_and(|index| keep(self, index)) {
                kept.push(slot);
                continue;
            }
            self.slots[slot as usize].stacked = false;
            if left.is_some() {
                found = Some(slot);
                break;
            }
        }
        self.scanned.extend(kept.into_iter().rev());
        found
    }

    /// Of a sample of the unpinned slots that hold an expert, the one that is expected to be used last, and in how many
    /// steps.
    fn latest_used(&mut self) -> Option<(u32, f32)> {
        let mut latest = None;
        let count = self.slots.len();
        if count > 2 * SAMPLE {
            for _ in 0..SAMPLE {
                let slot = self.draw(count);
                self.consider(slot, &mut latest);
            }
        }
        if latest.is_none() {
            (0..count).for_each(|slot| self.consider(slot, &mut latest));
        }
        latest
    }

    fn consider(&self, slot: usize, latest: &mut Option<(u32, f32)>) {
        let entry = &self.slots[slot];
        let Some(index) = entry.expert.filter(|_| entry.pins == 0) else { return };
        let steps = self.steps_to_use(index);
        if latest.is_none_or(|(_, other)| steps > other) {
            *latest = Some((slot as u32, steps));
        }
    }

    /// A number below `end`, by xorshift (Marsaglia 2003).
    fn draw(&mut self, end: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % end as u64) as usize
    }
}

/// A profile's uses are counted over so many steps.
const PROFILE_STEPS: f32 = 65536.0;
