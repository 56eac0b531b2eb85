//! Values as Python's `json.dumps` writes them.

use minijinja::{
    Error, ErrorKind,
    value::{Value, ValueKind},
};

/// The arguments of `json.dumps` that templates use.
#[derive(Debug, Default)]
pub(super) struct JsonOptions {
    /// Write characters beyond ASCII as `\uXXXX`.
    pub ensure_ascii: bool,
    /// Spaces of each level, on lines of their own.
    pub indent: Option<usize>,
    /// Between items, and between key and value.
    pub separators: Option<(String, String)>,
    /// Order keys by name.
    pub sort_keys: bool,
}

/// `value` as JSON.
pub(super) fn to_json(value: &Value, options: &JsonOptions) -> Result<String, Error> {
    let (item, key) = match &options.separators {
        Some((item, key)) => (item.as_str(), key.as_str()),
        None => (if options.indent.is_some() { "," } else { ", " }, ": "),
    };
    let mut writer = Writer { text: String::new(), options, item, key };
    writer.value(value, 0)?;
    Ok(writer.text)
}

struct Writer<'a> {
    text: String,
    options: &'a JsonOptions,
    item: &'a str,
    key: &'a str,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, level: usize) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.text.push_str(&number(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<_> = value.try_iter()?.collect();
                self.block(['[', ']'], level, items, |writer, item, level| writer.value(&item, level))?;
            }
            ValueKind::Map => self.map(value, level)?,
            kind => {
                let message = format!("tojson: a value of kind {kind} cannot be written as JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn map(&mut self, map: &Value, level: usize) -> Result<(), Error> {
        let mut entries = Vec::new();
        for key in map.try_iter()? {
            entries.push((key_text(&key)?, map.get_item(&key)?));
        }
        if self.options.sort_keys {
            entries.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        self.block(['{', '}'], level, entries, |writer, (key, value), level| {
            writer.string(&key);
            writer.text.push_str(writer.key);
            writer.value(&value, level)
        })
    }

    /// Brackets round items, each on its own line if there is an indent.
    fn block<T>(
        &mut self,
        [open, close]: [char; 2],
        level: usize,
        items: Vec<T>,
        write: impl Fn(&mut Self, T, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(open);
        let some = !items.is_empty();
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                self.text.push_str(self.item);
            }
            self.new_line(level + 1);
            write(self, item, level + 1)?;
        }
        if some {
            self.new_line(level);
        }
        self.text.push(close);
        Ok(())
    }

    fn new_line(&mut self, level: usize) {
        if let Some(indent) = self.options.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(' ', indent * level));
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for character in text.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                '\0'..='\u{1f}' => self.escape(character),
                '\u{7f}'.. if self.options.ensure_ascii && character != '\u{7f}' => self.escape(character),
                _ => self.text.push(character),
            }
        }
        self.text.push('"');
    }

    fn escape(&mut self, character: char) {
        for unit in character.encode_utf16(&mut [0; 2]) {
            self.text.push_str(&format!("\\u{unit:04x}"));
        }
    }
}

/// A key as Python writes it: numbers, booleans and None become text.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => number(key),
        _ => Ok(key.to_string()),
    }
}

fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    f64::try_from(value.clone()).map(float)
}

/// Python's `repr` of a float: the shortest digits that read back the same, with an exponent below 1e-4 and from 1e16.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "NaN".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::value::Serde;

    fn json(text: &str, options: &JsonOptions) -> String {
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        to_json(&Value::from(Serde(value)), options).unwrap()
    }

    /// The expectations are Python 3.11's.
    #[test]
    fn floats_are_pythons() {
        for (value, expected) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e-5, "1.5e-05"),
            (0.0001, "0.0001"),
            (-2.5e300, "-2.5e+300"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(float(value), expected);
        }
    }

    #[test]
    fn values_are_pythons() {
        let text = r#"{"b": [1, 2.0, true, null], "a": {"x": "é<\"\\\n\u0001\u007f😀"}, "e": [], "f": {}}"#;
        let expected = r#"{"b": [1, 2.0, true, null], "a": {"x": "é<\"\\\n\u0001"#.to_owned()
            + "\u{7f}😀\"}, \"e\": [], \"f\": {}}";
        assert_eq!(json(text, &JsonOptions::default()), expected);
        let ascii = JsonOptions { ensure_ascii: true, ..JsonOptions::default() };
        assert_eq!(json("\"é\u{7f}😀\"", &ascii), "\"\\u00e9\u{7f}\\ud83d\\ude00\"");
        let sorted =
            JsonOptions { sort_keys: true, separators: Some((",".into(), ":".into())), ..JsonOptions::default() };
        assert_eq!(json(r#"{"b": 1, "a": [2, 3]}"#, &sorted), r#"{"a":[2,3],"b":1}"#);
        let indented = JsonOptions { indent: Some(2), ..JsonOptions::default() };
        assert_eq!(
            json(r#"{"a": [1, {}], "b": []}"#, &indented),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"
        );
    }

    #[test]
    fn undefined_is_refused() {
        assert!(to_json(&Value::UNDEFINED, &JsonOptions::default()).is_err());
    }
}
