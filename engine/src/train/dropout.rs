//! Dropout on what adapters take, as PEFT's `lora_dropout`: the frozen product is not touched.
//!
//! A value's fate is a function of the seed, the step, the matrix, the token's number in the step and the column. So a
//! layer that is computed again, another division into batches, other threads and a run that is gone on with drop the same
//! values; no mask is kept. Adapters of one matrix that take the same input, as those of queries, keys and values, take it
//! with the same values dropped.

use cadre_kernels::ffn::WeightedRow;

use super::places::Place;

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
        let key = [self.step, number(place)].into_iter().fold(self.seed, |key, part| mix(key ^ mix(part)));
        Mask { rate: self.rate, key, first_token, rows: None }
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

/// A number that no other place has.
fn number(place: Place) -> u64 {
    let [kind, layer, expert] = match place {
        Place::Qkv { layer } => [0, layer, 0],
        Place::AttentionOutput { layer } => [1, layer, 0],
        Place::Router { layer } => [2, layer, 0],
        Place::GateUp { layer, expert } => [3, layer, expert],
        Place::Down { layer, expert } => [4, layer, expert],
        Place::SharedGateUp { layer } => [5, layer, 0],
        Place::SharedDown { layer } => [6, layer, 0],
        Place::Head => [7, 0, 0],
    };
    ((kind as u64) << 48) | ((layer as u64) << 24) | expert as u64
}

/// SplitMix64's output function (Steele et al., OOPSLA 2014).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
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
