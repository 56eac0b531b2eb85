//! Answers that tell nothing of when they were made, nor of what else was going on: those for the lines of a file, which may be
//! worked on a second time.

/// In a request's extensions, it stands for what its answer would else take from clock and chance: time, id, and the seed where
/// the request gives none. Nor does such an answer tell how much of its prompt was cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reproducible {
    /// Tells this request from others of its run.
    pub number: u64,
    /// Tells this run from others that shall have other ids and draw other numbers.
    pub seed: u64,
    /// When it was made, as its answer has it: in seconds since 1970.
    pub created: u64,
}

impl Reproducible {
    /// What the ids of its answer end in.
    pub fn id(self) -> String {
        format!("{:016x}{:016x}", self.seed, self.number)
    }

    /// The seed of its draws: those of neighbours have nothing in common.
    pub fn draws(self) -> u64 {
        // The finaliser of splitmix64.
        let mix = |x: u64| {
            let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^ (x >> 31)
        };
        mix(mix(self.seed).wrapping_add(self.number.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_request_of_every_run_is_another_one() {
        let requests = (0..10).flat_map(|seed| (0..100).map(move |number| Reproducible { number, seed, created: 0 }));
        let told: HashSet<(String, u64)> = requests.map(|request| (request.id(), request.draws())).collect();
        let draws: HashSet<u64> = told.iter().map(|(_, draws)| *draws).collect();
        assert_eq!((told.len(), draws.len()), (1000, 1000));
    }
}
