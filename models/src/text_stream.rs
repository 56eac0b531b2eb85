//! Token by token to text, in whole characters.
//!
//! What `push` and `finish` return, put together, is what [`Tokenizer::decode`] makes of all ids.

use crate::{Result, tokenizer::Tokenizer};

/// A decoder that takes one token at a time and holds back what may still change.
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    state: State,
}

enum State {
    /// Byte-level vocabularies: the bytes of a character that is not complete.
    Bytes(Vec<u8>),
    /// Others: the last token whose text is out, as context, and those whose text is not.
    Window {
        ids: Vec<u32>,
        /// Tokens at the front of `ids` whose text is out.
        told: usize,
        /// The text of those alone.
        prefix: String,
    },
}

impl TextStream {
    pub(crate) fn new(tokenizer: Tokenizer, skip_special_tokens: bool) -> Self {
        let state = if tokenizer.decodes_bytewise() {
            State::Bytes(Vec::new())
        } else {
            State::Window { ids: Vec::new(), told: 0, prefix: String::new() }
        };
        Self { tokenizer, skip_special_tokens, state }
    }

    /// Takes the next token; returns the text that it completes, often empty.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        // What decoding leaves out must not become context either.
        if self.tokenizer.token(id).is_none() || self.skip_special_tokens && self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        match &mut self.state {
            State::Bytes(pending) => {
                pending.extend(self.tokenizer.token_bytes(id));
                Ok(take_characters(pending))
            }
            State::Window { ids, told, prefix } => {
                ids.push(id);
                // Decoders replace a run of byte tokens as a whole when it is not valid: its end must be seen first.
                if self.tokenizer.is_byte_token(id) {
                    return Ok(String::new());
                }
                let text = self.tokenizer.decode(ids, self.skip_special_tokens)?;
                if text.ends_with('\u{fffd}') {
                    return Ok(String::new());
                }
                let new = after(&text, prefix).to_owned();
                *ids = vec![id];
                *told = 1;
                *prefix = self.tokenizer.decode(ids, self.skip_special_tokens)?;
                Ok(new)
            }
        }
    }

    /// The text that was held back, once no token follows.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn finish(&mut self) -> Result<String> {
        match &mut self.state {
            State::Bytes(pending) => Ok(String::from_utf8_lossy(&std::mem::take(pending)).into_owned()),
            State::Window { ids, told, prefix } => {
                if ids.len() == *told {
                    return Ok(String::new());
                }
                let text = self.tokenizer.decode(ids, self.skip_special_tokens)?;
                let new = after(&text, prefix).to_owned();
                ids.clear();
                *told = 0;
                prefix.clear();
                Ok(new)
            }
        }
    }
}

/// `text` without `prefix`, or without what they share.
fn after<'a>(text: &'a str, prefix: &str) -> &'a str {
    let shared = text.char_indices().zip(prefix.chars()).find(|((_, a), b)| a != b);
    match shared {
        Some(((at, _), _)) => &text[at..],
        None => text.get(prefix.len()..).unwrap_or(""),
    }
}

/// Takes all characters off the front of `pending` but one that may still be completed; bytes that can never be part
/// of one become U+FFFD, as `String::from_utf8_lossy` has it.
fn take_characters(pending: &mut Vec<u8>) -> String {
    let unfinished = pending.utf8_chunks().last().map_or(0, |chunk| {
        let tail = chunk.invalid();
        // The last chunk's invalid part is either hopeless or a character cut short; `error_len` tells.
        match std::str::from_utf8(tail) {
            Err(error) if error.error_len().is_none() => tail.len(),
            _ => 0,
        }
    });
    let rest = pending.split_off(pending.len() - unfinished);
    let text = String::from_utf8_lossy(pending).into_owned();
    *pending = rest;
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::{byte_fallback, byte_level, words};
    use proptest::prelude::*;
    use serde_json::json;

    fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> Vec<String> {
        let mut stream = tokenizer.stream(skip);
        let mut pieces: Vec<_> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    fn tokenizers() -> Vec<Tokenizer> {
        let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let pieces = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
        let sequence = json!({"type": "Sequence", "decoders": [{"type": "ByteLevel", "add_prefix_space": true,
            "trim_offsets": true, "use_regex": true}, {"type": "Fuse"}]});
        vec![
            byte_level(),
            byte_fallback(),
            words(&serde_json::Value::Null),
            words(&metaspace),
            words(&pieces),
            words(&sequence),
        ]
    }

    #[test]
    fn a_character_comes_out_when_it_is_complete() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("a漢b", false).unwrap();
        assert_eq!(streamed(&tokenizer, &ids, false), ["a", "", "", "漢", "b", ""]);
    }

    #[test]
    fn bytes_that_are_no_character_become_replacements() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("漢", false).unwrap();
        assert_eq!(streamed(&tokenizer, &ids[..2], false), ["", "", "\u{fffd}"]);
        let cut = [ids[0], tokenizer.token_id("a").unwrap()];
        assert_eq!(streamed(&tokenizer, &cut, false), ["", "\u{fffd}a", ""]);
        // A byte that can begin nothing does not wait.
        assert_eq!(streamed(&tokenizer, &ids[1..2], false), ["\u{fffd}", ""]);
    }

    #[test]
    fn spaces_survive_special_tokens() {
        let tokenizer = byte_fallback();
        let id = |token| tokenizer.token_id(token).unwrap();
        let ids = [id("▁a"), id("</s>"), id("▁b"), id("<0xC3>"), id("<0xA9>"), id("b")];
        assert_eq!(streamed(&tokenizer, &ids, true), ["a", "", " b", "", "", "éb", ""]);
    }

    proptest! {
        #[test]
        fn the_pieces_are_the_whole(
            ids in proptest::collection::vec(0_u32..300, 0..24),
            few in proptest::collection::vec(0_u32..12, 0..24),
            skip: bool,
        ) {
            for tokenizer in tokenizers() {
                for ids in [&ids, &few] {
                    let whole = tokenizer.decode(ids, skip).unwrap();
                    prop_assert_eq!(streamed(&tokenizer, ids, skip).concat(), whole);
                }
            }
        }

        #[test]
        fn no_piece_ends_within_a_character(text in "\\PC{0,20}") {
            for tokenizer in [byte_level(), byte_fallback()] {
                let ids = tokenizer.encode(&text, false).unwrap();
                let pieces = streamed(&tokenizer, &ids, false);
                let cut = pieces.iter().any(|piece| piece.contains(char::REPLACEMENT_CHARACTER));
                prop_assert!(!cut || text.contains(char::REPLACEMENT_CHARACTER));
                prop_assert_eq!(pieces.concat(), tokenizer.decode(&ids, false).unwrap());
            }
        }
    }
}
