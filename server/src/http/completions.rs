//! `POST /v1/completions`.

use std::sync::Arc;

use axum::{Extension, extract::State, response::Response};
use cadre_engine::request::{Request, Scores};
use serde_json::{Map, Value};

use super::{
    App,
    answer::{self, Envelope},
    body::JsonBody,
    error::ApiError,
    fields::{Fields, token_ids, wrong},
    logprobs::{TextLogprobs, TokenNames},
    messages::required,
    params::{
        Endpoint,
        shared::{MAX_LOGPROBS, MaxTokens, Shared},
    },
    reproducible::Reproducible,
    sse::{self, Chunks},
};
use crate::{
    engine::Served,
    generation::{Completed, Delta, Generation, Update},
};

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// The most choices of all prompts together.
const MAX_CHOICES: usize = 4096;

/// Completes texts.
///
/// # Errors
/// When the request is at fault, or the engine fails.
pub async fn create(
    State(app): State<Arc<App>>,
    reproducible: Option<Extension<Reproducible>>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let reproducible = reproducible.map(|Extension(reproducible)| reproducible);
    let (prepared, unknown) = app
        .admitted(body, Endpoint::Completions, move |served, body| Prepared::new(served, body, reproducible))
        .await?;
    let mut response = prepared.answer(app).await?;
    answer::name_ignored(&mut response, &unknown);
    Ok(response)
}

/// A completion request, checked and tokenised.
struct Prepared {
    served: Arc<Served>,
    reproducible: Option<Reproducible>,
    shared: Shared,
    requests: Vec<Request>,
    answer: TextAnswer,
}

impl Prepared {
    fn new(
        served: &Arc<Served>,
        body: &Map<String, Value>,
        reproducible: Option<Reproducible>,
    ) -> Result<Self, ApiError> {
        let fields = Fields::new(body);
        let echo = fields.boolean("echo")?.unwrap_or(false);
        let mut shared = Shared::parse(fields, served, max_tokens(fields, echo)?, reproducible)?;
        check_best_of(fields, shared.n)?;
        let logprobs = fields.count("logprobs", 0, MAX_LOGPROBS)?;
        let told_prompt_logprobs = shared.prompt_logprobs.is_some();
        if echo {
            shared.prompt_logprobs = shared.prompt_logprobs.max(logprobs);
        }
        let inputs = inputs(fields, served.vocab_size)?;
        check_choices(inputs.len(), shared.n as usize)?;
        let mut requests = Vec::with_capacity(inputs.len());
        let mut echoed = Vec::new();
        for input in &inputs {
            let request = request(input, served, &shared, logprobs).map_err(|error| error.or_param("prompt"))?;
            if echo {
                echoed.push(Echo::new(input, served, &request, shared.truncate.is_some())?);
            }
            requests.push(request);
        }
        let choices = requests.len() * shared.n as usize;
        let answer = TextAnswer {
            n: shared.n as usize,
            prompts: requests.iter().map(|request| request.prompt.clone()).collect(),
            echoed: echo.then_some(echoed),
            scores: vec![None; requests.len()],
            told_prompt_logprobs,
            logprobs: logprobs.map(|top| (top, vec![0; choices])),
            special_tokens: !shared.output.skip_special_tokens,
            names: TokenNames::new(served.tokenizer.clone(), shared.tokens_as_ids),
            token_ids: shared.return_token_ids,
            begun: vec![false; choices],
        };
        Ok(Self { served: served.clone(), reproducible, shared, requests, answer })
    }

    async fn answer(self, app: Arc<App>) -> Result<Response, ApiError> {
        let Self { served, reproducible, shared, requests, mut answer } = self;
        let mut generation = Generation::start(&served.machine(), requests, shared.output)
            .map_err(|error| ApiError::from(error).or_param("prompt"))?;
        let envelope = Envelope::new("cmpl", "text_completion", served.name(), reproducible);
        if let Some(options) = shared.stream {
            return Ok(sse::respond(app, generation, TextChunks { envelope, answer }, options));
        }
        let completed = app.unless_closing(generation.collect()).await?;
        Ok(answer::whole(answer.whole(&envelope, completed), generation.usage(), reproducible))
    }
}

/// At least 1; 0 only makes sense where the prompt is echoed.
fn max_tokens(fields: Fields<'_>, echo: bool) -> Result<MaxTokens, ApiError> {
    let asked = fields.count("max_tokens", u32::from(!echo), u32::MAX)?;
    Ok(asked.map_or(MaxTokens::Default(DEFAULT_MAX_TOKENS), MaxTokens::Asked))
}

fn check_choices(prompts: usize, n: usize) -> Result<(), ApiError> {
    if prompts * n <= MAX_CHOICES {
        return Ok(());
    }
    let message = format!("A request may ask for at most {MAX_CHOICES} choices, got {prompts} prompts with {n} each.");
    Err(ApiError::invalid("prompt", message))
}

fn check_best_of(fields: Fields<'_>, n: u32) -> Result<(), ApiError> {
    match fields.integer("best_of", i64::MIN, i64::MAX)? {
        Some(best_of) if best_of != 1 && best_of != i64::from(n) => {
            let message = format!("best_of must be 1 or equal to n ({n}), got {best_of}: choices are not ranked.");
            Err(ApiError::invalid("best_of", message))
        }
        _ => Ok(()),
    }
}

/// A prompt as it was sent.
enum Input {
    Text(String),
    Tokens(Vec<u32>),
}

/// A string, strings, token ids or lists of token ids.
fn inputs(fields: Fields<'_>, vocab_size: usize) -> Result<Vec<Input>, ApiError> {
    const EXPECTED: &str = "a string, an array of strings, an array of token ids or an array of arrays of token ids";
    let prompt = fields.get("prompt").ok_or_else(|| required("prompt"))?;
    let values = match prompt {
        Value::String(text) => return Ok(vec![Input::Text(text.clone())]),
        Value::Array(values) if values.is_empty() => {
            return Err(ApiError::invalid("prompt", "`prompt` must not be an empty array."));
        }
        Value::Array(values) => values,
        other => return Err(wrong("prompt", EXPECTED, other)),
    };
    // The first element says what kind of list it is.
    match values[0] {
        Value::Number(_) => Ok(vec![Input::Tokens(token_ids(values, "prompt", vocab_size)?)]),
        Value::String(_) => values.iter().enumerate().map(text_input).collect(),
        Value::Array(_) => values.iter().enumerate().map(|at| token_input(at, vocab_size)).collect(),
        ref other => Err(wrong("prompt[0]", "a string, a token id or an array of token ids", other)),
    }
}

fn text_input((index, value): (usize, &Value)) -> Result<Input, ApiError> {
    let text = value.as_str().ok_or_else(|| wrong(&format!("prompt[{index}]"), "a string as prompt[0] is", value))?;
    Ok(Input::Text(text.to_owned()))
}

fn token_input((index, value): (usize, &Value), vocab_size: usize) -> Result<Input, ApiError> {
    let path = format!("prompt[{index}]");
    let ids = value.as_array().ok_or_else(|| wrong(&path, "an array of token ids as prompt[0] is", value))?;
    token_ids(ids, &path, vocab_size).map(Input::Tokens)
}

fn request(input: &Input, served: &Served, shared: &Shared, logprobs: Option<u32>) -> Result<Request, ApiError> {
    let prompt = match input {
        Input::Tokens(ids) => ids.clone(),
        Input::Text(text) => {
            served.tokenizer.encode(text, shared.add_special_tokens.unwrap_or(true)).map_err(ApiError::internal)?
        }
    };
    shared.request(prompt, served.max_model_len, logprobs)
}

/// A prompt's text, as it is echoed.
struct Echo {
    text: String,
    /// Whether special tokens among the prompt's are part of it.
    special_tokens: bool,
}

impl Echo {
    /// A text is echoed as it was sent, unless it was cut; tokens, as they read.
    fn new(input: &Input, served: &Served, request: &Request, cut: bool) -> Result<Self, ApiError> {
        let whole = served.tokenizer.decode(&request.prompt, false).map_err(ApiError::internal)?;
        Ok(match input {
            Input::Text(text) if !cut => Self { special_tokens: *text == whole, text: text.clone() },
            _ => Self { special_tokens: true, text: whole },
        })
    }
}

/// What an answer tells, and what it has told.
struct TextAnswer {
    n: usize,
    prompts: Vec<Vec<u32>>,
    /// The prompts' texts, if they are to be echoed.
    echoed: Option<Vec<Echo>>,
    scores: Vec<Option<Scores>>,
    /// Tell the prompt's log-probabilities in vLLM's own field.
    told_prompt_logprobs: bool,
    /// How many alternatives, and each choice's place in its text.
    logprobs: Option<(u32, Vec<usize>)>,
    /// Whether the generated text shows special tokens.
    special_tokens: bool,
    names: TokenNames,
    token_ids: bool,
    begun: Vec<bool>,
}

impl TextAnswer {
    fn whole(&mut self, envelope: &Envelope, completed: Completed) -> Map<String, Value> {
        self.scores = completed.scores;
        let choices = completed.choices.iter().map(|delta| self.choice(delta).into()).collect();
        envelope.with("choices", choices)
    }

    /// A choice's next part; its first one begins with the prompt if that is echoed.
    fn choice(&mut self, delta: &Delta) -> Map<String, Value> {
        let prompt = delta.choice / self.n;
        let first = !std::mem::replace(&mut self.begun[delta.choice], true);
        let echo = self.echoed.as_ref().filter(|_| first).map(|echoed| &echoed[prompt]);
        let text = format!("{}{}", echo.map_or("", |echo| &echo.text), delta.text);
        let special_tokens = echo.map(|echo| echo.special_tokens);
        let logprobs = self.logprobs(delta, prompt, special_tokens);
        let mut choice = Map::new();
        choice.insert("index".to_owned(), delta.choice.into());
        choice.insert("text".to_owned(), text.into());
        choice.insert("logprobs".to_owned(), logprobs);
        choice.insert("finish_reason".to_owned(), answer::finish_reason(delta.finish.as_ref()));
        choice.insert("stop_reason".to_owned(), answer::stop_reason(delta.finish.as_ref()));
        if self.told_prompt_logprobs
            && let Some(scores) = &self.scores[prompt]
        {
            choice.insert("prompt_logprobs".to_owned(), self.names.prompt(&self.prompts[prompt], &scores.prompt));
        }
        if self.token_ids {
            let ids: Vec<u32> = delta.tokens.iter().map(|token| token.id).collect();
            choice.insert("token_ids".to_owned(), ids.into());
            if first {
                choice.insert("prompt_token_ids".to_owned(), self.prompts[prompt].clone().into());
            }
        }
        answer::add_routed_experts(&mut choice, delta);
        choice
    }

    /// Of the delta's tokens, after the prompt's if `echo` says whether that shows special tokens.
    fn logprobs(&mut self, delta: &Delta, prompt: usize, echo: Option<bool>) -> Value {
        let Some((top, places)) = &mut self.logprobs else { return Value::Null };
        let place = &mut places[delta.choice];
        let mut told = TextLogprobs::default();
        if let (Some(special_tokens), Some(scores)) = (echo, &self.scores[prompt]) {
            for (&id, entry) in self.prompts[prompt].iter().zip(&scores.prompt) {
                // The engine may have been asked for more alternatives than are told here.
                let entry = entry.clone().map(|mut entry| {
                    entry.top.truncate(*top as usize);
                    entry
                });
                told.push(&self.names, place, id, entry.as_ref(), special_tokens);
            }
        }
        for token in &delta.tokens {
            told.push(&self.names, place, token.id, token.logprobs.as_ref(), self.special_tokens);
        }
        told.into()
    }
}

/// The chunks of a streamed completion.
struct TextChunks {
    envelope: Envelope,
    answer: TextAnswer,
}

impl Chunks for TextChunks {
    fn chunks(&mut self, update: Update) -> Vec<Map<String, Value>> {
        match update {
            Update::Scores { prompt, scores } => {
                self.answer.scores[prompt] = Some(scores);
                Vec::new()
            }
            Update::Delta(delta) => vec![self.envelope.with("choices", vec![self.answer.choice(&delta).into()])],
        }
    }

    fn envelope(&self) -> &Envelope {
        &self.envelope
    }
}
