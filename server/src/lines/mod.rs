//! A file of lines through a program that may be killed at any moment: run again, it goes on where it was. What a line means
//! is its users' business.
//!
//! [`input`] numbers the lines of what is read, [`output`] writes one line for each and knows from what it has written which
//! are done; [`manifest`] tells whether it is the same run that goes on. [`compression`] is what both may lie in.

pub mod compression;
pub mod input;
pub mod manifest;
pub mod output;

/// Numbers of lines, counted from 1: a bit each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LineSet {
    words: Vec<u64>,
    len: u64,
}

impl LineSet {
    /// Adds a number; false if it was there.
    pub fn insert(&mut self, number: u64) -> bool {
        let (word, bit) = place(number);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        let is_new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.len += u64::from(is_new);
        is_new
    }

    /// Whether a number is there.
    pub fn contains(&self, number: u64) -> bool {
        let (word, bit) = place(number);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.len
    }
}

fn place(number: u64) -> (usize, u64) {
    (usize::try_from(number / 64).unwrap_or(usize::MAX), 1 << (number % 64))
}

#[cfg(test)]
mod tests;
