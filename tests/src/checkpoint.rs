//! Random checkpoints in the Hugging Face layout, written on the fly.

use std::{
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use crate::source::root;

/// The sizes of a Qwen3-MoE model. Its tokenizer is the embedded model's.
#[derive(Debug, Clone, Copy)]
pub struct Qwen3Moe {
    /// Decoder layers.
    pub layers: usize,
    /// Width of the hidden states.
    pub hidden: usize,
    /// Query heads of 64 values; a quarter as many keys and values.
    pub heads: usize,
    /// Experts of a layer, four of which a token uses.
    pub experts: usize,
    /// Width of an expert.
    pub expert_width: usize,
    /// The longest sequence.
    pub positions: usize,
}

const HEAD_DIM: usize = 64;
const VOCAB: usize = 640;

impl Qwen3Moe {
    /// Writes the checkpoint into `directory`, and returns the bytes of its weights.
    ///
    /// # Panics
    /// When it can't be written.
    pub fn write(&self, directory: &Path) -> u64 {
        copy_tokenizer(directory);
        let config = serde_json::to_string_pretty(&self.config()).expect("a JSON value");
        fs::write(directory.join("config.json"), config).expect("config.json");
        let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .shapes()
            .into_iter()
            .map(|(name, shape)| {
                let count = shape.iter().product();
                let bytes = if name.ends_with("norm.weight") { ones(count) } else { numbers.bf16(count) };
                (name, shape, bytes)
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, bytes)| {
            (name.as_str(), TensorView::new(Dtype::BF16, shape.clone(), bytes).expect("two bytes a value"))
        });
        safetensors::serialize_to_file(views, None, &directory.join("model.safetensors")).expect("model.safetensors");
        tensors.iter().map(|(_, _, bytes)| bytes.len() as u64).sum()
    }

    fn key_value_heads(&self) -> usize {
        (self.heads / 4).max(1)
    }

    fn config(&self) -> Value {
        json!({
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
            "attention_bias": false, "bos_token_id": 0, "eos_token_id": 2, "decoder_sparse_step": 1,
            "head_dim": HEAD_DIM, "hidden_act": "silu", "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden, "max_position_embeddings": self.positions, "mlp_only_layers": [],
            "moe_intermediate_size": self.expert_width, "norm_topk_prob": true, "num_attention_heads": self.heads,
            "num_experts": self.experts, "num_experts_per_tok": 4, "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads(), "rms_norm_eps": 1e-6, "rope_theta": 1e6,
            "rope_scaling": null, "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": VOCAB,
        })
    }

    fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, queries, keys) = (self.hidden, self.heads * HEAD_DIM, self.key_value_heads() * HEAD_DIM);
        let mut shapes: Vec<(String, Vec<usize>)> = vec![
            ("model.embed_tokens.weight".into(), vec![VOCAB, hidden]),
            ("model.norm.weight".into(), vec![hidden]),
            ("lm_head.weight".into(), vec![VOCAB, hidden]),
        ];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
            };
            add("input_layernorm", &[hidden]);
            add("post_attention_layernorm", &[hidden]);
            add("self_attn.q_proj", &[queries, hidden]);
            add("self_attn.k_proj", &[keys, hidden]);
            add("self_attn.v_proj", &[keys, hidden]);
            add("self_attn.o_proj", &[hidden, queries]);
            add("self_attn.q_norm", &[HEAD_DIM]);
            add("self_attn.k_norm", &[HEAD_DIM]);
            add("mlp.gate", &[self.experts, hidden]);
            for expert in 0..self.experts {
                add(&format!("mlp.experts.{expert}.gate_proj"), &[self.expert_width, hidden]);
                add(&format!("mlp.experts.{expert}.up_proj"), &[self.expert_width, hidden]);
                add(&format!("mlp.experts.{expert}.down_proj"), &[hidden, self.expert_width]);
            }
        }
        shapes
    }
}

/// The embedded model's files, but for those named, to be damaged by a test.
///
/// # Panics
/// When they can't be copied.
pub fn copy_embedded(directory: &Path, but: &[&str]) {
    for file in embedded_files() {
        let name = file.file_name().expect("a file has a name");
        if !but.iter().any(|left_out| name == *left_out) {
            fs::copy(&file, directory.join(name)).expect("a copy");
        }
    }
}

fn embedded_files() -> Vec<PathBuf> {
    const FILES: &[&str] = &[
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    FILES.iter().map(|name| root().join("models/embedded").join(name)).collect()
}

fn copy_tokenizer(directory: &Path) {
    copy_embedded(directory, &["config.json", "generation_config.json", "model.safetensors"]);
}

fn ones(count: usize) -> Vec<u8> {
    0x3F80_u16.to_le_bytes().repeat(count)
}

/// Cheap random numbers: xorshift.
struct Numbers(u64);

impl Numbers {
    /// bf16 values of both signs between 2⁻⁷ and 2⁻⁵ in size.
    fn bf16(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(2 * count);
        while bytes.len() < 2 * count {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            for lane in self.0.to_le_bytes().chunks_exact(2).take(count - bytes.len() / 2) {
                let random = u16::from_le_bytes([lane[0], lane[1]]);
                // Sign and eight bits from the generator: seven of mantissa, one of exponent.
                let value = (random & 0x80FF) + (120 << 7);
                bytes.extend_from_slice(&value.to_le_bytes());
            }
        }
        bytes
    }
}
