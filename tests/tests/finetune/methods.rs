//! Weights that are trained themselves: all, some, those of the experts that the data use most, or the routers'.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};

use cadre_tests::{binary::output, source::root};
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use tempfile::TempDir;

use super::runs::{data, killed_when, log, path, refused};

/// Arguments for twelve steps on all examples at once.
fn flags<'a>(lines: &'a str, folder: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let fixed =
        ["--data", lines, "--output", folder, "--max-steps", "12", "--batch-size", "8", "--learning-rate", "1e-3"];
    [&["finetune"][..], &fixed, more].concat()
}

/// The names of the tensors that the run in `folder` changed in the embedded model.
fn changed(folder: &Path) -> BTreeSet<String> {
    let read = |path: &Path| -> HashMap<String, Tensor> { candle_core::safetensors::load(path, &Device::Cpu).unwrap() };
    let before = read(&root().join("models/embedded/model.safetensors"));
    let after = read(&folder.join("model/model.safetensors"));
    assert_eq!(before.len(), after.len());
    let is_same = |name: &str| {
        let [before, after] = [&before, &after].map(|all| all[name].to_dtype(DType::F32).unwrap());
        assert_eq!(before.dims(), after.dims());
        let difference = (before - after).unwrap().abs().unwrap().sum_all().unwrap();
        difference.to_scalar::<f32>().unwrap() == 0.0
    };
    before.keys().filter(|name| !is_same(name)).cloned().collect()
}

/// Runs a method; its output directory.
fn train(method: &[&str]) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let (lines, folder) = (directory.path().join("train.jsonl"), directory.path().join("run"));
    data(&lines, 8);
    output(&flags(path(&lines), path(&folder), method));
    (directory, folder)
}

#[test]
fn a_method_changes_what_it_says_and_nothing_else() {
    let trained = |method: &[&str]| changed(&train(method).1);
    let is_router = |name: &String| name.ends_with("mlp.gate.weight");
    let routers = trained(&["--method", "router"]);
    assert!(!routers.is_empty() && routers.iter().all(is_router), "{routers:?}");
    let all = trained(&["--method", "full"]);
    assert!(!all.iter().any(is_router));
    for part in ["word_embeddings", "query_key_value", "shared_experts", "experts.3.up_proj", "lm_head"] {
        assert!(all.iter().any(|name| name.contains(part)), "{part} is missing in {all:?}");
    }
    let some = trained(&["--method", "full", "--targets", "attention,gate"]);
    assert!(some.iter().any(is_router) && some.iter().any(|name| !is_router(name)));
    assert!(some.iter().all(|name| name.contains(".attention.") || is_router(name)), "{some:?}");
}

#[test]
fn the_experts_that_the_data_use_most_are_chosen_and_changed() {
    let (_directory, folder) = train(&["--method", "experts"]);
    let kept: Value = serde_json::from_slice(&fs::read(folder.join("expert_cfg.json")).unwrap()).unwrap();
    let layers = kept["experts"].as_object().unwrap();
    let of_layer = |(layer, experts): (&String, &Value)| {
        let experts = experts.as_array().unwrap().iter();
        experts.map(|expert| format!("model.layers.{layer}.mlp.experts.{expert}.")).collect::<Vec<_>>()
    };
    let chosen: Vec<String> = layers.iter().flat_map(of_layer).collect();
    assert!(layers.len() == 3 && chosen.len() < 3 * 16, "{chosen:?}");
    let changed = changed(&folder);
    assert!(chosen.iter().all(|expert| changed.iter().any(|tensor| tensor.starts_with(expert))), "{changed:?}");
    assert!(changed.iter().all(|tensor| chosen.iter().any(|expert| tensor.starts_with(expert))), "{changed:?}");
}

#[test]
fn the_model_that_is_written_is_the_one_that_was_trained() {
    let directory = tempfile::tempdir().unwrap();
    let [lines, first, second] = ["train.jsonl", "first", "second"].map(|name| directory.path().join(name));
    data(&lines, 8);
    output(&flags(path(&lines), path(&first), &["--method", "full", "--eval", path(&lines)]));
    let loss = |folder: &Path, kind: &str| log(folder, kind)[0]["loss"].as_f64().unwrap();
    let (before, after) = (loss(&first, "step"), loss(&first, "evaluation"));
    assert!(after < 0.7 * before, "{before} became {after}");
    // The new model's first step begins where the first run ended, but for norms that are stored as bf16: a part in 500.
    let model = first.join("model");
    output(&flags(path(&lines), path(&second), &["--model", path(&model), "--warmup-ratio", "1"]));
    let again = loss(&second, "step");
    assert!((again - after).abs() < 0.01 * after, "{after}, then {again}");
}

#[test]
fn a_killed_run_ends_with_the_same_model() {
    for (method, file) in [
        (&["--method", "experts", "--expert-share", "0.5"][..], "expert_cfg.json"),
        (&["--method", "router", "--routing-warmup-steps", "9"], "checkpoint-12/trainer_state.json"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let [lines, whole, broken] = ["train.jsonl", "whole", "broken"].map(|name| directory.path().join(name));
        data(&lines, 20);
        let method = [method, &["--save-every", "3"]].concat();
        output(&flags(path(&lines), path(&whole), &method));
        let arguments = flags(path(&lines), path(&broken), &method);
        killed_when(&arguments, || broken.join("checkpoint-3").exists());
        output(&[&arguments[..], &["--resume"]].concat());
        let result = |folder: &Path| {
            [file, "model/model.safetensors", "checkpoint-12/optimizer.safetensors"]
                .map(|file| fs::read(folder.join(file)).unwrap())
        };
        assert!(result(&whole) == result(&broken), "{method:?}");
    }
}

#[test]
fn the_last_checkpoints_of_trained_weights_become_one_model() {
    let (directory, folder) = train(&["--method", "router", "--scheduler", "constant", "--save-every", "4"]);
    let mean = directory.path().join("mean");
    let flags = ["merge", "--last", "2", "--input", path(&folder), "--output", path(&mean)];
    let told = output(&flags);
    assert!(told.contains("the mean of the weights of steps 8, 12"), "{told}");
    let read = |path: &Path| -> HashMap<String, Tensor> { candle_core::safetensors::load(path, &Device::Cpu).unwrap() };
    let [first, second] = [8, 12].map(|step| read(&folder.join(format!("checkpoint-{step}/optimizer.safetensors"))));
    let (before, after) =
        (read(&root().join("models/embedded/model.safetensors")), read(&mean.join("model.safetensors")));
    let values =
        |tensor: &Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
    let mut routers = 0;
    for (name, tensor) in &after {
        let Some([one, other]) =
            first.get(&format!("value.{name}")).map(|one| [one, &second[&format!("value.{name}")]])
        else {
            assert_eq!(values(tensor), values(&before[name]), "{name}");
            continue;
        };
        routers += 1;
        let expected = ((one + other).unwrap() * 0.5).unwrap().to_dtype(tensor.dtype()).unwrap();
        assert_eq!(values(tensor), values(&expected), "{name}");
        assert_ne!(values(tensor), values(&before[name]), "{name}");
    }
    assert_eq!(routers, 3);
    let error = refused(&[&flags[..6], &[path(&directory.path().join("other")), "--model", path(&mean)]].concat());
    assert!(error.contains("is not the model that"), "{error}");
}

#[test]
fn noise_in_the_choice_gives_all_experts_tokens() {
    let entropy = |flags: &[&str]| {
        let (_directory, folder) = train(&[&["--method", "router"][..], flags].concat());
        let steps = log(&folder, "step");
        [0, 1, 11].map(|step| serde_json::from_value::<Vec<f64>>(steps[step]["expert_entropy"].clone()).unwrap())
    };
    let ([first, second, _], warm) = (entropy(&[]), entropy(&["--routing-warmup-steps", "10"]));
    assert_eq!(warm[0], first, "the first step measures");
    // Not all are alike: the model's own biases of experts, and its groups, have a say in the choice.
    assert!(warm[1].iter().zip(&second).all(|(warm, cold)| *warm > cold + 0.05), "{warm:?}, {second:?}");
    assert!(warm[2].iter().zip(&warm[1]).all(|(after, before)| after < before), "{warm:?}");
}

#[test]
fn what_a_method_cannot_do_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let [lines, folder, pack] = ["train.jsonl", "run", "pack"].map(|name| directory.path().join(name));
    data(&lines, 4);
    output(&["pack", "--format", "bf16", "--output", path(&pack)]);
    for (flags, word) in [
        (&["--method", "full", "--rank", "4"][..], "--rank is for --method lora"),
        (&["--method", "router", "--targets", "gate"], "--targets is for --method lora or full"),
        (&["--expert-share", "0.5"], "--expert-share is for --method experts"),
        (&["--method", "full", "--dropout", "0.1"], "--dropout is for --method lora"),
        (&["--dropout", "1"], "--dropout must be at least 0 and below 1"),
        (&["--dropout", "0.1", "--adapter-layout", "fused"], "PEFT has no dropout"),
        (&["--routing-warmup-steps", "5"], "for routers that are trained"),
        (&["--method", "experts", "--expert-share", "0"], "--expert-share must be above 0"),
        (&["--method", "full", "--targets", "q_proj"], "query_key_value"),
        (&["--method", "full", "--dtype", "q4_k"], "give another --dtype"),
        (&["--method", "full", "--model", path(&pack)], "expected a checkpoint that isn't packed"),
        (&["--method", "full", "--memory", "60MiB"], "needs at least"),
    ] {
        let arguments = [&["finetune", "--data", path(&lines), "--output", path(&folder)][..], flags].concat();
        let error = refused(&arguments);
        assert!(error.contains(word), "{word} is missing in {error}");
    }
    assert!(!folder.exists());
    // A result of another run is found before the training, not after it.
    fs::create_dir_all(folder.join("model")).unwrap();
    let error = refused(&["finetune", "--data", path(&lines), "--output", path(&folder), "--method", "full"]);
    assert!(error.contains("has model") && error.contains("another --output"), "{error}");
}
