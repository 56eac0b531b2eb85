//! adapter_model.safetensors: the names and shapes of PEFT, both ways.

use std::{collections::BTreeMap, path::Path};

use cadre_engine::{
    nn::Decoder,
    train::{
        parameters::Parameters,
        places::{PlaceInfo, places},
    },
};

use super::{AdapterConfig, AdapterFiles, At, Entry, Lora, Part, stack_of};
use crate::{
    Error, Result,
    files::{Files, write::write_whole},
    tensors::{Stored, TensorSet, Written, write_tensors},
};

/// The file of an adapter's tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The file that says what they are of.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// What is wrong if one of them is missing.
pub(super) const HINT: &str = "expected the folder of a LoRA adapter as PEFT saves it";
/// What PEFT's names begin with.
const PREFIX: &str = "base_model.model.";

/// The two tensors of an adapter, or of a stack of them, in a file.
struct Pair {
    a: usize,
    b: usize,
}

impl Lora {
    /// Reads the adapter in `directory` for `decoder`.
    ///
    /// # Errors
    /// When a file is missing or broken, or the adapter is of another model, or of a kind that cadre hasn't.
    pub fn read(directory: &Path, decoder: &Decoder) -> Result<Self> {
        Self::read_for(directory, &places(decoder))
    }

    /// The same for a decoder that has these places.
    ///
    /// # Errors
    /// As [`Lora::read`].
    pub fn read_for(directory: &Path, places: &[PlaceInfo]) -> Result<Self> {
        let files = Files::Directory(directory.to_owned());
        let config = AdapterConfig::parse(&files.label(CONFIG_FILE), &files.require(CONFIG_FILE, HINT)?)?;
        let missing = || Error::MissingFile { checkpoint: files.describe(), file: WEIGHTS_FILE.to_owned(), hint: HINT };
        let tensors = TensorSet::of_file(files.open(WEIGHTS_FILE)?.ok_or_else(missing)?)?;
        let (entries, pairs) = entries(&config, &tensors, places)?;
        // Every expert of a layer asks for its two stacks, gate|up and down in turn: each is read once.
        let mut stacks = BTreeMap::new();
        Self::assemble(config, entries, |index, entry| {
            let Pair { a, b } = pairs[index];
            let At::Stack { expert, count, .. } = entry.at else { return Ok([tensors.values(a)?, tensors.values(b)?]) };
            if !stacks.contains_key(&a) {
                if stacks.len() == 2 {
                    stacks.clear();
                }
                stacks.insert(a, [tensors.values(a)?, tensors.values(b)?]);
            }
            let [a, b] = &stacks[&a];
            Ok(entry.unstacked(expert, count, a, b))
        })
    }
}

impl AdapterFiles {
    /// Writes the adapters, whose numbers are `parameters`, into `directory`, which is made if it isn't there.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write(&self, directory: &Path, parameters: &Parameters) -> Result<()> {
        let path = directory.display().to_string();
        std::fs::create_dir_all(directory).map_err(|source| Error::CreateDirectory { path, source })?;
        let mut tensors = BTreeMap::new();
        let values: Vec<&[f32]> = parameters.iter().map(|parameter| parameter.values.as_slice()).collect();
        for (entry, values) in self.entries.iter().zip(values.chunks_exact(2)) {
            self.add(entry, values[0], values[1], &mut tensors);
        }
        write_tensors(directory, WEIGHTS_FILE, tensors.iter().map(|(name, tensor)| (name.clone(), tensor)))?;
        let config =
            serde_json::to_vec_pretty(&self.config).map_err(|error| Error::Encode { detail: error.to_string() })?;
        write_whole(directory, CONFIG_FILE, &config)
    }

    /// Reads the adapters in `directory` back, and returns the norm of what they add to the weights: the root of the sum of
    /// |A|² |B|², which is 0 only if all of them add nothing.
    ///
    /// # Errors
    /// When a file is missing or broken.
    pub fn delta_on_disk(&self, directory: &Path) -> Result<f64> {
        let files = Files::Directory(directory.to_owned());
        let hint = "it was just written";
        let missing = || Error::MissingFile { checkpoint: files.describe(), file: WEIGHTS_FILE.to_owned(), hint };
        let tensors = TensorSet::of_file(files.open(WEIGHTS_FILE)?.ok_or_else(missing)?)?;
        let square =
            |index: usize| Ok::<_, Error>(tensors.values(index)?.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>());
        let mut total = 0.0;
        for (index, info) in tensors.iter().enumerate() {
            let Some(name) = info.name.strip_suffix(".lora_A.weight") else { continue };
            if let Some(b) = tensors.find(&format!("{name}.lora_B.weight")) {
                total += square(index)? * square(b)?;
            }
        }
        Ok(total.sqrt())
    }

    fn add<'a>(&self, entry: &Entry, a: &'a [f32], b: &'a [f32], tensors: &mut BTreeMap<String, Written<'a>>) {
        let (rank, inputs, outputs) = (entry.rank, entry.inputs, entry.rows.len());
        let At::Stack { experts, part, expert, count } = &entry.at else {
            let name = format!("{PREFIX}{}", entry.name());
            let written =
                |shape: [usize; 2], values: &'a [f32]| Written { shape: shape.to_vec(), values: values.into() };
            tensors.insert(format!("{name}.lora_A.weight"), written([rank, inputs], a));
            tensors.insert(format!("{name}.lora_B.weight"), written([outputs, rank], b));
            return;
        };
        let name = format!("{PREFIX}{experts}{}", self.config.infix(*part));
        let mut stacked = |side, shape: [usize; 2], fill: &mut dyn FnMut(&mut [f32])| {
            let zeros = || Written { shape: shape.to_vec(), values: vec![0.0; shape[0] * shape[1]].into() };
            fill(tensors.entry(format!("{name}.{side}.weight")).or_insert_with(zeros).values.to_mut());
        };
        stacked("lora_A", [count * rank, inputs], &mut |stack| {
            stack[expert * rank * inputs..(expert + 1) * rank * inputs].copy_from_slice(a);
        });
        stacked("lora_B", [outputs, count * rank], &mut |stack| {
            for (row, values) in b.chunks_exact(rank).enumerate() {
                let places = stack[row * count * rank + expert..].iter_mut().step_by(*count);
                places.zip(values).for_each(|(place, value)| *place = *value);
            }
        });
    }
}

impl AdapterConfig {
    /// What stands between `….experts` and `.lora_A` for a stack. PEFT wraps one parameter around the other: if both are
    /// adapted, gate|up is the inner one.
    fn infix(&self, part: Part) -> &'static str {
        if part == Part::GateUp && self.stacks(Part::Down) { ".base_layer" } else { "" }
    }
}

impl Entry {
    /// One expert's A `[rank, inputs]` and B `[outputs, rank]` of a stack's A `[count · rank, inputs]` and B
    /// `[outputs, rank · count]`, whose columns are expert by expert within a rank.
    fn unstacked(&self, expert: usize, count: usize, a: &[f32], b: &[f32]) -> [Vec<f32>; 2] {
        let size = self.rank * self.inputs;
        let rows = b.chunks_exact(count * self.rank);
        let b = rows.flat_map(|row| row[expert..].iter().step_by(count).copied());
        [a[expert * size..(expert + 1) * size].to_vec(), b.collect()]
    }
}

/// What the file's tensors adapt, and which they are.
fn entries(config: &AdapterConfig, tensors: &TensorSet, places: &[PlaceInfo]) -> Result<(Vec<Entry>, Vec<Pair>)> {
    let mut used = vec![false; tensors.len()];
    let (mut entries, mut pairs) = (Vec::new(), Vec::new());
    for info in places {
        let stack = stack_of(info, places).filter(|(_, part, ..)| config.stacks(*part));
        if let Some((experts, part, expert, count)) = stack {
            let name = format!("{experts}{}", config.infix(part));
            if let Some((pair, rank)) = pair(tensors, &name, info.inputs, info.outputs(), count, &mut used)? {
                let scale = config.scale(&format!("{experts}.{}", part.name()), rank);
                let at = At::Stack { experts, part, expert, count };
                let rows = 0..info.outputs();
                entries.push(Entry { place: info.place, rows, inputs: info.inputs, rank, scale, at });
                pairs.push(pair);
            }
            continue;
        }
        let mut start = 0;
        for module in &info.modules {
            let rows = start..start + module.rows;
            start = rows.end;
            if let Some((pair, rank)) = pair(tensors, &module.name, info.inputs, module.rows, 1, &mut used)? {
                let scale = config.scale(&module.name, rank);
                let at = At::Module(module.name.clone());
                entries.push(Entry { place: info.place, rows, inputs: info.inputs, rank, scale, at });
                pairs.push(pair);
            }
        }
    }
    if let Some(index) = used.iter().position(|used| !used) {
        return Err(Error::AdapterOfAnother {
            file: tensors.label(index).to_owned(),
            tensor: tensors.info(index).name.clone(),
        });
    }
    if entries.is_empty() {
        return Err(Error::EmptyAdapter { file: tensors.describe() });
    }
    Ok((entries, pairs))
}

/// The tensors of the adapters `name`, `count` in a stack, and the rank of each.
fn pair(
    tensors: &TensorSet,
    name: &str,
    inputs: usize,
    outputs: usize,
    count: usize,
    used: &mut [bool],
) -> Result<Option<(Pair, usize)>> {
    let full = |side: &str| format!("{PREFIX}{name}.{side}.weight");
    let (a, b) = match (tensors.find(&full("lora_A")), tensors.find(&full("lora_B"))) {
        (None, None) => return Ok(None),
        (Some(a), Some(b)) => (a, b),
        (found, _) => {
            let tensor = full(if found.is_some() { "lora_B" } else { "lora_A" });
            return Err(Error::MissingTensor { files: tensors.describe(), tensor, expected: vec![] });
        }
    };
    let rank = tensors.info(a).shape.first().map_or(0, |rows| rows / count).max(1);
    for (index, expected) in [(a, [count * rank, inputs]), (b, [outputs, count * rank])] {
        let found = &tensors.info(index).shape;
        if *found != expected {
            let (file, tensor) = (tensors.label(index).to_owned(), tensors.info(index).name.clone());
            return Err(Error::TensorShape { file, tensor, expected: expected.to_vec(), found: found.clone() });
        }
        if let Stored::Packed(_) = tensors.info(index).stored {
            return Err(Error::AdapterOfAnother {
                file: tensors.label(index).to_owned(),
                tensor: tensors.info(index).name.clone(),
            });
        }
        used[index] = true;
    }
    Ok(Some((Pair { a, b }, rank)))
}
