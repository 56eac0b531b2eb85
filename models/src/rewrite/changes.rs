//! What a checkpoint that was written again has in place of the numbers that it had.

use std::collections::BTreeMap;

use crate::summary::Part;

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Rewritten {
    /// Whether the same checkpoint was there already, finished: nothing was written.
    pub was_finished: bool,
    /// Tensors that nothing was said of.
    pub copied: usize,
    /// The others, in the order of the files.
    pub changes: Vec<TensorChange>,
}

/// What became of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorChange {
    /// Its name.
    pub name: String,
    /// The part of the model that it belongs to.
    pub part: Part,
    /// How many numbers it has.
    pub numbers: u64,
    /// How many of them have another value than before, as they are stored.
    pub changed: u64,
    /// Their lengths.
    pub norms: Norms,
}

/// Lengths of vectors of numbers, as sums of squares.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Norms {
    weight: f64,
    change: f64,
    rounding: f64,
}

impl Norms {
    /// Adds numbers: as they were, as they should become, and as they are stored.
    pub(super) fn add(&mut self, old: &[f32], new: &[f32], stored: &[f32]) {
        for ((old, new), stored) in old.iter().zip(new).zip(stored) {
            let [old, new, stored] = [old, new, stored].map(|value| f64::from(*value));
            self.weight += old * old;
            self.change += (new - old) * (new - old);
            self.rounding += (stored - new) * (stored - new);
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            weight: self.weight + other.weight,
            change: self.change + other.change,
            rounding: self.rounding + other.rounding,
        }
    }

    /// The length of the weights before.
    #[must_use]
    pub fn weight(&self) -> f64 {
        self.weight.sqrt()
    }

    /// The length of what is added to them, before it is rounded.
    #[must_use]
    pub fn change(&self) -> f64 {
        self.change.sqrt()
    }

    /// The length of what rounding to the stored type adds to that.
    #[must_use]
    pub fn rounding(&self) -> f64 {
        self.rounding.sqrt()
    }
}

/// The tensors of one part that something was said of.
#[derive(Debug, Clone, PartialEq)]
pub struct PartChange {
    /// The part.
    pub part: Part,
    /// How many there are.
    pub tensors: u64,
    /// How many of them changed in at least one number.
    pub changed_tensors: u64,
    /// How many numbers they have.
    pub numbers: u64,
    /// How many of these changed.
    pub changed: u64,
    /// Their lengths together.
    pub norms: Norms,
}

impl Rewritten {
    /// The changes part by part, in the order of a token's way.
    #[must_use]
    pub fn parts(&self) -> Vec<PartChange> {
        let mut parts: BTreeMap<Part, PartChange> = BTreeMap::new();
        for change in &self.changes {
            let empty = PartChange {
                part: change.part,
                tensors: 0,
                changed_tensors: 0,
                numbers: 0,
                changed: 0,
                norms: Norms::default(),
            };
            let part = parts.entry(change.part).or_insert(empty);
            part.tensors += 1;
            part.changed_tensors += u64::from(change.changed > 0);
            part.numbers += change.numbers;
            part.changed += change.changed;
            part.norms = part.norms.plus(change.norms);
        }
        parts.into_values().collect()
    }

    /// The names of tensors that are as they were.
    pub fn unchanged(&self) -> impl Iterator<Item = &str> {
        self.changes.iter().filter(|change| change.changed == 0).map(|change| change.name.as_str())
    }
}
