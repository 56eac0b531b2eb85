//! Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split form of the hub's checkpoints: place `i`
//! turns with place `i + rotary_dim / 2`.

/// Turns the first `2 · cos.len()` places of one head; the rest passes through.
#[inline(always)]
pub(crate) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head[..2 * cos.len()].split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// The reverse turn, which is also the gradient's way back.
#[inline(always)]
pub(crate) fn rotate_back(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head[..2 * cos.len()].split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos + *b * sin, *b * cos - *a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_pairs_and_leaves_the_rest() {
        let mut head = [1.0, 0.0, 0.0, 2.0, 7.0, 8.0];
        // Place 0 turns with 2 by 90 degrees, place 1 with 3 by 180.
        rotate(&mut head, &[0.0, -1.0], &[1.0, 0.0]);
        assert_eq!(head, [0.0, 0.0, 1.0, -2.0, 7.0, 8.0]);
    }
}
