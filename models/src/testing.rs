//! Small checkpoints for tests.

use std::path::Path;

use serde_json::json;

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
        let header = serde_json::Value::Object(header).to_string();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        std::fs::write(path, bytes).unwrap();
    }
}

/// The text of an index that maps tensors to shards.
pub(crate) fn index_json(entries: &[(&str, &str)]) -> String {
    let map: serde_json::Map<_, _> = entries.iter().map(|(tensor, shard)| ((*tensor).to_owned(), json!(shard))).collect();
    json!({"metadata": {}, "weight_map": map}).to_string()
}
