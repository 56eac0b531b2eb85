//! Means of adapters: what they add, and what is refused.

use std::fs;

use cadre_engine::{compute::Compute, nn::Decoder, train::places::places};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{
    FormatOptions, Placement,
    adapter::{AdapterLayout, Lora, LoraOptions, LoraPlan},
    checkpoint::open_directory,
    load::outline,
    targets::ALL_LINEAR,
    testing::{tiny, write_checkpoint},
    tokenizer::tests::byte_level_json,
};

fn decoder(directory: &TempDir) -> Decoder {
    let source = directory.path().join("source");
    fs::create_dir(&source).unwrap();
    let (config, tensors) = tiny("qwen3_moe");
    write_checkpoint(&source, &config, &tensors);
    fs::write(source.join("tokenizer.json"), byte_level_json().to_string()).unwrap();
    let options = FormatOptions { format: None, experts: None, dense: None };
    let checkpoint = open_directory(&source).unwrap();
    outline(&checkpoint, &options, Placement::Resident, &Compute::new(1)).unwrap().decoder
}

fn options(layout: AdapterLayout, rslora: bool) -> LoraOptions {
    LoraOptions {
        rank: 2,
        alpha: 3.0,
        rslora,
        dropout: 0.0,
        targets: vec![ALL_LINEAR.to_owned(), "gate".to_owned()],
        layout,
        seed: 1,
    }
}

/// `count` checkpoints of a run, with other numbers each.
fn checkpoints(directory: &TempDir, decoder: &Decoder, options: &LoraOptions, count: usize) -> Vec<PathBuf> {
    let save = |checkpoint: usize| {
        let mut lora = LoraPlan::new(decoder, "base", options).unwrap().build().unwrap();
        for (index, parameter) in lora.parameters.iter_mut().enumerate() {
            let number = |place: usize| ((index * 17 + place * 29 + checkpoint * 41) % 103) as f32 / 50.0 - 1.0;
            parameter.values.iter_mut().enumerate().for_each(|(place, value)| *value = number(place));
        }
        let folder = directory.path().join(format!("checkpoint-{checkpoint}"));
        lora.files.write(&folder, &lora.parameters).unwrap();
        folder
    };
    (0..count).map(save).collect()
}

/// What the adapter in `folder` adds, place by place.
fn added(decoder: &Decoder, folder: &Path) -> Vec<Vec<f32>> {
    let lora = Lora::read(folder, decoder).unwrap();
    let mut all = Vec::new();
    for info in places(decoder) {
        for adapter in &lora.trained.of(info.place).adapters {
            let mut sum = vec![0.0; adapter.rows.len() * info.inputs];
            adapter.add_to(&Compute::new(1), &lora.parameters, 0..adapter.rows.len(), &mut sum);
            all.push(sum);
        }
    }
    all
}

#[track_caller]
fn refused<T>(result: Result<T>, words: &[&str]) {
    let error = result.err().unwrap().to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn the_mean_adds_the_mean(fused: bool, rslora: bool, count in 1_usize..5) {
        let directory = tempfile::tempdir().unwrap();
        let decoder = decoder(&directory);
        let layout = if fused { AdapterLayout::Fused } else { AdapterLayout::PerExpert };
        let all = checkpoints(&directory, &decoder, &options(layout, rslora), count);
        let output = directory.path().join("mean");
        let averaged = average(&all, &output).unwrap();
        prop_assert_eq!((averaged.rank, averaged.averaged_rank), (2, 2 * count));
        let each: Vec<_> = all.iter().map(|folder| added(&decoder, folder)).collect();
        let mean = added(&decoder, &output);
        prop_assert_eq!(mean.len(), each[0].len());
        for (index, found) in mean.iter().enumerate() {
            for (place, found) in found.iter().enumerate() {
                let sum: f64 = each.iter().map(|one| f64::from(one[index][place])).sum();
                let expected = sum / count as f64;
                prop_assert!((f64::from(*found) - expected).abs() < 1e-5, "{found}, {expected}");
            }
        }
    }
}

#[test]
fn the_mean_of_products_is_not_the_product_of_means() {
    let directory = tempfile::tempdir().unwrap();
    let decoder = decoder(&directory);
    let options = options(AdapterLayout::PerExpert, false);
    let all = checkpoints(&directory, &decoder, &options, 2);
    let read = |folder: &Path| Lora::read(folder, &decoder).unwrap().parameters;
    let (mut of_means, other) = (Lora::read(&all[0], &decoder).unwrap(), read(&all[1]));
    for (one, other) in of_means.parameters.iter_mut().zip(other.iter()) {
        one.values.iter_mut().zip(&other.values).for_each(|(one, other)| *one = (*one + other) / 2.0);
    }
    let wrong = directory.path().join("wrong");
    of_means.files.write(&wrong, &of_means.parameters).unwrap();
    let mean = directory.path().join("mean");
    average(&all, &mean).unwrap();
    assert_ne!(added(&decoder, &mean), added(&decoder, &wrong));
}

#[test]
fn what_is_not_of_one_run_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let decoder = decoder(&directory);
    let fused = options(AdapterLayout::Fused, false);
    let all = checkpoints(&directory, &decoder, &fused, 2);
    let output = directory.path().join("mean");
    let save = |options: &LoraOptions| {
        let lora = LoraPlan::new(&decoder, "base", options).unwrap().build().unwrap();
        fs::remove_dir_all(&all[1]).unwrap();
        lora.files.write(&all[1], &lora.parameters).unwrap();
    };
    save(&LoraOptions { alpha: 4.0, ..fused.clone() });
    refused(average(&all, &output), &["checkpoint-1", "settings", "checkpoint-0"]);
    save(&LoraOptions { rank: 3, ..fused.clone() });
    refused(average(&all, &output), &["checkpoint-1", "settings"]);
    save(&fused);
    let file = all[1].join("adapter_model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let name = b"layers.1.self_attn.q_proj";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    let mut renamed = bytes.clone();
    renamed[at + name.len() - 6] = b'x';
    fs::write(&file, renamed).unwrap();
    refused(average(&all, &output), &["checkpoint-1", "tensors"]);
    fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    refused(average(&all, &output), &["checkpoint-1", "cut off"]);
    fs::remove_file(&file).unwrap();
    refused(average(&all, &output), &["checkpoint-1", "adapter_model.safetensors", "as PEFT saves it"]);
    assert!(!output.exists());
    refused(average(&all[..1], &all[0]), &["checkpoint-0", "in the way"]);
    refused(average(&[], &output), &["the list of directories", "no adapter"]);
}
