//! A list of block ids in the order of their last use; every operation takes constant time.

use super::BlockId;

const NONE: BlockId = BlockId::MAX;

#[derive(Debug, Clone, Copy)]
struct Link {
    older: BlockId,
    newer: BlockId,
}

/// A doubly linked list whose links lie in one array, one place for each block.
#[derive(Debug)]
pub(super) struct Recency {
    links: Vec<Link>,
    oldest: BlockId,
    newest: BlockId,
    len: usize,
}

impl Recency {
    /// An empty list for ids below `capacity`.
    pub(super) fn new(capacity: usize) -> Self {
        Self { links: vec![Link { older: NONE, newer: NONE }; capacity], oldest: NONE, newest: NONE, len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Adds an id that is not in the list.
    pub(super) fn push_newest(&mut self, id: BlockId) {
        self.links[id as usize] = Link { older: self.newest, newer: NONE };
        match self.newest {
            NONE => self.oldest = id,
            newest => self.links[newest as usize].newer = id,
        }
        self.newest = id;
        self.len += 1;
    }

    /// Takes out the id that was added longest ago.
    pub(super) fn pop_oldest(&mut self) -> Option<BlockId> {
        let id = self.oldest;
        if id == NONE {
            return None;
        }
        self.remove(id);
        Some(id)
    }

    /// Takes out an id that is in the list.
    pub(super) fn remove(&mut self, id: BlockId) {
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

    #[cfg(test)]
    pub(super) fn oldest_first(&self) -> Vec<BlockId> {
        let next = |&id: &BlockId| Some(self.links[id as usize].newer).filter(|&id| id != NONE);
        std::iter::successors(Some(self.oldest).filter(|&id| id != NONE), next).collect()
    }
}
