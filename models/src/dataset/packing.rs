//! Examples into sequences of a fixed length, with little left over.

use std::{cmp::Reverse, collections::BTreeSet};

/// Best-fit decreasing: the longest example first, each into the bin whose room it leaves the least of. Gives the
/// indices of each bin's examples; every example is in exactly one bin, and the same lengths always give the same bins.
/// Takes O(n log n).
///
/// No bin holds more than `capacity`, as long as no example does: a longer one is alone in its bin.
#[must_use]
pub fn pack(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|example| Reverse(lengths[*example]));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    let mut rooms: BTreeSet<(usize, usize)> = BTreeSet::new();
    for example in order {
        let length = lengths[example];
        let best = rooms.range((length, 0)..).next().copied();
        let (room, bin) = best.unwrap_or((capacity, bins.len()));
        if best.is_some() {
            rooms.remove(&(room, bin));
        } else {
            bins.push(Vec::new());
        }
        bins[bin].push(example);
        rooms.insert((room.saturating_sub(length), bin));
    }
    bins
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_goes_where_it_fits_best() {
        assert_eq!(pack(&[3, 7, 5, 5, 2, 8], 10), [vec![5, 4], vec![1, 0], vec![2, 3]]);
        assert_eq!(pack(&[], 10), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn equal_lengths_keep_their_order() {
        assert_eq!(pack(&[4, 4, 4, 4, 4], 8), [vec![0, 1], vec![2, 3], vec![4]]);
    }

    #[test]
    fn what_no_bin_holds_is_alone() {
        assert_eq!(pack(&[11, 1, 9], 10), [vec![0], vec![2, 1]]);
    }

    proptest! {
        #[test]
        fn every_example_is_in_one_bin_that_holds_it(
            capacity in 1_usize..200,
            shares in prop::collection::vec(0.0..=1.0_f64, 0..300),
        ) {
            let lengths: Vec<usize> = shares.iter().map(|share| (share * capacity as f64) as usize).collect();
            let bins = pack(&lengths, capacity);
            let mut packed = bins.concat();
            packed.sort_unstable();
            prop_assert_eq!(packed, (0..lengths.len()).collect::<Vec<_>>());
            let fill = |bin: &Vec<usize>| bin.iter().map(|example| lengths[*example]).sum::<usize>();
            let fills: Vec<usize> = bins.iter().map(fill).collect();
            prop_assert!(fills.iter().all(|fill| *fill <= capacity));
            // What any fit keeps to: no two bins could be one.
            let mut least = fills.clone();
            least.sort_unstable();
            if let [first, second, ..] = least[..] {
                prop_assert!(first + second > capacity, "{:?}", fills);
            }
        }
    }
}
