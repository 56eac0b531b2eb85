//! Chat templates: a conversation to the text that the model was trained on, as transformers renders it.

mod environment;
mod python;
mod strftime;

use std::{error::Error as _, sync::Arc};

use minijinja::{Environment, value::Serde};
use serde_json::{Map, Value, json};

use crate::{Error, Result, tokenizer::special_token};

/// The special tokens that templates may name.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// The names that a message's reasoning is passed under, the standard one first.
pub(crate) const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Marks the end of the message to go on with; found again in the rendered text.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// A checkpoint's chat template, compiled; clones share it.
#[derive(Clone)]
pub struct ChatTemplate(Arc<Inner>);

struct Inner {
    /// Holds the templates by name.
    environment: Environment<'static>,
    file: String,
    source: String,
    has_tool_use: bool,
    special_tokens: Map<String, Value>,
}

/// How a conversation is rendered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RenderOptions {
    /// Add the header of the answer that is to come.
    pub add_generation_prompt: bool,
    /// Leave the last message open, for the model to go on with it.
    pub continue_final_message: bool,
    /// Tools that the model may call, as JSON schemas.
    pub tools: Option<Vec<Value>>,
    /// Further variables of the template, `enable_thinking` for one.
    pub kwargs: Map<String, Value>,
}

impl ChatTemplate {
    /// From the text of chat_template.jinja, called `file` in errors; `tokenizer_config` gives the special tokens.
    pub(crate) fn from_source(file: &str, source: &str, tokenizer_config: &Value) -> Result<Self> {
        Self::compile(file, source, None, tokenizer_config)
    }

    /// From the template inside of tokenizer_config.json, called `file`: a text, or a list of named ones.
    pub(crate) fn from_tokenizer_config(file: &str, tokenizer_config: &Value) -> Result<Option<Self>> {
        let named = match tokenizer_config.get("chat_template") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(source)) => return Self::from_source(file, source, tokenizer_config).map(Some),
            Some(Value::Object(named)) => named.clone(),
            Some(Value::Array(list)) => {
                let pair =
                    |entry: &Value| Some((entry.get("name")?.as_str()?.to_owned(), entry.get("template")?.clone()));
                let pairs = list.iter().map(pair).collect::<Option<_>>();
                pairs.ok_or_else(|| {
                    Error::field(file, "chat_template", "entries with a name and a template", "others")
                })?
            }
            Some(_) => {
                return Err(Error::field(file, "chat_template", "a template or a list of named ones", "neither"));
            }
        };
        let find = |name: &str| named.get(name).and_then(Value::as_str);
        let Some(source) = find("default") else {
            let names: Vec<_> = named.keys().map(String::as_str).collect();
            return Err(Error::field(file, "chat_template", "one named `default`", names.join(", ")));
        };
        Self::compile(file, source, find("tool_use"), tokenizer_config).map(Some)
    }

    fn compile(file: &str, source: &str, tool_use: Option<&str>, tokenizer_config: &Value) -> Result<Self> {
        let failed = |error| Error::TemplateSyntax { file: file.to_owned(), detail: describe(&error) };
        let mut environment = environment::new().map_err(failed)?;
        let named = [("default", Some(source)), ("tool_use", tool_use)];
        for (name, source) in named.into_iter().filter_map(|(name, source)| Some((name, source?))) {
            let source = environment::without_generation_tags(source);
            environment.add_template_owned(name, source).map_err(failed)?;
        }
        let token = |field: &&str| Some(((*field).to_owned(), json!(special_token(tokenizer_config, field)?)));
        Ok(Self(Arc::new(Inner {
            environment,
            file: file.to_owned(),
            source: source.to_owned(),
            has_tool_use: tool_use.is_some(),
            special_tokens: SPECIAL_TOKENS.iter().filter_map(token).collect(),
        })))
    }

    /// The template's text.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// The file that holds it.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.0.file
    }

    /// The text of a conversation. Each message is an object with a `role` and what else the template reads.
    ///
    /// # Errors
    /// When the template refuses the conversation or fails on it, or the options don't fit it.
    pub fn render(&self, messages: &[Value], options: &RenderOptions) -> Result<String> {
        let mut messages = messages.iter().map(normalised).collect::<Result<Vec<_>>>()?;
        if messages.is_empty() {
            return Err(Error::TemplateOptions("the conversation is empty: expected at least one message"));
        }
        if !options.continue_final_message {
            return self.render_text(messages, options);
        }
        if options.add_generation_prompt {
            return Err(Error::TemplateOptions(
                "continue_final_message and add_generation_prompt exclude each other: set one of them",
            ));
        }
        let text = self.mark_end(&mut messages)?;
        cut_at_mark(&self.render_text(messages, options)?, &text)
    }

    fn render_text(&self, messages: Vec<Map<String, Value>>, options: &RenderOptions) -> Result<String> {
        let mut variables = Map::new();
        variables.insert("tools".to_owned(), json!(options.tools));
        variables.insert("documents".to_owned(), Value::Null);
        variables.insert("add_generation_prompt".to_owned(), json!(options.add_generation_prompt));
        variables.extend(self.0.special_tokens.clone());
        variables.extend(options.kwargs.clone());
        variables.insert("messages".to_owned(), messages.into_iter().map(Value::Object).collect());
        let name = if self.0.has_tool_use && options.tools.is_some() { "tool_use" } else { "default" };
        let template = self.0.environment.get_template(name);
        let rendered = template.and_then(|template| template.render(minijinja::Value::from(Serde(variables))));
        rendered.map_err(|error| match environment::refusal(&error) {
            Some(message) => Error::TemplateRefused { message },
            None => Error::TemplateFailed { detail: describe(&error) },
        })
    }

    /// Adds the mark to the end of the last message's text, and returns that text.
    fn mark_end(&self, messages: &mut [Map<String, Value>]) -> Result<String> {
        const NOTHING: Error =
            Error::TemplateOptions("continue_final_message is set, but the last message has no text to go on with");
        if !self.source().contains("content") {
            return Err(Error::TemplateOptions("continue_final_message is set, but the template reads no content"));
        }
        let content = messages.last_mut().and_then(|message| message.get_mut("content"));
        let text = match content {
            Some(Value::Array(blocks)) => blocks.iter_mut().rev().find_map(|block| block.get_mut("text")),
            other => other,
        };
        match text {
            Some(Value::String(text)) => {
                let before = text.clone();
                text.push_str(CONTINUE_TAG);
                Ok(before)
            }
            _ => Err(NOTHING),
        }
    }
}

/// A message's tool call as templates want it, with its arguments as an object; the wire has them as a string.
pub fn parse_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
    if let Some(object @ Value::Object(_)) = parsed {
        *arguments = object;
    }
}

/// The rendered text up to the mark, without the space that the template trimmed if it trimmed.
fn cut_at_mark(rendered: &str, last_text: &str) -> Result<String> {
    let mark = rendered.rfind(CONTINUE_TAG.trim_end()).filter(|_| rendered.contains(last_text.trim()));
    let Some(at) = mark else {
        return Err(Error::TemplateOptions(
            "continue_final_message is set, but the template changes the last message: it cannot be continued",
        ));
    };
    let kept = &rendered[..at];
    Ok(if rendered[at..].starts_with(CONTINUE_TAG) { kept } else { kept.trim_end() }.to_owned())
}

/// A message as templates expect it: without fields that are null, with its reasoning under the names they read.
fn normalised(message: &Value) -> Result<Map<String, Value>> {
    let Value::Object(fields) = message else {
        return Err(Error::TemplateOptions("a message is not an object: expected one with a role and a content"));
    };
    let mut fields: Map<_, _> = fields
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if let Some(reasoning) = REASONING_FIELDS.iter().find_map(|name| fields.get(*name)).cloned() {
        fields.entry("thinking").or_insert_with(|| reasoning.clone());
        fields.insert("reasoning_content".to_owned(), reasoning);
    }
    Ok(fields)
}

/// A template error with its place and causes.
fn describe(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
