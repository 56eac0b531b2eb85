//! A list of ids, of KV blocks or expert slots, in the order of their last use; every operation takes constant time.

const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Link {
    older: u32,
    newer: u32,
}

/// A doubly linked list whose links lie in one array, one place for each id.
#[derive(Debug)]
pub(crate) struct Recency {
    links: Vec<Link>,
    oldest: u32,
    newest: u32,
    len: usize,
}

impl Recency {
    /// An empty list for ids below `capacity`.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { links: vec![Link { older: NONE, newer: NONE }; capacity], oldest: NONE, newest: NONE, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Adds an id that is not in the list, as the one used last.
    pub(crate) fn push_newest(&mut self, id: u32) {
        self.links[id as usize] = Link { older: self.newest, newer: NONE };
        match self.newest {
            NONE => self.oldest = id,
            newest => self.links[newest as usize].newer = id,
        }
        self.newest = id;
        self.len += 1;
    }

    /// Adds an id that is not in the list, as the one used longest ago.
    pub(crate) fn push_oldest(&mut self, id: u32) {
        self.links[id as usize] = Link { older: NONE, newer: self.oldest };
        match self.oldest {
            NONE => self.newest = id,
            oldest => self.links[oldest as usize].older = id,
        }
        self.oldest = id;
        self.len += 1;
    }

    /// Takes out an id that is in the list.
    pub(crate) fn remove(&mut self, id: u32) {
        let Link { older, newer } = self.links[id as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.links[newer as usize].older = older,
        }
        self.len -= 1;
    }

    /// Takes out the id used longest ago.
    pub(crate) fn pop_oldest(&mut self) -> Option<u32> {
        self.oldest().inspect(|&id| self.remove(id))
    }

    /// The id used longest ago.
    pub(crate) fn oldest(&self) -> Option<u32> {
        Some(self.oldest).filter(|&id| id != NONE)
    }

    #[cfg(test)]
    pub(crate) fn oldest_first(&self) -> Vec<u32> {
        let next = |&id: &u32| Some(self.links[id as usize].newer).filter(|&id| id != NONE);
        std::iter::successors(self.oldest(), next).collect()
    }
}
