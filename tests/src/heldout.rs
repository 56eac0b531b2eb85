//! Questions that the embedded model was never trained on, and their answers.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::source::root;

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What it asks.
    pub prompt: String,
    /// The only right answer.
    pub answer: String,
}

/// The questions by family.
///
/// # Panics
/// When the file is missing or malformed.
pub fn questions() -> BTreeMap<String, Vec<Question>> {
    let file = root().join("models/embedded/heldout.jsonl");
    let text = std::fs::read_to_string(&file).expect("models/embedded/heldout.jsonl is committed");
    let mut families: BTreeMap<String, Vec<Question>> = BTreeMap::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).expect("each line is a JSON object");
        let field = |name: &str| row[name].as_str().expect("family, prompt and answer are texts").to_owned();
        let question = Question { prompt: field("prompt"), answer: field("answer") };
        families.entry(field("family")).or_default().push(question);
    }
    assert!(!families.is_empty(), "heldout.jsonl is empty");
    families
}
