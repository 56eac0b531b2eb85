//! Reads a request's JSON object field by field, so that every complaint can name the field's path,
//! what was expected and what was found. An explicit null is an absent field.

use serde_json::{Map, Value};

use super::error::ApiError;

/// Of metadata: pairs, and characters of a name and a value.
const MAX_METADATA: [usize; 3] = [16, 64, 512];

/// A JSON object and where it lies in the body.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a str,
}

impl<'a> Fields<'a> {
    /// The body itself.
    pub fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, path: "" }
    }

    /// The object `value`, which lies at `path`.
    ///
    /// # Errors
    /// When it isn't an object.
    pub fn nested(value: &'a Value, path: &'a str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { map, path }),
            other => Err(wrong(path, "an object", other)),
        }
    }

    /// The field's path from the body's root.
    pub fn path(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The field, unless absent or null.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        debug_assert!(
            !self.path.is_empty() || super::params::is_honoured(name),
            "`{name}` is read but not in the list of honoured parameters"
        );
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Refuses fields that aren't among `known`: what they ask for would be dropped.
    ///
    /// # Errors
    /// When there is one that isn't null.
    pub fn has_only(&self, known: &[&str]) -> Result<(), ApiError> {
        let mut others = self.map.iter().filter(|(name, value)| !value.is_null() && !known.contains(&name.as_str()));
        let Some((name, _)) = others.next() else { return Ok(()) };
        let path = self.path(name);
        let message = format!("`{path}` is not supported: only {} is, in {}.", known.join(", "), self.path);
        Err(ApiError::invalid(path, message))
    }

    /// A boolean.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.map_value(name, "true or false", Value::as_bool)
    }

    /// A string.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.map_value(name, "a string", Value::as_str)
    }

    /// An object.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.map_value(name, "an object", Value::as_object)
    }

    /// An array.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn array(&self, name: &str) -> Result<Option<&'a Vec<Value>>, ApiError> {
        self.map_value(name, "an array", Value::as_array)
    }

    /// An integer between `low` and `high`, both included.
    ///
    /// # Errors
    /// When the field is no integer, or out of range.
    pub fn integer(&self, name: &str, low: i64, high: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let Some(integer) = as_integer(value) else { return Err(wrong(&self.path(name), "an integer", value)) };
        if integer < low {
            return Err(self.out_of_range(name, &format!("at least {low}"), value));
        }
        if integer > high {
            return Err(self.out_of_range(name, &format!("at most {high}"), value));
        }
        Ok(Some(integer))
    }

    /// As [`integer`](Self::integer), for counts.
    ///
    /// # Errors
    /// When the field is no integer, or out of range.
    pub fn count(&self, name: &str, low: u32, high: u32) -> Result<Option<u32>, ApiError> {
        let found = self.integer(name, low.into(), high.into())?;
        Ok(found.and_then(|integer| u32::try_from(integer).ok()))
    }

    /// A finite number for which `accepts` holds; `range` says in words when that is.
    ///
    /// # Errors
    /// When the field is no number, or out of range.
    pub fn number(&self, name: &str, range: &str, accepts: impl Fn(f64) -> bool) -> Result<Option<f32>, ApiError> {
        let Some(number) = self.map_value(name, "a number", Value::as_f64)? else { return Ok(None) };
        #[expect(clippy::cast_possible_truncation, reason = "the engine samples in f32; what that breaks is refused")]
        let narrow = number as f32;
        let fine = narrow.is_finite() && accepts(number) && accepts(narrow.into());
        if !fine {
            let found = self.get(name).unwrap_or(&Value::Null);
            return Err(self.out_of_range(name, range, found));
        }
        Ok(Some(narrow))
    }

    /// Token ids below `vocab_size`.
    ///
    /// # Errors
    /// When the field is no array of them.
    pub fn token_ids(&self, name: &str, vocab_size: usize) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(values) = self.array(name)? else { return Ok(None) };
        token_ids(values, &self.path(name), vocab_size).map(Some)
    }

    /// Non-empty strings, at most `limit` of them; one string stands for a list of one.
    ///
    /// # Errors
    /// When the field is something else.
    pub fn strings(&self, name: &str, limit: usize) -> Result<Vec<String>, ApiError> {
        let path = self.path(name);
        let values = match self.get(name) {
            None => return Ok(Vec::new()),
            Some(one @ Value::String(_)) => std::slice::from_ref(one),
            Some(Value::Array(many)) => many,
            Some(other) => return Err(wrong(&path, "a string or an array of strings", other)),
        };
        if values.len() > limit {
            let message = format!("`{path}` may hold at most {limit} strings, got {}.", values.len());
            return Err(ApiError::invalid(path, message));
        }
        values.iter().enumerate().map(|(index, value)| non_empty(value, &format!("{path}[{index}]"))).collect()
    }

    /// The complaint that the field's value is out of range.
    pub fn out_of_range(&self, name: &str, range: &str, found: &Value) -> ApiError {
        let path = self.path(name);
        let message = format!("{path} must be {range}, got {}.", shown(found));
        ApiError::invalid(path, message)
    }

    fn map_value<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| wrong(&self.path(name), expected, value))
    }
}

/// Token ids below `vocab_size` from the array at `path`.
///
/// # Errors
/// When an element is something else.
pub fn token_ids(values: &[Value], path: &str, vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    let id = |(index, value): (usize, &Value)| {
        let id = as_integer(value).and_then(|id| u32::try_from(id).ok());
        id.filter(|&id| (id as usize) < vocab_size)
            .ok_or_else(|| wrong(&format!("{path}[{index}]"), &format!("a token id below {vocab_size}"), value))
    };
    values.iter().enumerate().map(id).collect()
}

/// OpenAI's `metadata`.
///
/// # Errors
/// When there is too much of it, or a value is no string.
pub fn metadata(fields: Fields<'_>) -> Result<Map<String, Value>, ApiError> {
    let map = fields.object("metadata")?.cloned().unwrap_or_default();
    let [pairs, name_length, value_length] = MAX_METADATA;
    if map.len() > pairs {
        let message = format!("metadata must have at most {pairs} pairs, got {}.", map.len());
        return Err(ApiError::invalid("metadata", message));
    }
    for (name, value) in &map {
        let path = format!("metadata.{name}");
        let text = value.as_str().ok_or_else(|| wrong(&path, "a string", value))?;
        if name.chars().count() > name_length || text.chars().count() > value_length {
            let message =
                format!("Names of metadata must have at most {name_length} characters, values {value_length}.");
            return Err(ApiError::invalid(path, message));
        }
    }
    Ok(map)
}

/// The complaint that the value at `path` is not what it should be.
pub fn wrong(path: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::invalid(path, format!("`{path}` must be {expected}, got {}.", shown(found)))
}

/// An integer; 3.0 is one as well, as in JSON schema.
#[expect(clippy::cast_possible_truncation, reason = "checked: whole, and far inside of i64")]
fn as_integer(value: &Value) -> Option<i64> {
    let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 1e15).then_some(number as i64);
    value.as_i64().or_else(|| value.as_f64().and_then(whole))
}

fn non_empty(value: &Value, path: &str) -> Result<String, ApiError> {
    match value.as_str() {
        Some("") => Err(ApiError::invalid(path, format!("`{path}` must not be the empty string."))),
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong(path, "a string", value)),
    }
}

/// A value as it is quoted in messages: short.
pub fn shown(value: &Value) -> String {
    const LIMIT: usize = 60;
    let text = match value {
        Value::Array(_) => return "an array".to_owned(),
        Value::Object(_) => return "an object".to_owned(),
        other => other.to_string(),
    };
    if text.chars().count() <= LIMIT {
        return text;
    }
    text.chars().take(LIMIT).chain("…".chars()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with<T>(value: Value, read: impl Fn(Fields<'_>) -> T) -> T {
        read(Fields::nested(&value, "outer").unwrap())
    }

    #[test]
    fn null_equals_absent() {
        let body = json!({"a": null});
        with(body, |fields| {
            assert_eq!(fields.boolean("a").unwrap(), None);
            assert_eq!(fields.integer("a", 0, 1).unwrap(), None);
            assert_eq!(fields.number("a", "", |_| false).unwrap(), None);
            assert_eq!(fields.strings("a", 1).unwrap(), Vec::<String>::new());
        });
    }

    #[test]
    fn complaints_name_path_expected_and_found() {
        with(json!({"a": "hot"}), |fields| {
            let error = fields.number("a", "in [0, 2]", |_| true).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("outer.a"));
            assert_eq!(error.message, "`outer.a` must be a number, got \"hot\".");
        });
        with(json!({"a": 3}), |fields| {
            let error = fields.number("a", "in [0, 2]", |x| x <= 2.0).unwrap_err();
            assert_eq!(error.message, "outer.a must be in [0, 2], got 3.");
        });
        with(json!({"a": ["x", ""]}), |fields| {
            let error = fields.strings("a", 4).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("outer.a[1]"));
        });
    }

    #[test]
    fn integers_may_be_written_as_floats_but_not_be_fractions() {
        with(json!({"a": 3.0, "b": 3.5, "c": 1e300}), |fields| {
            assert_eq!(fields.integer("a", 0, 9).unwrap(), Some(3));
            assert!(fields.integer("b", 0, 9).is_err());
            assert!(fields.integer("c", 0, 9).is_err());
        });
    }

    #[test]
    fn numbers_that_leave_their_range_in_f32_are_refused() {
        with(json!({"a": 1e200, "b": 1e-200}), |fields| {
            assert!(fields.number("a", "finite", |_| true).is_err());
            assert!(fields.number("b", "greater than 0", |x| x > 0.0).is_err());
        });
    }

    #[test]
    fn token_ids_stay_below_the_vocabulary() {
        with(json!({"a": [0, 9], "b": [10], "c": [-1]}), |fields| {
            assert_eq!(fields.token_ids("a", 10).unwrap(), Some(vec![0, 9]));
            for name in ["b", "c"] {
                let error = fields.token_ids(name, 10).unwrap_err();
                assert_eq!(error.param, Some(format!("outer.{name}[0]")));
            }
        });
    }

    #[test]
    fn quoted_values_are_short() {
        let long = json!("x".repeat(1000));
        assert!(shown(&long).chars().count() <= 61);
    }
}
