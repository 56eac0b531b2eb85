use proptest::{prelude::*, sample::Index};

use super::*;

fn expert(layer: u32, expert: u32) -> ExpertId {
    ExpertId { layer, expert }
}

/// A step's way through one layer, one expert after the other; which of them were there.
fn step(cache: &mut SlotCache, layer: u32, experts: &[usize], lane: Lane) -> Vec<usize> {
    cache.begin(layer, experts, lane);
    let mut hits = Vec::new();
    // What is there is taken first, as a visit does.
    let mut order = experts.to_vec();
    order.sort_by_key(|&number| !cache.contains(expert(layer, number as u32)));
    for number in order {
        let acquired = cache.acquire(expert(layer, number as u32), lane).expect("an unpinned slot");
        cache.release(acquired.slot);
        cache.check();
        hits.extend((!acquired.is_new).then_some(number));
    }
    hits.sort_unstable();
    hits
}

fn cached(cache: &SlotCache, layer: u32, experts: u32) -> Vec<u32> {
    (0..experts).filter(|&number| cache.contains(expert(layer, number))).collect()
}

impl SlotCache {
    /// Asserts the invariants at the head of the file.
    fn check(&self) {
        for (number, slot) in self.slots.iter().enumerate() {
            let is_free = self.free.iter().filter(|&&free| free as usize == number).count();
            assert_eq!(is_free, usize::from(slot.expert.is_none() && slot.pins == 0), "slot {number}: {slot:?}");
            let stacked = self.scanned.iter().filter(|&&stacked| stacked as usize == number).count();
            assert_eq!(stacked, usize::from(slot.stacked), "slot {number}: {slot:?}");
            if let Some(index) = slot.expert {
                assert_eq!(self.experts[index].slot, Some(number as u32), "expert {index} is in slot {number}");
            }
        }
        let held = self.slots.iter().filter(|slot| slot.expert.is_some()).count();
        assert_eq!(self.experts.iter().filter(|expert| expert.slot.is_some()).count(), held);
        assert_eq!(self.pinned, self.slots.iter().filter(|slot| slot.pins > 0).count());
    }
}

#[test]
fn what_is_used_least_goes() {
    let mut cache = SlotCache::new(3, &[5]);
    for experts in [&[0, 1, 2][..], &[0, 1], &[0, 2], &[0, 2], &[3]] {
        step(&mut cache, 0, experts, Lane::Decode);
    }
    assert_eq!(cached(&cache, 0, 5), [0, 2, 3], "1 is used least");
    step(&mut cache, 0, &[4], Lane::Decode);
    assert_eq!(cached(&cache, 0, 5), [0, 2, 4], "a newcomer goes before those that are used more often");
    let counters = cache.counters();
    assert_eq!((counters.hits(), counters.misses(), counters.evictions), (6, 5, 2));
}

#[test]
fn of_equals_the_one_whose_layer_comes_last_goes() {
    let mut cache = SlotCache::new(3, &[1, 1, 1, 1]);
    for layer in [0, 1, 2, 3] {
        step(&mut cache, layer, &[0], Lane::Decode);
    }
    let held: Vec<u32> = (0..4).filter(|&layer| cache.contains(expert(layer, 0))).collect();
    assert_eq!(held, [0, 1, 3], "at layer 3, layer 2 is a whole round away");
}

/// The case in which recency keeps nothing.
#[test]
fn a_round_of_more_experts_than_slots_keeps_what_it_has() {
    let (layers, slots, rounds) = (8_u32, 6, 40);
    let mut cache = SlotCache::new(slots, &[1; 8]);
    for round in 0..rounds {
        let hits = (0..layers).filter(|&layer| step(&mut cache, layer, &[0], Lane::Decode) == [0]).count();
        assert!(round == 0 || hits >= slots - 2, "{hits} hits in round {round}");
    }
}

#[test]
fn a_slot_is_given_up_only_after_its_last_release() {
    let mut cache = SlotCache::new(1, &[2]);
    let first = cache.acquire(expert(0, 0), Lane::Decode).expect("a slot");
    let second = cache.acquire(expert(0, 0), Lane::Scan).expect("the same slot");
    assert_eq!((first.slot, first.is_new, second.slot, second.is_new), (0, true, 0, false));
    for slot in [first.slot, second.slot] {
        let before = cache.counters().clone();
        assert_eq!(cache.acquire(expert(0, 1), Lane::Decode), None);
        assert_eq!(cache.counters(), &before);
        cache.release(slot);
    }
    assert!(cache.acquire(expert(0, 1), Lane::Decode).is_some_and(|acquired| acquired.is_new));
    assert!(!cache.contains(expert(0, 0)));
}

#[test]
fn what_the_step_still_wants_goes_last() {
    let mut cache = SlotCache::new(2, &[4]);
    for _ in 0..20 {
        step(&mut cache, 0, &[0], Lane::Decode);
    }
    step(&mut cache, 0, &[1], Lane::Decode);
    assert_eq!(cached(&cache, 0, 4), [0, 1]);
    cache.begin(0, &[1, 2], Lane::Decode);
    cache.acquire(expert(0, 2), Lane::Decode).expect("a slot");
    assert_eq!(cached(&cache, 0, 4), [1, 2], "0 is used far more often, but 1 is wanted now");
}

#[test]
fn a_scan_goes_through_one_slot_and_counts_no_use() {
    let mut cache = SlotCache::new(8, &[32]);
    for _ in 0..3 {
        step(&mut cache, 0, &[0, 1, 2, 3, 4, 5, 6, 7], Lane::Decode);
    }
    step(&mut cache, 0, &[0, 2, 4, 6, 7], Lane::Decode);
    let profile = cache.profile();
    for _ in 0..3 {
        step(&mut cache, 0, &(0..32).collect::<Vec<_>>(), Lane::Scan);
    }
    assert_eq!(cache.profile(), profile);
    assert_eq!(cached(&cache, 0, 8).len(), 7, "one slot serves the whole scan");
    assert!([0, 2, 4, 6, 7].iter().all(|&number| cache.contains(expert(0, number))));
    let before = cached(&cache, 0, 8);
    step(&mut cache, 0, &[20], Lane::Decode);
    assert_eq!(cached(&cache, 0, 8), before, "the scan's slot goes first");
}

#[test]
fn what_a_scan_brought_in_and_decode_uses_stays() {
    let mut cache = SlotCache::new(2, &[8]);
    step(&mut cache, 0, &[5, 6], Lane::Scan);
    step(&mut cache, 0, &[5], Lane::Decode);
    step(&mut cache, 0, &[0, 1, 2, 3], Lane::Scan);
    assert!(cache.contains(expert(0, 5)));
}

#[test]
fn a_discarded_slot_is_missing_at_once_and_free_after_its_last_release() {
    for lane in [Lane::Decode, Lane::Scan] {
        let mut cache = SlotCache::new(2, &[3]);
        step(&mut cache, 0, &[0, 1], Lane::Decode);
        let failed = [(); 2].map(|()| cache.acquire(expert(0, 0), lane).expect("a hit").slot);
        cache.discard(failed[0]);
        cache.check();
        assert!(!cache.contains(expert(0, 0)));
        let again = cache.acquire(expert(0, 0), lane).expect("the other slot");
        assert!(again.is_new && again.slot != failed[0], "{again:?}");
        cache.discard(failed[1]);
        assert!(cache.contains(expert(0, 0)), "the second to discard the failed slot leaves the new one alone");
        assert_eq!(cache.acquire(expert(0, 2), lane), None);
        failed.iter().for_each(|&slot| cache.release(slot));
        cache.check();
        let evictions = cache.counters().evictions;
        assert_eq!(cache.acquire(expert(0, 2), lane), Some(Acquired { slot: failed[0], is_new: true }));
        assert_eq!(cache.counters().evictions, evictions, "the slot was free");
    }
}

/// Begins to read at most so many ahead: which, and their slots.
fn read_ahead(cache: &mut SlotCache, layer: u32, which: Ahead<'_>, most: usize) -> Vec<(ExpertId, usize)> {
    let lane = if which == Ahead::All { Lane::Scan } else { Lane::Decode };
    let ids = cache.ahead(layer, which).into_iter().take(most);
    ids.filter_map(|id| Some((id, cache.take_ahead(id, lane)?))).collect()
}

/// Layer 1 in the store's view: 0 is used always, 1 in most steps, 2 now and then, 3 never.
fn with_habits(slots: usize) -> SlotCache {
    let mut cache = SlotCache::new(slots, &[4, 4]);
    for round in 0..200 {
        step(&mut cache, 0, &[0], Lane::Decode);
        let mut experts = vec![0];
        experts.extend((round % 4 != 0).then_some(1));
        experts.extend((round % 8 == 0).then_some(2));
        step(&mut cache, 1, &experts, Lane::Decode);
    }
    cache
}

#[test]
fn what_decode_uses_more_often_than_not_is_read_ahead() {
    let mut cache = with_habits(1);
    step(&mut cache, 0, &[3], Lane::Decode);
    let taken = read_ahead(&mut cache, 1, Ahead::Frequent, 8);
    assert_eq!(taken, [(expert(1, 0), 0)], "the most used, into the one slot");
    assert_eq!(cache.acquire(expert(0, 0), Lane::Decode), None, "it is pinned until it is read");
    cache.release(0);
    let misses = cache.counters().misses();
    assert_eq!(step(&mut cache, 1, &[0], Lane::Decode), [0]);
    assert_eq!((cache.counters().misses(), cache.counters().ahead_used), (misses + 1, 1), "it was read for this use");
    step(&mut cache, 0, &[3], Lane::Decode);
    let taken = read_ahead(&mut cache, 1, Ahead::Frequent, 8);
    assert_eq!(taken.len(), 1);
    cache.release(0);
    step(&mut cache, 1, &[3], Lane::Decode);
    assert_eq!((cache.counters().ahead_used, cache.counters().ahead_wasted), (1, 1));
}

#[test]
fn reading_ahead_displaces_nothing_that_is_wanted_sooner() {
    let mut cache = with_habits(2);
    // Both slots hold what every step uses.
    step(&mut cache, 1, &[0], Lane::Decode);
    step(&mut cache, 0, &[0], Lane::Decode);
    step(&mut cache, 1, &[0], Lane::Decode);
    assert_eq!((cached(&cache, 0, 4), cached(&cache, 1, 4)), (vec![0], vec![0]));
    assert_eq!(
        read_ahead(&mut cache, 1, Ahead::Frequent, 8),
        [],
        "1 is wanted in three of four steps, 0 of either layer in all"
    );
    let scan = read_ahead(&mut cache, 0, Ahead::All, 1);
    assert_eq!(scan.len(), 1, "a scan wants all of a layer");
}

#[test]
fn what_is_predicted_is_read_and_keeps_its_slot() {
    let mut cache = with_habits(3);
    step(&mut cache, 0, &[3], Lane::Decode);
    assert_eq!((cached(&cache, 0, 4), cached(&cache, 1, 4)), (vec![3], vec![0, 1]));
    // 0 has a slot. 3, which nobody has used yet, takes that of the layer that has just been, and is pinned.
    let taken = read_ahead(&mut cache, 1, Ahead::Predicted(&[3, 0]), 8);
    assert_eq!((cached(&cache, 0, 4), cached(&cache, 1, 4)), (vec![], vec![0, 1, 3]));
    cache.release(taken[0].1);
    // What is predicted displaces nothing that is too.
    let taken = read_ahead(&mut cache, 1, Ahead::Predicted(&[2, 0, 3]), 8);
    assert_eq!((taken[0].0, cached(&cache, 1, 4)), (expert(1, 2), vec![0, 2, 3]));
    cache.release(taken[0].1);
    assert_eq!(read_ahead(&mut cache, 1, Ahead::Predicted(&[0, 2, 3, 1]), 8), []);
    step(&mut cache, 1, &[3], Lane::Decode);
    assert_eq!((cache.counters().ahead_used, cached(&cache, 1, 4)), (1, vec![0, 2, 3]));
}

#[test]
fn what_a_scan_left_makes_room_for_what_earlier_runs_used() {
    let mut cache = SlotCache::new(2, &[4, 4]);
    step(&mut cache, 0, &[0], Lane::Decode);
    step(&mut cache, 0, &[1], Lane::Scan);
    let slot = cache.preload(expert(1, 2)).expect("the scan's");
    assert_eq!((cached(&cache, 0, 4), cached(&cache, 1, 4), cache.unpinned()), (vec![0], vec![2], 1));
    assert_eq!(cache.preload(expert(1, 2)), None, "it has a slot");
    assert_eq!(cache.preload(expert(1, 3)), None, "nothing that decode uses goes");
    cache.release(slot);
    assert_eq!((cache.preload(expert(1, 3)), cache.unpinned()), (None, 2));
}

#[test]
fn a_profile_seeds_the_next_cache_and_must_fit_it() {
    let cache = with_habits(3);
    let mut next = SlotCache::new(3, &[4, 4]);
    next.seed(&cache.profile()).expect("the same model");
    let (before, after) = (cache.profile(), next.profile());
    assert!(before.iter().flatten().zip(after.iter().flatten()).all(|(one, other)| one.abs_diff(*other) <= 1));
    assert!(after[1][0] > after[1][1] && after[1][1] > after[1][2] && after[1][3] == 0, "{after:?}");
    let error = SlotCache::new(1, &[4, 5]).seed(&cache.profile()).expect_err("another model");
    assert!(error.to_string().contains("expected shape [4, 5], found [4, 4]"), "{error}");
}

proptest! {
    /// Random accesses over few slots, with several pins at a time: the books stay whole, a pinned slot stays its expert's,
    /// and nobody goes who is expected back sooner than another.
    #[test]
    fn the_books_stay_whole(
        slots in 1_usize..7,
        accesses in prop::collection::vec((0_usize..9, 0_usize..4, 0_usize..4, any::<Index>()), 1..300),
    ) {
        let mut cache = SlotCache::new(slots, &[4, 5]);
        let mut pinned: Vec<(ExpertId, usize)> = Vec::new();
        for (number, kind, releases, which) in accesses {
            let id = if number < 4 { expert(0, number as u32) } else { expert(1, number as u32 - 4) };
            let lane = if kind == 0 { Lane::Scan } else { Lane::Decode };
            if kind == 3 {
                let which = [Ahead::Frequent, Ahead::All, Ahead::Predicted(&[2, 0, 3])][number % 3];
                pinned.extend(read_ahead(&mut cache, id.layer, which, 2));
            } else {
                cache.begin(id.layer, &[id.expert as usize], lane);
                let idle: Vec<(usize, f32)> = (0..slots)
                    .filter(|&slot| cache.slots[slot].pins == 0)
                    .filter_map(|slot| Some((slot, cache.steps_to_use(cache.slots[slot].expert?))))
                    .collect();
                let nothing_scanned = !cache.slots.iter().any(|slot| slot.scanned);
                let evictions = cache.counters().evictions;
                let acquired = cache.acquire(id, lane);
                if let Some(acquired) = acquired {
                    pinned.push((id, acquired.slot));
                    if cache.counters().evictions > evictions && nothing_scanned {
                        let gone = idle.iter().find(|(slot, _)| *slot == acquired.slot).expect("it was idle").1;
                        prop_assert!(idle.iter().all(|(_, steps)| *steps <= gone), "{idle:?}: {acquired:?}");
                    }
                } else {
                    let held: Vec<usize> = pinned.iter().map(|(_, slot)| *slot).collect();
                    prop_assert!((0..slots).all(|slot| held.contains(&slot)), "a slot was free");
                }
            }
            cache.check();
            for _ in 0..releases.min(pinned.len()) {
                let (id, slot) = pinned.swap_remove(which.index(pinned.len()));
                prop_assert_eq!(cache.slots[slot].expert, Some(cache.index(id)), "a pinned slot was given to another");
                cache.release(slot);
                cache.check();
            }
        }
    }
}
