use std::ops::Range;

use crate::{Error, Result};

/// Whole sequences, one after the other on one flat axis of tokens; they see nothing of each other.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// `[tokens]` token ids.
    pub token_ids: Vec<u32>,
    /// `[tokens]` each token's position in its sequence.
    pub positions: Vec<u32>,
    /// The rows of each sequence, in order; together they cover the axis.
    pub sequences: Vec<Range<usize>>,
    /// What the loss asks for, in ascending rows.
    pub targets: Vec<Target>,
}

/// A token that is to be predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The row that predicts it.
    pub row: u32,
    /// Which token it is.
    pub token: u32,
}

impl Batch {
    /// Adds a sequence; `is_target[i]` says whether its token `i` is to be predicted from those before it.
    ///
    /// # Errors
    /// When the lengths differ, or the first token is a target: nothing comes before it.
    pub fn push(&mut self, tokens: &[u32], is_target: &[bool]) -> Result<()> {
        if tokens.len() != is_target.len() {
            let (what, expected) = ("targets of a sequence".into(), vec![tokens.len()]);
            return Err(Error::Shape { what, expected, found: vec![is_target.len()] });
        }
        if is_target.first() == Some(&true) {
            return Err(Error::Config("the first token of a sequence can't be predicted".into()));
        }
        let start = self.token_ids.len();
        self.token_ids.extend(tokens);
        self.positions.extend(0..tokens.len() as u32);
        self.sequences.push(start..self.token_ids.len());
        let targets = (1..tokens.len()).filter(|&index| is_target[index]);
        self.targets.extend(targets.map(|index| Target { row: (start + index - 1) as u32, token: tokens[index] }));
        Ok(())
    }

    /// How many tokens it has.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }
}
