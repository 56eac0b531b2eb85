//! `cadre merge`: PEFT's logits without an adapter, and the command from the outside.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use anyhow::{Context, Result, ensure};
use cadre_engine::{
    compute::Compute,
    kv::{KvCache, KvDtype, blocks::BLOCK_SIZE},
    model::{Model, SequenceRows, StepBatch, StepContext, forward},
    nn::Format,
    ops,
};
use cadre_models::{FormatOptions, Placement, StoredType, load, merge::merge, open, rewrite::Rewriting};
use cadre_tests::binary::{output, run};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

/// Of the greatest logit.
const TOLERANCE: f32 = 1e-5;

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The logits of all tokens of the sequence.
fn logits(checkpoint: &Path, tokens: &[u32]) -> Result<Vec<f32>> {
    let compute = Compute::new(2);
    let options = FormatOptions::all(Format::F32);
    let checkpoint = open(checkpoint.to_str(), &|_| {})?;
    let decoder = load(&checkpoint, &options, Placement::Resident, &compute, &|_| {})?.decoder;
    let info = decoder.info();
    let blocks = tokens.len().div_ceil(BLOCK_SIZE);
    let mut kv = KvCache::new(info.num_layers, info.num_kv_heads, info.head_dim, blocks, KvDtype::F32)?;
    let mut batch = StepBatch::default();
    batch.token_ids.extend(tokens);
    batch.positions.extend(0..tokens.len() as u32);
    batch.logit_rows.extend(0..tokens.len() as u32);
    batch.sequences.push(SequenceRows {
        rows: 0..tokens.len(),
        context_len: tokens.len(),
        block_table: (0..blocks as u32).collect(),
        adapter: None,
    });
    let lane = batch.lane();
    let mut step = StepContext { compute: &compute, batch: &batch, kv: &mut kv, routes: None, lane };
    let logits = forward(&decoder, &mut step)?.context("logits of all rows")?;
    let mut out = Vec::new();
    ops::values(&logits, |values| {
        out.extend_from_slice(values);
        Ok(())
    })?;
    Ok(out)
}

#[test]
fn merged_checkpoints_have_the_logits_of_peft() -> Result<()> {
    let mut compared = 0;
    for entry in fs::read_dir(fixtures().join("finetune/adapters"))? {
        let folder = entry?.path();
        let name = folder.file_name().context("a name")?.to_string_lossy().into_owned();
        let family = name.split('-').next().context("a family")?;
        let base = fixtures().join("parity").join(format!("{family}-base"));
        let directory = tempfile::tempdir()?;
        let stop = AtomicBool::new(false);
        let dtype = Some(StoredType::F32);
        let rewriting = Rewriting { output: directory.path(), dtype, stop: &stop, on_bytes: &|_| {} };
        let merged = merge(&open(base.to_str(), &|_| {})?, &folder, &Compute::new(2), &rewriting)?;
        ensure!(!merged.changes.is_empty() && merged.unchanged().count() == 0, "{name}: {merged:?}");

        let tensors = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu)?;
        let tensor = |name: &str| -> Result<&Tensor> { tensors.get(name).with_context(|| name.to_owned()) };
        let sequences: Vec<Vec<u32>> = tensor("input_ids")?.to_dtype(DType::U32)?.to_vec2()?;
        let expected: Vec<Vec<f32>> = tensor("logits")?.flatten_from(1)?.to_vec2()?;
        for (tokens, expected) in sequences.iter().zip(expected) {
            let found = logits(directory.path(), tokens)?;
            ensure!(found.len() == expected.len(), "{name}: {} logits of {}", found.len(), expected.len());
            let greatest = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            let difference = found.iter().zip(&expected).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
            ensure!(difference <= TOLERANCE * greatest, "{name}: off by {difference} of {greatest}");
            compared += 1;
        }
    }
    ensure!(compared >= 6, "{compared} sequences");
    Ok(())
}

/// From a run over the mean of its checkpoints to a checkpoint that answers.
#[test]
fn a_run_becomes_a_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let [data, trained, mean, merged, report] =
        ["train.jsonl", "run", "mean", "merged", "report.json"].map(|name| directory.path().join(name));
    let line = json!({"messages": [
        {"role": "user", "content": "Greet me."}, {"role": "assistant", "content": "Good day to you!"},
    ]});
    fs::write(&data, format!("{line}\n")).unwrap();
    let steps = ["--max-steps", "12", "--save-every", "1", "--keep", "3", "--learning-rate", "0.01"];
    output(&[&["finetune", "--data", path(&data), "--output", path(&trained)], &steps[..]].concat());

    let told = output(&["merge", "--last", "3", "--input", path(&trained), "--output", path(&mean)]);
    assert!(told.contains("steps 10, 11, 12") && told.contains("rank 24 (8 each)"), "{told}");
    let flags = ["merge", "--adapter", path(&mean), "--output", path(&merged), "--report", path(&report)];
    let table = output(&flags);
    for word in ["attention", "experts", "shared experts", "further tensors are as they were", "rounding"] {
        assert!(table.contains(word), "{word} is missing in\n{table}");
    }
    let report: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    let tensors = report["tensors"].as_array().unwrap();
    let idle = report["unchanged"].as_array().unwrap().len() as u64;
    assert_eq!(report["adapted"].as_u64().unwrap(), tensors.len() as u64);
    assert_eq!(report["changed"].as_u64().unwrap() + idle, tensors.len() as u64);
    let share = report["parts"][0]["relative_change"].as_f64().unwrap();
    assert!((1e-6..1.0).contains(&share), "{report:#}");

    assert!(output(&flags).contains("merged already: nothing was written"));
    let question = ["--prompt", "Greet me.", "--temperature", "0", "--max-tokens", "8"];
    let answer = |model: &[&str]| output(&[&["generate"], model, &question[..]].concat());
    let [before, after] = [answer(&[]), answer(&["--model", path(&merged)])];
    assert!(!before.contains("day to you") && after.contains("day to you"), "before: {before}, after: {after}");
    let about =
        |model: &[&str]| -> Value { serde_json::from_str(&output(&[&["inspect", "--json"], model].concat())).unwrap() };
    assert_eq!(about(&["--model", path(&merged)])["parts"], about(&[])["parts"]);

    let refused = |arguments: &[&str], words: &[&str]| {
        let run = run(&[&["merge"], arguments].concat());
        let all = words.iter().all(|word| run.stderr.contains(word));
        assert!(run.code.is_some_and(|code| code > 0) && all, "{words:?}: {}", run.stderr);
    };
    let other = directory.path().join("other");
    let input = ["--input", path(&trained), "--output", path(&other)];
    refused(&[&["--last", "4"], &input[..]].concat(), &["--last 4", "found 3", "--keep"]);
    refused(&[&["--last", "0"], &input[..]].concat(), &["at least 1"]);
    refused(&["--output", path(&other)], &["--adapter"]);
    refused(&["--last", "2", "--output", path(&other)], &["--input"]);
    let into = ["--output", path(&other), "--adapter"];
    refused(&[&into[..], &[path(&trained), "--dtype", "q4_k"]].concat(), &["--dtype", "bf16"]);
    refused(&["--adapter", path(&trained), "--output", path(&merged)], &["in the way", "give another --output"]);
    assert!(!other.exists());
    let pack = directory.path().join("pack");
    output(&["pack", "--output", path(&pack)]);
    refused(&[&into[..], &[path(&mean), "--model", path(&pack)]].concat(), &["found a pack", "made from"]);
    assert!(!other.exists());
}
