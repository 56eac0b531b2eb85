//! Finds requests of one `custom_id`, in eight bytes of memory a line, and no more than so many lines at a time.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    fmt,
    hash::{BuildHasher, RandomState},
};

use anyhow::Result;

use super::request::BatchRequest;
use crate::lines::input::{Input, Line, Scan};

/// How many hashes memory holds at a time: 256 MiB of them.
pub const MOST_HASHES: usize = 32 << 20;
/// How many duplicates are told.
const MOST_TOLD: usize = 20;

/// Requests that have the `custom_id` of an earlier one.
#[derive(Debug, thiserror::Error)]
pub struct Duplicates {
    count: u64,
    told: Vec<Duplicate>,
}

impl Duplicates {
    /// The first of them.
    pub fn told(&self) -> &[Duplicate] {
        &self.told
    }
}

/// One of them.
#[derive(Debug)]
pub struct Duplicate {
    /// Of both.
    pub custom_id: String,
    /// The line that had it first.
    pub first: u64,
    /// The line that has it too.
    pub again: u64,
}

impl fmt::Display for Duplicates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "each line needs a custom_id of its own, but of {} lines it is that of an earlier one:", self.count)?;
        for Duplicate { custom_id, first, again } in &self.told {
            write!(f, "\n  lines {first} and {again}: {custom_id:?}")?;
        }
        let more = self.count - self.told.len() as u64;
        if more > 0 { write!(f, "\n  and {more} more") } else { Ok(()) }
    }
}

/// Looks at all lines; those that can't be read have no `custom_id`.
///
/// # Errors
/// [`Duplicates`] when there are any; or when the lines can't be read.
pub fn scan(input: &Input, most_hashes: usize) -> Result<Scan> {
    let mut hashes = Hashes {
        state: RandomState::new(),
        parts: 1,
        part: 0,
        most: most_hashes,
        kept: Vec::new(),
        twice: HashSet::new(),
    };
    let scan = input.scan(|line| hashes.see(line))?;
    hashes.settle();
    for part in 1..hashes.parts {
        hashes.part = part;
        input.scan(|line| hashes.see(line))?;
        hashes.settle();
    }
    if hashes.twice.is_empty() {
        return Ok(scan);
    }
    // Different ids may have one hash.
    let mut seen: HashMap<String, u64> = HashMap::new();
    let mut duplicates = Duplicates { count: 0, told: Vec::new() };
    input.scan(|line| {
        let Some(custom_id) = custom_id(line).filter(|id| hashes.twice.contains(&hashes.state.hash_one(id))) else {
            return;
        };
        match seen.entry(custom_id) {
            Entry::Vacant(place) => {
                place.insert(line.number);
            }
            Entry::Occupied(known) => {
                duplicates.count += 1;
                if duplicates.told.len() < MOST_TOLD {
                    let (custom_id, first) = (known.key().clone(), *known.get());
                    duplicates.told.push(Duplicate { custom_id, first, again: line.number });
                }
            }
        }
    })?;
    if duplicates.count > 0 { Err(duplicates.into()) } else { Ok(scan) }
}

/// Hashes of one part of all ids. There are twice as many parts whenever one turns out to be too large.
struct Hashes {
    state: RandomState,
    parts: u64,
    part: u64,
    most: usize,
    kept: Vec<u64>,
    /// Those that were seen twice.
    twice: HashSet<u64>,
}

impl Hashes {
    fn see(&mut self, line: &Line) {
        let Some(hash) = custom_id(line).map(|id| self.state.hash_one(id)) else { return };
        if hash % self.parts != self.part {
            return;
        }
        self.kept.push(hash);
        // Only the first part can be halved: the others are as large as it has become.
        if self.part == 0 && self.kept.len() >= self.most {
            self.find_twice();
            self.parts *= 2;
            let parts = self.parts;
            self.kept.retain(|hash| hash % parts == 0);
        }
    }

    fn find_twice(&mut self) {
        self.kept.sort_unstable();
        let repeated = self.kept.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        self.twice.extend(repeated);
        self.kept.dedup();
    }

    /// The part is over.
    fn settle(&mut self) {
        self.find_twice();
        self.kept.clear();
    }
}

fn custom_id(line: &Line) -> Option<String> {
    match BatchRequest::parse(line.text.as_deref().ok()?) {
        Ok(request) => Some(request.custom_id),
        Err(bad) => bad.custom_id,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn scanned(ids: impl Iterator<Item = String>, most_hashes: usize) -> Result<Scan> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("input");
        let text: String = ids.map(|id| format!("{}\n", json!({"custom_id": id, "body": {}}))).collect();
        std::fs::write(
            &path,
            format!("{text}no json\nno json\n[\"a\"]\n[\"a\"]\n{{\"custom_id\": \"\"}}\n{{\"custom_id\": \"\"}}\n"),
        )
        .unwrap();
        scan(&Input::open(path.to_str().unwrap(), folder.path()).unwrap(), most_hashes)
    }

    #[test]
    fn both_lines_of_a_duplicate_are_told() {
        let ids = (0..50).map(|number| if number == 41 { "7".to_owned() } else { number.to_string() });
        let error = scanned(ids, MOST_HASHES).unwrap_err().to_string();
        assert!(error.contains("lines 8 and 42: \"7\"") && error.contains("of 1 lines"), "{error}");
    }

    #[test]
    fn several_passes_find_what_one_does() {
        let distinct = (0..1000).map(|number| number.to_string());
        assert_eq!(scanned(distinct, 16).unwrap().lines, 1006);
        let doubled = (0..1000).map(|number| (number % 900).to_string());
        let error = scanned(doubled, 16).unwrap_err().to_string();
        assert!(error.contains("of 100 lines") && error.contains("and 80 more"), "{error}");
        let same = (0..1000).map(|_| "same".to_owned());
        assert!(scanned(same, 16).unwrap_err().to_string().contains("of 999 lines"));
    }
}
