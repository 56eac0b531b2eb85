//! Which experts data use most.

/// Of each layer the fewest experts that together were chosen for at least `share` of its choices, as ESFT's token
/// selection ratio picks them (Wang et al., arXiv:2407.01906), ascending; among equals those with the lower number. `loads`
/// is how often each expert of each layer was chosen; empty for layers without a router.
#[must_use]
pub fn most_used(loads: &[Vec<u64>], share: f64) -> Vec<Vec<usize>> {
    let of_layer = |load: &Vec<u64>| {
        let wanted = share * load.iter().sum::<u64>() as f64;
        let mut order: Vec<usize> = (0..load.len()).collect();
        order.sort_by_key(|expert| std::cmp::Reverse(load[*expert]));
        let mut sum = 0;
        let mut chosen: Vec<usize> = order
            .into_iter()
            .take_while(|expert| {
                let is_enough = sum as f64 >= wanted;
                sum += load[*expert];
                !is_enough
            })
            .collect();
        chosen.sort_unstable();
        chosen
    };
    loads.iter().map(of_layer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fewest_experts_that_make_up_the_share() {
        let loads = [vec![], vec![10, 0, 50, 10, 30], vec![25, 25, 25, 25]];
        assert_eq!(most_used(&loads, 0.5), [vec![], vec![2], vec![0, 1]]);
        assert_eq!(most_used(&loads, 0.51), [vec![], vec![2, 4], vec![0, 1, 2]]);
        assert_eq!(most_used(&loads, 1.0), [vec![], vec![0, 2, 3, 4], vec![0, 1, 2, 3]]);
    }
}
