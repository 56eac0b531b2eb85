//! Adapters of tiny checkpoints, merged: the numbers, and what is refused.

use std::{fs, path::PathBuf, sync::atomic::AtomicBool};

use cadre_engine::nn::Decoder;
use tempfile::TempDir;

use super::*;
use crate::{
    StoredType,
    adapter::{AdapterLayout, LoraOptions, LoraPlan},
    checkpoint::open_directory,
    targets::ALL_LINEAR,
    testing::{tiny, write_checkpoint},
    tokenizer::tests::byte_level_json,
};

/// A checkpoint, an adapter of it, and a place to merge them.
struct Rig {
    directory: TempDir,
}

impl Rig {
    fn new(architecture: &str) -> Self {
        let rig = Self { directory: tempfile::tempdir().unwrap() };
        fs::create_dir(rig.path("source")).unwrap();
        let (config, tensors) = tiny(architecture);
        write_checkpoint(&rig.path("source"), &config, &tensors);
        fs::write(rig.path("source").join("tokenizer.json"), byte_level_json().to_string()).unwrap();
        rig
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn decoder(&self) -> Decoder {
        let options = FormatOptions { format: None, experts: None, dense: None };
        let checkpoint = open_directory(&self.path("source")).unwrap();
        outline(&checkpoint, &options, Placement::Resident, &Compute::new(1)).unwrap().decoder
    }

    /// An adapter whose factors are all other numbers, in thousandths, changed by `change`: by the name of each and its
    /// values.
    fn adapter(&self, targets: &[&str], layout: AdapterLayout, change: impl Fn(&str, &mut [f32])) -> Lora {
        let targets = targets.iter().map(|target| (*target).to_owned()).collect();
        let options = LoraOptions { rank: 3, alpha: 6.0, rslora: false, dropout: 0.0, targets, layout, seed: 1 };
        let mut lora = LoraPlan::new(&self.decoder(), "base", &options).unwrap().build().unwrap();
        for (index, parameter) in lora.parameters.iter_mut().enumerate() {
            let number = |place: usize| ((index * 7 + place * 13) % 101) as f32 / 1000.0 - 0.05;
            parameter.values.iter_mut().enumerate().for_each(|(place, value)| *value = number(place));
            change(&parameter.name, &mut parameter.values);
        }
        lora.files.write(&self.path("adapter"), &lora.parameters).unwrap();
        lora
    }

    fn merge(&self, dtype: Option<StoredType>) -> Result<Rewritten> {
        let stop = AtomicBool::new(false);
        let rewriting = Rewriting { output: &self.path("output"), dtype, stop: &stop, on_bytes: &|_| {} };
        let checkpoint = open_directory(&self.path("source"))?;
        merge(&checkpoint, &self.path("adapter"), &Compute::new(2), &rewriting)
    }

    /// The weights of the output.
    fn merged(&self, tensor: &str) -> Vec<f32> {
        let tensors = open_directory(&self.path("output")).unwrap().tensors().unwrap();
        tensors.values(tensors.find(tensor).unwrap()).unwrap()
    }
}

#[track_caller]
fn refused<T>(result: Result<T>, words: &[&str]) {
    let error = result.err().unwrap().to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

/// W + scale · B · A, in f64, of each tensor that an adapter's rows are of.
fn expected(decoder: &Decoder, lora: &Lora) -> Vec<(String, Vec<f64>)> {
    let mut all = Vec::new();
    for info in places(decoder) {
        for adapter in &lora.trained.of(info.place).adapters {
            let (a, b) = (&lora.parameters.get(adapter.a).values, &lora.parameters.get(adapter.b).values);
            let mut start = 0;
            for module in &info.modules {
                let own = start..start + module.rows;
                start = own.end;
                if !adapter.rows.contains(&own.start) {
                    continue;
                }
                let number = |row: usize, column: usize| {
                    let factor = |rank: usize| {
                        let b = b[(row - adapter.rows.start) * adapter.rank + rank];
                        f64::from(b) * f64::from(a[rank * info.inputs + column])
                    };
                    0.5 + f64::from(adapter.scale) * (0..adapter.rank).map(factor).sum::<f64>()
                };
                let numbers = own.flat_map(|row| (0..info.inputs).map(move |column| (row, column)));
                let numbers = numbers.map(|(row, column)| number(row, column)).collect();
                all.push((format!("{}.weight", module.name), numbers));
            }
        }
    }
    all
}

#[test]
fn every_architecture_and_layout_merges() {
    for architecture in crate::architectures() {
        for layout in [AdapterLayout::Fused, AdapterLayout::PerExpert] {
            for (dtype, tolerance) in [(Some(StoredType::F32), 1e-7), (None, 1.0 / 512.0)] {
                let rig = Rig::new(architecture);
                let lora = rig.adapter(&[ALL_LINEAR, "gate", "lm_head"], layout, |_, _| {});
                let merged = rig.merge(dtype).unwrap();
                let expected = expected(&rig.decoder(), &lora);
                assert_eq!(merged.changes.len(), expected.len(), "{architecture}");
                for (name, numbers) in expected {
                    for (found, expected) in rig.merged(&name).iter().zip(numbers) {
                        let difference = (f64::from(*found) - expected).abs();
                        assert!(difference <= tolerance, "{architecture} {layout:?}: {name}: {found}, {expected}");
                    }
                }
                assert_eq!(merged.unchanged().count(), 0);
            }
        }
    }
}

#[test]
fn experts_that_saw_no_token_are_listed() {
    for layout in [AdapterLayout::Fused, AdapterLayout::PerExpert] {
        let rig = Rig::new("qwen3_moe");
        let idle = |name: &str| name.contains(".layers.1.mlp.experts.2.") && name.ends_with("lora_B.weight");
        rig.adapter(&["experts", "q_proj"], layout, |name, values| {
            if idle(name) {
                values.fill(0.0);
            }
        });
        let merged = rig.merge(None).unwrap();
        let mut unchanged: Vec<&str> = merged.unchanged().collect();
        unchanged.sort_unstable();
        let names = ["down", "gate", "up"].map(|part| format!("model.layers.1.mlp.experts.2.{part}_proj.weight"));
        assert_eq!(unchanged, names);
        let parts = merged.parts();
        let experts = parts.iter().find(|part| part.part == crate::summary::Part::Experts).unwrap();
        assert_eq!((experts.tensors, experts.changed_tensors), (24, 21));
    }
}

#[test]
fn an_adapter_that_adds_nothing_is_refused_before_anything_is_written() {
    for (tensor, is_zero) in [
        ("model.layers.1.self_attn.q_proj.weight", "layers.1.self_attn.q_proj.lora_B"),
        ("model.layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.lora_A"),
        ("model.layers.0.mlp.experts.*.down_proj.weight", "layers.0.mlp.experts"),
    ] {
        let rig = Rig::new("olmoe");
        rig.adapter(&["experts", "q_proj"], AdapterLayout::PerExpert, |name, values| {
            if name.contains(is_zero) && !name.contains("gate_proj") && !name.contains("up_proj") {
                values.fill(0.0);
            }
        });
        refused(rig.merge(None), &[tensor, "only zeros", "adapter"]);
        assert!(!rig.path("output").exists());
    }
    // As it is before its first step.
    let rig = Rig::new("olmoe");
    rig.adapter(&[ALL_LINEAR], AdapterLayout::Fused, |name, values| {
        if name.ends_with("lora_B.weight") {
            values.fill(0.0);
        }
    });
    refused(rig.merge(None), &["only zeros", "was it trained"]);
}

#[test]
fn what_is_lost_in_rounding_is_refused_and_a_wider_type_keeps_it() {
    let rig = Rig::new("olmoe");
    rig.adapter(&["experts", "q_proj"], AdapterLayout::Fused, |name, values| {
        if name.contains("layers.1.mlp.experts") {
            values.iter_mut().for_each(|value| *value /= 100.0);
        }
    });
    refused(rig.merge(None), &["model.layers.1.mlp.experts.*.", "lost in rounding", "--dtype f32"]);
    assert!(open_directory(&rig.path("output")).unwrap().tensors().is_err(), "it doesn't look whole");
    fs::remove_dir_all(rig.path("output")).unwrap();
    let merged = rig.merge(Some(StoredType::F32)).unwrap();
    assert_eq!(merged.unchanged().count(), 0);
}

#[test]
fn a_head_that_is_not_as_stored_is_refused() {
    let rig = Rig::new("bailing_moe");
    rig.adapter(&["lm_head"], AdapterLayout::Fused, |_, _| {});
    rig.merge(None).unwrap();
    fs::remove_dir_all(rig.path("output")).unwrap();
    let file = rig.path("source").join("config.json");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replacen('{', r#"{"norm_head": true, "#, 1)).unwrap();
    refused(rig.merge(None), &["the head", "lm_head.weight", "serve it as an adapter"]);
    fs::write(&file, text.replacen(r#""tie_word_embeddings":false"#, r#""tie_word_embeddings":true"#, 1)).unwrap();
    let tied = "base_model.model.model.word_embeddings";
    rig.adapter(&["word_embeddings"], AdapterLayout::Fused, |_, _| {});
    refused(rig.merge(None), &["the head", "word_embeddings.weight", "serve it as an adapter"]);
    assert!(
        fs::read(rig.path("adapter").join("adapter_model.safetensors"))
            .unwrap()
            .windows(tied.len())
            .any(|w| w == tied.as_bytes())
    );
}

#[test]
fn an_adapter_of_another_model_or_broken_is_refused() {
    let (rig, other) = (Rig::new("olmoe"), Rig::new("bailing_moe"));
    other.adapter(&[ALL_LINEAR], AdapterLayout::PerExpert, |_, _| {});
    fs::rename(other.path("adapter"), rig.path("adapter")).unwrap();
    refused(rig.merge(None), &["adapter_model.safetensors", "made for another model"]);
    rig.adapter(&[ALL_LINEAR], AdapterLayout::PerExpert, |_, _| {});
    let file = rig.path("adapter").join("adapter_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    refused(rig.merge(None), &["adapter_model.safetensors", "cut off"]);
    fs::remove_file(&file).unwrap();
    refused(rig.merge(None), &["adapter_model.safetensors", "as PEFT saves it"]);
    assert!(!rig.path("output").exists());
}

/// The number of threads changes no bit, and an adapter that changed between two runs is noticed.
#[test]
fn merging_again_is_the_same_or_refused() {
    let rig = Rig::new("qwen3_moe");
    rig.adapter(&[ALL_LINEAR], AdapterLayout::Fused, |_, _| {});
    assert!(!rig.merge(None).unwrap().was_finished);
    let stop = AtomicBool::new(false);
    let rewriting = Rewriting { output: &rig.path("output"), dtype: None, stop: &stop, on_bytes: &|_| {} };
    let checkpoint = open_directory(&rig.path("source")).unwrap();
    assert!(merge(&checkpoint, &rig.path("adapter"), &Compute::new(1), &rewriting).unwrap().was_finished);
    rig.adapter(&[ALL_LINEAR], AdapterLayout::Fused, |_, values| values[0] += 1.0);
    refused(rig.merge(None), &["model.safetensors", "in the way"]);
}
