//! How much memory loading and packing take: weights are packed once, and never held twice.

use std::path::Path;

use cadre_tests::{checkpoint::Qwen3Moe, peak::peak_of};

/// The binary's own pages with the embedded model, stacks, tokenizer, one step's activations.
const PROCESS_BYTES: u64 = 40 << 20;
const KV_BYTES: u64 = 4 << 20;

/// A checkpoint of about 85 MiB, and its size.
fn checkpoint(directory: &Path) -> u64 {
    let sizes = Qwen3Moe { layers: 4, hidden: 512, heads: 8, experts: 48, expert_width: 128, positions: 512 };
    let weights = sizes.write(directory);
    assert!((60 << 20..120 << 20).contains(&weights), "{weights}");
    weights
}

/// Loads and answers within the weights, the KV cache and the process's own.
fn loads_in_little_more_than(weights: u64, model: &Path) {
    let (model, kv) = (model.to_str().expect("UTF-8"), KV_BYTES.to_string());
    let args = ["generate", "--raw", "--prompt", "x", "--max-tokens", "1", "--model", model, "--kv-memory", &kv];
    let peak = peak_of(&args);
    let limit = weights * 115 / 100 + KV_BYTES + PROCESS_BYTES;
    println!("weights {} MiB, peak {} MiB, limit {} MiB", weights >> 20, peak >> 20, limit >> 20);
    assert!(peak > weights, "the peak was not seen: {peak} bytes, and the weights have {weights}");
    assert!(peak <= limit, "peak {peak} bytes, limit {limit}: the weights have {weights}");
}

#[test]
fn loading_takes_little_more_than_the_weights() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let weights = checkpoint(directory.path());
    loads_in_little_more_than(weights, directory.path());
}

#[test]
fn packing_takes_a_few_matrices_and_loading_the_pack_little_more_than_the_weights() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let pack = directory.path().join("pack");
    let weights = checkpoint(directory.path());
    let [from, to] = [directory.path(), &pack].map(|path| path.to_str().expect("UTF-8"));
    let peak = peak_of(&["pack", "--model", from, "--output", to]);
    println!("packing {} MiB took {} MiB", weights >> 20, peak >> 20);
    assert!(peak <= PROCESS_BYTES, "peak {peak} bytes, limit {PROCESS_BYTES}: the weights have {weights}");
    loads_in_little_more_than(weights, &pack);
}
