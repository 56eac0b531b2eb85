//! The mean of adapters: what the last checkpoints of a run give in place of a decaying learning rate (WSM, Tian et al.,
//! arXiv:2507.17634).
//!
//! WSM takes the mean of weights, and those of a model with an adapter are W + scale · B · A. The mean of the products is
//! not the product of the means: mean(B) · mean(A) misses how B and A vary together. So nothing is rounded or fitted
//! here: k adapters of rank r side by side are one of rank k · r, [B₁ … Bₖ] · [A₁; …; Aₖ] is the sum of the products, and
//! alpha / (k · r) divides it by k. The price is a file k times as large; merged into the weights, it costs nothing.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use super::{
    AdapterConfig,
    file::{CONFIG_FILE, HINT, WEIGHTS_FILE},
};
use crate::{
    Error, Result,
    files::{
        Files,
        write::{create_directory, write_whole},
    },
    tensors::{TensorInfo, TensorSet, write_one_by_one},
};

/// What averaging gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Averaged {
    /// The adapters' rank.
    pub rank: usize,
    /// That of their mean.
    pub averaged_rank: usize,
    /// Tensors of each.
    pub tensors: usize,
}

/// Writes into the directory `output` an adapter that adds the mean of what those in `directories`, of one run, add.
///
/// # Errors
/// When a file is missing or broken, the adapters are not alike, or `output` has an adapter already or can't be written
/// to.
pub fn average(directories: &[PathBuf], output: &Path) -> Result<Averaged> {
    let adapters = directories.iter().map(|directory| Saved::read(directory)).collect::<Result<Vec<_>>>()?;
    let Some((first, others)) = adapters.split_first() else {
        return Err(Error::EmptyAdapter { file: "the list of directories to average".to_owned() });
    };
    others.iter().try_for_each(|other| other.check_like(first))?;
    let out = Files::Directory(output.to_owned());
    for name in [CONFIG_FILE, WEIGHTS_FILE] {
        if out.open(name)?.is_some() {
            let (expected, found) = ("a directory without an adapter".to_owned(), "one".to_owned());
            return Err(Error::OutputInTheWay { file: out.label(name), expected, found });
        }
    }
    let (count, rank) = (adapters.len(), first.config.r);
    let mut config = AdapterConfig { r: count * rank, ..first.config.clone() };
    if config.use_rslora {
        // alpha / √(k · r) has √k in place of k.
        let factor = (count as f64).sqrt();
        config.lora_alpha /= factor;
        config.alpha_pattern.values_mut().for_each(|alpha| *alpha /= factor);
    }
    let wider = |info: &TensorInfo| {
        let mut shape = info.shape.clone();
        shape[usize::from(!is_a(&info.name))] *= count;
        (info.name.clone(), shape)
    };
    let shapes: Vec<(String, Vec<usize>)> = first.tensors.iter().map(wider).collect();
    create_directory(output)?;
    write_one_by_one(output, WEIGHTS_FILE, &shapes, &|index| {
        let all = adapters.iter().map(|adapter| adapter.values(&shapes[index].0)).collect::<Result<Vec<_>>>()?;
        // A is `[experts · rank, inputs]`, B `[outputs, rank · experts]` with a rank's experts side by side.
        let (rows, columns) = (first.tensors.info(index).shape[0], first.tensors.info(index).shape[1]);
        let pieces = if is_a(&shapes[index].0) { rows / rank } else { rows };
        let size = rows * columns / pieces.max(1);
        let interleaved =
            (0..pieces).flat_map(|piece| all.iter().map(move |one| &one[piece * size..(piece + 1) * size]));
        Ok(Cow::Owned(interleaved.flatten().copied().collect()))
    })?;
    let bytes = serde_json::to_vec_pretty(&config).map_err(|error| Error::Encode { detail: error.to_string() })?;
    write_whole(output, CONFIG_FILE, &bytes)?;
    Ok(Averaged { rank, averaged_rank: count * rank, tensors: shapes.len() })
}

/// Whether the tensor is an A, else it is a B.
fn is_a(name: &str) -> bool {
    name.ends_with(".lora_A.weight")
}

/// An adapter on disk.
struct Saved {
    config: AdapterConfig,
    tensors: TensorSet,
}

impl Saved {
    fn read(directory: &Path) -> Result<Self> {
        let files = Files::Directory(directory.to_owned());
        let label = files.label(CONFIG_FILE);
        let config = AdapterConfig::parse(&label, &files.require(CONFIG_FILE, HINT)?)?;
        if !config.rank_pattern.is_empty() {
            return Err(Error::field(&label, "rank_pattern", "one rank for all modules", "several"));
        }
        let missing = || Error::MissingFile { checkpoint: files.describe(), file: WEIGHTS_FILE.to_owned(), hint: HINT };
        let tensors = TensorSet::of_file(files.open(WEIGHTS_FILE)?.ok_or_else(missing)?)?;
        for (index, info) in tensors.iter().enumerate() {
            let axis = usize::from(!is_a(&info.name));
            let has_ranks = info.shape.get(axis).is_some_and(|size| *size > 0 && size.is_multiple_of(config.r));
            if info.shape.len() != 2 || !has_ranks || !(is_a(&info.name) || info.name.ends_with(".lora_B.weight")) {
                return Err(Error::TensorEntry {
                    file: tensors.label(index).to_owned(),
                    tensor: info.name.clone(),
                    what: "shape",
                    expected: format!("a lora_A or lora_B of rank {}", config.r),
                    found: format!("{:?}", info.shape),
                });
            }
        }
        Ok(Self { config, tensors })
    }

    /// Whether it is an adapter of the same run as `first`.
    fn check_like(&self, first: &Self) -> Result<()> {
        let told = |saved: &Self| {
            let shapes: Vec<_> = saved.tensors.iter().map(|info| (&info.name, &info.shape)).collect();
            (saved.config.clone(), shapes.iter().map(|(name, shape)| format!("{name} {shape:?}")).collect::<Vec<_>>())
        };
        let (mine, theirs) = (told(self), told(first));
        if mine == theirs {
            return Ok(());
        }
        let what = if mine.0 == theirs.0 { "tensors" } else { "settings" };
        let (file, first) = (self.tensors.describe(), first.tensors.describe());
        Err(Error::UnlikeAdapters { file, what, first })
    }

    fn values(&self, name: &str) -> Result<Vec<f32>> {
        // It has the same tensors as the first one.
        let missing =
            || Error::MissingTensor { files: self.tensors.describe(), tensor: name.to_owned(), expected: vec![] };
        self.tensors.values(self.tensors.find(name).ok_or_else(missing)?)
    }
}

#[cfg(test)]
mod tests;
