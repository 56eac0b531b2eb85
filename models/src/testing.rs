//! Small checkpoints for tests.

use std::path::Path;

use serde_json::{Value, json};

/// A safetensors file in the making.
#[derive(Default)]
pub(crate) struct TensorFile {
    tensors: Vec<(String, &'static str, Vec<usize>, Vec<u8>)>,
}

impl TensorFile {
    /// With a further f32 tensor.
    pub(crate) fn f32(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        self.raw(name, "F32", shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
    }

    /// With a further bf16 tensor.
    pub(crate) fn bf16(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
        self.raw(name, "BF16", shape, bytes)
    }

    /// With a further f16 tensor.
    pub(crate) fn f16(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect();
        self.raw(name, "F16", shape, bytes)
    }

    fn raw(mut self, name: &str, dtype: &'static str, shape: &[usize], bytes: Vec<u8>) -> Self {
        self.tensors.push((name.to_owned(), dtype, shape.to_vec(), bytes));
        self
    }

    /// Writes the file.
    pub(crate) fn write(&self, path: &Path) {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, dtype, shape, bytes) in &self.tensors {
            let begin = data.len();
            data.extend_from_slice(bytes);
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert(name.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        std::fs::write(path, bytes).unwrap();
    }
}

/// The text of an index that maps tensors to shards.
pub(crate) fn index_json(entries: &[(&str, &str)]) -> String {
    let map: serde_json::Map<_, _> =
        entries.iter().map(|(tensor, shard)| ((*tensor).to_owned(), json!(shard))).collect();
    json!({"metadata": {}, "weight_map": map}).to_string()
}

/// The configuration of a tiny model of each architecture, with the names and shapes of its tensors.
pub(crate) fn tiny(architecture: &str) -> (Value, Vec<(String, Vec<usize>)>) {
    let mut config = json!({
        "model_type": architecture, "vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-6, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 6, "max_position_embeddings": 64, "hidden_act": "silu",
        "rope_theta": 10000.0, "tie_word_embeddings": false, "eos_token_id": 2,
    });
    let ling = architecture.starts_with("bailing");
    let embedding = if ling { "word_embeddings" } else { "embed_tokens" };
    let mut tensors = vec![
        (format!("model.{embedding}.weight"), vec![11, 8]),
        ("model.norm.weight".to_owned(), vec![8]),
        ("lm_head.weight".to_owned(), vec![11, 8]),
    ];
    if ling {
        config["num_shared_experts"] = json!(1);
    }
    if architecture == "bailing_moe_v2" {
        config["first_k_dense_replace"] = json!(1);
        config["n_group"] = json!(2);
        config["topk_group"] = json!(1);
        config["partial_rotary_factor"] = json!(0.5);
        config["score_function"] = json!("sigmoid");
    }
    for layer in 0..2 {
        let name = |name: &str| format!("model.layers.{layer}.{name}.weight");
        tensors.push((name("input_layernorm"), vec![8]));
        tensors.push((name("post_attention_layernorm"), vec![8]));
        tensors.extend(attention(architecture).into_iter().map(|(part, shape)| (name(part), shape)));
        if architecture == "bailing_moe_v2" && layer == 0 {
            tensors.extend(ffn(&format!("model.layers.{layer}.mlp")));
            continue;
        }
        tensors.push((name("mlp.gate"), vec![4, 8]));
        (0..4).for_each(|expert| tensors.extend(ffn(&format!("model.layers.{layer}.mlp.experts.{expert}"))));
        if ling {
            tensors.extend(ffn(&format!("model.layers.{layer}.mlp.shared_experts")));
        }
        if architecture == "bailing_moe_v2" {
            tensors.push((format!("model.layers.{layer}.mlp.gate.expert_bias"), vec![4]));
        }
    }
    (config, tensors)
}

fn attention(architecture: &str) -> Vec<(&'static str, Vec<usize>)> {
    let separate = vec![
        ("self_attn.q_proj", vec![8, 8]),
        ("self_attn.k_proj", vec![4, 8]),
        ("self_attn.v_proj", vec![4, 8]),
        ("self_attn.o_proj", vec![8, 8]),
    ];
    let fused = vec![("attention.query_key_value", vec![16, 8]), ("attention.dense", vec![8, 8])];
    let norms = |width| vec![("self_attn.q_norm", vec![width]), ("self_attn.k_norm", vec![4])];
    match architecture {
        "qwen3_moe" => [separate, norms(4)].concat(),
        "olmoe" => [separate, norms(8)].concat(),
        "bailing_moe" => fused,
        _ => [fused, vec![("attention.query_layernorm", vec![4]), ("attention.key_layernorm", vec![4])]].concat(),
    }
}

fn ffn(prefix: &str) -> Vec<(String, Vec<usize>)> {
    let name = |part: &str| format!("{prefix}.{part}_proj.weight");
    vec![(name("gate"), vec![6, 8]), (name("up"), vec![6, 8]), (name("down"), vec![8, 6])]
}

/// Writes a checkpoint into `directory`: bf16 weights of 0.5.
pub(crate) fn write_checkpoint(directory: &Path, config: &Value, tensors: &[(String, Vec<usize>)]) {
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let file = tensors
        .iter()
        .fold(TensorFile::default(), |file, (name, shape)| file.bf16(name, shape, &vec![0.5; shape.iter().product()]));
    file.write(&directory.join("model.safetensors"));
}
