//! Numbers that nobody foresees: ids, and seeds where a request gives none.

use std::{
    hash::{BuildHasher, RandomState},
    time::SystemTime,
};

/// A number that differs from call to call.
pub fn random_seed() -> u64 {
    RandomState::new().hash_one(SystemTime::now())
}
