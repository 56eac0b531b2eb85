//! What was measured and what benches found, kept in the user's cache directory for each host and model.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use cadre_engine::{compute::Compute, kv::KvDtype};
use cadre_models::{Checkpoint, Formats};
use serde::{Deserialize, Serialize};

use crate::{
    engine::EngineOptions,
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
    pub fn new(
        checkpoint: &Checkpoint,
        formats: Formats,
        kv_dtype: KvDtype,
        compute: &Compute,
        threads: usize,
    ) -> Result<Self> {
        let device = checkpoint.directory().and_then(|directory| fs::metadata(directory).ok()).map(|data| data.dev());
        let device = device.map_or_else(String::new, |device| format!(", device {device}"));
        let (cpu, isa, model) = (host::cpu_name(), compute.isa, checkpoint.identity()?);
        Ok(Self(format!("{cpu}, {threads} threads, {isa}; {model} as {formats}, kv {kv_dtype:?}{device}")))
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
        let contents = path.as_deref().and_then(read).unwrap_or_default();
        Self { path, contents }
    }

    /// What was measured of this machine; nothing if `stored` experts are to be read and that was not measured.
    pub fn machine(&self, key: &Key, stored: bool) -> Option<&Machine> {
        self.contents.machines.get(&key.0).filter(|machine| !stored || !machine.reads.is_empty())
    }

    /// Keeps it, and the reads that were measured before if these were not.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn keep_machine(&mut self, key: &Key, mut machine: Machine) -> Result<()> {
        self.change(|contents| {
            let before = contents.machines.remove(&key.0);
            if machine.reads.is_empty() {
                machine.reads = before.map(|before| before.reads).unwrap_or_default();
            }
            contents.machines.insert(key.0.clone(), machine);
        })
    }

    /// What the last bench with the same limits found, `kind` with so many tokens or sequences.
    pub fn result(&self, key: &Key, options: &EngineOptions, kind: &str, size: usize) -> Option<Found> {
        self.contents.results.get(&within(key, options))?.get(&format!("{kind} {size}")).copied()
    }

    /// Keeps one.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn keep_result(
        &mut self,
        key: &Key,
        options: &EngineOptions,
        (kind, size): (&str, usize),
        found: Found,
    ) -> Result<()> {
        self.change(|contents| {
            let results = contents.results.entry(within(key, options)).or_default();
            results.insert(format!("{kind} {size}"), found);
        })
    }

    /// Changes what the file holds by now, whoever else wrote it. Writes another file and gives it the name, so that nobody
    /// reads half of one.
    fn change(&mut self, change: impl FnOnce(&mut Contents)) -> Result<()> {
        if let Some(contents) = self.path.as_deref().and_then(read) {
            self.contents = contents;
        }
        change(&mut self.contents);
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

/// One that another version wrote is as good as none: it can be measured again.
fn read(path: &Path) -> Option<Contents> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// The flags that change what a bench finds.
fn within(key: &Key, options: &EngineOptions) -> String {
    let EngineOptions { memory, kv_memory, max_num_batched_tokens, predict_experts, .. } = options;
    let bytes = |limit: &Option<u64>| limit.map_or_else(|| "default".to_owned(), |bytes| bytes.to_string());
    let (memory, kv_memory) = (bytes(memory), bytes(kv_memory));
    let predicting = if *predict_experts { ", predicting" } else { "" };
    format!("{}; memory {memory}, kv {kv_memory}, {max_num_batched_tokens} tokens a step{predicting}", key.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{plan::Reads, testing::engine_options};

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
        assert_eq!(kept.machine(&key, false), None);
        kept.keep_machine(&key, machine()).unwrap();
        let found = Found { speed: 12.5, seen: Some(Seen { distinct: 7.0, hit_rate: 0.5 }) };
        let within = |memory| EngineOptions { memory, ..engine_options() };
        kept.keep_result(&key, &within(Some(9)), ("decode", 8), found).unwrap();
        let kept = Kept::at(path);
        assert_eq!((kept.machine(&key, true), kept.machine(&other, true)), (Some(&machine()), None));
        assert_eq!(kept.result(&key, &within(Some(9)), "decode", 8), Some(found));
        for (memory, kind, size) in [(Some(8), "decode", 8), (None, "decode", 8), (Some(9), "prefill", 8)] {
            assert_eq!(kept.result(&key, &within(memory), kind, size), None);
        }
    }

    #[test]
    fn reads_are_kept_beside_what_was_measured_without_them() {
        let mut kept = Kept::at(None);
        let key = Key("a".to_owned());
        let resident = Machine { read_bandwidth: 3.5, reads: Vec::new(), ..machine() };
        kept.keep_machine(&key, resident.clone()).unwrap();
        assert_eq!((kept.machine(&key, false), kept.machine(&key, true)), (Some(&resident), None));
        kept.keep_machine(&key, machine()).unwrap();
        kept.keep_machine(&key, resident).unwrap();
        assert_eq!(kept.machine(&key, true), Some(&Machine { read_bandwidth: 3.5, ..machine() }));
    }

    #[test]
    fn what_others_kept_meanwhile_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = Some(directory.path().join("measured.json"));
        let (mut one, mut other) = (Kept::at(path.clone()), Kept::at(path.clone()));
        one.keep_machine(&Key("a".to_owned()), machine()).unwrap();
        other.keep_machine(&Key("b".to_owned()), machine()).unwrap();
        let kept = Kept::at(path);
        assert!(["a", "b"].into_iter().all(|key| kept.machine(&Key(key.to_owned()), true).is_some()));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_written_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("measured.json");
        fs::write(&path, "{\"machines\": 7").unwrap();
        let mut kept = Kept::at(Some(path.clone()));
        kept.keep_machine(&Key("a".to_owned()), machine()).unwrap();
        assert!(Kept::at(Some(path)).machine(&Key("a".to_owned()), true).is_some());
    }
}
