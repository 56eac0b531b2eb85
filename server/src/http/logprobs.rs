//! Log-probabilities in OpenAI's two shapes and vLLM's third, for prompts.

use cadre_engine::request::TokenLogprobs;
use cadre_models::Tokenizer;
use serde_json::{Map, Value, json};

use crate::generation::GeneratedToken;

/// JSON has no infinity: what is impossible gets this log-probability, as in vLLM.
const IMPOSSIBLE: f32 = -9999.0;

/// How tokens are named.
#[derive(Clone)]
pub struct TokenNames {
    tokenizer: Tokenizer,
    as_ids: bool,
}

impl TokenNames {
    /// Names by their text, or as `token_id:<id>`.
    pub fn new(tokenizer: Tokenizer, as_ids: bool) -> Self {
        Self { tokenizer, as_ids }
    }

    fn name(&self, id: u32) -> String {
        if self.as_ids { format!("token_id:{id}") } else { self.text(id) }
    }

    fn text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.tokenizer.token_bytes(id)).into_owned()
    }

    fn chat_entry(&self, id: u32, logprob: f32) -> Map<String, Value> {
        let mut entry = Map::new();
        entry.insert("token".to_owned(), self.name(id).into());
        entry.insert("logprob".to_owned(), finite(logprob).into());
        entry.insert("bytes".to_owned(), self.tokenizer.token_bytes(id).into());
        entry
    }

    /// Chat's shape: `{"content": [{token, logprob, bytes, top_logprobs}]}`.
    pub fn chat(&self, tokens: &[GeneratedToken]) -> Value {
        let entry = |token: &GeneratedToken| {
            let logprobs = token.logprobs.as_ref()?;
            let top = logprobs.top.iter().map(|&(id, logprob)| self.chat_entry(id, logprob).into());
            let mut entry = self.chat_entry(token.id, logprobs.logprob);
            entry.insert("top_logprobs".to_owned(), top.collect::<Vec<Value>>().into());
            Some(Value::Object(entry))
        };
        json!({"content": tokens.iter().filter_map(entry).collect::<Vec<_>>(), "refusal": null})
    }

    /// vLLM's shape for prompts: per token null, or `{id: {logprob, rank, decoded_token}}`.
    pub fn prompt(&self, prompt: &[u32], entries: &[Option<TokenLogprobs>]) -> Value {
        prompt.iter().zip(entries).map(|(&id, entry)| self.prompt_entry(id, entry.as_ref())).collect()
    }

    fn prompt_entry(&self, id: u32, entry: Option<&TokenLogprobs>) -> Value {
        let Some(entry) = entry else { return Value::Null };
        let tell = |id: u32, logprob: f32, rank: usize| {
            let value = json!({"logprob": finite(logprob), "rank": rank, "decoded_token": self.name(id)});
            (id.to_string(), value)
        };
        let own = tell(id, entry.logprob, entry.rank as usize);
        let top = entry.top.iter().enumerate().map(|(place, &(id, logprob))| tell(id, logprob, place + 1));
        Value::Object(std::iter::once(own).chain(top).collect())
    }

    fn alternatives(&self, id: u32, logprobs: &TokenLogprobs) -> Map<String, Value> {
        let all = std::iter::once((id, logprobs.logprob)).chain(logprobs.top.iter().copied());
        let mut map = Map::new();
        for (id, logprob) in all {
            // Of tokens with one text, such as parts of characters, the likeliest one's value stays: whoever asks whether
            // the token was the greedy one (lm-evaluation-harness) holds its value against the greatest here.
            let (name, value) = (self.name(id), finite(logprob));
            if map.get(&name).and_then(Value::as_f64).is_none_or(|kept| f64::from(value) > kept) {
                map.insert(name, value.into());
            }
        }
        map
    }

    /// Characters that begin in the token: a character's bytes may be spread over tokens.
    fn characters(&self, id: u32, special_tokens: bool) -> usize {
        if !special_tokens && self.tokenizer.is_special(id) {
            return 0;
        }
        self.tokenizer.token_bytes(id).iter().filter(|&&byte| byte & 0xC0 != 0x80).count()
    }
}

/// Text completions' shape: four lists, one entry a token.
#[derive(Default)]
pub struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// The next token. `place` is where in the text it stands, and is moved on; special tokens are part of that text
    /// or aren't.
    pub fn push(
        &mut self,
        names: &TokenNames,
        place: &mut usize,
        id: u32,
        logprobs: Option<&TokenLogprobs>,
        special_tokens: bool,
    ) {
        self.tokens.push(names.name(id));
        self.token_logprobs.push(logprobs.map(|logprobs| finite(logprobs.logprob)));
        self.top_logprobs.push(logprobs.map(|logprobs| names.alternatives(id, logprobs)));
        self.text_offset.push(*place);
        *place += names.characters(id, special_tokens);
    }
}

impl From<TextLogprobs> for Value {
    fn from(lists: TextLogprobs) -> Self {
        json!({
            "tokens": lists.tokens,
            "token_logprobs": lists.token_logprobs,
            "top_logprobs": lists.top_logprobs,
            "text_offset": lists.text_offset,
        })
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { IMPOSSIBLE } else { logprob.max(IMPOSSIBLE) }
}
