//! An item, and the passages that it is made of.

use std::fmt::Display;

use cadre_engine::{request::Scoring, score::Passage};
use cadre_models::Tokenizer;
use serde::Deserialize;
use serde_json::Value;

/// An item as it is written.
#[derive(Debug, Deserialize)]
struct Written {
    id: Option<Value>,
    text: Option<String>,
    prompt: Option<String>,
    completion: Option<String>,
    choices: Option<Vec<String>>,
    labels: Option<Vec<Label>>,
}

/// A label: a text that is one token behind the prompt, or that token.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "a label is a text or a token id")]
pub enum Label {
    /// As a text.
    Text(String),
    /// As a token id.
    Token(u32),
}

/// What is to be scored, and the passages that tell it.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// What its writer calls it.
    pub id: Option<Value>,
    /// What is asked.
    pub question: Question,
    /// In which `question` names its parts.
    pub passages: Vec<Passage>,
}

/// What an item asks.
#[derive(Debug, Clone, PartialEq)]
pub enum Question {
    /// How likely a text is: all passages, one after the other.
    Text {
        /// Its length.
        bytes: usize,
        /// Its tokens; the first one has no score.
        tokens: Vec<u32>,
    },
    /// How likely a completion is.
    Completion(Continuation),
    /// Which of several completions is likeliest.
    Choices(Vec<Continuation>),
    /// How likely each of several tokens is.
    Labels(Vec<(Label, Continuation)>),
}

/// What stands behind a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// Its length as it is written.
    pub bytes: usize,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// The passage that ends before its last token.
    pub passage: usize,
    /// Which of that passage's following tokens its last one is.
    pub next: usize,
}

/// Reads items.
#[derive(Clone)]
pub struct Reader {
    /// Text to tokens.
    pub tokenizer: Tokenizer,
    /// Width of the logits.
    pub vocab_size: usize,
    /// Tokens that are looked at together; longer texts are scored window by window.
    pub window: usize,
    /// How far a window lies behind the one before it.
    pub stride: usize,
}

impl Reader {
    /// Reads the item on a line.
    ///
    /// # Errors
    /// With what is wrong, and with its id if that can be told.
    pub fn read(&self, line: &str) -> Result<Item, (Option<Value>, String)> {
        let no_item = |reason: &dyn Display| (None, format!("this is no item: {reason}"));
        // An array would pass for the fields in their order.
        if !line.trim_start().starts_with('{') {
            return Err(no_item(&"expected a JSON object"));
        }
        let written: Written = serde_json::from_str(line).map_err(|error| no_item(&error))?;
        let Written { id, text, prompt, completion, choices, labels } = written;
        if let Some(Value::Number(number)) = id.as_ref().filter(|id| id.is_f64()) {
            return Err(no_item(&format_args!(
                "`id` is {number}: write what is no whole number of 64 bits as a string"
            )));
        }
        let mut passages = Passages::default();
        let question = match (text, prompt, completion, choices, labels) {
            (Some(text), None, None, None, None) => self.text(&text, &mut passages),
            (None, Some(prompt), Some(completion), None, None) => {
                self.continuation(&prompt, &completion, &mut passages).map(Question::Completion)
            }
            (None, Some(prompt), None, Some(choices), None) => self.choices(&prompt, &choices, &mut passages),
            (None, Some(prompt), None, None, Some(labels)) => self.labels(&prompt, labels, &mut passages),
            _ => Err("expected `text`, or `prompt` with one of `completion`, `choices` and `labels`".to_owned()),
        };
        match question {
            Ok(question) => Ok(Item { id, question, passages: passages.0 }),
            Err(reason) => Err((id, reason)),
        }
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.tokenizer.encode(text, true).map_err(|error| error.to_string())
    }

    fn text(&self, text: &str, passages: &mut Passages) -> Result<Question, String> {
        let tokens = self.encode(text)?;
        if tokens.len() < 2 {
            return Err(format!(
                "`text` has {} tokens: nothing precedes the first, at least two are needed",
                tokens.len()
            ));
        }
        let (mut start, mut scored) = (0, 1);
        loop {
            let end = tokens.len().min(start + self.window);
            let scoring = Scoring { from: (scored - start) as u32, ..Scoring::default() };
            passages.0.push(Passage { tokens: tokens[start..end].to_vec(), scoring, adapter: None });
            if end == tokens.len() {
                return Ok(Question::Text { bytes: text.len(), tokens });
            }
            (start, scored) = (start + self.stride, end);
        }
    }

    fn choices(&self, prompt: &str, choices: &[String], passages: &mut Passages) -> Result<Question, String> {
        if choices.is_empty() {
            return Err("`choices` is empty".to_owned());
        }
        let of = |(at, choice): (usize, &String)| {
            self.continuation(prompt, choice, passages).map_err(|reason| format!("choices[{at}]: {reason}"))
        };
        choices.iter().enumerate().map(of).collect::<Result<_, _>>().map(Question::Choices)
    }

    fn labels(&self, prompt: &str, labels: Vec<Label>, passages: &mut Passages) -> Result<Question, String> {
        if labels.is_empty() {
            return Err("`labels` is empty".to_owned());
        }
        let mut of = |(at, label): (usize, Label)| {
            let continuation = match &label {
                Label::Token(token) => self.token(prompt, *token, passages),
                Label::Text(text) => self.continuation(prompt, text, passages),
            };
            let continuation = continuation.map_err(|reason| format!("labels[{at}]: {reason}"))?;
            match continuation.tokens.len() {
                1 => Ok((label, continuation)),
                tokens => Err(format!("labels[{at}] is {tokens} tokens behind this prompt, not one: use `choices`")),
            }
        };
        let labels = labels.into_iter().enumerate().map(&mut of).collect::<Result<Vec<_>, String>>()?;
        if labels.iter().any(|(_, label)| label.passage != labels[0].1.passage) {
            return Err("the labels change how the prompt is cut into tokens: use `choices`".to_owned());
        }
        Ok(Question::Labels(labels))
    }

    fn token(&self, prompt: &str, token: u32, passages: &mut Passages) -> Result<Continuation, String> {
        if token as usize >= self.vocab_size {
            return Err(format!("token id {token} is out of range: the vocabulary has {} tokens", self.vocab_size));
        }
        let mut tokens = self.encode(prompt.trim_end())?;
        let from = tokens.len();
        tokens.push(token);
        self.passage(tokens, from, 0, passages)
    }

    /// Cut as lm-evaluation-harness does: the tokens are those of both texts together, and spaces at the prompt's end belong to
    /// the completion.
    fn continuation(&self, prompt: &str, completion: &str, passages: &mut Passages) -> Result<Continuation, String> {
        if completion.is_empty() {
            return Err("the completion is empty".to_owned());
        }
        let tokens = self.encode(&format!("{prompt}{completion}"))?;
        // A completion may go into the prompt's last token: then that one is scored.
        let from = self.encode(prompt.trim_end())?.len().min(tokens.len().saturating_sub(1));
        self.passage(tokens, from, completion.len(), passages)
    }

    /// The passage of a prompt and what follows from token `from` on.
    fn passage(
        &self,
        mut tokens: Vec<u32>,
        from: usize,
        bytes: usize,
        passages: &mut Passages,
    ) -> Result<Continuation, String> {
        if from == 0 {
            return Err("the prompt has no token: nothing precedes the completion's first".to_owned());
        }
        if tokens.len() > self.window {
            return Err(format!(
                "prompt and completion are {} tokens, but {} are looked at together (--max-model-len)",
                tokens.len(),
                self.window
            ));
        }
        let own = tokens[from..].to_vec();
        let last = tokens.pop().unwrap_or_default();
        let (passage, next) = passages.ending(tokens, from, last);
        Ok(Continuation { bytes, tokens: own, passage, next })
    }
}

/// The passages of an item: what its parts have in common is one.
#[derive(Default)]
struct Passages(Vec<Passage>);

impl Passages {
    /// The one of these tokens, which are scored from `from` on and followed by `next`; and the place of that among what
    /// follows it.
    fn ending(&mut self, tokens: Vec<u32>, from: usize, next: u32) -> (usize, usize) {
        let same = |passage: &Passage| passage.tokens == tokens && passage.scoring.from == from as u32;
        let index = self.0.iter().position(same).unwrap_or_else(|| {
            let scoring = Scoring { from: from as u32, ..Scoring::default() };
            self.0.push(Passage { tokens, scoring, adapter: None });
            self.0.len() - 1
        });
        let followers = &mut self.0[index].scoring.next;
        followers.push(next);
        (index, followers.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(window: usize, stride: usize) -> Reader {
        let checkpoint = cadre_models::open(None, &|_| ()).unwrap();
        let tokenizer = checkpoint.tokenizer().unwrap();
        Reader { vocab_size: tokenizer.vocab_size(), tokenizer, window, stride }
    }

    fn read(line: &str) -> Item {
        reader(1000, 500).read(line).unwrap()
    }

    #[test]
    fn choices_share_what_they_have_in_common() {
        let item = read(r#"{"id": 7, "prompt": "2 + 2 =", "choices": [" 4", " 5", " 44"]}"#);
        assert_eq!(item.id, Some(7.into()));
        let Question::Choices(choices) = &item.question else { panic!("{item:?}") };
        let tokenizer = reader(1, 1).tokenizer;
        let context = tokenizer.encode("2 + 2 =", true).unwrap();
        for (choice, text) in choices.iter().zip([" 4", " 5", " 44"]) {
            let whole = tokenizer.encode(&format!("2 + 2 ={text}"), true).unwrap();
            let passage = &item.passages[choice.passage];
            assert_eq!((&choice.tokens[..], choice.bytes), (&whole[context.len()..], text.len()));
            assert_eq!(passage.scoring.from as usize, context.len());
            assert_eq!([&passage.tokens[..], &[passage.scoring.next[choice.next]]].concat(), whole);
        }
        let labels = read(r#"{"prompt": "2 + 2 =", "labels": [5, 9, 5]}"#);
        assert_eq!((labels.passages.len(), &labels.passages[0].scoring.next[..]), (1, &[5, 9, 5][..]));
    }

    #[test]
    fn a_prompt_s_last_spaces_belong_to_the_completion() {
        let [one, other] =
            [r#"{"prompt": "a: ", "completion": "b"}"#, r#"{"prompt": "a:", "completion": " b"}"#].map(read);
        assert_eq!(one.passages, other.passages);
    }

    #[test]
    fn a_long_text_is_scored_window_by_window_each_token_once() {
        let text = "one two three four five six seven eight nine ten ".repeat(3);
        let tokens = reader(1, 1).tokenizer.encode(&text, true).unwrap();
        for (window, stride) in [(16, 8), (16, 16), (16, 1), (1000, 500), (tokens.len(), 3)] {
            let line = serde_json::json!({"text": text}).to_string();
            let item = reader(window, stride).read(&line).unwrap();
            let scored = item.passages.iter().flat_map(|passage| &passage.tokens[passage.scoring.from as usize..]);
            assert_eq!(scored.copied().collect::<Vec<_>>(), tokens[1..], "{window} {stride}");
            assert!(item.passages.iter().all(|passage| passage.tokens.len() <= window));
        }
    }

    #[test]
    fn what_is_no_item_says_why() {
        for (line, why) in [
            ("nothing", "no item"),
            (r#"[null, "a text", null, null, null, null]"#, "expected a JSON object"),
            (r#"{"text": 5}"#, "no item"),
            ("{}", "expected `text`, or `prompt`"),
            (r#"{"text": "a", "prompt": "b", "completion": "c"}"#, "expected `text`, or `prompt`"),
            (r#"{"text": ""}"#, "at least two"),
            (r#"{"prompt": "a", "completion": ""}"#, "empty"),
            (r#"{"prompt": "a", "choices": []}"#, "empty"),
            (r#"{"prompt": "a", "choices": ["b", ""]}"#, "choices[1]"),
            (r#"{"prompt": "a", "labels": [" many tokens"]}"#, "use `choices`"),
            (r#"{"prompt": "a", "labels": [4000000]}"#, "out of range"),
            (r#"{"prompt": "a", "labels": [-1]}"#, "a label is a text or a token id"),
        ] {
            let (_, reason) = reader(1000, 500).read(line).unwrap_err();
            assert!(reason.contains(why), "{line}: {reason}");
        }
        let long = serde_json::json!({"id": "x", "prompt": "a b c d ".repeat(9), "completion": "e"}).to_string();
        let (id, reason) = reader(8, 4).read(&long).unwrap_err();
        assert!(id == Some("x".into()) && reason.contains("--max-model-len"), "{reason}");
    }
}
