//! The hyperparameters of a job: OpenAI's, and flags of `cadre finetune` under the same names with underscores.

use serde_json::{Map, Value, json};

use super::FinetuneArgs;

/// The learning rate that a multiplier of 1 stands for.
const LEARNING_RATE: f64 = 2e-4;
const MULTIPLIER: &str = "learning_rate_multiplier";
/// What no hyperparameter is larger or smaller than; messages have digits for those between.
const NUMBERS: std::ops::RangeInclusive<f64> = 1e-15..=1e15;
/// OpenAI's, each with its default and with the one of ours that is given in its place.
const OPENAIS: [(&str, u64, Option<&str>); 3] =
    [("n_epochs", 3, Some("max_steps")), ("batch_size", 4, None), (MULTIPLIER, 1, Some("learning_rate"))];
/// Ours.
const OURS: [&str; 20] = [
    "rank",
    "alpha",
    "rslora",
    "dropout",
    "targets",
    "adapter_layout",
    "learning_rate",
    "scheduler",
    "warmup_ratio",
    "max_steps",
    "grad_accum",
    "weight_decay",
    "clip",
    "spike_threshold",
    "max_length",
    "packing",
    "loss_on",
    "aux_loss_coef",
    "z_loss_coef",
    "routing_warmup_steps",
];

/// Why a job can't have these hyperparameters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct HyperparameterError {
    /// The one at fault, if it is at fault alone.
    pub name: Option<String>,
    /// What was expected, and what was found.
    pub message: String,
}

impl HyperparameterError {
    fn of(name: &str, message: String) -> Self {
        Self { name: Some(name.to_owned()), message }
    }
}

/// Completes hyperparameters by the defaults of OpenAI's. One that is null is absent; `auto` is the default.
///
/// # Errors
/// When one is unknown, of another type or out of its range, or two exclude each other.
pub fn complete(hyperparameters: &mut Map<String, Value>) -> Result<(), HyperparameterError> {
    hyperparameters.retain(|_, value| !value.is_null());
    for (name, default, instead) in OPENAIS {
        let is_asked = hyperparameters.get(name).is_some_and(|value| value != "auto");
        match instead.filter(|other| hyperparameters.contains_key(*other)) {
            Some(other) if is_asked => {
                let message = format!("`{name}` and `{other}` can't both be given: leave one of them out");
                return Err(HyperparameterError::of(name, message));
            }
            Some(_) => _ = hyperparameters.remove(name),
            None if is_asked => {}
            None => _ = hyperparameters.insert(name.to_owned(), default.into()),
        }
    }
    // Each alone, so that an error is that one's; then all together.
    for (name, value) in &*hyperparameters {
        settings(fields(&Map::from_iter([(name.clone(), value.clone())]))?).map_err(|text| {
            let message = if text.contains(name) { text } else { format!("`{name}`: {text}") };
            HyperparameterError::of(name, message)
        })?;
    }
    settings(fields(hyperparameters)?).map_err(|message| HyperparameterError { name: None, message })
}

/// Whether these fields are a run's, but for the names of its files; if not, why.
fn settings(mut fields: Map<String, Value>) -> Result<(), String> {
    fields.extend([("data".to_owned(), json!(["-"])), ("output".to_owned(), json!("-"))]);
    FinetuneArgs::settings_of(fields).map(drop).map_err(|error| by_names(&format!("{error:#}")))
}

/// Complete hyperparameters as the fields of a run's config file.
///
/// # Errors
/// When one is unknown, or no number where it has to be one.
pub fn fields(hyperparameters: &Map<String, Value>) -> Result<Map<String, Value>, HyperparameterError> {
    let field = |(name, value): (&String, &Value)| {
        let unknown = || {
            let known = OPENAIS.map(|(name, ..)| name).join(", ");
            let message = format!("`{name}` is not a hyperparameter: {known}, {}", OURS.join(", "));
            HyperparameterError::of(name, message)
        };
        let flag = flag(name).ok_or_else(unknown)?;
        if let Some(number) = value.as_f64()
            && number != 0.0
            && !NUMBERS.contains(&number.abs())
        {
            let message = format!("`{name}` must be a number that could be meant, found {value}");
            return Err(HyperparameterError::of(name, message));
        }
        if name != MULTIPLIER {
            return Ok((flag, value.clone()));
        }
        let factor = value.as_f64().filter(|factor| *factor > 0.0).ok_or_else(|| {
            HyperparameterError::of(name, format!("`{name}` must be a number above 0, found {value}"))
        })?;
        Ok((flag, json!(LEARNING_RATE * factor)))
    };
    hyperparameters.iter().map(field).collect()
}

/// The flag of `cadre finetune` that a hyperparameter sets, without the dashes.
fn flag(name: &str) -> Option<String> {
    match name {
        "n_epochs" => Some("epochs".to_owned()),
        "batch_size" => Some("batch-size".to_owned()),
        MULTIPLIER => Some("learning-rate".to_owned()),
        name => OURS.contains(&name).then(|| name.replace('_', "-")),
    }
}

/// A message that speaks of flags and of Rust's types, for those who give hyperparameters.
pub fn by_names(message: &str) -> String {
    const TYPES: [(&str, &str); 4] =
        [("usize", "a whole number"), ("u64", "a whole number"), ("f64", "a number"), ("f32", "a number")];
    let typed = |text: String, (name, words): (&str, &str)| {
        text.replace(&format!("expected {name}"), &format!("expected {words}"))
    };
    let message = TYPES.into_iter().fold(message.to_owned(), typed);
    let names = OURS.into_iter().chain(["n_epochs", "batch_size"]);
    names.fold(message, |text, name| match flag(name) {
        Some(flag) => text.replace(&format!("--{flag}"), &format!("`{name}`")),
        None => text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::object;

    fn completed(given: Value) -> Result<Value, HyperparameterError> {
        let mut hyperparameters = object(given);
        complete(&mut hyperparameters)?;
        Ok(hyperparameters.into())
    }

    #[test]
    fn null_is_absent_and_auto_is_the_default() {
        let defaults = json!({"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1});
        assert_eq!(completed(json!({})).unwrap(), defaults);
        let nothing = json!({"n_epochs": "auto", "batch_size": "auto", "max_steps": null, "learning_rate": null});
        assert_eq!(completed(nothing).unwrap(), defaults);
        let asked = json!({"n_epochs": 10, "max_steps": null, "learning_rate": null, "learning_rate_multiplier": 50});
        assert_eq!(completed(asked).unwrap(), json!({"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 50}));
        let ours = json!({"n_epochs": "auto", "max_steps": 7, "learning_rate": 0.01});
        assert_eq!(completed(ours).unwrap(), json!({"batch_size": 4, "max_steps": 7, "learning_rate": 0.01}));
    }

    #[test]
    fn an_error_names_the_one_at_fault() {
        for (given, name, word) in [
            (json!({"rank": "x"}), "rank", "whole number"),
            (json!({"alpha": [2]}), "alpha", "a number"),
            (json!({"rank": 0}), "rank", "at least 1"),
            (json!({"n_epochs": "many"}), "n_epochs", "many"),
            (json!({"n_epochs": -1}), "n_epochs", "above 0"),
            (json!({"batch_size": 0}), "batch_size", "at least 1"),
            (json!({"learning_rate_multiplier": -1}), "learning_rate_multiplier", "found -1"),
            (json!({"learning_rate_multiplier": "x"}), "learning_rate_multiplier", "number"),
            (json!({"scheduler": "none"}), "scheduler", "cosine"),
            (json!({"n_epochs": 3, "max_steps": 5}), "n_epochs", "max_steps"),
            (json!({"learning_rate_multiplier": 3, "learning_rate": 0.1}), "learning_rate_multiplier", "both"),
            (json!({"output": "/etc"}), "output", "not a hyperparameter"),
            (json!({"rank": 1e300}), "rank", "found 1e+300"),
            (json!({"learning_rate_multiplier": 1e300}), "learning_rate_multiplier", "found 1e+300"),
            (json!({"dropout": -1e-300}), "dropout", "found -1e-300"),
        ] {
            let error = completed(given.clone()).unwrap_err();
            assert_eq!(error.name.as_deref(), Some(name), "{given}: {error}");
            assert!(error.message.contains(name) && error.message.contains(word), "{given}: {error}");
            assert!(!error.message.contains("--") && error.message.len() < 500, "{given}: {error}");
        }
    }
}
