//! The rotary embedding's parameters, in the form of the hub (`rope_theta`, `rope_scaling`) and in that of
//! transformers 5 (`rope_parameters`).

use cadre_engine::nn::{RopeConfig, RopeScaling};
use serde_json::{Map, Value};

use super::{ConfigFile, shown};
use crate::Result;

/// transformers' base when a configuration names none.
const DEFAULT_THETA: f64 = 10_000.0;

impl ConfigFile {
    /// The rotary embedding of heads of width `head_dim`.
    pub(crate) fn rope(&self, head_dim: usize) -> Result<RopeConfig> {
        let parameters = Parameters::of(self)?;
        let theta = match parameters.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(DEFAULT_THETA),
        };
        if theta <= 1.0 {
            return Err(self.error("rope_theta", "a number above 1", theta));
        }
        let max_position_embeddings = self
            .count("max_position_embeddings")?
            .and_then(|count| usize::try_from(count).ok())
            .ok_or_else(|| self.error("max_position_embeddings", "a value", "none"))?;
        Ok(RopeConfig {
            rotary_dim: self.rotary_dim(&parameters, head_dim)?,
            theta,
            max_position_embeddings,
            scaling: parameters.scaling(max_position_embeddings)?,
        })
    }

    /// How many of a head's `head_dim` values are rotated.
    fn rotary_dim(&self, parameters: &Parameters<'_>, head_dim: usize) -> Result<usize> {
        let factor = match parameters.number("partial_rotary_factor")? {
            Some(factor) => Some(factor),
            None => self.number("partial_rotary_factor")?,
        };
        // Rounded down, as transformers does.
        let by_factor = factor.map(|factor| (head_dim as f64 * factor) as usize);
        let by_count = self.count("rotary_dim")?.map(|count| usize::try_from(count).unwrap_or(usize::MAX));
        if let (Some(by_factor), Some(by_count)) = (by_factor, by_count)
            && by_factor != by_count
        {
            return Err(self.error("rotary_dim", format!("{by_factor}, as partial_rotary_factor has it"), by_count));
        }
        let rotary_dim = by_factor.or(by_count).unwrap_or(head_dim);
        if rotary_dim < 2 || rotary_dim > head_dim || !rotary_dim.is_multiple_of(2) {
            let field = if by_count.is_some() { "rotary_dim" } else { "partial_rotary_factor" };
            let expected = format!("an even number of rotated values up to head_dim, which is {head_dim}");
            return Err(self.error(field, expected, rotary_dim));
        }
        Ok(rotary_dim)
    }

    fn number(&self, field: &str) -> Result<Option<f64>> {
        number(self, field, self.get(field))
    }
}

/// `rope_parameters`, else `rope_scaling`, else nothing.
struct Parameters<'a> {
    config: &'a ConfigFile,
    field: &'static str,
    values: Option<&'a Map<String, Value>>,
}

impl<'a> Parameters<'a> {
    fn of(config: &'a ConfigFile) -> Result<Self> {
        let present = ["rope_parameters", "rope_scaling"].into_iter().find(|field| config.get(field).is_some());
        let field = present.unwrap_or("rope_scaling");
        match config.get(field) {
            None => Ok(Self { config, field, values: None }),
            Some(Value::Object(values)) => Ok(Self { config, field, values: Some(values) }),
            other => Err(config.error(field, "an object", shown(other))),
        }
    }

    fn get(&self, name: &str) -> Option<&'a Value> {
        self.values.and_then(|values| values.get(name)).filter(|value| !value.is_null())
    }

    fn path(&self, name: &str) -> String {
        format!("{}.{name}", self.field)
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        number(self.config, &self.path(name), self.get(name))
    }

    /// `name` with its default, above zero.
    fn positive(&self, name: &str, default: Option<f64>) -> Result<f64> {
        match self.number(name)?.or(default) {
            Some(value) if value > 0.0 && value < 1e9 => Ok(value),
            Some(value) => Err(self.config.error(&self.path(name), "a number above 0 and below 1e9", value)),
            None => Err(self.config.error(&self.path(name), "a value", "none")),
        }
    }

    fn scaling(&self, max_position_embeddings: usize) -> Result<RopeScaling> {
        let kind = self.get("rope_type").or_else(|| self.get("type"));
        match kind.map_or(Some("default"), Value::as_str) {
            Some("default") => Ok(RopeScaling::Default),
            Some("linear") => Ok(RopeScaling::Linear { factor: self.positive("factor", None)? }),
            Some("dynamic") => Ok(RopeScaling::Dynamic { factor: self.positive("factor", None)? }),
            Some("yarn") => self.yarn(max_position_embeddings),
            _ => {
                let expected = "one of default, linear, dynamic, yarn";
                Err(self.config.error(&self.path("rope_type"), expected, shown(kind)))
            }
        }
    }

    /// transformers' rules: a length of its own at the top level wins, else the one beside the factor, else the whole.
    fn yarn(&self, max_position_embeddings: usize) -> Result<RopeScaling> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        let original = match self.config.count(ORIGINAL)? {
            Some(count) => count as f64,
            None => self.positive(ORIGINAL, Some(max_position_embeddings as f64))?,
        };
        if original < 1.0 || original > u32::MAX.into() {
            return Err(self.config.error(&self.path(ORIGINAL), "a whole number above 0", original));
        }
        let factor = self.positive("factor", Some(max_position_embeddings as f64 / original))?;
        let truncate = match self.get("truncate") {
            None => true,
            Some(Value::Bool(truncate)) => *truncate,
            other => return Err(self.config.error(&self.path("truncate"), "true or false", shown(other))),
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original as usize,
            beta_fast: self.positive("beta_fast", Some(32.0))?,
            beta_slow: self.positive("beta_slow", Some(1.0))?,
            attention_factor: self.attention_factor(factor)?,
            truncate,
        })
    }

    /// What YaRN multiplies the rotated queries and keys by: given, or from the factor as in the paper.
    fn attention_factor(&self, factor: f64) -> Result<f64> {
        if self.get("attention_factor").is_some() {
            return self.positive("attention_factor", None);
        }
        let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let (mscale, all_dim) = (self.number("mscale")?.unwrap_or(0.0), self.number("mscale_all_dim")?.unwrap_or(0.0));
        if mscale != 0.0 && all_dim != 0.0 {
            return Ok(scale(mscale) / scale(all_dim));
        }
        Ok(scale(1.0))
    }
}

fn number(config: &ConfigFile, field: &str, value: Option<&Value>) -> Result<Option<f64>> {
    match value {
        None => Ok(None),
        Some(value) => match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(config.error(field, "a number", shown(Some(value)))),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::read, *};

    fn rope(fields: &str) -> Result<RopeConfig> {
        read(&format!("{{\"max_position_embeddings\": 4096, {fields}}}")).unwrap().rope(64)
    }

    fn yarn(fields: &str) -> (f64, usize, f64, f64, f64, bool) {
        match rope(fields).unwrap().scaling {
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                attention_factor,
                truncate,
            } => (factor, original_max_position_embeddings, beta_fast, beta_slow, attention_factor, truncate),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn both_forms_say_the_same() {
        for fields in [
            r#""rope_theta": 600000, "partial_rotary_factor": 0.5, "rope_scaling": null"#,
            r#""rope_theta": 600000, "rotary_dim": 32"#,
            r#""rope_theta": 600000, "rotary_dim": 32, "partial_rotary_factor": 0.5"#,
            r#""rope_parameters": {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5}"#,
        ] {
            let rope = rope(fields).unwrap();
            assert_eq!((rope.theta, rope.rotary_dim, rope.max_position_embeddings), (600_000.0, 32, 4096), "{fields}");
            assert!(matches!(rope.scaling, RopeScaling::Default), "{fields}");
        }
        let plain = rope(r#""hidden_size": 8"#).unwrap();
        assert_eq!((plain.theta, plain.rotary_dim), (10_000.0, 64));
    }

    #[test]
    fn scaling_by_type() {
        assert!(matches!(
            rope(r#""rope_scaling": {"type": "linear", "factor": 4}"#).unwrap().scaling,
            RopeScaling::Linear { factor: 4.0 }
        ));
        assert!(matches!(
            rope(r#""rope_parameters": {"rope_type": "dynamic", "factor": 2.5}"#).unwrap().scaling,
            RopeScaling::Dynamic { factor: 2.5 }
        ));
    }

    #[test]
    fn yarn_resolves_its_defaults_as_transformers_does() {
        let original = r#""rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}"#;
        assert_eq!(yarn(original), (4.0, 1024, 32.0, 1.0, 0.1 * 4.0_f64.ln() + 1.0, true));
        let inferred = r#""rope_scaling": {"type": "yarn", "factor": null, "original_max_position_embeddings": 512}"#;
        assert_eq!(yarn(inferred).0, 8.0);
        let top = r#""original_max_position_embeddings": 2048, "rope_scaling": {"type": "yarn", "factor": 2}"#;
        assert_eq!(yarn(top).1, 2048);
        let full = r#""rope_parameters": {"rope_type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5,
            "beta_fast": 16, "beta_slow": 2, "truncate": false}"#;
        let scale = |mscale: f64| 0.1 * mscale * 40.0_f64.ln() + 1.0;
        assert_eq!(yarn(full), (40.0, 4096, 16.0, 2.0, scale(1.0) / scale(0.5), false));
        let given = r#""rope_parameters": {"rope_type": "yarn", "factor": 40, "attention_factor": 1.5}"#;
        assert_eq!(yarn(given).4, 1.5);
    }

    #[test]
    fn refuses_what_makes_no_sense() {
        for (fields, words) in [
            (r#""rope_scaling": {"type": "longrope"}"#, "rope_scaling.rope_type: expected one of default"),
            (r#""rope_scaling": {"type": "linear"}"#, "rope_scaling.factor: expected a value, found none"),
            (r#""rope_scaling": {"type": "linear", "factor": -1}"#, "rope_scaling.factor"),
            (r#""rope_scaling": {"type": "yarn", "factor": "4"}"#, "rope_scaling.factor: expected a number"),
            (r#""rope_scaling": 3"#, "rope_scaling: expected an object, found 3"),
            (r#""rope_parameters": {"rope_theta": 0}"#, "rope_theta: expected a number above 1"),
            (r#""partial_rotary_factor": 0.01"#, "partial_rotary_factor: expected an even number"),
            (r#""rotary_dim": 128"#, "rotary_dim: expected an even number"),
            (r#""rotary_dim": 16, "partial_rotary_factor": 0.5"#, "rotary_dim: expected 32"),
        ] {
            let error = rope(fields).unwrap_err().to_string();
            assert!(error.starts_with("config.json: ") && error.contains(words), "{fields}: {error}");
        }
    }
}
