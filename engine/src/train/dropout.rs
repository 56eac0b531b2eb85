//! Dropout on what adapters take, as PEFT's `lora_dropout`: the frozen product is not touched.
//!
//! A value's fate is a function of the seed, the step, the matrix, the token's number in the step and the column. So a
//! layer that is computed again, another division into batches, other threads and a run that is gone on with drop the same
//! values; no mask is kept. Adapters of one matrix that take the same input, as those of queries, keys and values, take it
//! with the same values dropped.

use cadre_kernels::ffn::WeightedRow;

use super::{
    places::Place,
    random::{key, mix},
};

/// How much is dropped, and the beginning of its randomness.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The probability that a value is dropped, at least 0 and below 1; the others are divided by what is left.
    pub rate: f32,
    /// The run's.
    pub seed: u64,
    /// The step's number.
    pub step: u64,
}

/// What is dropped of the input of one matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mask<'a> {
    pub rate: f32,
    key: u64,
    /// The number in the step of the batch's first token.
    first_token: usize,
    /// The batch's tokens that are the input's rows; `None`: all of them.
    rows: Option<&'a [WeightedRow]>,
}

impl Dropout {
    /// That of the matrix at `place`, for a batch whose first token has this number in the step.
    pub(super) fn mask<'a>(&self, place: Place, first_token: usize) -> Mask<'a> {
        Mask { rate: self.rate, key: key(self.seed, self.step, place), first_token, rows: None }
    }
}

impl<'a> Mask<'a> {
    /// The same for an input of these rows only.
    pub fn of_rows(self, rows: &'a [WeightedRow]) -> Self {
        Self { rows: Some(rows), ..self }
    }

    /// A number for each of so many rows.
    pub fn keys(&self, count: usize) -> Vec<u32> {
        let token = |index: usize| self.first_token + self.rows.map_or(index, |rows| rows[index].row as usize);
        (0..count).map(|index| (mix(self.key ^ token(index) as u64) >> 32) as u32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_follow_the_token_through_batches_and_experts() {
        let dropout = Dropout { rate: 0.1, seed: 1, step: 2 };
        let place = Place::GateUp { layer: 3, expert: 4 };
        let whole = dropout.mask(place, 0).keys(8);
        assert_eq!(dropout.mask(place, 5).keys(3), whole[5..]);
        let rows = [1, 6].map(|row| WeightedRow { row, weight: 0.5 });
        assert_eq!(dropout.mask(place, 0).of_rows(&rows).keys(2), [whole[1], whole[6]]);
        let others = [
            Dropout { seed: 2, ..dropout }.mask(place, 0),
            Dropout { step: 3, ..dropout }.mask(place, 0),
            dropout.mask(Place::GateUp { layer: 4, expert: 3 }, 0),
            dropout.mask(Place::Down { layer: 3, expert: 4 }, 0),
        ];
        for other in others {
            assert!(other.keys(8).iter().zip(&whole).all(|(one, other)| one != other));
        }
    }
}
