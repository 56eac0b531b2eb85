//! A conversation as the chat template takes it.

use cadre_models::chat_template::parse_arguments;
use serde_json::{Map, Value};

use super::{
    error::ApiError,
    fields::{Fields, wrong},
};

const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool"];

/// Checks the messages and brings them into the template's form: content as one string.
/// `knows_developer`: whether the template speaks of that role; else its messages become the system's.
///
/// # Errors
/// When a message is malformed, or holds something other than text.
pub fn parse(fields: Fields<'_>, knows_developer: bool) -> Result<Vec<Value>, ApiError> {
    let messages = fields.array("messages")?.ok_or_else(|| required("messages"))?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "`messages` must hold at least one message, got an empty array."));
    }
    let parse = |(index, message)| one(message, &format!("messages[{index}]"), knows_developer);
    messages.iter().enumerate().map(parse).collect()
}

/// The complaint that a field is missing.
pub fn required(name: &str) -> ApiError {
    ApiError::invalid(name, format!("`{name}` is required."))
}

fn one(message: &Value, path: &str, knows_developer: bool) -> Result<Value, ApiError> {
    let fields = Fields::nested(message, path)?;
    let role = fields.string("role")?.ok_or_else(|| required(&fields.path("role")))?;
    if !ROLES.contains(&role) {
        let message = format!("`{path}.role` must be one of {}, got \"{role}\".", ROLES.join(", "));
        return Err(ApiError::invalid(fields.path("role"), message));
    }
    let role = if role == "developer" && !knows_developer { "system" } else { role };
    let tool_calls = tool_calls(fields)?;
    let content = match fields.get("content") {
        Some(content) => text(content, &fields.path("content"))?,
        None if role == "assistant" => String::new(),
        None => return Err(wrong(&fields.path("content"), "a string or an array of text parts", &Value::Null)),
    };
    // The rest, `name` and `tool_call_id` among it, is the template's business.
    let mut parsed: Map<String, Value> = message.as_object().cloned().unwrap_or_default();
    parsed.retain(|_, value| !value.is_null());
    parsed.insert("role".to_owned(), role.into());
    parsed.insert("content".to_owned(), content.into());
    if let Some(tool_calls) = tool_calls {
        parsed.insert("tool_calls".to_owned(), tool_calls);
    }
    Ok(parsed.into())
}

/// A string, or text parts, which are put under each other.
fn text(content: &Value, path: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let parts = parts.iter().enumerate().map(|(index, value)| part(value, &format!("{path}[{index}]")));
            Ok(parts.collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        other => Err(wrong(path, "a string or an array of text parts", other)),
    }
}

fn part<'a>(part: &'a Value, path: &str) -> Result<&'a str, ApiError> {
    if let Some(text) = part.as_str() {
        return Ok(text);
    }
    let kind = Fields::nested(part, path)?.string("type")?.unwrap_or("none");
    if kind != "text" {
        let message = format!("`{path}.type` must be \"text\": this model reads text only; got \"{kind}\".");
        return Err(ApiError::invalid(format!("{path}.type"), message));
    }
    part.get("text")
        .and_then(Value::as_str)
        .ok_or_else(|| wrong(&format!("{path}.text"), "a string", part.get("text").unwrap_or(&Value::Null)))
}

/// An assistant's earlier tool calls, as templates want them.
fn tool_calls(fields: Fields<'_>) -> Result<Option<Value>, ApiError> {
    let Some(calls) = fields.array("tool_calls")? else { return Ok(None) };
    let mut calls = calls.clone();
    calls.iter_mut().for_each(parse_arguments);
    Ok(Some(calls.into()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(messages: Value) -> Result<Vec<Value>, ApiError> {
        let body = json!({"messages": messages});
        parse(Fields::new(body.as_object().unwrap()), false)
    }

    #[test]
    fn content_may_be_text_parts_or_null() {
        let parsed = read(json!([
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "name": null},
        ]))
        .unwrap();
        assert_eq!(parsed[0], json!({"role": "user", "content": "a\nb"}));
        assert_eq!(parsed[1], json!({"role": "assistant", "content": ""}));
    }

    #[test]
    fn complaints_name_the_place() {
        for (message, param) in [
            (json!({"content": "x"}), "messages[1].role"),
            (json!({"role": "robot", "content": "x"}), "messages[1].role"),
            (json!({"role": "user"}), "messages[1].content"),
            (json!({"role": "user", "content": 7}), "messages[1].content"),
            (json!({"role": "user", "content": [{"type": "image_url"}]}), "messages[1].content[0].type"),
            (json!({"role": "user", "content": [{"type": "text"}]}), "messages[1].content[0].text"),
            (json!("hello"), "messages[1]"),
        ] {
            let error = read(json!([{"role": "user", "content": "fine"}, message])).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{}", error.message);
        }
        assert_eq!(read(json!([])).unwrap_err().param.as_deref(), Some("messages"));
    }

    #[test]
    fn developers_speak_as_the_system_where_the_template_does_not_know_them() {
        let body = json!({"messages": [{"role": "developer", "content": "x"}]});
        let fields = Fields::new(body.as_object().unwrap());
        assert_eq!(parse(fields, false).unwrap()[0]["role"], "system");
        assert_eq!(parse(fields, true).unwrap()[0]["role"], "developer");
    }

    #[test]
    fn earlier_tool_calls_reach_the_template_as_objects() {
        let parsed = read(json!([{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]}]))
        .unwrap();
        assert_eq!(parsed[0]["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
    }
}
