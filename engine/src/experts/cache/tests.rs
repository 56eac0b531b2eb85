use proptest::{prelude::*, sample::Index};

use super::*;

fn expert(layer: u32, expert: u32) -> ExpertId {
    ExpertId { layer, expert }
}

/// Acquires and releases at once; whether it was a hit.
fn touch(cache: &mut SlotCache, id: ExpertId, lane: Lane) -> bool {
    let acquired = cache.acquire(id, lane).expect("an unpinned slot");
    cache.release(acquired.slot);
    cache.check();
    acquired.hit
}

fn cached(cache: &SlotCache, experts: u32) -> Vec<u32> {
    (0..experts).filter(|&number| cache.contains(expert(0, number))).collect()
}

impl SlotCache {
    /// Asserts the invariants at the head of the file.
    fn check(&self) {
        let listed = self.recency.oldest_first();
        let mut places = vec![0; self.slots.len()];
        for &slot in &listed {
            places[slot as usize] += 1;
            let entry = self.slots[slot as usize];
            assert!(entry.listed && entry.expert.is_some(), "slot {slot} stands in the list: {entry:?}");
        }
        for &slot in &self.free {
            places[slot as usize] += 1;
            let entry = self.slots[slot as usize];
            assert!(!entry.listed && entry.pins == 0 && entry.expert.is_none(), "slot {slot} is free: {entry:?}");
        }
        for (slot, entry) in self.slots.iter().enumerate() {
            let pinned_outside = entry.pins > 0 && !entry.listed;
            assert_eq!(places[slot] + i32::from(pinned_outside), 1, "slot {slot} is in {} places", places[slot]);
            if let Some(index) = entry.expert {
                assert_eq!(self.experts[index].slot, Some(slot as u32), "expert {index} is in slot {slot}");
            }
        }
        let held = self.slots.iter().filter(|slot| slot.expert.is_some()).count();
        assert_eq!(self.experts.iter().filter(|expert| expert.slot.is_some()).count(), held);
    }
}

#[test]
fn the_least_recently_used_goes() {
    let mut cache = SlotCache::new(3, &[4, 4]);
    let [a, b, c, d] = [expert(0, 0), expert(1, 0), expert(0, 3), expert(1, 3)];
    for id in [a, b, c] {
        assert!(!touch(&mut cache, id, Lane::Decode));
    }
    assert!(touch(&mut cache, a, Lane::Decode));
    assert!(!touch(&mut cache, d, Lane::Decode));
    assert_eq!([a, b, c, d].map(|id| cache.contains(id)), [true, false, true, true]);
    let layers = vec![LayerCounters { hits: 1, misses: 2 }, LayerCounters { hits: 0, misses: 2 }];
    assert_eq!(cache.counters(), &Counters { layers, evictions: 1 });
    assert_eq!((cache.counters().hits(), cache.counters().misses()), (1, 4));
}

#[test]
fn a_slot_is_given_up_only_after_its_last_release() {
    let mut cache = SlotCache::new(1, &[2]);
    let first = cache.acquire(expert(0, 0), Lane::Decode).expect("a slot");
    let second = cache.acquire(expert(0, 0), Lane::Scan).expect("the same slot");
    assert_eq!((first.slot, first.hit, second.slot, second.hit), (0, false, 0, true));
    for slot in [first.slot, second.slot] {
        let before = cache.counters().clone();
        assert_eq!(cache.acquire(expert(0, 1), Lane::Decode), None);
        assert_eq!((cache.counters(), cache.profile()), (&before, vec![vec![USE, 0]]));
        cache.release(slot);
    }
    assert!(!touch(&mut cache, expert(0, 1), Lane::Decode));
    assert!(!cache.contains(expert(0, 0)));
}

#[test]
fn a_newcomer_rarer_than_what_it_replaces_is_the_next_to_go() {
    let mut cache = SlotCache::new(2, &[4]);
    for number in [0, 0, 1, 1, 2] {
        touch(&mut cache, expert(0, number), Lane::Decode);
    }
    assert_eq!(cached(&cache, 4), [1, 2], "0 was used longest ago, so 2 took its slot");
    touch(&mut cache, expert(0, 3), Lane::Decode);
    assert_eq!(cached(&cache, 4), [1, 3], "2 is rarer than 0 was, so it went before 1");
}

#[test]
fn a_count_outlives_the_eviction() {
    let mut cache = SlotCache::new(1, &[3]);
    for number in [0, 0, 1] {
        touch(&mut cache, expert(0, number), Lane::Decode);
    }
    assert!(!cache.contains(expert(0, 0)));
    assert_eq!(cache.profile(), [[2 * USE, USE, 0]]);
}

#[test]
fn counts_halve_with_the_uses_of_all_experts() {
    let mut cache = SlotCache::new(2, &[1, 1]);
    for _ in 1..2 * ROUND_USES {
        touch(&mut cache, expert(0, 0), Lane::Decode);
    }
    let uses = 2 * ROUND_USES as u32 - 1;
    assert_eq!(cache.profile(), [[uses * USE], [0]]);
    touch(&mut cache, expert(1, 0), Lane::Decode);
    assert_eq!(cache.profile(), [[uses * USE / 2], [USE]]);
}

#[test]
fn a_scan_flushes_only_the_slots_it_pins_at_once_and_counts_no_use() {
    let mut cache = SlotCache::new(8, &[32]);
    for number in 0..8 {
        touch(&mut cache, expert(0, number), Lane::Decode);
    }
    let profile = cache.profile();
    for _ in 0..3 {
        for number in 0..32 {
            touch(&mut cache, expert(0, number), Lane::Scan);
        }
    }
    assert_eq!(cache.profile(), profile);
    assert_eq!(cached(&cache, 8), [1, 2, 3, 4, 5, 6, 7], "one slot serves the whole scan");
    for number in 20..23 {
        touch(&mut cache, expert(0, number), Lane::Decode);
    }
    assert_eq!(cached(&cache, 8), [3, 4, 5, 6, 7], "the scan's slot goes first, then what decode used longest ago");
}

#[test]
fn what_a_scan_pins_keeps_its_place_or_comes_back_to_the_end_it_had() {
    let mut cache = SlotCache::new(3, &[6]);
    for number in 0..3 {
        touch(&mut cache, expert(0, number), Lane::Decode);
    }
    let scanned = [0, 1].map(|number| cache.acquire(expert(0, number), Lane::Scan).expect("a hit").slot);
    touch(&mut cache, expert(0, 3), Lane::Decode);
    assert_eq!(cached(&cache, 6), [0, 1, 3], "the unpinned one went, though it was used last");
    scanned.iter().for_each(|&slot| cache.release(slot));
    touch(&mut cache, expert(0, 4), Lane::Decode);
    assert!(cache.contains(expert(0, 3)), "decode used 3 after 0 and 1");
}

#[test]
fn a_discarded_slot_is_missing_at_once_and_free_after_its_last_release() {
    for lane in [Lane::Decode, Lane::Scan] {
        let mut cache = SlotCache::new(2, &[3]);
        touch(&mut cache, expert(0, 0), Lane::Decode);
        touch(&mut cache, expert(0, 1), Lane::Decode);
        let failed = [(); 2].map(|()| cache.acquire(expert(0, 0), lane).expect("a hit").slot);
        cache.discard(failed[0]);
        cache.check();
        assert!(!cache.contains(expert(0, 0)));
        let again = cache.acquire(expert(0, 0), lane).expect("the other slot");
        assert!(!again.hit && again.slot != failed[0], "{again:?}");
        cache.discard(failed[1]);
        assert!(cache.contains(expert(0, 0)), "the second to discard the failed slot leaves the new one alone");
        assert_eq!(cache.acquire(expert(0, 2), lane), None);
        failed.iter().for_each(|&slot| cache.release(slot));
        cache.check();
        let evictions = cache.counters().evictions;
        assert_eq!(cache.acquire(expert(0, 2), lane), Some(Acquired { slot: failed[0], hit: false }));
        assert_eq!(cache.counters().evictions, evictions, "the slot was free");
    }
}

#[test]
fn a_profile_seeds_the_next_cache_and_must_fit_it() {
    let mut cache = SlotCache::new(1, &[2, 1]);
    for id in [expert(0, 1), expert(0, 1), expert(1, 0)] {
        touch(&mut cache, id, Lane::Decode);
    }
    let mut next = SlotCache::new(1, &[2, 1]);
    next.seed(&cache.profile()).expect("the same model");
    assert_eq!(next.profile(), cache.profile());
    let error = SlotCache::new(1, &[2, 2]).seed(&cache.profile()).expect_err("another model");
    assert!(error.to_string().contains("expected shape [2, 2], found [2, 1]"), "{error}");
}

/// The same rules in the plainest form: one list in order of use, counts halved one by one.
#[derive(Default)]
struct Naive {
    capacity: usize,
    /// The list of experts, the next to go first.
    order: Vec<usize>,
    /// What is pinned outside of `order`, and the end to which it comes back.
    outside: Vec<(usize, End)>,
    pins: Vec<u32>,
    counts: Vec<u32>,
    uses: u64,
}

impl Naive {
    fn acquire(&mut self, expert: usize, lane: Lane) -> Option<bool> {
        let outside = self.outside.iter().position(|&(held, _)| held == expert);
        let hit = outside.is_some() || self.order.contains(&expert);
        let mut evicted = None;
        if !hit && self.order.len() + self.outside.len() == self.capacity {
            while evicted.is_none() {
                let oldest = *self.order.first()?;
                self.order.remove(0);
                if self.pins[oldest] > 0 {
                    self.outside.push((oldest, End::Oldest));
                } else {
                    evicted = Some(oldest);
                }
            }
        }
        if lane == Lane::Decode {
            self.uses += 1;
            if self.uses.is_multiple_of(ROUND_USES * self.counts.len() as u64) {
                self.counts.iter_mut().for_each(|count| *count /= 2);
            }
            self.counts[expert] += USE;
        }
        let rarer = evicted.is_some_and(|evicted| self.counts[expert] < self.counts[evicted]);
        if lane == Lane::Decode || !hit {
            self.order.retain(|&held| held != expert);
            self.outside.retain(|&(held, _)| held != expert);
            let end = if lane == Lane::Scan || rarer { End::Oldest } else { End::Newest };
            self.outside.push((expert, end));
        }
        self.pins[expert] += 1;
        Some(hit)
    }

    fn release(&mut self, expert: usize) {
        self.pins[expert] -= 1;
        let outside = self.outside.iter().position(|&(held, _)| held == expert);
        if let (0, Some(at)) = (self.pins[expert], outside) {
            match self.outside.remove(at).1 {
                End::Oldest => self.order.insert(0, expert),
                End::Newest => self.order.push(expert),
            }
        }
    }
}

proptest! {
    /// Random steps over few slots, with several pins at a time: as the plain rules say, and the books stay whole.
    #[test]
    fn does_as_the_plain_rules_say(
        slots in 1_usize..7,
        accesses in prop::collection::vec((0_usize..9, any::<bool>(), 0_usize..4, any::<Index>()), 1..400),
    ) {
        let layers = [4, 5];
        let mut cache = SlotCache::new(slots, &layers);
        let mut naive = Naive { capacity: slots, pins: vec![0; 9], counts: vec![0; 9], ..Naive::default() };
        let mut pinned: Vec<(usize, usize)> = Vec::new();
        for (number, decode, releases, which) in accesses {
            let id = if number < 4 { expert(0, number as u32) } else { expert(1, number as u32 - 4) };
            let lane = if decode { Lane::Decode } else { Lane::Scan };
            let acquired = cache.acquire(id, lane);
            prop_assert_eq!(acquired.map(|acquired| acquired.hit), naive.acquire(number, lane));
            pinned.extend(acquired.map(|acquired| (number, acquired.slot)));
            cache.check();
            for _ in 0..releases.min(pinned.len()) {
                let (number, slot) = pinned.swap_remove(which.index(pinned.len()));
                prop_assert_eq!(cache.slots[slot].expert, Some(number), "a pinned slot was given to another");
                cache.release(slot);
                naive.release(number);
                cache.check();
            }
            prop_assert_eq!(cache.profile().concat(), naive.counts.clone());
            let order: Vec<_> = cache.recency.oldest_first().iter().filter_map(|&slot| cache.slots[slot as usize].expert).collect();
            prop_assert_eq!(order, naive.order.clone());
        }
    }
}
