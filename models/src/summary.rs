//! What a checkpoint holds, from its configuration and headers alone: no weight is read.

use std::collections::BTreeMap;

use cadre_engine::nn::{Format, PackingError};

use crate::{
    Result,
    config::ConfigFile,
    formats::{FormatOptions, Formats},
    tensors::{Stored, StoredType, TensorInfo, TensorSet},
};

/// What a checkpoint holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Decoder layers.
    pub layers: Option<u64>,
    /// Width of the hidden states.
    pub hidden_size: Option<u64>,
    /// Width of the logits.
    pub vocab_size: Option<u64>,
    /// The longest sequence that the position encoding was made for.
    pub max_position_embeddings: Option<u64>,
    /// Routed experts of a layer.
    pub experts: Option<u64>,
    /// Routed experts that a token uses.
    pub experts_per_token: Option<u64>,
    /// Parameters in all, without those that only training uses.
    pub total_parameters: u64,
    /// Parameters that one token uses, as model cards count them: embedding and head whole, experts by their share.
    pub active_parameters: u64,
    /// Bytes of all tensors.
    pub total_bytes: u64,
    /// The parts that occur, in the order of a token's way.
    pub parts: Vec<PartSummary>,
    /// Bytes of each stored type that occurs.
    pub types: Vec<(Stored, u64)>,
    /// The type that most of what isn't packed is stored in.
    pub main_type: StoredType,
}

/// One part of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct PartSummary {
    /// Which one.
    pub part: Part,
    /// Its tensors.
    pub tensors: u64,
    /// Its parameters.
    pub parameters: u64,
    /// Its bytes in the files.
    pub bytes: u64,
    /// Its bytes of each stored type that occurs.
    pub types: Vec<(Stored, u64)>,
    /// How far packing took it from the checkpoint that the pack was made from; `None` if nothing of it is packed.
    pub error: Option<PackingError>,
}

impl PartSummary {
    fn add(&mut self, info: &TensorInfo) {
        self.tensors += 1;
        self.parameters += info.elements;
        self.bytes += info.bytes;
        add_type(&mut self.types, info.stored, info.bytes);
        if let Stored::Packed(_) = info.stored {
            *self.error.get_or_insert_default() += info.error;
        }
    }
}

/// Adds to the bytes of a stored type.
fn add_type(types: &mut Vec<(Stored, u64)>, stored: Stored, bytes: u64) {
    match types.iter_mut().find(|(found, _)| *found == stored) {
        Some((_, sum)) => *sum += bytes,
        None => types.push((stored, bytes)),
    }
}

/// The parts of a mixture-of-experts decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Token embedding.
    Embedding,
    /// Attention projections and their norms.
    Attention,
    /// Norms between blocks.
    Norms,
    /// Routers and their biases.
    Routers,
    /// Routed experts.
    Experts,
    /// Experts that every token uses.
    SharedExperts,
    /// Feed-forwards without experts.
    DenseFeedForward,
    /// Output projection.
    Head,
    /// Layers past the last decoder layer: extra predictions, not used here.
    ExtraPredictions,
    /// Anything else.
    Other,
}

impl Part {
    /// Its name for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Attention => "attention",
            Self::Norms => "norms",
            Self::Routers => "routers",
            Self::Experts => "experts",
            Self::SharedExperts => "shared experts",
            Self::DenseFeedForward => "dense feed-forward",
            Self::Head => "output head",
            Self::ExtraPredictions => "extra predictions (not used)",
            Self::Other => "other",
        }
    }

    /// The part that the tensor `name` belongs to, for a model of `layers` layers.
    pub(crate) fn of(name: &str, layers: Option<u64>) -> Self {
        let pieces: Vec<&str> = name.split('.').collect();
        let has = |wanted: &[&str]| pieces.iter().any(|piece| wanted.contains(piece));
        if let (Some(layer), Some(layers)) = (layer_of(name), layers)
            && layer >= layers
        {
            return Self::ExtraPredictions;
        }
        if has(&["experts"]) {
            return Self::Experts;
        }
        if has(&["shared_experts", "shared_expert", "shared_expert_gate"]) {
            return Self::SharedExperts;
        }
        if has(&["self_attn", "attention"]) {
            return Self::Attention;
        }
        if has(&["mlp"]) {
            return if has(&["gate"]) { Self::Routers } else { Self::DenseFeedForward };
        }
        if has(&["embed_tokens", "word_embeddings"]) {
            return Self::Embedding;
        }
        if has(&["lm_head"]) {
            return Self::Head;
        }
        if pieces.iter().any(|piece| piece.ends_with("norm")) { Self::Norms } else { Self::Other }
    }
}

/// The number of the layer that the tensor `name` belongs to.
pub(crate) fn layer_of(name: &str) -> Option<u64> {
    name.split('.').skip_while(|piece| *piece != "layers").nth(1)?.parse().ok()
}

impl Summary {
    /// Adds up the headers.
    pub(crate) fn of(config: &ConfigFile, tensors: &TensorSet) -> Result<Self> {
        let layers = config.count("num_hidden_layers")?;
        let mut parts: BTreeMap<Part, PartSummary> = BTreeMap::new();
        let mut types = Vec::new();
        for info in tensors.iter() {
            let part = Part::of(&info.name, layers);
            let empty = PartSummary { part, tensors: 0, parameters: 0, bytes: 0, types: Vec::new(), error: None };
            parts.entry(part).or_insert(empty).add(info);
            add_type(&mut types, info.stored, info.bytes);
        }
        let (experts, experts_per_token) = (config.count("num_experts")?, config.count("num_experts_per_tok")?);
        let parts: Vec<_> = parts.into_values().collect();
        let used = parts.iter().filter(|part| part.part != Part::ExtraPredictions);
        Ok(Self {
            layers,
            hidden_size: config.count("hidden_size")?,
            vocab_size: config.count("vocab_size")?,
            max_position_embeddings: config.count("max_position_embeddings")?,
            experts,
            experts_per_token,
            total_parameters: used.clone().map(|part| part.parameters).sum(),
            active_parameters: used.map(|part| active(part, experts, experts_per_token)).sum(),
            total_bytes: parts.iter().map(|part| part.bytes).sum(),
            parts,
            types,
            main_type: tensors.main_type(),
        })
    }

    /// About the bytes that the weights take in memory if `options` are asked for: at least as many, but for rows that
    /// no tile divides. A pack has them already.
    #[must_use]
    pub fn loaded_bytes(&self, options: &FormatOptions) -> u64 {
        if self.types.iter().any(|(stored, _)| matches!(stored, Stored::Packed(_))) {
            return self.total_bytes;
        }
        let formats = options.resolve(self.main_type);
        let bytes = self.parts.iter().map(|part| part.parameters as f64 * bytes_per_weight(part.part, formats));
        (bytes.sum::<f64>() * (1.0 + PADDING)).ceil() as u64
    }
}

/// What the padding of columns adds at most, as a part of the whole: that of the K formats' super-blocks.
const PADDING: f64 = 0.01;

/// Bytes that a weight of `part` takes in memory.
fn bytes_per_weight(part: Part, formats: Formats) -> f64 {
    /// Sizes that nothing is padded at.
    const INPUTS: usize = 256;
    const OUTPUTS: usize = 16;
    let format = match part {
        Part::Embedding => formats.embedding,
        Part::Experts => formats.experts,
        Part::Attention | Part::SharedExperts | Part::DenseFeedForward | Part::Head => formats.dense,
        Part::Norms | Part::Routers | Part::Other => Format::F32,
        Part::ExtraPredictions => return 0.0,
    };
    format.panel_bytes(INPUTS) as f64 / (INPUTS * OUTPUTS) as f64
}

/// The parameters of `part` that one token uses: all, or its share of the routed experts.
fn active(part: &PartSummary, experts: Option<u64>, experts_per_token: Option<u64>) -> u64 {
    match (part.part, experts, experts_per_token) {
        (Part::Experts, Some(experts), Some(used)) if experts > 0 => part.parameters / experts * used,
        _ => part.parameters,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{files::Files, testing::TensorFile};

    #[test]
    fn names_tell_the_parts() {
        for (name, part) in [
            ("model.embed_tokens.weight", Part::Embedding),
            ("model.word_embeddings.weight", Part::Embedding),
            ("model.layers.0.self_attn.q_norm.weight", Part::Attention),
            ("model.layers.0.attention.query_key_value.weight", Part::Attention),
            ("model.layers.0.input_layernorm.weight", Part::Norms),
            ("model.norm.weight", Part::Norms),
            ("model.layers.0.mlp.gate.weight", Part::Routers),
            ("model.layers.0.mlp.gate.expert_bias", Part::Routers),
            ("model.layers.0.mlp.experts.7.up_proj.weight", Part::Experts),
            ("model.layers.0.mlp.shared_experts.gate_proj.weight", Part::SharedExperts),
            ("model.layers.0.mlp.gate_proj.weight", Part::DenseFeedForward),
            ("model.layers.2.mlp.gate_proj.weight", Part::ExtraPredictions),
            ("lm_head.weight", Part::Head),
            ("model.rotary.inv_freq", Part::Other),
        ] {
            assert_eq!(Part::of(name, Some(2)), part, "{name}");
        }
    }

    #[test]
    fn adds_up() {
        let directory = tempfile::tempdir().unwrap();
        let mut file = TensorFile::default().bf16("model.embed_tokens.weight", &[10, 2], &[0.0; 20]);
        for expert in 0..4 {
            file = file.bf16(&format!("model.layers.0.mlp.experts.{expert}.up_proj.weight"), &[3, 2], &[0.0; 6]);
        }
        file.f32("model.layers.0.mlp.gate.weight", &[4, 2], &[0.0; 8])
            .bf16("model.layers.1.eh_proj.weight", &[5], &[0.0; 5])
            .write(&directory.path().join("model.safetensors"));
        let tensors = TensorSet::open(&Files::Directory(directory.path().to_owned())).unwrap();
        let text = br#"{"model_type": "m", "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2}"#;
        let summary = Summary::of(&ConfigFile::read("config.json".to_owned(), text).unwrap(), &tensors).unwrap();
        assert_eq!((summary.total_parameters, summary.active_parameters), (20 + 24 + 8, 20 + 12 + 8));
        assert_eq!(summary.total_bytes, 40 + 48 + 32 + 10);
        let plain = Stored::Plain;
        assert_eq!(summary.types, [(plain(StoredType::Bf16), 98), (plain(StoredType::F32), 32)]);
        let parts: Vec<_> = summary.parts.iter().map(|part| (part.part, part.tensors, part.bytes)).collect();
        let expected =
            [(Part::Embedding, 1, 40), (Part::Routers, 1, 32), (Part::Experts, 4, 48), (Part::ExtraPredictions, 1, 10)];
        assert_eq!(parts, expected);
        // 20 of the embedding, 24 of experts, 8 of the router; what only training uses is not loaded.
        let loaded = |options| summary.loaded_bytes(&options);
        let about = |weights: f64| weights..weights * 1.02 + 1.0;
        assert!(about(40.0 + 48.0 + 32.0).contains(&(loaded(FormatOptions::default()) as f64)));
        assert!(about(80.0 + 96.0 + 32.0).contains(&(loaded(FormatOptions::all(Format::F32)) as f64)));
        let q4 = FormatOptions { experts: Some(Format::Q4_0), ..FormatOptions::default() };
        assert!(about(40.0 + 24.0 * 4.5 / 8.0 + 32.0).contains(&(loaded(q4) as f64)));
    }
}
