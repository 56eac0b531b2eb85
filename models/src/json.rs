//! JSON objects from a checkpoint's text files, with errors that name the file and the place.

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The object in `bytes`; `file` names it in errors.
pub(crate) fn object(file: &str, bytes: &[u8]) -> Result<Map<String, Value>> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| Error::Json { file: file.to_owned(), detail: explain(bytes, &error) })?;
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(Error::Json {
            file: file.to_owned(),
            detail: format!("expected an object with named fields, found {}", excerpt(&other.to_string())),
        }),
    }
}

/// The parser's words, and the line they are about when it holds what Python writes and JSON does not know.
fn explain(bytes: &[u8], error: &serde_json::Error) -> String {
    let line = bytes.split(|byte| *byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    // Only the part around the fault, so that a one-line file does not end up whole in the message.
    let near: String = line.chars().skip(error.column().saturating_sub(60)).take(80).collect();
    if ["NaN", "Infinity"].iter().any(|word| near.contains(word)) {
        return format!("line {}: expected a finite number, found {}", error.line(), near.trim());
    }
    error.to_string()
}

/// The start of `text`, short enough for a message.
pub(crate) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_place_of_a_fault() {
        let error = object("config.json", b"{\n  \"a\": 1,\n  oops\n}").unwrap_err().to_string();
        assert!(error.starts_with("config.json is not valid JSON") && error.contains("line 3"), "{error}");
    }

    #[test]
    fn says_that_nan_is_no_number() {
        for word in ["NaN", "Infinity", "-Infinity"] {
            let text = format!("{{\n \"hidden_size\": 4,\n \"rms_norm_eps\": {word}\n}}");
            let error = object("config.json", text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("line 3: expected a finite number, found \"rms_norm_eps\""), "{error}");
        }
    }

    #[test]
    fn refuses_what_is_not_an_object() {
        let error = object("config.json", b"[1, 2]").unwrap_err().to_string();
        assert!(error.contains("expected an object with named fields, found [1,2]"), "{error}");
    }
}
