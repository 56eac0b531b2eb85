//! What a training run needs to go on bit for bit: the numbers that are trained, and what the optimizer remembers.

use std::{collections::BTreeMap, path::Path};

use cadre_engine::train::{optimizer::AdamWState, parameters::Parameters};

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
    let files = Files::Directory(directory.to_owned());
    let source = files.open(FILE)?.ok_or_else(|| Error::MissingFile {
        checkpoint: files.describe(),
        file: FILE.to_owned(),
        hint: "expected the folder of a training checkpoint that `cadre finetune` saved",
    })?;
    let tensors = TensorSet::of_file(source)?;
    let count = KINDS.len() * parameters.iter().count();
    if tensors.len() != count {
        let (file, expected) = (tensors.describe(), format!("{count} tensors: the same settings as before"));
        return Err(Error::TrainingState { file, expected, found: tensors.len().to_string() });
    }
    let values = |kind: &str, name: &str, shape: &[usize]| {
        let name = format!("{kind}.{name}");
        let missing =
            || Error::MissingTensor { files: tensors.describe(), tensor: name.clone(), expected: shape.to_vec() };
        let index = tensors.find(&name).ok_or_else(missing)?;
        if tensors.info(index).shape != shape {
            let (file, tensor) = (tensors.label(index).to_owned(), name);
            let (expected, found) = (shape.to_vec(), tensors.info(index).shape.clone());
            return Err(Error::TensorShape { file, tensor, expected, found });
        }
        tensors.values(index)
    };
    let mut state = AdamWState { updates, first_moments: Vec::new(), second_moments: Vec::new() };
    let mut all = Vec::new();
    for parameter in parameters.iter() {
        let [value, first, second] = KINDS.map(|kind| values(kind, &parameter.name, &parameter.shape));
        all.push(value?);
        state.first_moments.push(first?);
        state.second_moments.push(second?);
    }
    // Nothing has changed until all is read.
    parameters.iter_mut().zip(all).for_each(|(parameter, values)| parameter.values = values);
    Ok(state)
}
