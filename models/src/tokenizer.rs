//! tokenizer.json and tokenizer_config.json: text to token ids and back.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use serde_json::{Map, Value};
use tokenizers::{DecoderWrapper, PostProcessorWrapper};

use crate::{Error, Result, text_stream::TextStream};

/// A tokenizer; clones share it.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    file: String,
    tokenizer: tokenizers::Tokenizer,
    /// tokenizer_config.json, an empty object if there is none.
    config: Value,
    scheme: Scheme,
}

/// How a token's text stands for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    /// Every character stands for one byte, and decoding is nothing but that.
    ByteLevel,
    /// Every character stands for one byte, and decoding does more.
    ByteLevelAndMore,
    /// Words begin with `▁`; tokens like `<0xE2>` are single bytes.
    WordMarks,
    /// Tokens are their own text.
    Plain,
}

impl Tokenizer {
    /// From tokenizer.json in `bytes`, called `file` in errors, and the fields of tokenizer_config.json.
    pub(crate) fn read(file: String, bytes: &[u8], config: Map<String, Value>) -> Result<Self> {
        let tokenizer = guarded(&file, || {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)?;
            // A prompt is never cut or padded silently, whatever the file was saved with.
            tokenizer.with_padding(None);
            tokenizer.with_truncation(None)?;
            if let Some(processor) = tokenizer.get_post_processor().cloned() {
                tokenizer.with_post_processor(Some(with_whole_ranges(processor)));
            }
            Ok(tokenizer)
        })?;
        let scheme = Scheme::of(tokenizer.get_decoder());
        Ok(Self(Arc::new(Inner { file, tokenizer, config: Value::Object(config), scheme })))
    }

    /// The token ids of `text`; `add_special_tokens` as the tokenizer's post-processor has them (a chat template
    /// writes its own).
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = guarded(&self.0.file, || self.0.tokenizer.encode_fast(text, add_special_tokens))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token ids of `text`, without special tokens of the post-processor, each with the bytes of `text` that it is
    /// made of. A character that is several tokens belongs to each of them as a whole.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_with_ranges(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = guarded(&self.0.file, || self.0.tokenizer.encode(text, false))?;
        let ranges = encoding.get_offsets().iter().map(|(start, end)| *start..*end);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// The text of token ids. Ids that are not in the vocabulary are left out, as in the reference implementation.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        guarded(&self.0.file, || self.0.tokenizer.decode(ids, skip_special_tokens))
    }

    /// How many tokens there are, added ones included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.0.tokenizer.get_vocab_size(true)
    }

    /// The token as the vocabulary writes it.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// The id of the token that the vocabulary writes as `token`.
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.0.tokenizer.token_to_id(token)
    }

    /// The bytes that a token stands for inside of a text, also when they are only a part of a character. Empty for
    /// an id that is not in the vocabulary.
    #[must_use]
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.token(id).map(|token| self.0.scheme.bytes(token)).unwrap_or_default()
    }

    /// Whether a token is skipped by `skip_special_tokens`.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.0.tokenizer.get_added_vocabulary();
        self.token(id).is_some_and(|token| added.is_special_token(&token))
    }

    /// A decoder that takes one token at a time.
    #[must_use]
    pub fn stream(&self, skip_special_tokens: bool) -> TextStream {
        TextStream::new(self.clone(), skip_special_tokens)
    }

    /// tokenizer_config.json; an empty object if there is none.
    #[must_use]
    pub fn config(&self) -> &Value {
        &self.0.config
    }

    /// The id of the end-of-sequence token that tokenizer_config.json names.
    pub(crate) fn eos_token_id(&self) -> Option<u32> {
        special_token(self.config(), "eos_token").and_then(|token| self.token_id(token))
    }

    /// Whether decoding is joining the tokens' bytes.
    pub(crate) fn decodes_bytewise(&self) -> bool {
        self.0.scheme == Scheme::ByteLevel
    }

    /// Whether the token is a single byte of a character written as several tokens.
    pub(crate) fn is_byte_token(&self, id: u32) -> bool {
        self.0.scheme == Scheme::WordMarks && self.token(id).is_some_and(|token| byte_token(&token).is_some())
    }
}

/// `processor` without the wish to leave white space out of the tokens' ranges; it changes no token.
fn with_whole_ranges(processor: PostProcessorWrapper) -> PostProcessorWrapper {
    match processor {
        PostProcessorWrapper::ByteLevel(processor) => processor.trim_offsets(false).into(),
        PostProcessorWrapper::Roberta(processor) => processor.trim_offsets(false).into(),
        PostProcessorWrapper::Sequence(mut processors) => {
            let parts: &mut [PostProcessorWrapper] = processors.as_mut();
            parts.iter_mut().for_each(|part| *part = with_whole_ranges(part.clone()));
            processors.into()
        }
        other => other,
    }
}

/// What `run` gives. The library panics over some files that contradict themselves: an error like its others.
fn guarded<T>(file: &str, run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let error = |detail| Error::Tokenizer { file: file.to_owned(), detail };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|found| error(found.to_string())),
        Err(_) => {
            Err(error("the tokenizer's parts contradict each other; take the file from the model's makers".into()))
        }
    }
}

/// The special token that `config` names in `field`, a string or an object with a `content`.
pub(crate) fn special_token<'a>(config: &'a Value, field: &str) -> Option<&'a str> {
    let value = config.get(field)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

impl Scheme {
    fn of(decoder: Option<&DecoderWrapper>) -> Self {
        let Some(decoder) = decoder else { return Self::Plain };
        if matches!(decoder, DecoderWrapper::ByteLevel(_)) {
            return Self::ByteLevel;
        }
        let steps = match decoder {
            DecoderWrapper::Sequence(sequence) => sequence.get_decoders(),
            single => std::slice::from_ref(single),
        };
        if steps.iter().any(|step| matches!(step, DecoderWrapper::ByteLevel(_))) {
            return if steps.len() == 1 { Self::ByteLevel } else { Self::ByteLevelAndMore };
        }
        let marks =
            |step: &DecoderWrapper| matches!(step, DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_));
        if steps.iter().any(marks) { Self::WordMarks } else { Self::Plain }
    }

    fn bytes(self, token: String) -> Vec<u8> {
        match self {
            Self::ByteLevel | Self::ByteLevelAndMore => {
                token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.into_bytes())
            }
            Self::WordMarks => match byte_token(&token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
            Self::Plain => token.into_bytes(),
        }
    }
}

/// The byte of a token like `<0xE2>`.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The byte that a character of a byte-level vocabulary stands for: printable Latin-1 characters stand for themselves,
/// the other 68 bytes are counted off from U+0100 in ascending order.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// A byte-level tokenizer: 256 bytes, a merge of "é", and three added tokens, two of them special.
    pub(crate) fn byte_level() -> Tokenizer {
        byte_level_tokenizer(&byte_level_json())
    }

    /// A variant of it.
    pub(crate) fn byte_level_tokenizer(json: &Value) -> Tokenizer {
        read(json, json!({"eos_token": {"content": "<|end|>"}, "bos_token": null}))
    }

    /// Its tokenizer.json.
    pub(crate) fn byte_level_json() -> Value {
        let mut vocab = Map::new();
        let mut characters: Vec<char> = (0..=255_u8).map(character_of).collect();
        characters.sort_unstable();
        for (id, character) in characters.into_iter().enumerate() {
            vocab.insert(character.to_string(), json!(id));
        }
        vocab.insert("Ã©".to_owned(), json!(256));
        let added = |id: u32, content: &str, special: bool| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special})
        };
        json!({
            "version": "1.0", "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "normalizer": null,
            "added_tokens": [added(257, "<|end|>", true), added(258, "<|pad|>", true), added(259, "<tool>", false)],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": [["Ã", "©"]]}
        })
    }

    /// A tokenizer with word marks and byte tokens, as SentencePiece models are converted.
    pub(crate) fn byte_fallback() -> Tokenizer {
        read(&byte_fallback_json(), json!({}))
    }

    /// Its tokenizer.json.
    fn byte_fallback_json() -> Value {
        let mut vocab = Map::new();
        for word in ["<unk>", "</s>", "▁", "a", "b", "▁a", "▁b", "ab", "é", "▁é", "\u{fffd}"] {
            vocab.insert(word.to_owned(), json!(vocab.len()));
        }
        for byte in 0..=255_u8 {
            vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
        }
        let added = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        json!({
            "version": "1.0", "truncation": null, "padding": null,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "added_tokens": [added(0, "<unk>"), added(1, "</s>")],
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": vocab, "merges": []}
        })
    }

    /// A tokenizer without a decoder, over whole words.
    pub(crate) fn words(decoder: &Value) -> Tokenizer {
        let json = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "added_tokens": [],
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": decoder,
            "model": {"type": "WordLevel", "unk_token": "?",
                "vocab": {"?": 0, "the": 1, "▁cat": 2, "sat": 3, "##s": 4, "▁": 5, ".": 6, "é": 7}}
        });
        read(&json, json!({}))
    }

    fn read(json: &Value, config: Value) -> Tokenizer {
        let Value::Object(config) = config else { panic!("an object") };
        Tokenizer::read("tokenizer.json".to_owned(), json.to_string().as_bytes(), config).unwrap()
    }

    fn character_of(byte: u8) -> char {
        (0..0x200).filter_map(char::from_u32).find(|character| byte_of(*character) == Some(byte)).unwrap()
    }

    #[test]
    fn every_byte_has_one_character() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('ĉ')), (Some(b' '), Some(b'\n'), Some(b'\t')));
    }

    #[test]
    fn encodes_and_decodes() {
        for tokenizer in [byte_level(), byte_fallback()] {
            let text = "ab é 漢字\u{1f600}";
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).collect();
            assert_eq!(String::from_utf8(bytes).unwrap().trim_start(), text);
        }
    }

    #[test]
    fn ranges_hold_white_space_and_whole_characters() {
        let mut trimming = byte_level_json();
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
        trimming["post_processor"] = json!({"type": "Sequence", "processors": [byte_level]});
        for tokenizer in [byte_level_tokenizer(&byte_level_json()), byte_level_tokenizer(&trimming)] {
            let text = "a  é漢<|end|> ";
            let (ids, ranges): (Vec<_>, Vec<_>) = tokenizer.encode_with_ranges(text).unwrap().into_iter().unzip();
            assert_eq!(ids, tokenizer.encode(text, false).unwrap());
            assert_eq!(ranges, [0..1, 1..2, 2..3, 3..5, 5..8, 5..8, 5..8, 8..15, 15..16]);
        }
        let ranges = byte_fallback().encode_with_ranges("a é漢").unwrap().into_iter().map(|(_, range)| range);
        assert_eq!(ranges.collect::<Vec<_>>(), [0..1, 0..1, 1..2, 2..4, 4..7, 4..7, 4..7]);
    }

    #[test]
    fn a_prompt_is_not_cut() {
        assert_eq!(byte_level().encode("12345", false).unwrap().len(), 5);
    }

    #[test]
    fn special_tokens_are_known() {
        let tokenizer = byte_level();
        assert_eq!(tokenizer.vocab_size(), 260);
        assert_eq!(tokenizer.eos_token_id(), Some(257));
        let ids = tokenizer.encode("a<|end|><tool>", false).unwrap();
        assert_eq!(ids[1..], [257, 259]);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<tool>");
        assert_eq!(
            (tokenizer.is_special(257), tokenizer.is_special(259), tokenizer.is_special(9999)),
            (true, false, false)
        );
        assert_eq!((tokenizer.token(9999), tokenizer.token_bytes(9999)), (None, Vec::new()));
        assert_eq!(tokenizer.token_id("<tool>"), Some(259));
    }

    #[test]
    fn bytes_of_parts_of_a_character() {
        let tokenizer = byte_level();
        assert_eq!(tokenizer.token_bytes(256), "é".as_bytes());
        let ids = tokenizer.encode("漢", false).unwrap();
        assert_eq!(ids.iter().map(|id| tokenizer.token_bytes(*id)).collect::<Vec<_>>(), [[0xe6], [0xbc], [0xa2]]);
        let tokenizer = byte_fallback();
        assert_eq!(tokenizer.token_bytes(tokenizer.token_id("<0xE6>").unwrap()), [0xe6]);
        assert_eq!(tokenizer.token_bytes(tokenizer.token_id("▁a").unwrap()), b" a");
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_named() {
        let error = Tokenizer::read("x/tokenizer.json".to_owned(), b"{}", Map::new()).err().unwrap().to_string();
        assert!(error.starts_with("x/tokenizer.json: "), "{error}");
    }

    /// Puts `value` in the place of the `at`-th part of `json`, big lists only by their beginnings.
    fn replace(json: &mut Value, at: &mut usize, value: &Value) -> bool {
        if *at == 0 {
            *json = value.clone();
            return true;
        }
        *at -= 1;
        match json {
            Value::Array(items) => items.iter_mut().take(4).any(|item| replace(item, at, value)),
            Value::Object(fields) => fields.values_mut().take(9).any(|field| replace(field, at, value)),
            _ => false,
        }
    }

    #[test]
    fn no_damaged_file_is_fatal() {
        let values = [json!(null), json!(-1), json!(u64::MAX), json!("▁"), json!("ByteLevel"), json!([["a", 1]])];
        for whole in [byte_level_json(), byte_fallback_json()] {
            for (value, at) in values.iter().flat_map(|value| (0..120).map(move |at| (value, at))) {
                let mut json = whole.clone();
                if !replace(&mut json, &mut at.clone(), value) {
                    continue;
                }
                let text = json.to_string();
                let Ok(tokenizer) = Tokenizer::read("x".to_owned(), text.as_bytes(), Map::new()) else { continue };
                let ids = tokenizer.encode("ab é 漢<|end|>", true).unwrap_or_default();
                let _ = (tokenizer.decode(&ids, true), tokenizer.decode(&[0, 3, 255, 258, 400], false));
                (0..300).for_each(|id| drop(tokenizer.token_bytes(id)));
            }
        }
    }
}
