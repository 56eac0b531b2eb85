//! Models larger than the memory that they may use: the same tokens, within the budget, and faults that stay with
//! those whom they concern.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use cadre_tests::{
    binary::{output, run},
    checkpoint::Qwen3Moe,
    peak::peak_of,
    server::{MODEL, Server},
};
use serde_json::json;

/// A checkpoint of about 85 MiB in bf16, not packed, in a directory.
fn source(directory: &Path) -> PathBuf {
    let source = directory.join("source");
    fs::create_dir(&source).unwrap();
    let sizes = Qwen3Moe { layers: 4, hidden: 512, heads: 8, experts: 48, expert_width: 128, positions: 512 };
    sizes.write(&source);
    source
}

/// A pack of it.
fn pack(directory: &Path) -> PathBuf {
    let (source, pack) = (source(directory), directory.join("pack"));
    output(&["pack", "--model", source.to_str().unwrap(), "--output", pack.to_str().unwrap()]);
    pack
}

fn generate<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["generate", "--raw", "--prompt", "What is it that a budget changes?", "--max-tokens", "16"];
    [&args[..], &["--temperature", "0", "--kv-memory", "4MiB", "--threads", "2", "--model", model], more].concat()
}

/// Within each budget, in MiB, the tokens are those of a run without one; returns what each run said.
fn within_budgets(model: &str, more: &[&str], budgets: &[u64]) -> Vec<String> {
    let expected = output(&generate(model, more));
    let run = |mebibytes: &u64| {
        let budget = format!("{mebibytes}MiB");
        let small = [more, &["--memory", &budget, "--max-num-batched-tokens", "64"]].concat();
        let args = generate(model, &small);
        let found = run(&args);
        assert_eq!(found.stdout, expected, "{budget}: {}", found.stderr);
        // What doesn't fit says so.
        assert!(found.stderr.contains("were in memory"), "{budget}: {}", found.stderr);
        let peak = peak_of(&args);
        println!("budget {mebibytes} MiB, peak {} MiB", peak >> 20);
        assert!(peak <= (mebibytes << 20) * 105 / 100, "budget {budget}, peak {peak}");
        found.stderr
    };
    budgets.iter().map(run).collect()
}

#[test]
fn a_budget_changes_the_memory_and_not_the_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let pack = pack.to_str().unwrap();
    for told in within_budgets(pack, &[], &[125, 110, 100]) {
        assert!(!told.contains("isn't packed"), "{told}");
    }
}

#[test]
fn a_checkpoint_that_is_not_packed_runs_within_a_budget_too() {
    let directory = tempfile::tempdir().unwrap();
    let source = source(directory.path());
    let source = source.to_str().unwrap();
    // An expert has 384 KiB of bf16, which is what it is packed as, or 111 KiB of q4_k; reads are of whole 4 KiB.
    for (more, budgets, packed) in [
        (&[][..], &[105, 74][..], "384 KiB and ready: run `cadre pack --model"),
        (&["--experts-format", "q4_k"], &[74, 68], "112 KiB and ready: run `cadre pack --model"),
    ] {
        for told in within_budgets(source, more, budgets) {
            for words in ["isn't packed: each expert that is needed takes 388 KiB", packed, "--output source-pack`"] {
                assert!(told.contains(words), "`{words}` is missing in {told}");
            }
            assert!(more.is_empty() || told.contains("--experts-format q4_k"), "{told}");
        }
    }
}

#[test]
fn a_budget_that_holds_all_costs_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let pack = pack.to_str().unwrap();
    let found = run(&generate(pack, &["--memory", "1GiB"]));
    assert!(found.code == Some(0) && !found.stderr.contains("experts"), "{}", found.stderr);
}

#[test]
fn budgets_that_cannot_be_kept_are_refused_with_what_would_do() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let found = run(&generate(pack.to_str().unwrap(), &["--memory", "40MiB"]));
    assert_ne!(found.code, Some(0));
    for word in ["(--memory) is 40 MiB", "needs at least", "--kv-memory"] {
        assert!(found.stderr.contains(word), "{word} is missing in {}", found.stderr);
    }
    assert!(!found.stderr.contains("convert"), "{}", found.stderr);
    let source = directory.path().join("source");
    let found = run(&generate(source.to_str().unwrap(), &["--memory", "40MiB"]));
    assert_ne!(found.code, Some(0));
    for word in ["(--memory) is 40 MiB", "needs at least", "2 MiB to convert them", "`cadre pack`"] {
        assert!(found.stderr.contains(word), "{word} is missing in {}", found.stderr);
    }
}

#[test]
fn a_damaged_expert_is_told_from_a_sound_one() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    // One bit in each half mebibyte of a layer's experts, which lie behind its header.
    let shard = pack.join("model-00002-of-00005.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    bytes.iter_mut().skip(64 << 10).step_by(100 << 10).for_each(|byte| *byte ^= 1);
    fs::write(&shard, bytes).unwrap();
    let found = run(&generate(pack.to_str().unwrap(), &["--memory", "105MiB"]));
    assert_ne!(found.code, Some(0));
    for word in ["could not be read", "checksum", "cadre pack", "model-00002-of-00005.safetensors"] {
        assert!(found.stderr.contains(word), "{word} is missing in {}", found.stderr);
    }
}

#[test]
fn a_file_that_is_cut_off_fails_those_who_need_it_until_it_is_whole_again() {
    let directory = tempfile::tempdir().unwrap();
    pack(directory.path());
    for model in ["pack", "source"] {
        cut_off_and_made_whole(&directory.path().join(model));
    }
}

/// Serves the model, cuts its files off and mends them.
fn cut_off_and_made_whole(model: &Path) {
    let path = model.to_str().unwrap();
    let server = Server::start(&["--model", path, "--memory", "125MiB", "--kv-memory", "4MiB", "--threads", "2"]);
    let body = json!({"model": MODEL, "prompt": "Who reads this?", "max_tokens": 8, "temperature": 0});
    let expected = server.client().post("/v1/completions", &body).ok();
    let shards: Vec<PathBuf> = fs::read_dir(model).unwrap().map(|entry| entry.unwrap().path()).collect();
    let shards: Vec<_> =
        shards.into_iter().filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    let whole: Vec<Vec<u8>> = shards.iter().map(|path| fs::read(path).unwrap()).collect();
    for path in &shards {
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
    }
    // A prompt of its own, so that other experts are needed and nothing is cached.
    let other: Vec<u32> = (0..200).map(|token| token * 7 % 250).collect();
    let other = json!({"model": MODEL, "prompt": other, "max_tokens": 8, "temperature": 0});
    let refused = server.client().post("/v1/completions", &other);
    assert_eq!(refused.status, 500, "{}", refused.json());
    let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("expert") && message.contains("could not be read"), "{message}");
    let log = server.log();
    assert!(log.contains("cut off") && log.contains("/model") && log.contains(".safetensors"), "{log}");
    for (path, bytes) in shards.iter().zip(&whole) {
        // In place: the server has these files open.
        std::os::unix::fs::FileExt::write_all_at(&fs::OpenOptions::new().write(true).open(path).unwrap(), bytes, 0)
            .unwrap();
    }
    server.client().post("/v1/completions", &other).ok();
    let again = server.client().post("/v1/completions", &body).ok();
    assert_eq!(again["choices"], expected["choices"]);
    let metrics = server.metrics();
    let tier = [("tier", "disk")];
    assert!(metrics.value("cadre_expert_misses_total", &tier) > 0.0);
    assert!(metrics.value("cadre_expert_read_bytes_total", &tier) > 0.0);
}
