//! What a run saves to go on bit for bit: a folder `checkpoint-N` with the adapter (if it trains one), the optimizer's
//! numbers, and where the run stood.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use cadre_engine::train::{
    LogitMoments,
    guard::{GuardState, KeptBatch, Running},
    optimizer::AdamWState,
    parameters::Parameters,
};
use cadre_models::{adapter::AdapterFiles, training_state};
use serde::{Deserialize, Serialize};
use serde_json::Value;

const PREFIX: &str = "checkpoint-";
const STATE_FILE: &str = "trainer_state.json";
/// What a folder's name ends in while it is written.
const UNFINISHED: &str = ".unfinished";

/// Where a run stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Position {
    /// Steps made.
    pub step: u64,
    /// Batches drawn from the data; steps that tried a batch again drew none.
    pub drawn: u64,
    /// What the guard remembers.
    pub guard: GuardState,
    /// Of each layer's router, what its logits were in the applied steps of a routing warm-up; empty after it.
    pub logits: Vec<LogitMoments>,
}

/// A number by its bits: text would round it.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Bits(u64);

impl From<f64> for Bits {
    fn from(value: f64) -> Self {
        Self(value.to_bits())
    }
}

impl From<Bits> for f64 {
    fn from(bits: Bits) -> Self {
        Self::from_bits(bits.0)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct RunningFile {
    count: u64,
    mean: Bits,
    variance: Bits,
}

impl From<Running> for RunningFile {
    fn from(running: Running) -> Self {
        Self { count: running.count, mean: running.mean.into(), variance: running.variance.into() }
    }
}

impl From<RunningFile> for Running {
    fn from(file: RunningFile) -> Self {
        Self { count: file.count, mean: file.mean.into(), variance: file.variance.into() }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct LogitsFile {
    count: u64,
    sum: Bits,
    squares: Bits,
}

impl From<LogitMoments> for LogitsFile {
    fn from(moments: LogitMoments) -> Self {
        Self { count: moments.count, sum: moments.sum.into(), squares: moments.squares.into() }
    }
}

impl From<LogitsFile> for LogitMoments {
    fn from(file: LogitsFile) -> Self {
        Self { count: file.count, sum: file.sum.into(), squares: file.squares.into() }
    }
}

/// trainer_state.json. Numbers that aren't whole are given by their bits.
#[derive(Debug, Serialize, Deserialize)]
struct StateFile {
    global_step: u64,
    batches_drawn: u64,
    optimizer_updates: u64,
    settings: Value,
    guard_steps: u64,
    guard_loss: RunningFile,
    guard_gradient_norm: RunningFile,
    guard_kept: Vec<(Vec<u64>, u64)>,
    guard_skipped: u64,
    guard_recent_spikes: Vec<u64>,
    guard_skipped_in_a_row: u64,
    guard_learning_rate_factor: Bits,
    guard_lowered_until: u64,
    router_logits: Vec<LogitsFile>,
}

impl StateFile {
    fn new(position: &Position, updates: u64, settings: Value) -> Self {
        let guard = &position.guard;
        Self {
            global_step: position.step,
            batches_drawn: position.drawn,
            optimizer_updates: updates,
            settings,
            guard_steps: guard.steps,
            guard_loss: guard.loss.into(),
            guard_gradient_norm: guard.gradient_norm.into(),
            guard_kept: guard.kept.iter().map(|kept| (kept.examples.clone(), kept.retry_step)).collect(),
            guard_skipped: guard.skipped,
            guard_recent_spikes: guard.recent_spikes.clone(),
            guard_skipped_in_a_row: guard.skipped_in_a_row,
            guard_learning_rate_factor: guard.learning_rate_factor.into(),
            guard_lowered_until: guard.lowered_until,
            router_logits: position.logits.iter().copied().map(Into::into).collect(),
        }
    }

    fn position(self) -> Position {
        let kept = self.guard_kept.into_iter().map(|(examples, retry_step)| KeptBatch { examples, retry_step });
        let guard = GuardState {
            steps: self.guard_steps,
            loss: self.guard_loss.into(),
            gradient_norm: self.guard_gradient_norm.into(),
            kept: kept.collect(),
            skipped: self.guard_skipped,
            recent_spikes: self.guard_recent_spikes,
            skipped_in_a_row: self.guard_skipped_in_a_row,
            learning_rate_factor: self.guard_learning_rate_factor.into(),
            lowered_until: self.guard_lowered_until,
        };
        let logits = self.router_logits.into_iter().map(Into::into).collect();
        Position { step: self.global_step, drawn: self.batches_drawn, guard, logits }
    }
}

/// Writes `checkpoint-N` into `output`, there whole or not at all, and removes all but the latest `keep`. One that is there is
/// of the same run and step: it stays.
///
/// # Errors
/// When the system refuses.
pub fn save(
    output: &Path,
    position: &Position,
    files: Option<&AdapterFiles>,
    parameters: &Parameters,
    optimizer: &AdamWState,
    settings: &Value,
    keep: usize,
) -> Result<()> {
    let folder = folder(output, position.step);
    if folder.exists() {
        return remove_old(output, keep);
    }
    let unfinished = output.join(format!("{PREFIX}{}{UNFINISHED}", position.step));
    let failed = || format!("cannot save {}", folder.display());
    remove_unfinished(output)?;
    fs::create_dir_all(&unfinished).with_context(failed)?;
    files.map_or(Ok(()), |files| files.write(&unfinished, parameters))?;
    training_state::write(&unfinished, parameters, optimizer)?;
    let state = StateFile::new(position, optimizer.updates, settings.clone());
    write_synced(&unfinished.join(STATE_FILE), &serde_json::to_vec_pretty(&state)?).with_context(failed)?;
    fs::rename(&unfinished, &folder).with_context(failed)?;
    fs::File::open(output).and_then(|output| output.sync_all()).with_context(failed)?;
    remove_old(output, keep)
}

/// Removes what saves that were killed have left.
fn remove_unfinished(output: &Path) -> Result<()> {
    let step = |name: &str| name.strip_suffix(UNFINISHED)?.parse::<u64>().ok();
    let left = named(output)?.into_iter().filter(|(name, _)| step(name).is_some());
    left.into_iter().try_for_each(|(_, folder)| remove(&folder))
}

/// Removes all checkpoints but the latest `keep`.
fn remove_old(output: &Path, keep: usize) -> Result<()> {
    let all = found(output)?;
    all.iter().rev().skip(keep).try_for_each(|(_, folder)| remove(folder))
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    fs::write(path, bytes)?;
    fs::File::open(path)?.sync_all()
}

fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// The folder in `output` of the checkpoint after so many steps.
pub fn folder(output: &Path, step: u64) -> PathBuf {
    output.join(format!("{PREFIX}{step}"))
}

/// The checkpoints in `output` by their steps, ascending.
///
/// # Errors
/// When the system refuses to tell.
pub fn found(output: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let step = |(name, path): (String, PathBuf)| Some((name.parse().ok()?, path));
    let mut all: Vec<(u64, PathBuf)> = named(output)?.into_iter().filter_map(step).collect();
    all.sort();
    Ok(all)
}

/// What is named as checkpoints are, and what follows the prefix.
fn named(output: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut all = Vec::new();
    let entries = match fs::read_dir(output) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(all),
        entries => entries.with_context(|| format!("cannot read {}", output.display()))?,
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if let Some(rest) = name.strip_prefix(PREFIX) {
            all.push((rest.to_owned(), path));
        }
    }
    Ok(all)
}

/// Whether a run has left a checkpoint in `output`.
///
/// # Errors
/// When the system refuses to tell.
pub fn is_there(output: &Path) -> Result<bool> {
    Ok(!found(output)?.is_empty())
}

/// Reads the checkpoint in `folder`: the numbers that are trained into `parameters`.
///
/// # Errors
/// When it is broken, or of a run with other settings.
pub fn read(folder: &Path, parameters: &mut Parameters, settings: &Value) -> Result<(Position, AdamWState)> {
    let state = read_state(folder)?;
    for (name, value) in settings.as_object().into_iter().flatten() {
        let before = state.settings.get(name).unwrap_or(&Value::Null);
        ensure!(
            before == value,
            "--resume: the run in {} had {name} {before}, now it is {value}: give the same, or another --output",
            folder.display()
        );
    }
    let optimizer = training_state::read(folder, parameters, state.optimizer_updates)?;
    Ok((state.position(), optimizer))
}

/// The fingerprint of the model that the run of the checkpoint in `folder` began from.
///
/// # Errors
/// When the checkpoint is broken.
pub fn model_fingerprint(folder: &Path) -> Result<String> {
    let state = read_state(folder)?;
    let found = state.settings.get("model_fingerprint").and_then(Value::as_str);
    Ok(found.with_context(|| format!("{} names no model", folder.display()))?.to_owned())
}

fn read_state(folder: &Path) -> Result<StateFile> {
    let path = folder.join(STATE_FILE);
    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is broken", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use cadre_engine::train::guard::{Guard, GuardOptions};

    use super::*;

    #[test]
    fn a_checkpoint_that_is_there_is_never_taken_away_to_be_saved_again() {
        let directory = tempfile::tempdir().unwrap();
        let guard = Guard::new(GuardOptions::default()).state().clone();
        let state = AdamWState { updates: 0, first_moments: Vec::new(), second_moments: Vec::new() };
        let save = |step| {
            let position = Position { step, drawn: 0, guard: guard.clone(), logits: Vec::new() };
            save(directory.path(), &position, None, &Parameters::default(), &state, &Value::Null, 1).unwrap();
            let all = found(directory.path()).unwrap();
            assert_eq!(all.len(), 1, "as many as are to be kept");
            (all[0].0, fs::metadata(&all[0].1).unwrap().ino())
        };
        let first = save(3);
        assert_eq!(save(3), first);
        assert_eq!(save(5).0, 5);
    }
}
