//! Where the assistant's words lie in the text that a chat template makes of a conversation.
//!
//! The text is the template's own, of the whole conversation. In it an answer's range begins where the prompt ends that
//! serving would make of the messages before it (generation prompt included), and ends where the text of the
//! conversation up to it ends, without white space after it. So it holds what the model has to write when served: a
//! thinking block if the template writes one, the content, the tool calls and the end-of-turn token.
//!
//! Both texts must be the beginning of the whole. They aren't where a template rewrites earlier messages: strips their
//! reasoning, or moves the system's words and the tools to the last question. There the messages' own texts are marked:
//! a word that occurs nowhere else is put to both sides of each of them, inside of the white space at its edges, which
//! templates trim, and between thinking tags, which templates split at. The marks count only if the text without them
//! is the template's text, to the byte. So it is known what the template writes behind a message's words: behind the
//! answer's here, and where the conversation ends with it; behind those of the message before it here, and in the prompt
//! that serving would make. The answer begins and ends where these part, in whole words.
//!
//! Where the template makes no prompt, for an answer that nothing comes before, it begins at its first word, or the
//! `<think>` before that. If all fails, the line is refused. `{% generation %}` blocks aren't used: some hold the header
//! as well, which serving gives to the model.

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
        let prompt = RenderOptions { add_generation_prompt: true, ..self.options.clone() };
        let start = match self.template.render(&self.messages[..index], &prompt) {
            Ok(before) if self.text.starts_with(&before) => before.len(),
            before => {
                self.rewritten += usize::from(before.is_ok());
                self.start(index, before.ok(), &prompt)?
            }
        };
        let end = match self.until(index) {
            Ok(until) if self.text.starts_with(until.trim_end()) => until.trim_end().len(),
            until => self.end(index, &until.map_err(TurnError::Refused)?)?,
        };
        Ok(start..end.max(start))
    }

    /// The text of the conversation that ends with `messages[index]`.
    fn until(&self, index: usize) -> Result<String> {
        if index + 1 == self.messages.len() {
            return Ok(self.text.clone());
        }
        self.template.render(&self.messages[..=index], &self.options)
    }

    /// Where the answer begins, if not behind `before`, the prompt that serving makes with the options `prompt`.
    fn start(&self, index: usize, before: Option<String>, prompt: &RenderOptions) -> Result<usize, TurnError> {
        let (Some(before), Some(previous)) = (before, index.checked_sub(1)) else {
            // The template makes no prompt for it, as nothing comes before it.
            let words = self.words(index, &self.messages, &self.options, &self.text)?;
            return Ok(self.text[..words.start].trim_end().strip_suffix(THINK).map_or(words.start, str::len));
        };
        let no_beginning = |_| TurnError::NoBeginning;
        let there = self.words(previous, &self.messages[..index], prompt, &before).map_err(no_beginning)?;
        let here = self.words(previous, &self.messages, &self.options, &self.text).map_err(no_beginning)?;
        let header = &before[there.end..];
        let shared = shared_words(header, &self.text[here.end..]).len();
        // What the prompt has besides may be a thinking block that was opened for the model.
        let missing = [THINK, END_THINK].iter().fold(header[shared..].to_owned(), |rest, tag| rest.replace(tag, ""));
        if !missing.trim().is_empty() {
            let words = self.words(index, &self.messages, &self.options, &self.text)?;
            let between = self.text.get(here.end + shared..words.start);
            if between.is_none_or(|between| !between.trim().is_empty()) {
                return Err(TurnError::NoBeginning);
            }
        }
        Ok(here.end + shared)
    }

    /// Where the answer ends, if not where `until` does, the text of the conversation that ends with it.
    fn end(&self, index: usize, until: &str) -> Result<usize, TurnError> {
        let there = self.words(index, &self.messages[..=index], &self.options, until)?;
        let here = self.words(index, &self.messages, &self.options, &self.text)?;
        let (last, here_on) = (until[there.end..].trim_end(), &self.text[here.end..]);
        let shared = shared_words(last, here_on).trim_end();
        if shared.is_empty() && !last.is_empty() {
            return Err(TurnError::Ending { last: excerpt(last), here: excerpt(here_on) });
        }
        Ok(here.end + shared.len())
    }

    /// From the first to the last word of `messages[index]` in `text`, which the template makes of `messages`.
    fn words(
        &self,
        index: usize,
        messages: &[Value],
        options: &RenderOptions,
        text: &str,
    ) -> Result<Range<usize>, TurnError> {
        let alone = self.places_of_marks(&[index], messages, options, text);
        let alike: Vec<usize> = (0..messages.len()).filter(|other| messages[*other] == messages[index]).collect();
        let places = match alone {
            // The template may look for messages that equal another: they must stay equal.
            Err(TurnError::Changed) if alike.len() > 1 => {
                let (places, given) = self.places_of_marks(&alike, messages, options, text)?;
                if places.len() != given {
                    return Err(TurnError::Changed);
                }
                let each = given / alike.len();
                let before = each * alike.iter().filter(|other| **other < index).count();
                places[before..before + each].to_vec()
            }
            alone => alone?.0,
        };
        let (Some(first), Some(last)) = (places.first(), places.last()) else { return Err(TurnError::LeftOut) };
        Ok(*first..*last)
    }

    /// Where marks around the texts of `messages[each of indices]` would lie in `text`, which the template makes of
    /// `messages`, and how many were given: the template may leave some out.
    fn places_of_marks(
        &self,
        indices: &[usize],
        messages: &[Value],
        options: &RenderOptions,
        text: &str,
    ) -> Result<(Vec<usize>, usize), TurnError> {
        let mut mark = "cadremark".to_owned();
        while text.contains(&mark) {
            mark.push('x');
        }
        let mut messages = messages.to_vec();
        let mut given = 0;
        for index in indices {
            messages[*index] = marked(&messages[*index], &mark);
            given += messages[*index].to_string().matches(&mark).count();
        }
        let with_marks = self.template.render(&messages, options).map_err(|_| TurnError::Changed)?;
        let found = with_marks.match_indices(&mark).enumerate();
        let places: Vec<usize> = found.map(|(before, (at, _))| at - mark.len() * before).collect();
        if places.len() > given {
            return Err(TurnError::Repeated);
        }
        if !places.is_empty() && with_marks.replace(&mark, "") != text {
            return Err(TurnError::Changed);
        }
        Ok((places, given))
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
        Value::String(text) => *text = mark_parts(text, mark),
        Value::Array(items) => items.iter_mut().for_each(|item| mark_texts(item, mark)),
        Value::Object(fields) => {
            // Templates check the form of an id, and compare the type.
            let texts = fields.iter_mut().filter(|(name, _)| !["id", "type"].contains(&name.as_str()));
            texts.for_each(|(_, value)| mark_texts(value, mark));
        }
        _ => {}
    }
}

/// `text` with `mark` around each part between its thinking tags; around all, if it is nothing but tags.
fn mark_parts(text: &str, mark: &str) -> String {
    if text.replace(THINK, "").replace(END_THINK, "").trim().is_empty() {
        return surround(text, mark);
    }
    let mut marked = String::with_capacity(text.len() + 2 * mark.len());
    let mut rest = text;
    loop {
        let tags = [THINK, END_THINK].into_iter().filter_map(|tag| Some((rest.find(tag)?, tag)));
        let (end, tag) = tags.min().unwrap_or((rest.len(), ""));
        marked.push_str(&surround(&rest[..end], mark));
        if tag.is_empty() {
            return marked;
        }
        marked.push_str(tag);
        rest = &rest[end + tag.len()..];
    }
}

/// `text` with `mark` on both sides, inside of its white space; nothing is marked if there is only that.
fn surround(text: &str, mark: &str) -> String {
    let words = text.trim();
    if words.is_empty() {
        return text.to_owned();
    }
    let before = text.len() - text.trim_start().len();
    [&text[..before], mark, words, mark, &text[before + words.len()..]].concat()
}

/// What `there` and `here` both begin with: all of `there`, or whole words of it with the white space behind them.
fn shared_words<'a>(there: &'a str, here: &str) -> &'a str {
    let different = there.char_indices().zip(here.chars()).find(|((_, one), other)| one != other);
    let same = different.map_or(there.len().min(here.len()), |((at, _), _)| at);
    let ends_word = |text: &str| text[same..].chars().next().is_none_or(char::is_whitespace);
    let common = &there[..same];
    if same == there.len() || ends_word(there) && ends_word(here) {
        return common;
    }
    &common[..common.trim_end_matches(|letter: char| !letter.is_whitespace()).len()]
}
