//! config.json: the raw fields, checked for values that no model has, and parsed into an architecture's own struct.

mod bounds;
mod generation;
mod rope;

use std::cell::RefCell;

use serde::de::{DeserializeOwned, value::MapDeserializer};
use serde_json::{Map, Value};

use crate::{Error, Result, json};

pub use generation::GenerationConfig;

/// A config.json whose well-known fields have values that a model can have.
#[derive(Debug, Clone)]
pub struct ConfigFile {
    file: String,
    fields: Map<String, Value>,
}

impl ConfigFile {
    /// Reads `bytes`; `file` names them in errors.
    pub(crate) fn read(file: String, bytes: &[u8]) -> Result<Self> {
        let config = Self { fields: json::object(&file, bytes)?, file };
        bounds::check(&config)?;
        Ok(config)
    }

    /// The architecture's name.
    pub(crate) fn model_type(&self) -> Result<&str> {
        match self.get("model_type") {
            Some(Value::String(name)) => Ok(name),
            other => Err(self.error("model_type", "the name of an architecture", shown(other))),
        }
    }

    /// The raw value of a field; `None` also when it is null.
    #[must_use]
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// The value of a field that counts something; `None` if it is absent or null.
    pub(crate) fn count(&self, field: &str) -> Result<Option<u64>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(count) => Ok(Some(count)),
                None => Err(self.error(field, "a whole number that is not negative", shown(Some(value)))),
            },
        }
    }

    /// The fields as an architecture's own struct.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        // serde's messages name a field that is missing, but not one whose value is wrong: it is the last one read.
        let current = RefCell::new(String::new());
        let fields = self.fields.iter().map(|(name, value)| {
            name.clone_into(&mut current.borrow_mut());
            (name.as_str(), value)
        });
        let parsed = T::deserialize(MapDeserializer::new(fields));
        parsed.map_err(|error: serde_json::Error| {
            let message = error.to_string();
            match message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
                Some(field) => self.error(field, "a value", "none"),
                None => self.mismatch(&current.borrow(), &message),
            }
        })
    }

    /// serde's "invalid type: string "x", expected usize" in this crate's order of words.
    fn mismatch(&self, field: &str, message: &str) -> Error {
        match message.rsplit_once(", expected ") {
            Some((found, expected)) => self.error(field, expected, found),
            None => self.error(field, "another value", message),
        }
    }

    /// Refuses a configuration whose `field` asks for something else than one of `values`; absent and null are fine.
    pub(crate) fn supports<T>(&self, field: &str, values: &[T]) -> Result<()>
    where
        T: std::fmt::Debug,
        Value: PartialEq<T>,
    {
        match self.get(field) {
            Some(value) if !values.iter().any(|known| value == known) => {
                Err(self.error(field, format!("one of {values:?}, which is all that is supported"), shown(Some(value))))
            }
            _ => Ok(()),
        }
    }

    /// An error about the value of `field`.
    pub(crate) fn error(&self, field: &str, expected: impl ToString, found: impl ToString) -> Error {
        Error::field(&self.file, field, expected, found)
    }

    /// How the file is called in messages.
    pub(crate) fn label(&self) -> &str {
        &self.file
    }
}

/// A field's value for a message.
fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "none".to_owned(), |value| json::excerpt(&value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    pub(super) fn read(text: &str) -> Result<ConfigFile> {
        ConfigFile::read("config.json".to_owned(), text.as_bytes())
    }

    #[derive(Debug, Deserialize)]
    #[allow(dead_code, reason = "only parsed")]
    struct Example {
        hidden_size: usize,
        head_dim: Option<usize>,
        #[serde(default)]
        tie_word_embeddings: bool,
    }

    #[test]
    fn parses_and_skips_what_it_does_not_know() {
        let config = read(r#"{"model_type": "m", "hidden_size": 8, "head_dim": null, "other": {"a": [1]}}"#).unwrap();
        let example: Example = config.parse().unwrap();
        assert_eq!((example.hidden_size, example.head_dim, example.tie_word_embeddings), (8, None, false));
        assert_eq!(config.model_type().unwrap(), "m");
    }

    #[test]
    fn errors_name_the_field() {
        for (text, expected) in [
            ("{}", "config.json: hidden_size: expected a value, found none"),
            (
                r#"{"hidden_size": 8, "tie_word_embeddings": "yes"}"#,
                "config.json: tie_word_embeddings: expected a boolean",
            ),
            (r#"{"head_dim": [], "hidden_size": 8}"#, "config.json: head_dim: expected"),
        ] {
            let error = read(text).and_then(|config| config.parse::<Example>()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{error}");
        }
        let error = read("{}").unwrap().model_type().unwrap_err().to_string();
        assert_eq!(error, "config.json: model_type: expected the name of an architecture, found none");
    }
}
