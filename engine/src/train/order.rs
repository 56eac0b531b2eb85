//! In which order the examples are gone through: another one each epoch, the same for the same seed.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

/// The numbers `0..count` in the order of epoch number `epoch` (Fisher and Yates).
#[must_use]
pub fn shuffled(seed: u64, epoch: u64, count: usize) -> Vec<usize> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // Adapters begin from the low streams of the same seed.
    random.set_stream(u64::MAX - epoch);
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        // The bias of a remainder is below one in 2^32 for four billion examples.
        order.swap(last, (random.next_u64() % (last as u64 + 1)) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_comes_once_in_another_order_each_epoch() {
        let orders: Vec<Vec<usize>> = (0..3).map(|epoch| shuffled(7, epoch, 50)).collect();
        for order in &orders {
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..50).collect::<Vec<_>>());
        }
        assert!(orders[0] != orders[1] && orders[1] != orders[2] && orders[0] != shuffled(8, 0, 50));
        assert_eq!(orders[1], shuffled(7, 1, 50));
        assert!(shuffled(1, 0, 0).is_empty() && shuffled(1, 0, 1) == [0]);
    }
}
