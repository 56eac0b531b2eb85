//! `cadre plan`: what it tells of a model within a budget, and that it agrees with what the server then does.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use cadre_tests::{binary, checkpoint::Qwen3Moe};
use serde_json::{Value, json};

/// A pack, and a cache directory that is nobody else's.
struct Rig {
    directory: tempfile::TempDir,
    /// The model that is planned: the pack, unless a test wants its source.
    model: PathBuf,
}

impl Rig {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (source, pack) = (directory.path().join("source"), directory.path().join("pack"));
        fs::create_dir(&source).unwrap();
        let sizes = Qwen3Moe { layers: 4, hidden: 512, heads: 8, experts: 48, expert_width: 128, positions: 512 };
        sizes.write(&source);
        binary::output(&["pack", "--model", path(&source), "--output", path(&pack)]);
        Self { directory, model: pack }
    }

    /// Standard output and error of a command that has to succeed.
    fn run(&self, args: &[&str]) -> (String, String) {
        let args = [args, &["--threads", "2", "--kv-memory", "4MiB", "--model", path(&self.model)]].concat();
        let mut command = binary::command(&args);
        command.env("XDG_CACHE_HOME", self.directory.path()).env("RUST_LOG", "cadre=info");
        let output = command.stdin(Stdio::null()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(output.stderr));
        (text(output.stdout), text(output.stderr))
    }

    fn plan(&self, more: &[&str]) -> Value {
        serde_json::from_str(&self.run(&[&["plan", "--json"], more].concat()).0).unwrap()
    }

    fn kept(&self) -> String {
        fs::read_to_string(self.directory.path().join("cadre/measured.json")).unwrap()
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().ok_or_else(|| format!("no number {key} in {value}")).unwrap()
}

/// The number after `key=` in a log.
fn logged(log: &str, key: &str) -> f64 {
    let (_, rest) = log.split_once(&format!("{key}=")).ok_or_else(|| format!("no {key} in {log}")).unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

const LIMITS: [&str; 4] = ["--memory", "110MiB", "--max-num-batched-tokens", "64"];

#[test]
fn the_split_is_the_one_that_the_engine_then_makes() {
    let packed = Rig::new();
    assert_eq!(split_of(&packed), 0.0);
    // Not packed, its experts need room between disk and slot.
    let plain = Rig { model: packed.directory.path().join("source"), ..packed };
    assert!(split_of(&plain) > 0.0);
}

/// Bytes between disk and slot in the split that is planned, which is the one that `generate` makes.
fn split_of(rig: &Rig) -> f64 {
    let plan = rig.plan(&[&LIMITS[..], &["--max-num-seqs", "1"]].concat());
    let memory = &plan["memory"];
    assert_eq!((number(memory, "budget_bytes"), number(memory, "experts")), (110.0 * 1_048_576.0, 192.0));
    assert!(number(memory, "needed_bytes") <= number(memory, "budget_bytes"), "{memory}");
    let (_, log) = rig.run(&[&["generate", "--raw", "--prompt", "x", "--max-tokens", "1"], &LIMITS[..]].concat());
    let (slots, planned) = (logged(&log, "expert_slots"), number(memory, "expert_slots"));
    println!("planned {planned} slots, had {slots}");
    assert!((slots / planned - 1.0).abs() < 0.1, "planned {planned} slots, had {slots}");
    assert_eq!(logged(&log, "step_mib"), (number(memory, "step_bytes") / 1_048_576.0).floor());
    for (part, bytes) in [("kv_mib", "kv_bytes"), ("staging_mib", "staging_bytes")] {
        assert_eq!(logged(&log, part), (number(memory, bytes) / 1_048_576.0).floor(), "{part}");
    }
    number(memory, "staging_bytes")
}

#[test]
fn figures_have_bounds_hit_rates_and_what_was_measured() {
    let rig = Rig::new();
    let plan = rig.plan(&LIMITS);
    assert_eq!((&plan["routing"], &plan["format"], &plan["threads"]), (&json!("even"), &json!("bf16"), &json!(2)));
    for rate in ["read_bytes_per_second", "matrix_operations_per_second", "disk_bytes_per_second"] {
        assert!(number(&plan["machine"], rate) > 0.0, "{plan}");
    }
    let figures = plan["figures"].as_array().unwrap();
    let of: Vec<_> = figures.iter().map(|figure| (figure["kind"].as_str().unwrap(), number(figure, "batch"))).collect();
    assert_eq!(of, [("prefill", 1.0), ("decode", 1.0), ("decode", 8.0), ("decode", 32.0)]);
    let share = number(&plan["memory"], "expert_slots") / 192.0;
    for figure in figures {
        assert!((number(figure, "hit_rate") - share).abs() < 1e-9, "{figure}");
        assert!(number(figure, "predicted_tokens_per_second") > 0.0, "{figure}");
        assert!(number(figure, "bound_tokens_per_second") > 0.0, "{figure}");
        assert!(figure["measured"].is_null(), "{figure}");
    }

    // A bench shows what was predicted, and the next plan what was measured, without measuring the machine again.
    let measured = rig.kept();
    let sizes = ["--prompt", "64", "--batch", "8", "--generate", "4", "--repetitions", "1"];
    let (lines, _) = rig.run(&[&["bench", "--json"], &sizes[..], &LIMITS].concat());
    let benched: Value = serde_json::from_str(lines.lines().nth(1).unwrap()).unwrap();
    let again = rig.plan(&LIMITS);
    let measured_then = &again["figures"][2]["measured"];
    assert_eq!(measured_then["tokens_per_second"], benched["tokens_per_second"]);
    assert_eq!(measured_then["hit_rate"], benched["experts"]["hit_rate"]);
    assert_eq!(measured_then["experts_per_step"], benched["experts"]["active_per_step_mean"]);
    let [speed, at_its_hits] = ["tokens_per_second", "predicted_at_hit_rate"].map(|key| number(measured_then, key));
    assert!((number(measured_then, "by_predicted_at_hit_rate") - speed / at_its_hits).abs() < 1e-9);
    // The bench has more slots, since its step is smaller, but slots count only by their hits.
    let ratio = number(&benched, "predicted_tokens_per_second") / at_its_hits;
    assert!((0.999..1.001).contains(&ratio), "{benched} {again}");
    assert_eq!(again["machine"], plan["machine"]);
    let machines = |text: &str| serde_json::from_str::<Value>(text).unwrap()["machines"].clone();
    assert_eq!(machines(&rig.kept()), machines(&measured));
    assert_ne!(rig.plan(&[&LIMITS[..], &["--measure"]].concat())["machine"], plan["machine"]);
    // Another budget is another bench's.
    assert!(rig.plan(&["--memory", "120MiB"])["figures"][2]["measured"].is_null());
}

#[test]
fn a_routing_profile_makes_more_hits() {
    // So small that not nearly all experts have slots, whatever else the process takes.
    const TIGHT: [&str; 4] = ["--memory", "100MiB", LIMITS[2], LIMITS[3]];
    let rig = Rig::new();
    let even = rig.plan(&TIGHT);
    let _ = rig.run(&[&["generate", "--raw", "--prompt", "x", "--max-tokens", "4"], &TIGHT[..]].concat());
    let file = rig.model.join("routing_profile.json");
    let mut profile: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let uses: Vec<u32> = (0..48).map(|expert| if expert < 8 { 1000 } else { 1 }).collect();
    profile["uses"] = json!([uses, uses, uses, uses]);
    fs::write(&file, profile.to_string()).unwrap();
    let skewed = rig.plan(&TIGHT);
    assert_eq!(skewed["routing"], "profile");
    let [even, skewed] = [even, skewed].map(|plan| number(&plan["figures"][1], "hit_rate"));
    assert!(skewed > 0.9 && even < 0.7, "even {even}, skewed {skewed}");
}

#[test]
fn the_table_tells_memory_machine_and_figures() {
    let rig = Rig::new();
    let (table, _) = rig.run(&[&["plan"], &LIMITS[..]].concat());
    for part in [
        "pack: bf16",
        "2 threads",
        "the process and dense weights",
        "keys and values",
        "of 192 experts",
        "of 110 MiB",
        "GB/s from the disk",
        "routing: even",
        "predicted",
        "bound",
        "measured",
    ] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
    // All of it in memory.
    let (table, _) = rig.run(&["plan"]);
    for part in ["all 192 experts are among the weights", "no limit", "100.0%"] {
        assert!(table.contains(part), "{part} is missing in\n{table}");
    }
}

#[test]
fn what_cannot_be_kept_or_read_is_refused() {
    let rig = Rig::new();
    let pack = path(&rig.model);
    let source = rig.directory.path().join("source");
    for (args, words) in [
        (&["--memory", "40MiB", "--model", pack][..], &["needs at least", "--kv-memory"][..]),
        (&["--memory", "40MiB", "--model", path(&source)], &["needs at least", "which `cadre pack` would do once"]),
        (&["--model", pack, "--format", "q4_k"], &["is a pack", "found q4_k"]),
        (&["--model", "/nowhere/at/all"], &["/nowhere/at/all"]),
        (&["--max-num-seqs", "0"], &["--max-num-seqs"]),
    ] {
        let run = binary::run(&[&["plan"], args].concat());
        assert!(run.code != Some(0) && run.stdout.is_empty(), "{args:?}: {}", run.stdout);
        for word in words {
            assert!(run.stderr.contains(word), "{args:?}: {word} is missing in {}", run.stderr);
        }
    }
}
