//! A list of slots in the order of their last use; every operation takes constant time.

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Link {
    older: u32,
    newer: u32,
}

/// A doubly linked list whose links lie in one array, one place for each slot.
#[derive(Debug)]
pub(super) struct Recency {
    links: Vec<Link>,
    oldest: u32,
    newest: u32,
}

impl Recency {
    /// An empty list for slots below `capacity`.
    pub(super) fn new(capacity: usize) -> Self {
        Self { links: vec![Link { older: NONE, newer: NONE }; capacity], oldest: NONE, newest: NONE }
    }

    /// Adds a slot that is not in the list, as the one used last.
    pub(super) fn push_newest(&mut self, slot: u32) {
        self.links[slot as usize] = Link { older: self.newest, newer: NONE };
        match self.newest {
            NONE => self.oldest = slot,
            newest => self.links[newest as usize].newer = slot,
        }
        self.newest = slot;
    }

    /// Adds a slot that is not in the list, as the one used longest ago.
    pub(super) fn push_oldest(&mut self, slot: u32) {
        self.links[slot as usize] = Link { older: NONE, newer: self.oldest };
        match self.oldest {
            NONE => self.newest = slot,
            oldest => self.links[oldest as usize].older = slot,
        }
        self.oldest = slot;
    }

    /// Takes out a slot that is in the list.
    pub(super) fn remove(&mut self, slot: u32) {
        let Link { older, newer } = self.links[slot as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.links[newer as usize].older = older,
        }
    }

    /// The slot used longest ago.
    pub(super) fn oldest(&self) -> Option<u32> {
        Some(self.oldest).filter(|&slot| slot != NONE)
    }

    #[cfg(test)]
    pub(super) fn oldest_first(&self) -> Vec<u32> {
        let next = |&slot: &u32| Some(self.links[slot as usize].newer).filter(|&slot| slot != NONE);
        std::iter::successors(self.oldest(), next).collect()
    }
}
