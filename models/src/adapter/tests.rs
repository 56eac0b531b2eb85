//! Adapters of tiny checkpoints: which modules a name means, and the files, both ways.

use std::fs;

use cadre_engine::{
    compute::Compute,
    nn::Decoder,
    train::places::{Place, places},
};
use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::{
    Error, FormatOptions, Placement, load, open,
    targets::ALL_LINEAR,
    tensors::TensorSet,
    testing::{tiny, write_checkpoint},
};

fn decoder(architecture: &str) -> Decoder {
    let directory = tempfile::tempdir().unwrap();
    let (config, tensors) = tiny(architecture);
    write_checkpoint(directory.path(), &config, &tensors);
    let checkpoint = open(Some(directory.path().to_str().unwrap()), &|_| {}).unwrap();
    let options = FormatOptions { format: None, experts: None, dense: None };
    load(&checkpoint, &options, Placement::Resident, &Compute::new(2), &|_| {}).unwrap().decoder
}

fn options(targets: &[&str], layout: AdapterLayout) -> LoraOptions {
    let targets = targets.iter().map(|target| (*target).to_owned()).collect();
    LoraOptions { rank: 3, alpha: 6.0, rslora: false, dropout: 0.0, targets, layout, seed: 1 }
}

/// The names of the adapters.
fn names(lora: &Lora) -> Vec<String> {
    let all = lora.parameters.iter().filter_map(|parameter| parameter.name.strip_suffix(".lora_A.weight"));
    all.map(str::to_owned).collect()
}

/// The folder of the adapter, and its tensors by name with their shapes.
fn written(lora: &Lora) -> (TempDir, Vec<(String, Vec<usize>)>) {
    let directory = tempfile::tempdir().unwrap();
    lora.files.write(directory.path(), &lora.parameters).unwrap();
    let files = crate::files::Files::Directory(directory.path().to_owned());
    let tensors = TensorSet::of_file(files.open("adapter_model.safetensors").unwrap().unwrap()).unwrap();
    let mut all: Vec<_> = tensors.iter().map(|info| (info.name.clone(), info.shape.clone())).collect();
    all.sort();
    (directory, all)
}

/// Every number another one.
fn filled(mut lora: Lora) -> Lora {
    let mut next = 0.0;
    for parameter in lora.parameters.iter_mut() {
        for value in &mut parameter.values {
            next += 1.0;
            *value = next;
        }
    }
    lora
}

#[test]
fn a_plan_counts_what_no_memory_could_hold() {
    let decoder = decoder("qwen3_moe");
    let plan = |rank| {
        let options = LoraOptions { rank, ..options(&[ALL_LINEAR, "gate"], AdapterLayout::PerExpert) };
        LoraPlan::new(&decoder, "base", &options).unwrap()
    };
    let one = plan(1).numbers();
    assert_eq!(one as usize, plan(1).build().unwrap().parameters.count());
    assert_eq!(plan(1 << 40).numbers(), one << 40);
    assert_eq!(plan(usize::MAX).numbers(), u64::MAX);
}

#[test]
fn names_mean_modules_and_what_holds_them() {
    let decoder = decoder("qwen3_moe");
    let adapted = |targets: &[&str]| {
        names(&LoraPlan::new(&decoder, "base", &options(targets, AdapterLayout::PerExpert)).unwrap().build().unwrap())
    };
    let of_query = adapted(&["q_proj"]);
    assert!(!of_query.is_empty() && of_query.iter().all(|name| name.ends_with(".self_attn.q_proj")), "{of_query:?}");
    assert_eq!(adapted(&["model.layers.1.self_attn.k_proj"]), ["model.layers.1.self_attn.k_proj"]);
    assert!(adapted(&["experts"]).iter().all(|name| name.contains(".mlp.experts.")));
    let all = adapted(&[ALL_LINEAR]);
    assert!(all.iter().any(|name| name.ends_with("o_proj")) && all.iter().any(|name| name.ends_with("down_proj")));
    assert!(!all.iter().any(|name| name.ends_with(".gate") || name == "lm_head"), "router and head are left out");
    assert!(adapted(&["gate", "lm_head"]).iter().any(|name| name.ends_with("mlp.gate")));
    let refused = |targets: &[&str], layout| LoraPlan::new(&decoder, "base", &options(targets, layout)).unwrap_err();
    let error = refused(&["q_proj", "w1"], AdapterLayout::Fused);
    assert!(
        matches!(&error, Error::NoSuchTarget { target, known } if target == "w1" && known.contains("o_proj")),
        "{error}"
    );
    // A part of a component is not its name.
    assert!(matches!(refused(&["proj"], AdapterLayout::Fused), Error::NoSuchTarget { .. }));
    assert!(matches!(refused(&["gate_proj"], AdapterLayout::Fused), Error::HalfTarget { .. }));
}

#[test]
fn what_is_written_is_read_back() {
    for architecture in crate::architectures() {
        let decoder = decoder(architecture);
        for layout in [AdapterLayout::Fused, AdapterLayout::PerExpert] {
            for targets in [&[ALL_LINEAR][..], &["experts", "lm_head"], &["down_proj"], &["gate"]] {
                let lora = filled(LoraPlan::new(&decoder, "base", &options(targets, layout)).unwrap().build().unwrap());
                let (directory, _) = written(&lora);
                let read = Lora::read(directory.path(), &decoder).unwrap();
                assert_eq!(read.parameters, lora.parameters, "{architecture} {layout:?} {targets:?}");
                assert_eq!(
                    (read.files.config, read.files.entries),
                    (lora.files.config.clone(), lora.files.entries.clone())
                );
                assert!(lora.files.delta_on_disk(directory.path()).unwrap() > 0.0);
            }
        }
    }
}

#[test]
fn a_stack_has_the_names_that_peft_gives_it() {
    let decoder = decoder("olmoe");
    let experts = places(&decoder).iter().filter(|info| matches!(info.place, Place::Down { layer: 0, .. })).count();
    let with = |targets: &[&str]| {
        written(&LoraPlan::new(&decoder, "base", &options(targets, AdapterLayout::Fused)).unwrap().build().unwrap())
    };
    let (directory, tensors) = with(&["experts"]);
    let shape = |name: &str| {
        let full = format!("base_model.model.model.layers.0.mlp.experts{name}.weight");
        tensors.iter().find(|(found, _)| *found == full).map(|(_, shape)| shape.clone())
    };
    // Gate and up are inside of what wraps down.
    assert_eq!(shape(".base_layer.lora_A").unwrap()[0], 3 * experts);
    assert_eq!(shape(".lora_B").unwrap()[1], 3 * experts);
    let config: Value =
        serde_json::from_slice(&fs::read(directory.path().join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["target_parameters"], serde_json::json!(["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]));
    assert_eq!((&config["r"], &config["lora_alpha"], &config["peft_type"]), (&3.into(), &6.0.into(), &"LORA".into()));
    // Alone it takes the plain name.
    let (directory, tensors) = with(&["mlp.experts.gate_up_proj"]);
    assert!(tensors.iter().all(|(name, _)| !name.contains("base_layer")));
    let read = Lora::read(directory.path(), &decoder).unwrap();
    assert!(read.trained.matrices().all(|(place, _)| matches!(place, Place::GateUp { .. })));
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let (one, other) = (decoder("olmoe"), decoder("bailing_moe"));
    let (directory, _) =
        written(&LoraPlan::new(&one, "base", &options(&["q_proj"], AdapterLayout::Fused)).unwrap().build().unwrap());
    let error = Lora::read(directory.path(), &other).unwrap_err();
    assert!(matches!(&error, Error::AdapterOfAnother { tensor, .. } if tensor.contains("q_proj")), "{error}");
    let file = directory.path().join("adapter_config.json");
    let text = fs::read_to_string(&file).unwrap();
    for (from, to, field) in [
        ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
        ("\"r\": 3", "\"r\": 0", "r"),
        ("\"LORA\"", "\"IA3\"", "peft_type"),
        ("{", "{\"use_dora\": true,", "use_dora"),
    ] {
        assert!(text.contains(from), "{from}");
        fs::write(&file, text.replacen(from, to, 1)).unwrap();
        let error = Lora::read(directory.path(), &one).unwrap_err();
        assert!(matches!(&error, Error::Field { field: found, .. } if found == field), "{error}");
    }
    fs::write(&file, &text).unwrap();
    let weights = directory.path().join("adapter_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 5]).unwrap();
    assert!(Lora::read(directory.path(), &one).is_err());
    fs::remove_file(&weights).unwrap();
    let error = Lora::read(directory.path(), &one).unwrap_err().to_string();
    assert!(error.contains("adapter_model.safetensors"), "{error}");
}
