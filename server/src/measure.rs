//! Measures what [`crate::plan`] reckons with: the limits of this machine, the steps of a model's shapes, and reads of its
//! experts, in about five seconds. What was measured is kept in the user's cache directory for each host and model,
//! and so is what `cadre bench` found.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use cadre_engine::{
    compute::{Compute, Roofline},
    experts::{ExpertStore, Lane},
    kv::KvDtype,
    model::{Model, ModelInfo},
    nn::{Format, Probe, StepTimes},
};
use cadre_models::{Checkpoint, Formats, Outline, UnopenedExperts};
use serde::{Deserialize, Serialize};

use crate::{
    host,
    plan::{Machine, Reads, Seen, Step},
};

/// The buffer whose reading is timed: larger than any cache.
const BUFFER_BYTES: u64 = 1 << 30;
/// Below this a large cache might hold it.
const LEAST_BUFFER_BYTES: usize = 256 << 20;
/// Made-up layers: two of a model with large experts.
const LAYER_BYTES: usize = 512 << 20;
/// Sequences of the steps that are timed, and how often each is by turns.
const DECODES: [usize; 3] = [1, 8, 32];
const DECODE_TURNS: usize = 4;
/// Tokens of the prompts that are timed.
const PREFILLS: [usize; 2] = [128, 512];
/// How long steps are timed; each at least once.
const STEPS_TIME: Duration = Duration::from_millis(2200);
/// Experts that are asked for at once, and how long each number is tried.
const READS: [usize; 5] = [1, 2, 4, 8, 16];
const READS_TIME: Duration = Duration::from_millis(200);
/// Slots to read into.
const READ_BYTES: usize = 256 << 20;

/// What the machine can do in a model whose experts have `format`.
///
/// # Errors
/// When there is no memory for it.
pub fn roofline(compute: &Compute, format: Format) -> Result<Roofline> {
    let quarter = host::free_memory_bytes().map_or(BUFFER_BYTES, |bytes| bytes / 4);
    let buffer_bytes = usize::try_from(BUFFER_BYTES.min(quarter))?;
    ensure!(
        buffer_bytes >= LEAST_BUFFER_BYTES,
        "measuring this machine reads a quarter of the free memory, which must be more than the caches hold: expected at \
         least {LEAST_BUFFER_BYTES} bytes, found {buffer_bytes}; free memory, or leave --roofline and --measure out"
    );
    Ok(compute.roofline(format, buffer_bytes)?)
}

/// Measures this machine for the model.
///
/// # Errors
/// When memory can't be had, or the experts can't be read.
pub fn machine(compute: &Compute, outline: Outline, kv_dtype: KvDtype) -> Result<Machine> {
    let Outline { decoder, formats, experts } = outline;
    let Roofline { read_bandwidth, matrix_rate } = roofline(compute, formats.experts)?;
    let layer_bytes = host::free_memory_bytes().map_or(LAYER_BYTES, |free| LAYER_BYTES.min(free as usize / 4));
    let mut probe = Probe::new(compute, &decoder, kv_dtype, layer_bytes)?;
    let steps = steps(&mut probe)?;
    drop(probe);
    let reads = experts.map(|experts| reads(experts, decoder.info())).transpose()?.unwrap_or_default();
    Ok(Machine { read_bandwidth, matrix_rate, steps, reads })
}

/// Each step's median: the machine's speed changes within seconds.
fn steps(probe: &mut Probe<'_>) -> Result<Vec<Step>> {
    let mut times: Vec<Vec<StepTimes>> = vec![Vec::new(); DECODES.len() + PREFILLS.len()];
    let begun = Instant::now();
    let mut warm = false;
    while begun.elapsed() < STEPS_TIME || times[0].is_empty() {
        for (&sequences, times) in DECODES.iter().zip(&mut times) {
            // The first one finds memory that was never touched.
            let turns = if warm { DECODE_TURNS } else { 1 };
            for turn in 0..turns {
                let step = probe.decode(sequences)?;
                if warm || turn > 0 {
                    times.push(step);
                }
            }
        }
        for (&tokens, times) in PREFILLS.iter().zip(&mut times[DECODES.len()..]) {
            times.push(probe.prefill(tokens)?);
        }
        warm = true;
    }
    let median = |times: &[StepTimes]| -> Option<Step> {
        let middle = |of: fn(&StepTimes) -> f64| {
            let mut all: Vec<f64> = times.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        Some(Step {
            layer_seconds: middle(|times| times.layer_seconds),
            head_seconds: middle(|times| times.head_seconds),
            expert_seconds: middle(|times| times.expert_seconds),
            rows_per_expert: middle(|times| times.rows_per_expert),
            ..(*times.first()?).into()
        })
    };
    Ok(times.iter().filter_map(|times| median(times)).collect())
}

/// Reads experts by way of the store, one group after the other over the whole pack, so that none lies in memory.
fn reads(experts: UnopenedExperts, info: &ModelInfo) -> Result<Vec<Reads>> {
    let (slot_bytes, count) = (experts.slot_bytes().max(1), experts.count());
    let most = READS.iter().copied().max().unwrap_or(1).min(READ_BYTES / slot_bytes).min(count / 2).max(1);
    let store = experts.open(most)?;
    let mut groups =
        Groups { layers: info.moe_layers.iter().map(|layer| layer.experts).collect(), layer: 0, expert: 0 };
    let mut all = Vec::new();
    for experts in READS.into_iter().filter(|experts| *experts <= most) {
        let (mut done, begun) = (Vec::new(), Instant::now());
        while begun.elapsed() < READS_TIME {
            let Some((layer, group)) = groups.next(experts) else { break };
            let before = store.counters();
            let start = Instant::now();
            fetch(&store, layer, &group)?;
            let (took, fetched) = (start.elapsed().as_secs_f64(), store.counters().since(&before));
            // Those that lay in a slot tell nothing.
            if fetched.misses() == experts as u64 {
                done.push((fetched.fetched_bytes, took));
            }
        }
        if let Some(bytes) = done.iter().map(|(bytes, _)| bytes).sum::<u64>().checked_div(done.len() as u64) {
            let seconds = done.iter().map(|(_, took)| took).sum::<f64>() / done.len() as f64;
            all.push(Reads { experts, bytes, seconds });
        }
    }
    Ok(all)
}

fn fetch(store: &ExpertStore, layer: usize, experts: &[usize]) -> Result<()> {
    let mut visit = store.visit(layer, experts, Lane::Scan);
    while !visit.landed()?.is_empty() {}
    Ok(())
}

/// Goes through the experts of all layers, again and again.
struct Groups {
    layers: Vec<usize>,
    layer: usize,
    expert: usize,
}

impl Groups {
    /// The next so many of one layer; none if no layer has so many.
    fn next(&mut self, experts: usize) -> Option<(usize, Vec<usize>)> {
        for _ in 0..=self.layers.len() {
            let (layer, first) = (self.layer, self.expert);
            if first + experts <= *self.layers.get(layer)? {
                self.expert += experts;
                return Some((layer, (first..first + experts).collect()));
            }
            (self.layer, self.expert) = ((layer + 1) % self.layers.len(), 0);
        }
        None
    }
}

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

    #[test]
    fn groups_go_through_all_layers_and_stay_within_one() {
        let mut groups = Groups { layers: vec![3, 1, 4], layer: 0, expert: 0 };
        let mut next = |experts| groups.next(experts);
        assert_eq!(next(2), Some((0, vec![0, 1])));
        assert_eq!(next(2), Some((2, vec![0, 1])));
        assert_eq!(next(1), Some((2, vec![2])));
        assert_eq!(next(4), Some((2, vec![0, 1, 2, 3])));
        assert_eq!(next(1), Some((0, vec![0])));
        assert_eq!(next(5), None);
    }
}
