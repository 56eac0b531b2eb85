//! Where the assistant's words lie in the text that a chat template makes of a conversation.
//!
//! The text is the template's own, of the whole conversation. In it an answer's range begins where the prompt ends that
//! serving would make of the messages before it (generation prompt included), and ends where the text of the
//! conversation up to it ends, without white space after it. So it holds what the model has to write when served: a
//! thinking block if the template writes one, the content, the tool calls and the end-of-turn token.
//!
//! Both texts must be the beginning of the whole. They aren't where a template rewrites earlier messages: strips their
//! reasoning, or moves the system's words and the tools to the last question. There the message's own texts are marked:
//! a word that occurs nowhere else is put to both sides of each of them, inside of the white space at its edges, which
//! templates trim, and between thinking tags, which templates split at. The marks count only if the text without them
//! is the template's text, to the byte. The answer then begins at the first mark, or the `<think>` before it, and ends
//! behind the last one with what the template writes behind it when the conversation ends there.
//!
//! If that fails too, the line is refused. `{% generation %}` blocks aren't used: some hold the header as well, which
//! serving gives to the model.

use std::ops::Range;

use serde_json::Value;

use super::{
    LineError,
    error::TurnError,
    row::{Chat, Turn},
};
use crate::{ChatTemplate, RenderOptions, Result, chat_template::REASONING_FIELDS, json::excerpt};

const THINK: &str = "<think>";
const END_THINK: &str = "</think>";

/// A conversation as the chat template writes it.
pub(super) struct Rendered {
    /// The text.
    pub text: String,
    /// The bytes of it that the loss is asked for, a range for each answer.
    pub answers: Vec<Range<usize>>,
    /// How many answers follow another text than the prompt that serving would make.
    pub rewritten: usize,
}

/// Writes the conversation and finds the answers that are wanted.
pub(super) fn render(template: &ChatTemplate, chat: Chat) -> Result<Rendered, LineError> {
    let Chat { turns, tools } = chat;
    let knows_developer = template.source().contains("developer");
    let (messages, turns): (Vec<Value>, Vec<(String, bool)>) = turns
        .into_iter()
        .map(|Turn { mut message, place, wanted }| {
            if message["role"] == "developer" && !knows_developer {
                message["role"] = "system".into();
            }
            (message, (place, wanted))
        })
        .unzip();
    let options = RenderOptions { tools, ..RenderOptions::default() };
    let text = template.render(&messages, &options)?;
    let mut conversation = Conversation { template, messages, options, text, rewritten: 0 };
    let mut answers = Vec::new();
    for (index, (place, _)) in turns.into_iter().enumerate().filter(|(_, (_, wanted))| *wanted) {
        answers.push(conversation.answer(index).map_err(|reason| LineError::Turn { place, reason: Box::new(reason) })?);
    }
    Ok(Rendered { text: conversation.text, answers, rewritten: conversation.rewritten })
}

struct Conversation<'a> {
    template: &'a ChatTemplate,
    messages: Vec<Value>,
    options: RenderOptions,
    /// The whole of it.
    text: String,
    rewritten: usize,
}

impl Conversation<'_> {
    /// The bytes of the answer in `messages[index]`.
    fn answer(&mut self, index: usize) -> Result<Range<usize>, TurnError> {
        let prompt = self.options_with_generation_prompt();
        let prompt = self.template.render(&self.messages[..index], &prompt).ok();
        let start = prompt.filter(|prompt| self.text.starts_with(prompt)).map(|prompt| prompt.len());
        let until = self.until(index);
        let end = until.as_ref().ok().map(|until| until.trim_end()).filter(|until| self.text.starts_with(until));
        let end = end.map(str::len);
        self.rewritten += usize::from(start.is_none());
        if let (Some(start), Some(end)) = (start, end) {
            return Ok(start..end.max(start));
        }
        let mark = self.mark();
        let marked = marked(&self.messages[index], &mark);
        let words = self.words(&self.messages[index + 1..], index, &marked, &mark, &self.text)?;
        let start = start.unwrap_or_else(|| with_think_tag(&self.text, words.start));
        let end = match end {
            Some(end) => end,
            None => {
                let until = until.map_err(TurnError::Refused)?;
                let last = self.words(&[], index, &marked, &mark, &until)?;
                words.end + ending(&until[last.end..], &self.text[words.end..])?
            }
        };
        Ok(start..end.max(start))
    }

    fn options_with_generation_prompt(&self) -> RenderOptions {
        RenderOptions { add_generation_prompt: true, ..self.options.clone() }
    }

    /// The text of the conversation that ends with `messages[index]`.
    fn until(&self, index: usize) -> Result<String> {
        if index + 1 == self.messages.len() {
            return Ok(self.text.clone());
        }
        self.template.render(&self.messages[..=index], &self.options)
    }

    /// A word that the conversation doesn't have.
    fn mark(&self) -> String {
        let mut mark = "cadremark".to_owned();
        while self.text.contains(&mark) {
            mark.push('x');
        }
        mark
    }

    /// From the first to the last word of `messages[index]` in `text`, the template's of the messages up to it and
    /// `after`. `marked` is the message with its marks.
    fn words(
        &self,
        after: &[Value],
        index: usize,
        marked: &Value,
        mark: &str,
        text: &str,
    ) -> Result<Range<usize>, TurnError> {
        let messages = [&self.messages[..index], std::slice::from_ref(marked), after].concat();
        let with_marks = self.template.render(&messages, &self.options).map_err(|_| TurnError::Changed)?;
        let given = marked.to_string().matches(mark).count();
        let found: Vec<usize> = with_marks.match_indices(mark).map(|(at, _)| at).collect();
        let (Some(first), Some(last)) = (found.first(), found.last()) else { return Err(TurnError::LeftOut) };
        if found.len() > given {
            return Err(TurnError::Repeated);
        }
        if with_marks.replace(mark, "") != text {
            return Err(TurnError::Changed);
        }
        Ok(*first..last - mark.len() * (found.len() - 1))
    }
}

/// `message` with `mark` around each of its texts.
fn marked(message: &Value, mark: &str) -> Value {
    let mut message = message.clone();
    let Value::Object(fields) = &mut message else { return message };
    for (name, value) in fields {
        if name == "content" || name == "tool_calls" || REASONING_FIELDS.contains(&name.as_str()) {
            mark_texts(value, mark);
        }
    }
    message
}

fn mark_texts(value: &mut Value, mark: &str) {
    match value {
        Value::String(text) => *text = surround(text, mark),
        Value::Array(items) => items.iter_mut().for_each(|item| mark_texts(item, mark)),
        Value::Object(fields) => {
            // Templates check the form of an id, and compare the type.
            let texts = fields.iter_mut().filter(|(name, _)| !["id", "type"].contains(&name.as_str()));
            texts.for_each(|(_, value)| mark_texts(value, mark));
        }
        _ => {}
    }
}

/// `text` with `mark` on both sides of what lies between thinking tags and has more than white space.
fn surround(text: &str, mark: &str) -> String {
    let mut marked = String::with_capacity(text.len() + 2 * mark.len());
    let mut rest = text;
    loop {
        let tags = [THINK, END_THINK].into_iter().filter_map(|tag| Some((rest.find(tag)?, tag)));
        let (end, tag) = tags.min().unwrap_or((rest.len(), ""));
        let (piece, after) = rest.split_at(end);
        let words = piece.trim();
        if words.is_empty() {
            marked.push_str(piece);
        } else {
            let (before, _) = piece.split_at(piece.len() - piece.trim_start().len());
            let behind = &piece[before.len() + words.len()..];
            marked.extend([before, mark, words, mark, behind]);
        }
        if tag.is_empty() {
            return marked;
        }
        marked.push_str(tag);
        rest = &after[tag.len()..];
    }
}

/// Where the `<think>` begins that stands before `start`; `start` if none does.
fn with_think_tag(text: &str, start: usize) -> usize {
    text[..start].trim_end().strip_suffix(THINK).map_or(start, str::len)
}

/// How much of `here`, the text behind an answer, ends it, as `last` does where the conversation ends: all of `last`,
/// or the words that both begin with.
fn ending(last: &str, here: &str) -> Result<usize, TurnError> {
    let last = last.trim_end();
    if here.starts_with(last) {
        return Ok(last.len());
    }
    let same = last.char_indices().zip(here.chars()).find(|((_, one), other)| one != other);
    let same = same.map_or(last.len().min(here.len()), |((at, _), _)| at);
    let ends_word = |text: &str| text[same..].chars().next().is_none_or(char::is_whitespace);
    let common = &last[..same];
    let words = if ends_word(last) && ends_word(here) {
        common
    } else {
        common.rfind(char::is_whitespace).map_or("", |at| &common[..at])
    };
    match words.trim_end().len() {
        0 => Err(TurnError::Ending { last: excerpt(last), here: excerpt(here) }),
        length => Ok(length),
    }
}
