//! What can be wrong with training data: all of it is told at once, each line with its place.

use std::{fmt, io, sync::Arc};

/// How many broken lines are kept, and listed by a message.
const KEPT: usize = 20;

/// What keeps training data from being read.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// No file is named.
    #[error("there is no training data: name at least one .jsonl file")]
    NoFiles,
    /// No example could have a target.
    #[error("max_length is {found}: expected at least 2, a token and the one to learn after it")]
    MaxLength {
        /// The length given.
        found: usize,
    },
    /// The system could not read a file.
    #[error("cannot read {file}: {reason}")]
    Read {
        /// The file.
        file: String,
        /// What the system said.
        reason: io::Error,
    },
    /// A file of another kind.
    #[error(
        "{file}: expected a .jsonl file with one JSON object a line, found {found}; `jq -c '.[]' {file} > data.jsonl` makes one of a JSON array"
    )]
    NotJsonLines {
        /// The file.
        file: String,
        /// What it seems to be.
        found: &'static str,
    },
    /// A file without a line.
    #[error("{file} is empty: expected one JSON object a line")]
    Empty {
        /// The file.
        file: String,
    },
    /// Lines that no example can be made of.
    #[error("{0}")]
    BadLines(BadLines),
}

/// The lines that no example can be made of: how many, and the first ones, in the files' order. A file that is something else
/// may have millions.
#[derive(Debug, Default)]
pub struct BadLines {
    pub(super) first: Vec<BadLine>,
    count: usize,
}

impl BadLines {
    pub(super) fn add(&mut self, line: BadLine) {
        self.count += 1;
        if self.first.len() < KEPT {
            self.first.push(line);
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }
}

/// A line that no example can be made of.
#[derive(Debug, thiserror::Error)]
#[error("{file}:{line}: {reason}")]
pub struct BadLine {
    /// The file.
    pub file: Arc<str>,
    /// The line's number, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub reason: LineError,
}

impl fmt::Display for BadLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, count } = self;
        write!(f, "{count} {} cannot be used:", if *count == 1 { "line" } else { "lines" })?;
        for line in first {
            write!(f, "\n  {line}")?;
        }
        if *count > first.len() {
            write!(f, "\n  … and {} more", count - first.len())?;
        }
        Ok(())
    }
}

/// Why no example can be made of a line.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// Bytes that are no text.
    #[error("expected UTF-8, found other bytes at byte {at} of the line")]
    NotUtf8 {
        /// How many bytes of the line are text.
        at: usize,
    },
    /// It is not JSON.
    #[error("not valid JSON: {detail}")]
    NotJson {
        /// Where and why.
        detail: String,
    },
    /// It is JSON, but no object.
    #[error("expected an object with named fields, found {found}")]
    NotAnObject {
        /// How it begins.
        found: String,
    },
    /// An object of none of the formats.
    #[error(
        "expected the fields `messages`, or `conversations`, or `prompt` and `completion`, or `instruction` and `output`, or `text`; found {found}"
    )]
    NoFormat {
        /// The fields it has.
        found: String,
    },
    /// A field has a value that cannot be used.
    #[error("{field}: expected {expected}, found {found}")]
    Field {
        /// The field, with its place.
        field: String,
        /// What would be right.
        expected: String,
        /// How the value begins.
        found: String,
    },
    /// Nobody speaks whose words are to be learnt.
    #[error("nothing to learn from: expected an assistant message that the loss is asked for and whose weight isn't 0")]
    NoAnswer,
    /// No token is left to be learnt.
    #[error("nothing to learn from: expected at least two tokens, found {tokens}")]
    NoTarget {
        /// How many tokens there are.
        tokens: usize,
    },
    /// What is to be learnt lies beyond the longest example.
    #[error(
        "nothing to learn from: max_length {max_length} cuts off every token that the loss is asked for; the line has {tokens}: raise max_length, or shorten what comes before the answer"
    )]
    CutOff {
        /// How many tokens there are.
        tokens: usize,
        /// How many are kept.
        max_length: usize,
    },
    /// A conversation for a model that has no words for one.
    #[error("a conversation, but the model has no chat template: give it as `prompt` and `completion`, or as `text`")]
    NoTemplate,
    /// A completion has to end, and the tokenizer names nothing to end it with.
    #[error(
        "a completion, but tokenizer_config.json names no eos_token of the vocabulary to end it with: set it there, or give the line as `text`"
    )]
    NoEndOfSequence,
    /// What the template makes of an assistant message can't be found in the text.
    #[error("{place}: {reason}")]
    Turn {
        /// The message's place in the line.
        place: String,
        /// Why not.
        reason: Box<TurnError>,
    },
    /// The template or the tokenizer failed.
    #[error(transparent)]
    Model(#[from] crate::Error),
}

/// Why it can't be told where an assistant message lies in the text that the chat template makes.
#[derive(Debug, thiserror::Error)]
pub enum TurnError {
    /// The template leaves it out.
    #[error("the chat template writes nothing of this message: remove it, or give it the weight 0")]
    LeftOut,
    /// The template repeats it.
    #[error(
        "the chat template writes this message's text more than once: give it the weight 0, or use another template"
    )]
    Repeated,
    /// The template decides by the message's text what to write.
    #[error(
        "the chat template changes this message's text, so that it can't be found again: give it the weight 0, or use another template"
    )]
    Changed,
    /// The template rewrites what comes before the message, and doesn't show where that ends.
    #[error(
        "the chat template rewrites the messages before this one, so that it can't be told where this one begins: give it the weight 0, or use another template"
    )]
    NoBeginning,
    /// The template refuses the conversation up to this message, which would show how it ends.
    #[error(
        "the chat template refuses the conversation that ends with this message ({0}): ask for the loss on the last one only"
    )]
    Refused(crate::Error),
    /// The template ends the message differently here than at a conversation's end.
    #[error(
        "the chat template ends this message with {last:?} when it is the last one, and goes on with {here:?} here: ask for the loss on the last one only"
    )]
    Ending {
        /// What follows the message when it is the last one.
        last: String,
        /// What follows it here.
        here: String,
    },
}
