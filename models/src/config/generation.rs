//! generation_config.json: the sampling that the model's makers recommend, and its end-of-sequence tokens.

use serde_json::{Map, Value};

use super::{ConfigFile, shown};
use crate::{Error, Result, json};

/// Default sampling of a checkpoint. `None` means that the checkpoint doesn't say.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// Tokens that end a text: generation_config.json's, else config.json's, else the tokenizer's.
    pub eos_token_ids: Vec<u32>,
    /// Whether to draw at all, rather than take the most likely token.
    pub do_sample: Option<bool>,
    /// What the logits are divided by.
    pub temperature: Option<f32>,
    /// The probability to keep.
    pub top_p: Option<f32>,
    /// How many tokens to keep; 0 keeps all.
    pub top_k: Option<u32>,
    /// The least probability to keep, relative to the most likely token's.
    pub min_p: Option<f32>,
    /// What the logits of tokens that have occurred are divided by.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// From generation_config.json in `bytes`, named `file` in errors.
    pub(crate) fn read(file: &str, bytes: &[u8]) -> Result<Self> {
        let fields = Fields { file, values: &json::object(file, bytes)? };
        Ok(Self {
            eos_token_ids: token_ids(file, "eos_token_id", fields.get("eos_token_id"))?,
            do_sample: fields.flag("do_sample")?,
            temperature: fields.number("temperature", "a number that is not negative", |value| value >= 0.0)?,
            top_p: fields.number("top_p", "a number above 0 and at most 1", |value| value > 0.0 && value <= 1.0)?,
            top_k: fields.top_k()?,
            min_p: fields.number("min_p", "a number from 0 to 1", |value| (0.0..=1.0).contains(&value))?,
            repetition_penalty: fields.number("repetition_penalty", "a number above 0", |value| value > 0.0)?,
        })
    }

    /// With config.json's end-of-sequence tokens, if generation_config.json named none.
    pub(crate) fn or_config(mut self, config: &ConfigFile) -> Result<Self> {
        if self.eos_token_ids.is_empty() {
            self.eos_token_ids = token_ids(config.label(), "eos_token_id", config.get("eos_token_id"))?;
        }
        Ok(self)
    }
}

/// A token id or a list of them.
fn token_ids(file: &str, field: &str, value: Option<&Value>) -> Result<Vec<u32>> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| Error::field(file, field, "a token id or a list of them", shown(Some(value))))
    };
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

struct Fields<'a> {
    file: &'a str,
    values: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn get(&self, field: &str) -> Option<&Value> {
        self.values.get(field).filter(|value| !value.is_null())
    }

    fn error(&self, field: &str, expected: &str) -> Error {
        Error::field(self.file, field, expected, shown(self.get(field)))
    }

    fn flag(&self, field: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.error(field, "true or false"))
    }

    fn number(&self, field: &str, expected: &str, fits: impl Fn(f64) -> bool) -> Result<Option<f32>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64().filter(|number| fits(*number) && (*number as f32).is_finite()) {
            Some(number) => Ok(Some(number as f32)),
            None => Err(self.error(field, expected)),
        }
    }

    /// −1 is vLLM's word for "all", 0 transformers'.
    fn top_k(&self) -> Result<Option<u32>> {
        let Some(value) = self.get("top_k") else { return Ok(None) };
        match value.as_i64() {
            Some(-1) => Ok(Some(0)),
            Some(count) if u32::try_from(count).is_ok() => Ok(u32::try_from(count).ok()),
            _ => Err(self.error("top_k", "a count of tokens, or 0 for all")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::read as config, *};

    fn read(text: &str) -> Result<GenerationConfig> {
        GenerationConfig::read("generation_config.json", text.as_bytes())
    }

    #[test]
    fn reads_a_real_one() {
        let text = r#"{"bos_token_id": 1, "do_sample": true, "eos_token_id": [5, 7], "temperature": 0.6, "top_k": 20,
            "top_p": 0.95, "transformers_version": "4.51.0"}"#;
        let expected = GenerationConfig {
            eos_token_ids: vec![5, 7],
            do_sample: Some(true),
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(20),
            ..GenerationConfig::default()
        };
        assert_eq!(read(text).unwrap(), expected);
    }

    #[test]
    fn eos_falls_back_to_the_configuration() {
        let config = config(r#"{"eos_token_id": 3}"#).unwrap();
        assert_eq!(read("{}").unwrap().or_config(&config).unwrap().eos_token_ids, [3]);
        assert_eq!(read(r#"{"eos_token_id": 4}"#).unwrap().or_config(&config).unwrap().eos_token_ids, [4]);
    }

    #[test]
    fn refuses_what_the_sampler_could_not_use() {
        for (field, value) in [
            ("temperature", "-0.5"),
            ("temperature", "1e300"),
            ("temperature", "\"warm\""),
            ("top_p", "0"),
            ("top_p", "1.01"),
            ("top_k", "-2"),
            ("top_k", "2.5"),
            ("min_p", "2"),
            ("repetition_penalty", "0"),
            ("do_sample", "1"),
            ("eos_token_id", "-1"),
            ("eos_token_id", "[1, \"a\"]"),
        ] {
            let error = read(&format!("{{\"{field}\": {value}}}")).unwrap_err().to_string();
            assert!(error.starts_with(&format!("generation_config.json: {field}: expected")), "{error}");
        }
    }
}
