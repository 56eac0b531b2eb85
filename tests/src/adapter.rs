//! Random LoRA adapters of the embedded model, in PEFT's layout, written on the fly.

use std::{fs, path::Path};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;

const HIDDEN: usize = 256;
const EXPERT_WIDTH: usize = 64;
const LAYERS: usize = 4;
const EXPERTS: usize = 16;
const RANK: usize = 3;

/// Which of the embedded model's modules have adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adapts {
    /// Attention's output of each layer.
    Attention,
    /// The routed and shared experts, and the feed-forward of the first layer.
    Experts,
}

/// Writes an adapter with the numbers of `seed` into `directory`, which is made.
///
/// # Panics
/// When it can't be written.
pub fn write(directory: &Path, adapts: Adapts, seed: u64) {
    fs::create_dir_all(directory).expect("a folder");
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "embedded", "r": RANK,
        "lora_alpha": 2 * RANK, "target_modules": "all-linear",
    });
    fs::write(directory.join("adapter_config.json"), config.to_string()).expect("adapter_config.json");
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut tensors = Vec::new();
    for (module, [outputs, inputs]) in modules(adapts) {
        for (side, shape) in [("lora_A", [RANK, inputs]), ("lora_B", [outputs, RANK])] {
            let mut bytes = Vec::new();
            for _ in 0..shape[0] * shape[1] {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                // Of both signs, below 1 in size: enough to change what the model says.
                let unit = f32::from((random >> 48) as u16) / f32::from(u16::MAX) - 0.5;
                bytes.extend_from_slice(&(2.0 * unit).to_le_bytes());
            }
            tensors.push((format!("base_model.model.{module}.{side}.weight"), shape.to_vec(), bytes));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("four bytes a value"))
    });
    let file = directory.join("adapter_model.safetensors");
    safetensors::serialize_to_file(views, None, &file).expect("adapter_model.safetensors");
}

/// The modules' names and weights' shapes.
fn modules(adapts: Adapts) -> Vec<(String, [usize; 2])> {
    let mut modules = Vec::new();
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape| modules.push((format!("model.layers.{layer}.{name}"), shape));
        if adapts == Adapts::Attention {
            add("attention.dense", [HIDDEN, HIDDEN]);
            continue;
        }
        let mut add_ffn = |name: &str, width| {
            add(&format!("{name}gate_proj"), [width, HIDDEN]);
            add(&format!("{name}up_proj"), [width, HIDDEN]);
            add(&format!("{name}down_proj"), [HIDDEN, width]);
        };
        if layer == 0 {
            add_ffn("mlp.", 2 * HIDDEN);
            continue;
        }
        add_ffn("mlp.shared_experts.", EXPERT_WIDTH);
        (0..EXPERTS).for_each(|expert| add_ffn(&format!("mlp.experts.{expert}."), EXPERT_WIDTH));
    }
    modules
}
