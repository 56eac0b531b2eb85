//! What a line says, whichever format it is in.

use serde_json::{Map, Value, json};

use super::{LineError, LossOn};
use crate::{chat_template::parse_arguments, json::excerpt};

/// Who may speak.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// What a line says.
#[derive(Debug)]
pub(super) enum Row {
    /// A conversation, for the chat template.
    Chat(Chat),
    /// A text to go on with, and what is to follow.
    Completion {
        /// The given text.
        prompt: String,
        /// The text to learn.
        completion: String,
    },
    /// A text to learn.
    Text(String),
}

/// A conversation.
#[derive(Debug)]
pub(super) struct Chat {
    /// What is said.
    pub turns: Vec<Turn>,
    /// The tools that the assistant may call.
    pub tools: Option<Vec<Value>>,
}

/// A message of a conversation.
#[derive(Debug)]
pub(super) struct Turn {
    /// The message as chat templates take it.
    pub message: Value,
    /// Its place in the line.
    pub place: String,
    /// Whether the loss is asked for.
    pub wanted: bool,
}

impl Row {
    /// The row in `line`. Where a line has the fields of several formats, the one that says more counts: conversations
    /// before prompts, those before instructions, and `text` last.
    pub fn parse(line: &[u8], loss_on: LossOn) -> Result<Self, LineError> {
        let text = std::str::from_utf8(line).map_err(|error| LineError::NotUtf8 { at: error.valid_up_to() })?;
        let value: Value =
            serde_json::from_str(text).map_err(|error| LineError::NotJson { detail: error.to_string() })?;
        let Value::Object(mut fields) = value else {
            return Err(LineError::NotAnObject { found: excerpt(&value.to_string()) });
        };
        // Tables of mixed rows are exported with null in the columns that a row doesn't have.
        fields.retain(|_, value| !value.is_null());
        let has = |name: &str| fields.contains_key(name);
        if has("messages") {
            return Chat::new(messages(&fields, "messages")?, &fields, loss_on).map(Self::Chat);
        }
        if has("conversations") {
            return Chat::new(sharegpt(&fields)?, &fields, loss_on).map(Self::Chat);
        }
        if has("prompt") && has("completion") {
            if !matches!(fields["prompt"], Value::Array(_)) {
                let [prompt, completion] = [string(&fields, "prompt", "")?, string(&fields, "completion", "")?];
                return Ok(Self::Completion { prompt, completion });
            }
            let mut turns = messages(&fields, "prompt")?;
            turns.iter_mut().for_each(|turn| turn.wanted = false);
            turns.extend(messages(&fields, "completion")?);
            return Chat::new(turns, &fields, loss_on).map(Self::Chat);
        }
        if has("instruction") && has("output") {
            return Chat::new(alpaca(&fields)?, &fields, loss_on).map(Self::Chat);
        }
        if has("text") {
            return string(&fields, "text", "").map(Self::Text);
        }
        let names: Vec<String> = fields.keys().map(|name| format!("`{}`", excerpt(name))).collect();
        let found = if names.is_empty() { "no field".to_owned() } else { names.join(", ") };
        Err(LineError::NoFormat { found })
    }
}

impl Chat {
    fn new(mut turns: Vec<Turn>, fields: &Map<String, Value>, loss_on: LossOn) -> Result<Self, LineError> {
        if loss_on == LossOn::LastAssistant {
            let last = turns.iter().rposition(|turn| turn.message["role"] == "assistant");
            for (index, turn) in turns.iter_mut().enumerate() {
                turn.wanted &= Some(index) == last;
            }
        }
        if !turns.iter().any(|turn| turn.wanted) {
            return Err(LineError::NoAnswer);
        }
        let tools = fields.get("tools").map(|_| list(fields, "tools", "").cloned()).transpose()?;
        Ok(Self { turns, tools })
    }
}

/// OpenAI's messages in the field `name`.
fn messages(fields: &Map<String, Value>, name: &str) -> Result<Vec<Turn>, LineError> {
    let list = some(fields, name, "a list of messages")?;
    list.iter().enumerate().map(|(index, value)| message(value, format!("{name}[{index}]"))).collect()
}

/// A message in the form that it has when it is served, without its weight.
fn message(value: &Value, place: String) -> Result<Turn, LineError> {
    let mut message = object(value, &place)?;
    let role = role(&message, "role", &place, &ROLES)?;
    let is_assistant = role == "assistant";
    let weight = weight(&message, &place)?;
    message.remove("weight");
    if message.contains_key("tool_calls") {
        let mut calls = list(&message, "tool_calls", &place)?.clone();
        calls.iter_mut().for_each(parse_arguments);
        message.insert("tool_calls".to_owned(), calls.into());
    }
    let content = match message.get("content") {
        None if is_assistant && message.contains_key("tool_calls") => String::new(),
        _ => content(&message, &place)?,
    };
    message.insert("content".to_owned(), content.into());
    Ok(Turn { message: message.into(), place, wanted: is_assistant && weight })
}

/// Whether the loss is asked for, as far as a message says itself.
fn weight(message: &Map<String, Value>, place: &str) -> Result<bool, LineError> {
    match message.get("weight").map(|weight| (weight, weight.as_f64())) {
        None => Ok(true),
        Some((_, Some(weight))) if weight == 0.0 || weight == 1.0 => Ok(weight == 1.0),
        Some((found, _)) => Err(wrong(place, "weight", "0 or 1", Some(found))),
    }
}

/// A string, or text parts, which are put under each other.
fn content(message: &Map<String, Value>, place: &str) -> Result<String, LineError> {
    let Some(Value::Array(parts)) = message.get("content") else { return string(message, "content", place) };
    let part = |(index, part): (usize, &Value)| {
        let place = format!("{place}.content[{index}]");
        if let Some(text) = part.as_str() {
            return Ok(text.to_owned());
        }
        let part = object(part, &place)?;
        match part.get("type").and_then(Value::as_str) {
            Some("text") => string(&part, "text", &place),
            _ => Err(wrong(&place, "type", "\"text\": models here read nothing else", part.get("type"))),
        }
    };
    let parts = parts.iter().enumerate().map(part).collect::<Result<Vec<_>, _>>()?;
    Ok(parts.join("\n"))
}

/// ShareGPT's `conversations`.
fn sharegpt(fields: &Map<String, Value>) -> Result<Vec<Turn>, LineError> {
    const SPEAKERS: [&str; 6] = ["human", "user", "gpt", "assistant", "system", "tool"];
    let turn = |(index, entry): (usize, &Value)| {
        let place = format!("conversations[{index}]");
        let entry = object(entry, &place)?;
        let role = match role(&entry, "from", &place, &SPEAKERS)? {
            "human" => "user",
            "gpt" => "assistant",
            other => other,
        };
        let message = json!({"role": role, "content": string(&entry, "value", &place)?});
        let wanted = role == "assistant" && weight(&entry, &place)?;
        Ok(Turn { message, wanted, place })
    };
    some(fields, "conversations", "a list of `from` and `value`")?.iter().enumerate().map(turn).collect()
}

/// Alpaca's instruction, with its input under it, and output.
fn alpaca(fields: &Map<String, Value>) -> Result<Vec<Turn>, LineError> {
    let mut question = string(fields, "instruction", "")?;
    if fields.contains_key("input") {
        let input = string(fields, "input", "")?;
        if !input.is_empty() {
            question = format!("{question}\n\n{input}");
        }
    }
    let turn = |role: &str, content: String, field: &str| Turn {
        message: json!({"role": role, "content": content}),
        place: field.to_owned(),
        wanted: role == "assistant",
    };
    Ok(vec![turn("user", question, "instruction"), turn("assistant", string(fields, "output", "")?, "output")])
}

/// The one of `known` that the field `name` holds.
fn role<'a>(fields: &Map<String, Value>, name: &str, place: &str, known: &[&'a str]) -> Result<&'a str, LineError> {
    let found = fields.get(name);
    let role = known.iter().find(|role| found.and_then(Value::as_str) == Some(**role));
    role.copied().ok_or_else(|| wrong(place, name, &format!("one of {}", known.join(", ")), found))
}

/// The fields of the object at `place`, without those that are null.
fn object(value: &Value, place: &str) -> Result<Map<String, Value>, LineError> {
    let Value::Object(fields) = value else { return Err(wrong("", place, "an object", Some(value))) };
    let mut fields = fields.clone();
    fields.retain(|_, value| !value.is_null());
    Ok(fields)
}

fn string(fields: &Map<String, Value>, name: &str, place: &str) -> Result<String, LineError> {
    let found = fields.get(name);
    found.and_then(Value::as_str).map(str::to_owned).ok_or_else(|| wrong(place, name, "a string", found))
}

fn list<'a>(fields: &'a Map<String, Value>, name: &str, place: &str) -> Result<&'a Vec<Value>, LineError> {
    let found = fields.get(name);
    found.and_then(Value::as_array).ok_or_else(|| wrong(place, name, "a list", found))
}

/// A list that isn't empty.
fn some<'a>(fields: &'a Map<String, Value>, name: &str, expected: &str) -> Result<&'a Vec<Value>, LineError> {
    let found = fields.get(name);
    let list = found.and_then(Value::as_array).filter(|list| !list.is_empty());
    list.ok_or_else(|| wrong("", name, expected, found))
}

/// The complaint about the field `name` of what lies at `place`, which is empty for the line itself.
fn wrong(place: &str, name: &str, expected: &str, found: Option<&Value>) -> LineError {
    let field = if place.is_empty() { name.to_owned() } else { format!("{place}.{name}") };
    let found = found.map_or_else(|| "none".to_owned(), |value| excerpt(&value.to_string()));
    LineError::Field { field, expected: expected.to_owned(), found }
}
