//! How much memory a load takes: weights are packed once, and never held twice.

use std::{
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use cadre_tests::{binary, checkpoint::Qwen3Moe};

/// The binary's own pages with the embedded model, stacks, tokenizer, one step's activations.
const PROCESS_BYTES: u64 = 40 << 20;
const KV_BYTES: u64 = 4 << 20;

#[test]
fn loading_takes_little_more_than_the_weights() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let sizes = Qwen3Moe { layers: 4, hidden: 512, heads: 8, experts: 48, expert_width: 128, positions: 512 };
    let weights = sizes.write(directory.path());
    assert!((60 << 20..120 << 20).contains(&weights), "{weights}");
    let model = directory.path().to_str().expect("UTF-8");
    let kv = KV_BYTES.to_string();
    let args = ["generate", "--raw", "--prompt", "x", "--max-tokens", "1", "--model", model, "--kv-memory", &kv];
    let mut child = binary::command(&args).stdout(Stdio::null()).spawn().expect("cadre starts");
    // The high-water mark can be asked for as long as the process lives; it only rises, so the last answer counts.
    let (mut peak, deadline) = (0, Instant::now() + Duration::from_secs(120));
    let status = loop {
        peak = peak.max(high_water_mark(child.id()).unwrap_or(0));
        if let Some(status) = child.try_wait().expect("its state can be asked") {
            break status;
        }
        assert!(Instant::now() < deadline, "cadre doesn't end");
        std::thread::sleep(Duration::from_micros(500));
    };
    assert!(status.success(), "{status}");
    let limit = weights * 115 / 100 + KV_BYTES + PROCESS_BYTES;
    println!("weights {} MiB, peak {} MiB, limit {} MiB", weights >> 20, peak >> 20, limit >> 20);
    assert!(peak > weights, "the peak was not seen: {peak} bytes, and the weights have {weights}");
    assert!(peak <= limit, "peak {peak} bytes, limit {limit}: the weights have {weights}");
}

/// `VmHWM` of a process, in bytes.
fn high_water_mark(process: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}
