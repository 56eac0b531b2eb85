//! Training data: JSON lines to examples, each token either given or to be learnt.
//!
//! | a line has | it is | the loss is on |
//! |---|---|---|
//! | `messages`, perhaps `tools` | OpenAI's chat; an assistant message may have a `weight` of 0 or 1 | the assistant's messages whose weight isn't 0 |
//! | `conversations` of `from` and `value` | ShareGPT's chat, the same with other names | the same |
//! | `prompt` and `completion`, lists of messages | a chat in two parts | the assistant's messages of the completion |
//! | `instruction`, perhaps `input`, and `output` | Alpaca's chat of one question | the output |
//! | `prompt` and `completion`, strings | a text, ended by the tokenizer's `eos_token` | the completion and its end |
//! | `text` | a text, between the special tokens that a served prompt gets | every token |
//!
//! Chats go through the model's chat template as they do when served: the tokens are those of the whole conversation's
//! text. Where an assistant's words lie in it is found exactly, or the line is refused; `turns` says how. A token counts
//! as a target if any byte of it lies in what is to be learnt, so no character is left out where a token spans an edge.
//!
//! Every line is read before training starts, and all that is wrong is told.

mod error;
mod packing;
mod row;
mod turns;

use std::{ops::Range, path::Path, sync::Arc};

pub use error::{BadLine, BadLines, DatasetError, LineError, TurnError};
pub use packing::pack;

use crate::{ChatTemplate, Result, Tokenizer, fnv::Fnv};
use row::{Chat, Row};
use turns::Rendered;

/// One training example: its tokens, and which of them the loss asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// For each token whether it is to be predicted from those before it; never the first.
    pub targets: Vec<bool>,
    /// The file that it comes from.
    pub file: Arc<str>,
    /// The line there, from 1.
    pub line: usize,
    /// How many tokens were cut off because there is no room for more.
    pub cut_tokens: usize,
}

/// Examples, and what was left out.
#[derive(Debug, Default)]
pub struct Dataset {
    /// The examples, in the files' order.
    pub examples: Vec<Example>,
    /// The lines that no example could be made of, if they are to be skipped.
    pub skipped: BadLines,
    /// How many answers follow another text than the prompt that serving would make of the messages before them,
    /// because the chat template writes earlier messages differently once there are later ones.
    pub rewritten_answers: usize,
}

/// Which of a chat's assistant messages the loss is on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LossOn {
    /// All of them.
    #[default]
    AllAssistant,
    /// The last one only.
    LastAssistant,
}

/// How training data is read.
#[derive(Debug, Clone)]
pub struct DatasetOptions {
    /// The most tokens that an example keeps: its first ones.
    pub max_length: usize,
    /// Which of a chat's assistant messages the loss is on.
    pub loss_on: LossOn,
    /// Go on with the good lines if there are others.
    pub skip_bad: bool,
}

/// A token of an example, for people to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The token.
    pub token: u32,
    /// Its text; bytes that are a part of a character only are written as `\xe6`.
    pub text: String,
    /// Whether the loss asks for it.
    pub is_target: bool,
}

impl Example {
    /// Whether it has lost tokens because there was no room for them.
    #[must_use]
    pub fn truncated(&self) -> bool {
        self.cut_tokens > 0
    }

    /// Its tokens one by one.
    #[must_use]
    pub fn pieces(&self, tokenizer: &Tokenizer) -> Vec<Piece> {
        let pairs = self.tokens.iter().zip(&self.targets);
        pairs
            .map(|(token, target)| Piece {
                token: *token,
                text: shown(&tokenizer.token_bytes(*token)),
                is_target: *target,
            })
            .collect()
    }
}

fn shown(bytes: &[u8]) -> String {
    let chunks =
        bytes.utf8_chunks().map(|chunk| chunk.valid().to_owned() + &chunk.invalid().escape_ascii().to_string());
    chunks.collect()
}

impl Dataset {
    /// How many examples have lost tokens because there was no room for them.
    #[must_use]
    pub fn truncated_examples(&self) -> usize {
        self.examples.iter().filter(|example| example.truncated()).count()
    }

    /// A number that tells it from others: of all tokens, and which of them the loss asks for.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = Fnv::default();
        for Example { tokens, targets, .. } in &self.examples {
            hash.add(&(tokens.len() as u64).to_le_bytes());
            for (token, target) in tokens.iter().zip(targets) {
                hash.add(&token.to_le_bytes());
                hash.add(&[u8::from(*target)]);
            }
        }
        hash.to_string()
    }

    /// How many tokens were cut off.
    #[must_use]
    pub fn cut_tokens(&self) -> usize {
        self.examples.iter().map(|example| example.cut_tokens).sum()
    }
}

/// Reads `files`, which are JSON lines, into examples. Empty lines don't count. `on_bad` is told of each line that no example
/// can be made of.
///
/// # Errors
/// When a file can't be read or is of another kind; when lines are broken, with the first of them, unless they are to be
/// skipped and there are others.
pub fn read(
    files: &[impl AsRef<Path>],
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &DatasetOptions,
    on_bad: &mut dyn FnMut(&BadLine),
) -> Result<Dataset, DatasetError> {
    if options.max_length < 2 {
        return Err(DatasetError::MaxLength { found: options.max_length });
    }
    if files.is_empty() {
        return Err(DatasetError::NoFiles);
    }
    let reader = Reader { tokenizer, template, options };
    let mut dataset = Dataset::default();
    for file in files {
        reader.add_file(file.as_ref(), &mut dataset, on_bad)?;
    }
    if dataset.skipped.count() == 0 || options.skip_bad && !dataset.examples.is_empty() {
        return Ok(dataset);
    }
    Err(DatasetError::BadLines(dataset.skipped))
}

/// What some editors begin a file with.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

struct Reader<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    options: &'a DatasetOptions,
}

/// What a line makes: see [`Example`] and [`Dataset`].
struct Tokens {
    tokens: Vec<u32>,
    targets: Vec<bool>,
    cut: usize,
    rewritten_answers: usize,
}

impl Reader<'_> {
    fn add_file(
        &self,
        path: &Path,
        dataset: &mut Dataset,
        on_bad: &mut dyn FnMut(&BadLine),
    ) -> Result<(), DatasetError> {
        let file: Arc<str> = path.to_string_lossy().into();
        let other_kind = |found| DatasetError::NotJsonLines { file: file.to_string(), found };
        if !path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("jsonl")) {
            return Err(other_kind("another ending"));
        }
        let bytes = std::fs::read(path).map_err(|reason| DatasetError::Read { file: file.to_string(), reason })?;
        let text = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes).trim_ascii();
        if text.is_empty() {
            return Err(DatasetError::Empty { file: file.to_string() });
        }
        if text.starts_with(b"[") {
            return Err(other_kind("a JSON array"));
        }
        for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            let line = if index == 0 { line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line) } else { line };
            if line.trim_ascii().is_empty() {
                continue;
            }
            match self.tokens(line) {
                Ok(Tokens { tokens, targets, cut, rewritten_answers }) => {
                    dataset.rewritten_answers += rewritten_answers;
                    let file = Arc::clone(&file);
                    dataset.examples.push(Example { tokens, targets, file, line: index + 1, cut_tokens: cut });
                }
                Err(reason) => {
                    let line = BadLine { file: Arc::clone(&file), line: index + 1, reason };
                    on_bad(&line);
                    dataset.skipped.add(line);
                }
            }
        }
        Ok(())
    }

    /// What a line makes, cut to the length allowed.
    fn tokens(&self, line: &[u8]) -> Result<Tokens, LineError> {
        let mut line = match Row::parse(line, self.options.loss_on)? {
            Row::Text(text) => self.text(&text)?,
            Row::Completion { prompt, completion } => self.completion(&prompt, &completion)?,
            Row::Chat(chat) => self.chat(chat)?,
        };
        let (length, max_length) = (line.tokens.len(), self.options.max_length);
        // Nothing comes before the first token that it could be predicted from.
        line.targets.iter_mut().take(1).for_each(|target| *target = false);
        if !line.targets.contains(&true) {
            return Err(LineError::NoTarget { tokens: length });
        }
        line.tokens.truncate(max_length);
        line.targets.truncate(max_length);
        if !line.targets.contains(&true) {
            return Err(LineError::CutOff { tokens: length, max_length });
        }
        line.cut = length - line.tokens.len();
        Ok(line)
    }

    fn text(&self, text: &str) -> Result<Tokens, LineError> {
        let tokens = self.tokenizer.encode(text, true)?;
        Ok(Tokens { targets: vec![true; tokens.len()], tokens, cut: 0, rewritten_answers: 0 })
    }

    /// The special tokens before the text are those that a served prompt gets; what would come after it is left to the
    /// end-of-sequence token.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Tokens, LineError> {
        let end = self.tokenizer.eos_token_id().ok_or(LineError::NoEndOfSequence)?;
        let text = format!("{prompt}{completion}");
        let wanted = prompt.len()..text.len();
        let mut line = self.marked(&text, std::slice::from_ref(&wanted))?;
        let special = self.tokenizer.encode(&text, true)?;
        let before = special.windows(line.tokens.len().max(1)).position(|part| part == line.tokens).unwrap_or(0);
        line.tokens.splice(0..0, special[..before].iter().copied());
        line.targets.splice(0..0, std::iter::repeat_n(false, before));
        if line.tokens.last() != Some(&end) {
            line.tokens.push(end);
            line.targets.push(true);
        }
        Ok(line)
    }

    fn chat(&self, chat: Chat) -> Result<Tokens, LineError> {
        let template = self.template.ok_or(LineError::NoTemplate)?;
        let Rendered { text, answers, rewritten } = turns::render(template, chat)?;
        Ok(Tokens { rewritten_answers: rewritten, ..self.marked(&text, &answers)? })
    }

    /// The tokens of `text`, without special tokens of the tokenizer's own; targets are those of which a byte lies in
    /// one of `wanted`.
    fn marked(&self, text: &str, wanted: &[Range<usize>]) -> Result<Tokens, LineError> {
        let overlaps =
            |token: &Range<usize>| wanted.iter().any(|range| token.start < range.end && range.start < token.end);
        let pairs = self.tokenizer.encode_with_ranges(text)?.into_iter();
        let (tokens, targets) = pairs.map(|(token, range)| (token, overlaps(&range))).unzip();
        Ok(Tokens { tokens, targets, cut: 0, rewritten_answers: 0 })
    }
}

#[cfg(test)]
mod tests;
