//! Randomness that is a function of where it is used: nobody keeps it, and whoever needs it again computes it again.

use super::places::Place;

/// The beginning of what is random at `place` in a step of the run with this seed.
pub(super) fn key(seed: u64, step: u64, place: Place) -> u64 {
    [step, number(place)].into_iter().fold(seed, |key, part| mix(key ^ mix(part)))
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
pub(super) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// A number of the standard normal distribution, made of 64 random bits (Box and Muller, 1958).
pub(super) fn normal(bits: u64) -> f32 {
    // Above 0, so that its logarithm is finite, and at most 1.
    let unit = |bits: u32| (f64::from(bits) + 1.0) / 2f64.powi(32);
    let (radius, angle) = (unit((bits >> 32) as u32), unit(bits as u32));
    ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_the_moments_of_their_distribution() {
        const COUNT: u64 = 100_000;
        let numbers: Vec<f64> = (0..COUNT).map(|index| f64::from(normal(mix(index)))).collect();
        let moment = |power: i32| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / COUNT as f64;
        // Four deviations of the mean of so many.
        let bound = |variance: f64| 4.0 * (variance / COUNT as f64).sqrt();
        assert!(moment(1).abs() < bound(1.0) && (moment(2) - 1.0).abs() < bound(2.0));
        assert!(moment(3).abs() < bound(15.0) && (moment(4) - 3.0).abs() < bound(96.0));
        let next: f64 = numbers.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / COUNT as f64;
        assert!(next.abs() < bound(1.0), "neighbours are alike: {next}");
        assert!([0, u64::MAX, 0xffff_ffff, 0xffff_ffff << 32].into_iter().all(|bits| normal(bits).is_finite()));
    }
}
