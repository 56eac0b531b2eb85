//! Stand-ins for tests: a tokenizer whose tokens are bytes, and an engine that says what it is told to.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use cadre_engine::request::{
    Event, FinishReason, Request, SamplingParams, Scores, Scoring, SubmitError, TokenLogprobs,
};
use cadre_models::{ChatTemplate, FormatOptions, Tokenizer};
use serde_json::{Map, Value, json};

use crate::{
    engine::{EngineOptions, Served},
    generation::{Backend, Machine, Sink, Ticket},
    metrics::Meters,
};

/// The token after the 256 bytes; it ends answers.
pub const END: u32 = 256;
/// Bytes and the end.
pub const VOCAB_SIZE: usize = 257;
/// The context of [`served`].
pub const MAX_MODEL_LEN: usize = 256;

const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\
    <{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}";

/// The embedded model on one thread, without limits.
pub fn engine_options() -> EngineOptions {
    EngineOptions {
        model: None,
        served_names: Vec::new(),
        threads: Some(1),
        memory: None,
        kv_memory: None,
        large_kv: false,
        max_num_seqs: 2,
        max_num_batched_tokens: 512,
        max_model_len: None,
        formats: FormatOptions::default(),
        kv_dtype: None,
        prefix_caching: true,
        trace_routing: None,
        routing_profile: true,
        predict_experts: false,
        return_routed_experts: false,
        adapters: Vec::new(),
        adapter_folder: None,
        finetunes: false,
        adapter_memory: None,
    }
}

/// Tokenizer and chat template of a checkpoint without weights whose token ids are byte values.
fn checkpoint() -> (Tokenizer, Option<ChatTemplate>) {
    let directory = tempfile::tempdir().unwrap();
    let mut other = 256;
    let mut vocab = Map::new();
    for byte in 0..=255_u8 {
        let printable = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let letter = if printable { char::from(byte) } else { char::from_u32(other).unwrap() };
        other += u32::from(!printable);
        vocab.insert(letter.to_string(), byte.into());
    }
    let end = json!({"id": END, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false,
                     "normalized": false, "special": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [end], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    let config = json!({"tokenizer_class": "Bytes", "eos_token": "<|end|>", "chat_template": TEMPLATE});
    for (file, content) in [
        ("config.json", json!({"model_type": "qwen3_moe", "eos_token_id": END})),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
    ] {
        std::fs::write(directory.path().join(file), content.to_string()).unwrap();
    }
    let checkpoint = cadre_models::open(directory.path().to_str(), &|_| {}).unwrap();
    (checkpoint.tokenizer().unwrap(), checkpoint.chat_template().unwrap())
}

/// The tokenizer of bytes.
pub fn tokenizer() -> Tokenizer {
    checkpoint().0
}

/// What the engine says to a request.
type Script = Box<dyn Fn(&Request) -> Vec<Event> + Send + Sync>;

/// An engine that follows a script.
pub struct Fake {
    script: Script,
    sinks: Mutex<Vec<Option<Sink>>>,
    /// The requests that it got.
    pub requests: Mutex<Vec<Request>>,
    /// Requests that are still wanted.
    pub wanted: Arc<AtomicUsize>,
}

impl Fake {
    /// Follows `script`.
    pub fn new(script: impl Fn(&Request) -> Vec<Event> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            script: Box::new(script),
            sinks: Mutex::default(),
            requests: Mutex::default(),
            wanted: Arc::default(),
        })
    }

    /// Says `text` to every request.
    pub fn saying(text: &'static str) -> Arc<Self> {
        Self::new(move |request| say(request, text))
    }

    /// Tells one more event about a request.
    pub fn tell(&self, request: usize, event: Event) {
        if let Some(sink) = &mut self.sinks.lock().unwrap()[request] {
            sink(event);
        }
    }

    /// Drops the request's sink: nothing more can be told.
    pub fn hang_up(&self, request: usize) {
        self.sinks.lock().unwrap()[request] = None;
    }

    /// The last request that it got.
    pub fn last_request(&self) -> Request {
        self.requests.lock().unwrap().last().unwrap().clone()
    }
}

/// Counts itself among the wanted requests.
struct Wanted(Arc<AtomicUsize>);

impl Ticket for Wanted {
    fn end_choice(&self, _: u32) {}
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Backend for Fake {
    fn submit(&self, request: Request, mut sink: Sink) -> Result<Box<dyn Ticket>, SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        let (prompt_tokens, max_tokens) = (request.prompt.len(), request.stop.max_tokens as usize);
        if prompt_tokens + max_tokens > MAX_MODEL_LEN {
            return Err(SubmitError::ContextLength { max_model_len: MAX_MODEL_LEN, prompt_tokens, max_tokens });
        }
        for event in (self.script)(&request) {
            sink(event);
        }
        self.sinks.lock().unwrap().push(Some(sink));
        self.requests.lock().unwrap().push(request);
        self.wanted.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Wanted(self.wanted.clone())))
    }
}

/// A token's event, with log-probabilities if the request wants them: the token itself and those after it.
pub fn token(request: &Request, choice: u32, token: u32) -> Event {
    Event::Token { choice, token, logprobs: request.logprobs.map(|top| logprobs(token, top)) }
}

fn logprobs(token: u32, top: u32) -> TokenLogprobs {
    let top =
        (0..top).map(|place| ((token + place) % 256, if place == 2 { f32::NEG_INFINITY } else { -0.5 })).collect();
    TokenLogprobs { logprob: -0.5, rank: 1, top }
}

/// Every choice says `text`, byte by byte, as far as `max_tokens` goes.
pub fn say(request: &Request, text: &str) -> Vec<Event> {
    let mut events = vec![Event::Started { cached_tokens: 1 }];
    if let Some(Scoring { top, .. }) = request.scoring {
        let entries = request.prompt.iter().enumerate().map(|(place, &id)| (place > 0).then(|| logprobs(id, top)));
        events.push(Event::Scores(Scores { prompt: entries.collect(), next: Vec::new() }));
    }
    let room = request.stop.max_tokens as usize;
    for choice in 0..request.n {
        events.extend(text.bytes().take(room).map(|byte| token(request, choice, byte.into())));
        let reason = if text.len() < room { FinishReason::EndOfSequence } else { FinishReason::Length };
        if reason == FinishReason::EndOfSequence {
            events.push(token(request, choice, END));
        }
        events.push(Event::Finished { choice, reason });
    }
    events
}

/// A model called `fake` with `backend` as its engine.
pub fn served(backend: Arc<Fake>) -> Arc<Served> {
    let (tokenizer, template) = checkpoint();
    Arc::new(Served {
        names: vec!["fake".to_owned(), "org/alias".to_owned()],
        root: "fake".to_owned(),
        created: 1,
        backend,
        tokenizer,
        template,
        sampling: SamplingParams::default(),
        eos_token_ids: vec![END],
        vocab_size: VOCAB_SIZE,
        max_model_len: MAX_MODEL_LEN,
        meters: Arc::new(Meters::new("fake")),
        routed: None,
        adapters: Arc::default(),
        adapter: None,
    })
}

/// The same for generations alone.
pub fn machine(backend: Arc<Fake>) -> Machine {
    Machine { backend, tokenizer: tokenizer(), meters: Arc::new(Meters::new("fake")), routed: None }
}

/// An object from a literal.
pub fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => panic!("not an object: {other}"),
    }
}
