//! A step's visit to the experts of one layer.

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use cadre_kernels::slots::SlotReader;

use super::{
    ExpertId, FetchError,
    cache::{Ahead, Lane},
    store::{Content, Missing, Shared, State},
};

/// Experts that are fetched, or were and are not yet released, at a time: enough to keep a disk busy while others
/// compute. More would displace what later steps use.
const WINDOW: usize = 16;

/// Experts of the next layer that are fetched while nothing else is.
const AHEAD: usize = 8;

/// In a scan, a layer of which so large a part is used says that the next one's experts will be too.
const SCAN_ALL: f64 = 0.75;

/// Experts of one layer that a step wants. Those that it holds stay in memory until they are released or it ends.
///
/// Those in memory are held from the start if that leaves room for others, those to be fetched follow in ascending order as
/// room is made. So whoever holds any holds the lowest that it has not released, and who releases in ascending order is
/// never left waiting. Several visits at a time may wait for each other's releases.
pub struct Visit<'a> {
    shared: &'a Arc<Shared>,
    layer: usize,
    lane: Lane,
    experts: &'a [usize],
    places: Vec<Place>,
    /// All before this one have, or had, a slot.
    next: usize,
    /// Slots held by those that were not taken at the start.
    followers: usize,
    looked_ahead: bool,
}

/// How far an expert of the visit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Waiting,
    Held { slot: usize, follower: bool, named: bool },
    Released,
}

impl<'a> Visit<'a> {
    pub(super) fn new(shared: &'a Arc<Shared>, layer: usize, experts: &'a [usize], lane: Lane) -> Self {
        let mut visit = Self {
            shared,
            layer,
            lane,
            experts,
            places: vec![Place::Waiting; experts.len()],
            next: 0,
            followers: 0,
            looked_ahead: false,
        };
        let mut state = shared.lock();
        state.cache.begin(layer as u32, experts, lane);
        // Those of them that are wanted are so now.
        state.ahead.clear();
        let layers = state.experts_per_layer.len();
        state.tally.uses(layer, layers, experts.len());
        visit.hold_present(&mut state);
        visit.follow(&mut state);
        drop(shared.give(state));
        visit
    }

    fn id(&self, index: usize) -> ExpertId {
        ExpertId { layer: self.layer as u32, expert: self.experts[index] as u32 }
    }

    /// Holds those that have a slot, but for the room that the others need.
    fn hold_present(&mut self, state: &mut State) {
        let present: Vec<usize> =
            (0..self.experts.len()).filter(|&index| state.cache.contains(self.id(index))).collect();
        let room = state.cache.unpinned().saturating_sub((self.experts.len() - present.len()).min(WINDOW));
        for index in present.into_iter().take(room) {
            self.hold(state, index, false);
        }
    }

    /// Takes as many of the others as there is room for; then the reading is free for the next layer.
    fn follow(&mut self, state: &mut State) {
        while self.next < self.experts.len() {
            if self.places[self.next] == Place::Waiting
                && (self.followers == WINDOW || !self.hold(state, self.next, true))
            {
                return;
            }
            self.next += 1;
        }
        if !std::mem::replace(&mut self.looked_ahead, true) {
            self.look_ahead(state);
        }
    }

    /// Holds one; false if there is no slot for it.
    fn hold(&mut self, state: &mut State, index: usize, follower: bool) -> bool {
        let id = self.id(index);
        let Some(acquired) = state.cache.acquire(id, self.lane) else { return false };
        if acquired.is_new {
            state.contents[acquired.slot] = Content::Coming;
            state.wanted.push_back(Missing { id, slot: acquired.slot, is_ahead: false });
        }
        self.places[index] = Place::Held { slot: acquired.slot, follower, named: false };
        self.followers += usize::from(follower);
        true
    }

    fn look_ahead(&self, state: &mut State) {
        let layers = state.experts_per_layer.len();
        let next = (self.layer + 1) % layers;
        let predicted = state.predicted.take().filter(|(layer, _)| *layer == next);
        let slots = self.shared.slots.count();
        let mut most = AHEAD.min(slots / 4);
        let which = match (self.lane, &predicted) {
            (Lane::Decode, Some((_, experts))) => Ahead::Predicted(experts),
            (Lane::Decode, None) if layers > 1 => Ahead::Frequent,
            // Whether another part of the prompt follows is not known here.
            (Lane::Scan, _)
                if next > 0 && self.experts.len() as f64 >= SCAN_ALL * state.experts_per_layer[self.layer] as f64 =>
            {
                Ahead::All
            }
            (Lane::LayerMajor, _) if next > 0 => {
                most = slots;
                Ahead::All
            }
            _ => return,
        };
        let ids = state.cache.ahead(next as u32, which);
        state.ahead.extend(ids.into_iter().take(most).map(|id| (id, self.lane)));
    }

    /// The experts, by their index in the visit, that are there and were not named before; waits until there is one. None:
    /// all have been named.
    ///
    /// # Errors
    /// When one of them can't be fetched.
    pub fn landed(&mut self) -> Result<Vec<usize>, FetchError> {
        let mut state = self.shared.lock();
        let mut waited_since = None;
        loop {
            self.follow(&mut state);
            state = self.shared.give(state);
            let (mut landed, mut failed) = (Vec::new(), None);
            for (index, place) in self.places.iter_mut().enumerate() {
                let Place::Held { slot, named: named @ false, .. } = place else { continue };
                match &state.contents[*slot] {
                    Content::Coming => {}
                    Content::Failed(error) => {
                        failed = Some(error.clone());
                        break;
                    }
                    Content::Ready => {
                        *named = true;
                        landed.push(index);
                    }
                }
            }
            let all_named = |place: &Place| matches!(place, Place::Held { named: true, .. } | Place::Released);
            if failed.is_some() || !landed.is_empty() || self.places.iter().all(all_named) {
                state.stalled += waited_since.map_or(Duration::ZERO, |since: Instant| since.elapsed());
                return failed.map_or(Ok(landed), Err);
            }
            waited_since.get_or_insert_with(Instant::now);
            state = self.shared.wait(state);
        }
    }

    /// The packed bytes of an expert that has landed, and what its slot holds after them.
    ///
    /// # Panics
    /// When it has not, or is released.
    #[must_use]
    pub fn bytes(&self, index: usize) -> SlotReader<'_> {
        let Place::Held { slot, named: true, .. } = self.places[index] else {
            unreachable!("expert {index} of the visit is {:?}", self.places[index]);
        };
        self.shared.slots.read(slot)
    }

    /// Gives back experts that have landed and are no longer needed; [`Visit::landed`] takes others in their place.
    pub fn release(&mut self, indices: Range<usize>) {
        let mut state = self.shared.lock();
        for place in &mut self.places[indices] {
            if let Place::Held { slot, follower, named } = std::mem::replace(place, Place::Released) {
                debug_assert!(named, "an expert is released before it has landed");
                self.followers -= usize::from(follower);
                state.cache.release(slot);
            }
        }
        self.shared.let_go();
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let held = self.places.iter().filter_map(|place| match place {
            Place::Held { slot, .. } => Some(*slot),
            Place::Waiting | Place::Released => None,
        });
        // A slot that is being filled may not become another expert's; nobody need wait for the others.
        let (coming, there): (Vec<_>, Vec<_>) = held.partition(|&slot| matches!(state.contents[slot], Content::Coming));
        there.into_iter().for_each(|slot| state.let_go(slot));
        self.shared.let_go();
        for slot in coming {
            while matches!(state.contents[slot], Content::Coming) {
                state = self.shared.wait(state);
            }
            state.let_go(slot);
        }
        self.shared.let_go();
    }
}
