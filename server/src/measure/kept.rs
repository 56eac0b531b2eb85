//! What was measured and what benches found, kept in the user's cache directory for each host and model.

use std::{collections::BTreeMap, fs, io::Write, os::unix::fs::MetadataExt, path::PathBuf};

use anyhow::{Context, Result};
use cadre_engine::compute::Compute;
use cadre_models::{Checkpoint, Formats};
use serde::{Deserialize, Serialize};

use crate::{
    host,
    plan::{Machine, Seen},
};

/// What is kept under: this host, this model in these formats, and where its files lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// Of `checkpoint` with `threads` threads.
    ///
    /// # Errors
    /// When the checkpoint's headers can't be read.
    pub fn new(checkpoint: &Checkpoint, formats: Formats, compute: &Compute, threads: usize) -> Result<Self> {
        let device = checkpoint.directory().and_then(|directory| fs::metadata(directory).ok()).map(|data| data.dev());
        let device = device.map_or_else(String::new, |device| format!(", device {device}"));
        let (cpu, isa, model) = (host::cpu_name(), compute.isa, checkpoint.identity()?);
        Ok(Self(format!("{cpu}, {threads} threads, {isa}; {model} as {formats}{device}")))
    }
}

/// What was measured before, by host and model.
pub struct Kept {
    path: Option<PathBuf>,
    contents: Contents,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Contents {
    machines: BTreeMap<String, Machine>,
    results: BTreeMap<String, BTreeMap<String, Found>>,
}

/// What a bench found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// Tokens per second.
    pub speed: f64,
    /// How experts that didn't fit the memory fared.
    pub seen: Option<Seen>,
}

impl Kept {
    /// What the user's cache directory has; nothing if it can't be read.
    pub fn open() -> Self {
        Self::at(host::cache_directory().map(|directory| directory.join("cadre/measured.json")))
    }

    fn at(path: Option<PathBuf>) -> Self {
        let read = || serde_json::from_slice(&fs::read(path.as_ref()?).ok()?).ok();
        // One that another version wrote is as good as none: it can be measured again.
        let contents = read().unwrap_or_default();
        Self { path, contents }
    }

    /// What was measured of this machine.
    pub fn machine(&self, key: &Key) -> Option<&Machine> {
        self.contents.machines.get(&key.0)
    }

    /// Keeps it.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn keep_machine(&mut self, key: &Key, machine: Machine) -> Result<()> {
        self.contents.machines.insert(key.0.clone(), machine);
        self.write()
    }

    /// What the last bench found within `memory` bytes, `kind` with so many `tokens` or sequences.
    pub fn result(&self, key: &Key, memory: Option<u64>, kind: &str, size: usize) -> Option<Found> {
        self.contents.results.get(&within(key, memory))?.get(&format!("{kind} {size}")).copied()
    }

    /// Keeps one.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn keep_result(
        &mut self,
        key: &Key,
        memory: Option<u64>,
        (kind, size): (&str, usize),
        found: Found,
    ) -> Result<()> {
        let results = self.contents.results.entry(within(key, memory)).or_default();
        results.insert(format!("{kind} {size}"), found);
        self.write()
    }

    /// Writes another file and gives it the name, so that nobody reads half of one.
    fn write(&self) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let told = || format!("cannot keep what was measured in {}", path.display());
        let write = || {
            fs::create_dir_all(path.parent().unwrap_or(path))?;
            let unfinished = path.with_extension(format!("{}.unfinished", std::process::id()));
            fs::File::create(&unfinished)?.write_all(&serde_json::to_vec_pretty(&self.contents)?)?;
            fs::rename(unfinished, path)
        };
        write().with_context(told)
    }
}

fn within(key: &Key, memory: Option<u64>) -> String {
    memory.map_or_else(|| key.0.clone(), |bytes| format!("{}; within {bytes} bytes", key.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Reads;

    fn machine() -> Machine {
        let reads = vec![Reads { experts: 2, bytes: 7, seconds: 0.5 }];
        Machine { read_bandwidth: 1.5, matrix_rate: 2.5, steps: Vec::new(), reads }
    }

    #[test]
    fn what_was_measured_is_there_the_next_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = Some(directory.path().join("cadre/measured.json"));
        let (key, other) = (Key("a".to_owned()), Key("b".to_owned()));
        let mut kept = Kept::at(path.clone());
        assert_eq!(kept.machine(&key), None);
        kept.keep_machine(&key, machine()).unwrap();
        let found = Found { speed: 12.5, seen: Some(Seen { distinct: 7.0, hit_rate: 0.5 }) };
        kept.keep_result(&key, Some(9), ("decode", 8), found).unwrap();
        let kept = Kept::at(path);
        assert_eq!((kept.machine(&key), kept.machine(&other)), (Some(&machine()), None));
        assert_eq!(kept.result(&key, Some(9), "decode", 8), Some(found));
        for (memory, kind, size) in [(Some(8), "decode", 8), (None, "decode", 8), (Some(9), "prefill", 8)] {
            assert_eq!(kept.result(&key, memory, kind, size), None);
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_written_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("measured.json");
        fs::write(&path, "{\"machines\": 7").unwrap();
        let mut kept = Kept::at(Some(path.clone()));
        kept.keep_machine(&Key("a".to_owned()), machine()).unwrap();
        assert!(Kept::at(Some(path)).machine(&Key("a".to_owned())).is_some());
    }
}
