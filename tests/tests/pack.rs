//! `cadre pack`: what is packed answers as what is quantised on load does, bit for bit; what is interrupted goes on;
//! what is damaged is refused.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use cadre_engine::{
    compute::Compute,
    kv::{KvCache, KvDtype, blocks::BLOCK_SIZE},
    model::{Model, SequenceRows, StepBatch, StepContext, forward},
    nn::Format,
    ops,
};
use cadre_models::{FormatOptions, Placement, load, open};
use cadre_tests::{
    binary::{self, output, run},
    checkpoint::Qwen3Moe,
    source::root,
    wait_for,
};
use serde_json::Value;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

/// A checkpoint whose packing takes a while: 12 layers.
fn larger(directory: &Path) {
    let sizes = Qwen3Moe { layers: 12, hidden: 256, heads: 4, experts: 32, expert_width: 128, positions: 128 };
    sizes.write(directory);
}

#[test]
fn a_pack_answers_as_the_checkpoint_does() {
    let question = "What is 15 + 17?";
    let directory = tempfile::tempdir().unwrap();
    for (name, format, flags) in [
        ("lossless", "bf16", &["--format", "auto"][..]),
        ("mxfp4", "mxfp4", &["--format", "mxfp4"]),
        ("two", "q4_k experts, q8_0 dense", &["--format", "q4_k", "--dense-format", "q8_0"]),
        ("experts", "q6_k experts, bf16 dense", &["--experts-format", "q6_k"]),
    ] {
        let pack = directory.path().join(name);
        let table = output(&[&["pack", "--output", path(&pack)], flags].concat());
        for word in ["experts", "attention", "shared experts", "bits/weight", "%"] {
            assert!(table.contains(word), "{word} is missing in\n{table}");
        }
        let more = ["--prompt", question, "--temperature", "0.8", "--seed", "3", "--max-tokens", "40"];
        let direct = output(&[&["generate"], flags, &more].concat());
        assert_eq!(output(&[&["generate", "--model", path(&pack)], &more[..]].concat()), direct, "{name}");

        let again = output(&[&["pack", "--output", path(&pack)], flags].concat());
        assert!(again.contains("packed already"), "{again}");
        let about: Value = serde_json::from_str(&output(&["inspect", "--json", "--model", path(&pack)])).unwrap();
        let experts = format.split(' ').next().unwrap();
        let types = about["parts"]["experts"]["types"].as_object().unwrap();
        assert_eq!(types.keys().collect::<Vec<_>>(), [&format!("packed {experts}")]);
        let error = about["parts"]["experts"]["packing_error"].as_f64().unwrap();
        assert!(if experts == "bf16" { error == 0.0 } else { (1e-3..0.2).contains(&error) }, "{name}: {error}");
        assert!(output(&["inspect", "--model", path(&pack)]).contains(&format!("packed {experts}")));

        let same = output(&[&["generate", "--model", path(&pack)], flags, &more].concat());
        assert_eq!(same, direct, "{name}: its own formats may be asked for");
        let run = run(&["generate", "--prompt", "x", "--model", path(&pack), "--format", "f32"]);
        let words = ["is a pack", "found f32", format, "pack the original"];
        assert!(run.code == Some(1) && words.iter().all(|word| run.stderr.contains(word)), "{}", run.stderr);
    }
}

/// As many tokens fit as their keys and values are small.
#[test]
fn the_kv_cache_has_a_format_of_its_own() {
    let room = |dtype: &str| -> usize {
        let small = ["--kv-memory", "64KiB", "--max-model-len", "512", "--format", "f32"];
        let run = run(&[&["generate", "--prompt", "x", "--kv-dtype", dtype], &small[..]].concat());
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        let (_, rest) = run.stderr.split_once("holds ").unwrap();
        rest.split(' ').next().unwrap().parse().unwrap()
    };
    let rooms = ["f32", "bf16", "int8"].map(room);
    assert!(rooms.is_sorted_by(|a, b| a < b), "{rooms:?}");
    assert_eq!(room("auto"), rooms[0], "f32 weights");
}

/// All logits of a few tokens.
fn logits(model: &dyn Model, compute: &Compute) -> Vec<u32> {
    let info = model.info();
    let ids: Vec<u32> = (0..7).map(|index| (index * 5 + 3) % info.vocab_size as u32).collect();
    let blocks = ids.len().div_ceil(BLOCK_SIZE);
    let mut kv = KvCache::new(info.num_layers, info.num_kv_heads, info.head_dim, blocks, KvDtype::F32).unwrap();
    let batch = StepBatch {
        positions: (0..ids.len() as u32).collect(),
        logit_rows: (0..ids.len() as u32).collect(),
        sequences: vec![SequenceRows {
            rows: 0..ids.len(),
            context_len: ids.len(),
            block_table: (0..blocks as u32).collect(),
            adapter: None,
        }],
        token_ids: ids,
    };
    let mut bits = Vec::new();
    let logits =
        forward(model, &mut StepContext { compute, batch: &batch, kv: &mut kv, routes: None, lane: batch.lane() })
            .unwrap()
            .unwrap();
    let collect = |values: &[f32]| {
        bits.extend(values.iter().map(|value| value.to_bits()));
        Ok(())
    };
    ops::values(&logits, collect).unwrap();
    bits
}

fn fixtures() -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("tests/fixtures/parity")).unwrap();
    let mut folders: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() > 40, "{folders:?}");
    folders
}

/// Every architecture with every option: tied heads, heads that are normed, biases, dense layers, shared experts.
#[test]
fn every_fixture_packs_to_the_same_logits() {
    let (compute, stop) = (Compute::new(2), false.into());
    let auto = FormatOptions::default();
    let two = FormatOptions { experts: Some(Format::F32), ..FormatOptions::all(Format::Bf16) };
    let all: Vec<_> = Format::ALL.iter().map(|format| FormatOptions::all(*format)).chain([two, auto]).collect();
    for folder in fixtures() {
        for options in &all {
            let directory = tempfile::tempdir().unwrap();
            let source = open(folder.to_str(), &|_| {}).unwrap();
            let pack = directory.path().join("pack");
            cadre_models::pack::pack(&source, options, &pack, &compute, &stop, &|_| {}).unwrap();
            let pack = open(pack.to_str(), &|_| {}).unwrap();
            let packed = load(&pack, &auto, Placement::Resident, &compute, &|_| {}).unwrap();
            let direct = load(&source, options, Placement::Resident, &compute, &|_| {}).unwrap();
            assert_eq!(packed.formats, direct.formats);
            let expected = logits(&direct.decoder, &compute);
            assert!(logits(&packed.decoder, &compute) == expected, "{}: {options}", folder.display());
            // Experts that are read as they are needed, into fewer slots than a layer uses: ready, or to be packed.
            for (checkpoint, options) in [(&pack, &auto), (&source, options)] {
                let stored = load(checkpoint, options, Placement::Stored, &compute, &|_| {}).unwrap();
                let experts = stored.experts.unwrap();
                assert_eq!(experts.conversion().is_some(), std::ptr::eq(checkpoint, &source));
                let store = experts.open(3).unwrap();
                let (name, folder) = (checkpoint.name(), folder.display());
                assert!(logits(&stored.decoder, &compute) == expected, "{folder}: {options}, stored in {name}");
                assert!(store.counters().misses() > 0);
            }
        }
    }
}

#[test]
fn a_killed_pack_goes_on_to_the_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let (source, whole, killed) =
        (directory.path().join("source"), directory.path().join("whole"), directory.path().join("killed"));
    fs::create_dir(&source).unwrap();
    larger(&source);
    let pack = |output: &Path| ["pack", "--model", path(&source), "--output", path(output)].map(str::to_owned);
    let arguments = pack(&whole);
    output(&arguments.each_ref().map(String::as_str));
    let expected = files(&whole);

    let arguments = pack(&killed);
    let third = killed.join("model-00003-of-00013.safetensors");
    // On a busy machine it may end before it is killed: then once more, from nothing.
    let left = (0..20).find_map(|_| {
        let mut command = binary::command(&arguments.each_ref().map(String::as_str));
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_for("a third file", 60, || third.exists());
        child.kill().unwrap();
        child.wait().unwrap();
        let left = files(&killed);
        let in_time = !left.contains_key("model.safetensors.index.json");
        if !in_time {
            fs::remove_dir_all(&killed).unwrap();
        }
        in_time.then_some(left)
    });
    let left = left.unwrap();
    for (name, bytes) in left.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        assert!(bytes == &expected[name], "{name}: what has its name is whole");
    }
    let unfinished = run(&["generate", "--prompt", "x", "--model", path(&killed)]);
    assert!(unfinished.code == Some(1) && !unfinished.stderr.contains("panicked"), "{}", unfinished.stderr);

    let mut other = arguments.to_vec();
    other.extend(["--format", "f32"].map(str::to_owned));
    let refused = run(&other.iter().map(String::as_str).collect::<Vec<_>>());
    let words = ["is in the way", "as f32", "as bf16", "--output"];
    assert!(refused.code == Some(1) && words.iter().all(|word| refused.stderr.contains(word)), "{}", refused.stderr);

    let kept = fs::metadata(&third).unwrap().modified().unwrap();
    output(&arguments.each_ref().map(String::as_str));
    assert_eq!(fs::metadata(&third).unwrap().modified().unwrap(), kept, "what was finished is not written again");
    assert!(files(&killed) == expected);
}

#[test]
fn ctrl_c_ends_a_pack_and_leaves_no_half_of_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let (source, pack) = (directory.path().join("source"), directory.path().join("pack"));
    fs::create_dir(&source).unwrap();
    larger(&source);
    let arguments = ["pack", "--model", path(&source), "--output", path(&pack)];
    let child = binary::command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("a file", 60, || pack.join("model-00001-of-00013.safetensors").exists());
    binary::signal(&child, "INT");
    let ended = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(ended.stderr).unwrap();
    assert!(ended.status.code() == Some(1) && stderr.contains("interrupted"), "{} {stderr}", ended.status);
    let left = files(&pack);
    assert!(left.keys().all(|name| name.ends_with(".safetensors")), "{:?}", left.keys());
    output(&arguments);
    output(&["generate", "--raw", "--prompt", "x", "--max-tokens", "1", "--model", path(&pack)]);
}

/// A limit on the size of files fails as a full disk does, with a signal that is ignored.
#[test]
fn a_full_disk_is_explained() {
    let directory = tempfile::tempdir().unwrap();
    let pack = directory.path().join("pack");
    let limited = "trap '' XFSZ; ulimit -f 100; exec \"$0\" pack --output \"$1\"";
    let mut command = Command::new("bash");
    command.args(["-c", limited]).arg(binary::cadre()).arg(&pack);
    let ended = command.output().unwrap();
    let stderr = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{stderr}");
    for word in ["cannot write", "model-00001-of-", "run the same command again"] {
        assert!(stderr.contains(word), "{word} is missing in {stderr}");
    }
    assert!(files(&pack).is_empty(), "{:?}", files(&pack).keys());
    output(&["pack", "--output", path(&pack)]);
}

#[test]
fn damaged_packs_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let pack = directory.path().join("pack");
    output(&["pack", "--output", path(&pack)]);
    let generate = ["generate", "--prompt", "x", "--model", path(&pack)];
    let refused = |words: &[&str]| {
        let run = run(&generate);
        assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""), "{}", run.stderr);
        for word in words {
            assert!(run.stderr.contains(word), "{word} is missing in {}", run.stderr);
        }
        assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    };
    let shards: Vec<_> = files(&pack).into_keys().filter(|name| name.ends_with(".safetensors")).collect();
    for shard in &shards {
        let file = pack.join(shard);
        let bytes = fs::read(&file).unwrap();
        for length in [0, 7, 1000, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&file, &bytes[..length]).unwrap();
            refused(&[shard, "expected", "found"]);
        }
        fs::remove_file(&file).unwrap();
        refused(&[shard, "no such file"]);
        fs::write(&file, &bytes).unwrap();
    }
    let config = fs::read_to_string(pack.join("config.json")).unwrap();
    let mut other: Value = serde_json::from_str(&config).unwrap();
    other["moe_intermediate_size"] = 8.into();
    fs::write(pack.join("config.json"), other.to_string()).unwrap();
    refused(&["model-0000", "experts", "expected shape [3, 8,", "found [3,"]);
    fs::write(pack.join("config.json"), config).unwrap();
    assert_eq!(run(&generate).code, Some(0));
}
