//! Loading tiny checkpoints of every architecture, whole and damaged.

use std::{path::Path, sync::Mutex};

use cadre_engine::{
    kv::KvDtype,
    model::Model,
    nn::{Format, Probe},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::{
    Error, architectures, open,
    testing::{TensorFile, index_json, tiny, write_checkpoint},
};

const AUTO: FormatOptions = FormatOptions { format: None, experts: None, dense: None };

type Tensors = Vec<(String, Vec<usize>)>;

/// A tiny checkpoint of an architecture, and the directory that it lies in.
fn tiny_checkpoint(architecture: &str) -> (TempDir, Checkpoint) {
    let directory = tempfile::tempdir().unwrap();
    let (config, tensors) = tiny(architecture);
    write_checkpoint(directory.path(), &config, &tensors);
    let checkpoint = open(Some(directory.path().to_str().unwrap()), &|_| {}).unwrap();
    (directory, checkpoint)
}

fn load_from(directory: &Path, options: FormatOptions) -> Result<LoadedModel> {
    let checkpoint = open(Some(directory.to_str().unwrap()), &|_| {})?;
    load(&checkpoint, &options, Placement::Resident, &Compute::new(2), &|_| {})
}

/// Loads a tiny model whose configuration and tensors were changed before they were written.
fn load_changed(architecture: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> Result<LoadedModel> {
    let directory = tempfile::tempdir().unwrap();
    let (mut config, mut tensors) = tiny(architecture);
    change(&mut config, &mut tensors);
    write_checkpoint(directory.path(), &config, &tensors);
    load_from(directory.path(), AUTO)
}

fn error_of(result: Result<LoadedModel>) -> String {
    match result {
        Ok(_) => panic!("it loaded"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_architecture_loads_and_counts_its_parameters() {
    for architecture in architectures() {
        let (_directory, checkpoint) = tiny_checkpoint(architecture);
        let told = Mutex::new(Vec::new());
        let loaded = load(&checkpoint, &AUTO, Placement::Resident, &Compute::new(2), &|progress| {
            told.lock().unwrap().push(progress)
        });
        let model = loaded.unwrap().decoder;
        let (info, summary) = (model.info(), checkpoint.summary().unwrap());
        assert_eq!((info.num_layers, info.hidden_size, info.vocab_size), (2, 8, 11), "{architecture}");
        assert_eq!(info.total_parameters, summary.total_parameters, "{architecture}");
        // The engine counts the one row of the embedding that a token uses; the summary all of it, as model cards do.
        assert_eq!(info.active_parameters + 10 * 8, summary.active_parameters, "{architecture}");
        let done = told.into_inner().unwrap().iter().map(|progress| progress.done_bytes).max();
        assert_eq!(done, Some(summary.total_bytes), "{architecture}");
    }
}

#[test]
fn the_embedded_model_loads() {
    let loaded = load(&open(None, &|_| {}).unwrap(), &AUTO, Placement::Resident, &Compute::new(2), &|_| {}).unwrap();
    assert_eq!(loaded.decoder.info().vocab_size, 640);
}

#[test]
fn every_missing_tensor_is_named() {
    for architecture in architectures() {
        for index in 0..tiny(architecture).1.len() {
            let mut name = String::new();
            let error = error_of(load_changed(architecture, |_, tensors| name = tensors.remove(index).0));
            assert!(error.contains(&format!("tensor {name} is missing")), "{architecture}: {error}");
        }
    }
}

#[test]
fn every_misshapen_tensor_is_named() {
    for architecture in architectures() {
        for index in 0..tiny(architecture).1.len() {
            let mut name = String::new();
            let error = error_of(load_changed(architecture, |_, tensors| {
                let (tensor, shape) = &mut tensors[index];
                shape[0] += 1;
                name.clone_from(tensor);
            }));
            assert!(error.contains(&format!("tensor {name}: expected shape")), "{architecture}: {error}");
        }
    }
}

#[test]
fn a_tensor_too_many_is_named() {
    for architecture in architectures() {
        for extra in ["model.layers.2.input_layernorm.weight", "model.layers.0.mlp.experts.4.up_proj.weight", "x"] {
            let error = error_of(load_changed(architecture, |_, tensors| tensors.push((extra.to_owned(), vec![2]))));
            assert!(error.contains(extra) && error.contains("does not use"), "{architecture}: {error}");
        }
    }
}

#[test]
fn extra_predictions_are_left_out() {
    let loaded = load_changed("bailing_moe_v2", |config, tensors| {
        config["num_nextn_predict_layers"] = json!(1);
        tensors.push(("model.layers.2.eh_proj.weight".to_owned(), vec![8, 16]));
    });
    assert_eq!(loaded.unwrap().decoder.info().num_layers, 2);
}

/// Whatever stands in a field, loading gives a model or an error, never a panic and never a huge allocation.
#[test]
fn no_value_of_a_field_is_fatal() {
    let values = [
        json!(null),
        json!(true),
        json!("silu"),
        json!([]),
        json!({}),
        json!({"type": "yarn", "factor": 0}),
        json!(-1),
        json!(0),
        json!(1),
        json!(3),
        json!(7),
        json!(0.5),
        json!(1e300),
        json!(65_535),
        json!(1 << 24),
        json!(i64::MAX),
        json!(u64::MAX),
    ];
    for architecture in architectures() {
        let fields: Vec<String> = tiny(architecture).0.as_object().unwrap().keys().cloned().collect();
        for field in fields.iter().map(String::as_str).chain(["rope_scaling", "rope_parameters", "mlp_only_layers"]) {
            for value in &values {
                if let Err(error) = load_changed(architecture, |config, _| config[field] = value.clone()) {
                    let text = error.to_string();
                    assert!(text.contains("expected"), "{architecture}: {field} = {value}: {text}");
                }
            }
        }
    }
}

#[test]
fn the_type_follows_the_checkpoint_or_the_caller() {
    let with = |write: fn(TensorFile, &str, &[usize], &[f32]) -> TensorFile| -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let (config, tensors) = tiny("qwen3_moe");
        std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        let file = tensors.iter().fold(TensorFile::default(), |file, (name, shape)| {
            write(file, name, shape, &vec![0.5; shape.iter().product()])
        });
        file.write(&directory.path().join("model.safetensors"));
        directory
    };
    let formats = |directory: &TempDir, options| load_from(directory.path(), options).unwrap().formats.to_string();
    for (directory, auto) in [
        (with(TensorFile::bf16), Format::Bf16),
        (with(TensorFile::f16), Format::F32),
        (with(TensorFile::f32), Format::F32),
    ] {
        assert_eq!(formats(&directory, AUTO), auto.to_string());
        assert_eq!(formats(&directory, FormatOptions::all(Format::F32)), "f32");
        assert_eq!(formats(&directory, FormatOptions::all(Format::Bf16)), "bf16");
        let two = FormatOptions { experts: Some(Format::Bf16), ..FormatOptions::all(Format::F32) };
        assert_eq!(formats(&directory, two), "bf16 experts, f32 dense");
    }
}

#[test]
fn shards_make_one_model() {
    let directory = tempfile::tempdir().unwrap();
    let (config, tensors) = tiny("olmoe");
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    let mut index = Vec::new();
    for (number, part) in tensors.chunks(10).enumerate() {
        let shard = format!("model-{number:05}.safetensors");
        let file = part.iter().fold(TensorFile::default(), |file, (name, shape)| {
            file.bf16(name, shape, &vec![0.5; shape.iter().product()])
        });
        file.write(&directory.path().join(&shard));
        index.extend(part.iter().map(|(name, _)| (name.clone(), shard.clone())));
    }
    let entries: Vec<_> = index.iter().map(|(name, shard)| (name.as_str(), shard.as_str())).collect();
    std::fs::write(directory.path().join("model.safetensors.index.json"), index_json(&entries)).unwrap();
    assert!(load_from(directory.path(), AUTO).is_ok());
    std::fs::write(directory.path().join("model-00001.safetensors"), "").unwrap();
    let error = load_from(directory.path(), AUTO).err().unwrap();
    assert!(matches!(&error, Error::TensorFile { file, .. } if file.ends_with("model-00001.safetensors")), "{error}");
}

#[test]
fn an_outline_has_the_sizes_of_what_is_loaded() {
    for architecture in architectures() {
        let (_directory, checkpoint) = tiny_checkpoint(architecture);
        let compute = Compute::new(2);
        for options in [AUTO, FormatOptions::all(Format::Q8_0)] {
            let loaded = load(&checkpoint, &options, Placement::Resident, &compute, &|_| {}).unwrap();
            let outline = outline(&checkpoint, &options, Placement::Resident, &compute).unwrap();
            assert_eq!((outline.decoder.info(), outline.formats), (loaded.decoder.info(), loaded.formats));
        }
        let stored = outline(&checkpoint, &AUTO, Placement::Stored, &compute).unwrap();
        let count: usize = stored.decoder.info().moe_layers.iter().map(|layer| layer.experts).sum();
        let experts = stored.experts.unwrap();
        assert!(experts.count() == count && experts.conversion().is_some(), "{architecture}");
    }
}

#[test]
fn an_outline_can_be_timed() {
    for architecture in architectures() {
        let (_directory, checkpoint) = tiny_checkpoint(architecture);
        let compute = Compute::new(2);
        let outline = outline(&checkpoint, &AUTO, Placement::Resident, &compute).unwrap();
        for bytes in [1, 1 << 20] {
            let mut probe = Probe::new(&compute, &outline.decoder, KvDtype::Bf16, bytes).unwrap();
            let (decode, prefill) = (probe.decode(3).unwrap(), probe.prefill(5).unwrap());
            assert_eq!((decode.tokens, decode.head_rows, prefill.tokens, prefill.head_rows), (3, 3, 5, 1));
            for times in [decode, prefill] {
                let seconds = [times.layer_seconds, times.head_seconds, times.expert_seconds];
                assert!(seconds.iter().all(|seconds| *seconds > 0.0 && seconds.is_finite()), "{times:?}");
                assert!((1.0..=5.0).contains(&times.rows_per_expert), "{times:?}");
            }
        }
    }
}
