//! What a training run needs to go on bit for bit: the numbers that are trained, and what the optimizer remembers.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use cadre_engine::train::{
    optimizer::AdamWState,
    parameters::{Parameter, Parameters},
};

use crate::{
    Error, Result,
    files::Files,
    tensors::{TensorSet, Written, write_tensors},
};

/// The file in a checkpoint's directory.
const FILE: &str = "optimizer.safetensors";
/// What the tensors' names begin with: the values, the mean of gradients and that of their squares.
const KINDS: [&str; 3] = ["value", "exp_avg", "exp_avg_sq"];

/// Writes them into `directory`.
///
/// # Errors
/// When the system refuses.
pub fn write(directory: &Path, parameters: &Parameters, optimizer: &AdamWState) -> Result<()> {
    let mut tensors = BTreeMap::new();
    let moments = optimizer.first_moments.iter().zip(&optimizer.second_moments);
    for (parameter, (first, second)) in parameters.iter().zip(moments) {
        for (kind, values) in KINDS.into_iter().zip([&parameter.values, first, second]) {
            let written = Written { shape: parameter.shape.clone(), values: values.into() };
            tensors.insert(format!("{kind}.{}", parameter.name), written);
        }
    }
    write_tensors(directory, FILE, tensors.iter().map(|(name, tensor)| (name.clone(), tensor)))
}

/// Reads them from `directory`: the values into `parameters`; `updates` is how many the optimizer had made.
///
/// # Errors
/// When the file is missing or broken, or of other parameters.
pub fn read(directory: &Path, parameters: &mut Parameters, updates: u64) -> Result<AdamWState> {
    let tensors = open(directory)?;
    let count = KINDS.len() * parameters.iter().count();
    if tensors.len() != count {
        let (file, expected) = (tensors.describe(), format!("{count} tensors: the same settings as before"));
        return Err(Error::TrainingState { file, expected, found: tensors.len().to_string() });
    }
    let mut state = AdamWState { updates, first_moments: Vec::new(), second_moments: Vec::new() };
    let mut all = Vec::new();
    for parameter in parameters.iter() {
        let [value, first, second] = KINDS.map(|kind| values(&tensors, kind, &parameter.name, &parameter.shape));
        all.push(value?);
        state.first_moments.push(first?);
        state.second_moments.push(second?);
    }
    // Nothing has changed until all is read.
    parameters.iter_mut().zip(all).for_each(|(parameter, values)| parameter.values = values);
    Ok(state)
}

/// The mean of the values that the checkpoints in `directories`, of one run, had come to. Each is summed in f64 and rounded
/// once; beside the mean, one tensor is in memory.
///
/// # Errors
/// When a file is missing or broken, or of other parameters than the first.
pub fn mean(directories: &[PathBuf]) -> Result<Parameters> {
    let all = directories.iter().map(|directory| open(directory)).collect::<Result<Vec<_>>>()?;
    let mut mean = Parameters::default();
    for info in all.first().into_iter().flat_map(TensorSet::iter) {
        let Some(name) = info.name.strip_prefix(KINDS[0]).and_then(|name| name.strip_prefix('.')) else { continue };
        let mut sums = vec![0.0; info.shape.iter().product()];
        for tensors in &all {
            let values = values(tensors, KINDS[0], name, &info.shape)?;
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(value));
        }
        let values = sums.into_iter().map(|sum| (sum / all.len() as f64) as f32).collect();
        mean.push(Parameter { name: name.to_owned(), shape: info.shape.clone(), values })?;
    }
    Ok(mean)
}

fn open(directory: &Path) -> Result<TensorSet> {
    let files = Files::Directory(directory.to_owned());
    TensorSet::of_file(files.open(FILE)?.ok_or_else(|| Error::MissingFile {
        checkpoint: files.describe(),
        file: FILE.to_owned(),
        hint: "expected the folder of a training checkpoint that `cadre finetune` saved",
    })?)
}

/// The numbers of a kind of the parameter `name`.
fn values(tensors: &TensorSet, kind: &str, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let tensor = format!("{kind}.{name}");
    let Some(index) = tensors.find(&tensor) else {
        return Err(Error::MissingTensor { files: tensors.describe(), tensor, expected: shape.to_vec() });
    };
    if tensors.info(index).shape != shape {
        let file = tensors.label(index).to_owned();
        let (expected, found) = (shape.to_vec(), tensors.info(index).shape.clone());
        return Err(Error::TensorShape { file, tensor, expected, found });
    }
    tensors.values(index)
}
