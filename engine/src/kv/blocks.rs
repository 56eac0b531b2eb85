//! The books of the KV blocks: who holds which, which hold a known prefix, which may be taken. No tensors, no clock.
//!
//! A full block whose keys and values are computed can be *cached* under its content: the 16 token ids and the block
//! before it. Since a block's parent is itself a cached block, that chain stands for the whole prefix. The map
//! hashes (parent, tokens) and compares both, so that a hash collision costs a comparison and never gives a wrong hit.
//!
//! Invariants:
//! - A block is in exactly one of three places: held (`refs > 0`), cached but unreferenced (in the recency list), free.
//! - Whoever holds a cached block holds its parent too, and tables are released last block first: so a parent is
//!   always evicted after its children, and every cached block can be reached from its root.
//! - A content is cached at most once; [`BlockPool::register`] answers with the block that holds it.
//! - A block that is shared (`refs > 1`) is full and is never written again.

mod recency;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use recency::Recency;

/// Tokens that one KV block holds.
pub const BLOCK_SIZE: usize = 16;

/// The number of a block, also its place in the storage.
pub type BlockId = u32;

/// The tokens of a full block.
pub type BlockTokens = [u32; BLOCK_SIZE];

/// Blocks that `tokens` tokens take.
#[must_use]
pub fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

/// What stands before a block in its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Parent {
    /// Nothing: the first block. Prefixes are shared only within one scope.
    Root(u64),
    /// This cached block.
    Block(BlockId),
}

/// What a cached block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Content {
    parent: Parent,
    tokens: BlockTokens,
}

#[derive(Debug, Clone, Default)]
struct Block {
    refs: u32,
    content: Option<Content>,
}

/// Prefix reuse so far, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixCounters {
    /// Prompt tokens that were looked for.
    pub queries: u64,
    /// Those that were found.
    pub hits: u64,
}

/// The books of all KV blocks.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<BlockId>,
    cached: HashMap<Content, BlockId>,
    /// Cached blocks that nobody holds, in the order of their last use.
    unreferenced: Recency,
    counters: PrefixCounters,
}

impl BlockPool {
    /// Books of `num_blocks` free blocks.
    #[must_use]
    pub fn new(num_blocks: usize) -> Self {
        let ids = 0..BlockId::try_from(num_blocks).unwrap_or(BlockId::MAX);
        Self {
            blocks: vec![Block::default(); ids.len()],
            free: ids.clone().rev().collect(),
            cached: HashMap::new(),
            unreferenced: Recency::new(ids.len()),
            counters: PrefixCounters::default(),
        }
    }

    /// All blocks.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that [`allocate`](Self::allocate) can give: the free ones and the cached ones that nobody holds.
    #[must_use]
    pub fn num_available(&self) -> usize {
        self.free.len() + self.unreferenced.len()
    }

    /// Blocks that somebody holds.
    #[must_use]
    pub fn num_used(&self) -> usize {
        self.num_blocks() - self.num_available()
    }

    /// The share of blocks that somebody holds, 0 to 1.
    #[must_use]
    pub fn usage(&self) -> f64 {
        if self.blocks.is_empty() { 0.0 } else { self.num_used() as f64 / self.num_blocks() as f64 }
    }

    /// Prefix reuse so far.
    #[must_use]
    pub fn counters(&self) -> PrefixCounters {
        self.counters
    }

    /// Counts one look-up of a prompt.
    pub fn count_query(&mut self, queried_tokens: usize, hit_tokens: usize) {
        self.counters.queries += queried_tokens as u64;
        self.counters.hits += hit_tokens as u64;
    }

    /// A block to write, held once; the least recently used cached block is evicted if none is free.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let id = match self.free.pop() {
            Some(id) => id,
            None => self.evict()?,
        };
        self.blocks[id as usize].refs = 1;
        Some(id)
    }

    /// Holds the cached blocks that `tokens` begin with, each once more, and gives them in order.
    pub fn acquire_prefix(&mut self, scope: u64, tokens: &[u32]) -> Vec<BlockId> {
        let mut found = Vec::new();
        let mut parent = Parent::Root(scope);
        for chunk in tokens.as_chunks::<BLOCK_SIZE>().0 {
            let Some(&id) = self.cached.get(&Content { parent, tokens: *chunk }) else { break };
            self.hold(id);
            found.push(id);
            parent = Parent::Block(id);
        }
        found
    }

    /// Caches `block`, which the caller holds and which is full and computed, and gives the block to go on with:
    /// `block`, or one that already holds the same (then that one is held in its place and `block` let go).
    pub fn register(&mut self, parent: Parent, tokens: BlockTokens, block: BlockId) -> BlockId {
        if let Parent::Block(id) = parent
            && self.blocks[id as usize].content.is_none()
        {
            return block; // The cache was cleared since: a child of it could not be found, or would be found wrongly.
        }
        let content = Content { parent, tokens };
        if let Some(&known) = self.cached.get(&content) {
            if known != block {
                self.hold(known);
                self.release(&[block]);
            }
            return known;
        }
        let entry = &mut self.blocks[block as usize];
        if entry.content.is_none() {
            entry.content = Some(content);
            self.cached.insert(content, block);
        }
        block
    }

    /// Lets go of a table's blocks. Cached ones stay until they are evicted.
    pub fn release(&mut self, table: &[BlockId]) {
        for &id in table.iter().rev() {
            let block = &mut self.blocks[id as usize];
            debug_assert!(block.refs > 0, "block {id} is released but nobody holds it");
            block.refs = block.refs.saturating_sub(1);
            if block.refs > 0 {
                continue;
            }
            if block.content.is_some() {
                self.unreferenced.push_newest(id);
            } else {
                self.free.push(id);
            }
        }
    }

    /// Forgets every cached prefix; held blocks stay held.
    pub fn clear_cache(&mut self) {
        self.cached.clear();
        for block in &mut self.blocks {
            block.content = None;
        }
        while let Some(id) = self.unreferenced.pop_oldest() {
            self.free.push(id);
        }
    }

    /// Every block is free again, whoever held it; nothing is cached. The counters stay.
    pub fn reset(&mut self) {
        *self = Self { counters: self.counters, ..Self::new(self.num_blocks()) };
    }

    fn hold(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        if block.refs == 0 {
            self.unreferenced.remove(id);
        }
        block.refs += 1;
    }

    fn evict(&mut self) -> Option<BlockId> {
        let id = self.unreferenced.pop_oldest()?;
        if let Some(content) = self.blocks[id as usize].content.take() {
            self.cached.remove(&content);
        }
        Some(id)
    }
}

#[cfg(test)]
impl BlockPool {
    /// How often each block is held.
    pub(crate) fn refs(&self) -> Vec<u32> {
        self.blocks.iter().map(|block| block.refs).collect()
    }

    /// Whether this block's content is known.
    pub(crate) fn is_cached(&self, id: BlockId) -> bool {
        self.blocks[id as usize].content.is_some()
    }

    /// Asserts the invariants at the head of this file.
    pub(crate) fn check(&self) {
        let mut places = vec![0; self.num_blocks()];
        let unreferenced = self.unreferenced.oldest_first();
        assert_eq!(unreferenced.len(), self.unreferenced.len());
        for &id in &self.free {
            places[id as usize] += 1;
            assert!(!self.is_cached(id), "free block {id} is cached");
        }
        for &id in &unreferenced {
            places[id as usize] += 1;
            assert!(self.is_cached(id), "unreferenced block {id} is not cached");
        }
        for (id, block) in self.blocks.iter().enumerate() {
            assert_eq!(places[id] + i32::from(block.refs > 0), 1, "block {id} is in {} places", places[id]);
            let Some(content) = block.content else { continue };
            assert_eq!(self.cached.get(&content), Some(&(id as BlockId)), "block {id} can't be found");
            if let Parent::Block(parent) = content.parent {
                assert!(self.is_cached(parent), "the parent {parent} of block {id} was evicted before it");
            }
        }
        assert_eq!(self.cached.len(), self.blocks.iter().filter(|block| block.content.is_some()).count());
    }
}
