//! Where the tokens of a super-batch lie: on which rows, in which KV blocks, in which chunk.

use std::ops::Range;

use super::Passage;
use crate::{
    kv::blocks::{BLOCK_SIZE, BlockId, blocks_for},
    model::{SequenceRows, StepBatch},
};

/// A super-batch on one axis of rows.
#[derive(Debug, Default)]
pub(super) struct Rows {
    token_ids: Vec<u32>,
    positions: Vec<u32>,
    /// Together they cover the axis, in order.
    pub(super) chunks: Vec<Chunk>,
    /// KV blocks that are in use at a time.
    pub(super) num_blocks: usize,
}

/// Rows that are computed at once.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) rows: Range<usize>,
    pieces: Vec<Piece>,
    /// Ascending in their rows.
    pub(super) targets: Vec<Target>,
}

/// A part of a passage: the rows of its last positions, as far as it goes.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    rows: Range<usize>,
    context_len: usize,
    block_table: Vec<BlockId>,
    /// By its place among those that were given.
    passage: usize,
}

/// A token that the logits of a row score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) row: usize,
    pub(super) token: u32,
    /// Whose score it is.
    pub(super) passage: usize,
}

/// Leading blocks that two passages have in common, as far as both are computed.
pub(super) fn shared_blocks(one: &Passage, other: &Passage) -> usize {
    if adapter(one) == adapter(other) { common(one, other) / BLOCK_SIZE } else { 0 }
}

/// Leading tokens that two passages have in common, as far as both are computed.
fn common(one: &Passage, other: &Passage) -> usize {
    let pairs = one.tokens[..one.computed()].iter().zip(&other.tokens[..other.computed()]);
    pairs.take_while(|(one, other)| one == other).count()
}

fn adapter(passage: &Passage) -> u64 {
    passage.adapter.as_ref().map_or(0, |adapter| adapter.id())
}

/// The passages in an order in which those that begin alike stand together. It descends: what begins another one comes after
/// it, and adds nothing to it.
fn sorted(passages: &[Passage]) -> Vec<usize> {
    let key = |&index: &usize| (adapter(&passages[index]), &passages[index].tokens[..passages[index].computed()]);
    let mut order: Vec<usize> = (0..passages.len()).collect();
    order.sort_by(|one, other| key(other).cmp(&key(one)));
    order
}

/// The passages in the order of [`sorted`], each with the one that has to be computed before it, so that all blocks that it
/// shares with any before it are there.
pub(super) fn in_turn(passages: &[Passage]) -> Vec<(usize, Option<usize>)> {
    // Of the blocks at hand, up to which one, and who computes the last of these.
    let mut owners: Vec<(usize, usize)> = Vec::new();
    let mut before = None;
    let turn = |index: usize| {
        let passage = &passages[index];
        let shared = before.replace(passage).map_or(0, |before| shared_blocks(before, passage));
        let begins = |owners: &[(usize, usize)]| owners.len().checked_sub(2).map_or(0, |at| owners[at].0);
        while !owners.is_empty() && begins(&owners) >= shared {
            owners.pop();
        }
        if let Some(last) = owners.last_mut() {
            last.0 = shared.min(last.0);
        }
        let needs = owners.last().map(|(_, owner)| *owner);
        let blocks = passage.computed() / BLOCK_SIZE;
        if blocks > shared {
            owners.push((blocks, index));
        }
        (index, needs)
    };
    sorted(passages).into_iter().map(turn).collect()
}

impl Rows {
    /// Lays out `passages` in chunks of at most `chunk_rows` rows, in each of which at most `chunk_blocks` blocks are begun;
    /// both at least 1.
    pub(super) fn new(passages: &[Passage], chunk_rows: usize, chunk_blocks: usize) -> Self {
        let mut layout = Layout::new(chunk_rows.max(1), chunk_blocks.max(1));
        let mut targets = Vec::new();
        let mut before = None;
        for index in sorted(passages) {
            let passage = &passages[index];
            layout.add(index, passage, before);
            targets.extend(layout.targets(index, passage));
            before = Some(passage);
        }
        layout.finish(targets)
    }

    pub(super) fn len(&self) -> usize {
        self.token_ids.len()
    }

    /// The tokens of a chunk, no logits wanted.
    pub(super) fn batch(&self, chunk: &Chunk, passages: &[Passage]) -> StepBatch {
        let start = chunk.rows.start;
        let sequence = |piece: &Piece| SequenceRows {
            rows: piece.rows.start - start..piece.rows.end - start,
            context_len: piece.context_len,
            block_table: piece.block_table.clone(),
            adapter: passages[piece.passage].adapter.clone(),
        };
        StepBatch {
            token_ids: self.token_ids[chunk.rows.clone()].to_vec(),
            positions: self.positions[chunk.rows.clone()].to_vec(),
            sequences: chunk.pieces.iter().map(sequence).collect(),
            logit_rows: Vec::new(),
        }
    }
}

/// Lays out one passage after the other.
struct Layout {
    rows: Rows,
    chunk: Chunk,
    chunk_rows: usize,
    chunk_blocks: usize,
    /// The row of each position of the passage at hand, and the blocks that hold it.
    path: Vec<usize>,
    table: Vec<BlockId>,
    /// Blocks that this chunk has begun.
    begun: usize,
    /// Those that nothing after this chunk needs, and those that nothing needs.
    leaving: Vec<BlockId>,
    free: Vec<BlockId>,
}

impl Layout {
    fn new(chunk_rows: usize, chunk_blocks: usize) -> Self {
        Self {
            rows: Rows::default(),
            chunk: Chunk::default(),
            chunk_rows,
            chunk_blocks,
            path: Vec::new(),
            table: Vec::new(),
            begun: 0,
            leaving: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Adds the rows of `passage` that the one `before` it in the order hasn't.
    fn add(&mut self, index: usize, passage: &Passage, before: Option<&Passage>) {
        let length = passage.computed();
        let is_akin = before.is_some_and(|before| adapter(before) == adapter(passage));
        let common = before.filter(|_| is_akin).map_or(0, |before| common(before, passage));
        let shared = if common == length { blocks_for(common) } else { common / BLOCK_SIZE };
        self.leaving.extend(self.table.drain(shared.min(self.table.len())..));
        if common == length {
            // It is the beginning of the one before it, or the same: all of it is there.
            self.path.truncate(length);
            return;
        }
        let mut position = shared * BLOCK_SIZE;
        self.path.truncate(position);
        while position < length {
            position = self.piece(index, passage, position);
        }
    }

    /// Adds rows of a passage from `start` on, as many as the chunk has room for, and says where that ends.
    fn piece(&mut self, index: usize, passage: &Passage, start: usize) -> usize {
        let filled = self.rows.len() - self.chunk.rows.start;
        if filled == self.chunk_rows || self.begun == self.chunk_blocks {
            self.close();
            return start;
        }
        let blocks = self.table.len() + self.chunk_blocks - self.begun;
        let room = (self.chunk_rows - filled).min(blocks * BLOCK_SIZE - start);
        let end = passage.computed().min(start + room);
        while self.table.len() < blocks_for(end) {
            let block = self.free.pop().unwrap_or_else(|| {
                self.rows.num_blocks += 1;
                (self.rows.num_blocks - 1) as BlockId
            });
            self.table.push(block);
            self.begun += 1;
        }
        let rows = self.rows.len()..self.rows.len() + end - start;
        self.rows.token_ids.extend_from_slice(&passage.tokens[start..end]);
        self.rows.positions.extend((start..end).map(|position| position as u32));
        self.path.extend(rows.clone());
        let block_table = self.table.clone();
        self.chunk.pieces.push(Piece { rows, context_len: end, block_table, passage: index });
        end
    }

    /// What the passage that was added last wants scored, in its order, which is also that of the rows.
    fn targets(&self, index: usize, passage: &Passage) -> Vec<Target> {
        let Passage { tokens, scoring, .. } = passage;
        let target = |(position, token): (usize, u32)| Target { row: self.path[position], token, passage: index };
        let first = (scoring.from as usize).clamp(1, tokens.len());
        let own = (first..tokens.len()).map(|at| (at - 1, tokens[at]));
        let next = scoring.next.iter().map(|&token| (tokens.len() - 1, token));
        own.chain(next).map(target).collect()
    }

    fn close(&mut self) {
        let end = self.rows.len();
        self.chunk.rows.end = end;
        let next = Chunk { rows: end..end, ..Chunk::default() };
        self.rows.chunks.push(std::mem::replace(&mut self.chunk, next));
        self.free.append(&mut self.leaving);
        self.begun = 0;
    }

    fn finish(mut self, mut targets: Vec<Target>) -> Rows {
        if !self.chunk.pieces.is_empty() {
            self.close();
        }
        // Stable: the targets of one row stay in the order of their passage.
        targets.sort_by_key(|target| target.row);
        let mut targets = &targets[..];
        for chunk in &mut self.rows.chunks {
            let own = targets.partition_point(|target| target.row < chunk.rows.end);
            chunk.targets = targets[..own].to_vec();
            targets = &targets[own..];
        }
        self.rows
    }
}
