//! A line of the input: `{"custom_id", "method", "url", "body"}`.

use serde::Deserialize;
use serde_json::{Value, value::RawValue};

/// The routes that lines may ask.
pub const URLS: &[&str] = &["/v1/chat/completions", "/v1/completions"];

/// A request as it stands in the file.
#[derive(Debug)]
pub struct BatchRequest<'a> {
    /// The user's name for it.
    pub custom_id: String,
    /// One of [`URLS`].
    pub url: &'static str,
    /// A JSON object.
    pub body: &'a RawValue,
}

/// A line that is no request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadLine {
    /// The user's name for it, if it has one.
    pub custom_id: Option<String>,
    /// OpenAI's word for what is wrong.
    pub code: &'static str,
    /// What was expected, and what was found.
    pub message: String,
}

/// A line without anything that could be read.
pub fn bad(message: String) -> BadLine {
    BadLine { custom_id: None, code: "invalid_json_line", message }
}

/// The fields as they may be.
#[derive(Deserialize)]
struct Fields<'a> {
    custom_id: Option<Value>,
    method: Option<Value>,
    url: Option<Value>,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

/// What of the body decides whether and how it is asked.
#[derive(Deserialize)]
struct Streams {
    stream: Option<Value>,
}

impl<'a> BatchRequest<'a> {
    /// Reads a line.
    ///
    /// # Errors
    /// When it is no request, or none that can be answered by one line.
    pub fn parse(text: &'a str) -> Result<Self, BadLine> {
        let fields: Fields<'_> = object(text).map_err(|found| bad(format!("the line is no JSON object: {found}")))?;
        let wrong =
            |custom_id: Option<&String>, code, message| BadLine { custom_id: custom_id.cloned(), code, message };
        let custom_id = match fields.custom_id {
            Some(Value::String(id)) if !id.is_empty() => id,
            None => return Err(wrong(None, "missing_required_parameter", "`custom_id` is missing".to_owned())),
            Some(other) => {
                let message = format!("`custom_id` must be a string that isn't empty, got {other}");
                return Err(wrong(None, "invalid_custom_id", message));
            }
        };
        let wrong = |code, message| wrong(Some(&custom_id), code, message);
        let missing = |name| wrong("missing_required_parameter", format!("`{name}` is missing"));
        let method = fields.method.ok_or_else(|| missing("method"))?;
        if method != "POST" {
            return Err(wrong("invalid_method", format!("`method` must be \"POST\", got {method}")));
        }
        let url = fields.url.ok_or_else(|| missing("url"))?;
        let Some(url) = URLS.iter().copied().find(|known| url == *known) else {
            return Err(wrong("invalid_url", format!("`url` must be one of {}, got {url}", URLS.join(", "))));
        };
        let body = fields.body.ok_or_else(|| missing("body"))?;
        let Streams { stream } =
            object(body.get()).map_err(|found| wrong("invalid_body", format!("`body` is no JSON object: {found}")))?;
        if stream.is_some_and(|stream| stream != false) {
            return Err(wrong("invalid_body", "`stream` is for connections: leave it out of a batch".to_owned()));
        }
        Ok(Self { custom_id, url, body })
    }
}

/// A JSON object's fields: serde would take them from an array too.
fn object<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, String> {
    const SHOWN: usize = 40;
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(text).map_err(|error| error.to_string());
    }
    let end = text.char_indices().nth(SHOWN).map(|(end, _)| end);
    Err(end.map_or(text.to_owned(), |end| format!("{}…", &text[..end])))
}
