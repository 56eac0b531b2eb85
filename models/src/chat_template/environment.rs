//! minijinja set up as transformers sets up Jinja.

use std::{fmt, time::SystemTime};

use minijinja::{
    Environment, Error, ErrorKind,
    syntax::SyntaxConfig,
    value::{Kwargs, Value},
};

use super::{python, strftime};

/// An environment without templates.
pub(super) fn new() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: String| strftime::format(SystemTime::now(), &format));
    Ok(environment)
}

/// Python's `json.dumps` with the arguments that transformers gives its filter.
fn tojson(value: &Value, ensure_ascii: Option<bool>, kwargs: Kwargs) -> Result<Value, Error> {
    let options = python::JsonOptions {
        ensure_ascii: match kwargs.get::<Option<bool>>("ensure_ascii")? {
            Some(given) => given,
            None => ensure_ascii.unwrap_or(false),
        },
        indent: kwargs.get("indent")?,
        separators: kwargs.get::<Option<Value>>("separators")?.map(pair).transpose()?,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    python::to_json(value, &options).map(Value::from)
}

/// The two texts of a list.
fn pair(list: Value) -> Result<(String, String), Error> {
    let texts: Vec<String> = list.try_iter()?.map(|text| text.to_string()).collect();
    let pair: Result<[String; 2], _> = texts.try_into();
    let expected = || Error::new(ErrorKind::InvalidOperation, "tojson: separators: expected a list of two texts");
    pair.map(|[item, key]| (item, key)).map_err(|_| expected())
}

fn raise_exception(message: String) -> Result<String, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, "raise_exception was called");
    Err(error.with_source(Refusal(message)))
}

/// What a template said with `raise_exception`.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

/// The template's own words, if `error` began with `raise_exception`.
pub(super) fn refusal(error: &Error) -> Option<String> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

/// `{% generation %}` marks the assistant's part for training; for the text it is a block without effect.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag, after)) = next_tag(rest) {
        text.push_str(before);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}");
        let (left, right) = (mark(inner.chars().next()), mark(inner.chars().next_back()));
        match inner.trim_matches(['-', '+']).trim() {
            "generation" => text.push_str(&format!("{{%{left} if true {right}%}}")),
            "endgeneration" => text.push_str(&format!("{{%{left} endif {right}%}}")),
            _ => text.push_str(tag),
        }
        rest = after;
    }
    text + rest
}

/// The text before the next `{% … %}`, the tag, and what follows.
fn next_tag(text: &str) -> Option<(&str, &str, &str)> {
    let start = text.find("{%")?;
    let end = start + text[start..].find("%}")? + 2;
    Some((&text[..start], &text[start..end], &text[end..]))
}

/// The whitespace mark at a tag's edge.
fn mark(edge: Option<char>) -> &'static str {
    match edge {
        Some('-') => "-",
        Some('+') => "+",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_blocks() {
        let source = "a{%- generation -%}b{% endgeneration %}{% if x %}c{% endif %}{{ '{%' }}";
        let expected = "a{%- if true -%}b{% endif %}{% if x %}c{% endif %}{{ '{%' }}";
        assert_eq!(without_generation_tags(source), expected);
    }
}
