//! `POST /v1/chat/completions`.

use std::{collections::HashSet, sync::Arc};

use axum::{Extension, extract::State, response::Response};
use cadre_engine::request::Request;
use cadre_models::RenderOptions;
use serde_json::{Map, Value, json};

use super::{
    App,
    answer::{self, Envelope},
    body::JsonBody,
    error::{ApiError, Kind, sentence},
    fields::Fields,
    logprobs::TokenNames,
    messages,
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

const REASONING_EFFORTS: &[&str] = &["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// Answers a chat.
///
/// # Errors
/// When the request is at fault, or the engine fails.
pub async fn create(
    State(app): State<Arc<App>>,
    reproducible: Option<Extension<Reproducible>>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let reproducible = reproducible.map(|Extension(reproducible)| reproducible);
    let (prepared, unknown) =
        app.admitted(body, Endpoint::Chat, move |served, body| Prepared::new(served, body, reproducible)).await?;
    let mut response = prepared.answer(app).await?;
    answer::name_ignored(&mut response, &unknown);
    Ok(response)
}

/// A chat request, checked and tokenised.
struct Prepared {
    served: Arc<Served>,
    reproducible: Option<Reproducible>,
    shared: Shared,
    logprobs: Option<u32>,
    request: Request,
}

impl Prepared {
    fn new(
        served: &Arc<Served>,
        body: &Map<String, Value>,
        reproducible: Option<Reproducible>,
    ) -> Result<Self, ApiError> {
        let fields = Fields::new(body);
        let shared = Shared::parse(fields, served, max_tokens(fields)?, reproducible)?;
        let logprobs = logprobs(fields)?;
        let prompt = prompt(served, fields, shared.add_special_tokens.unwrap_or(false))?;
        let request =
            shared.request(prompt, served.max_model_len, logprobs).map_err(|error| error.or_param("messages"))?;
        Ok(Self { served: served.clone(), reproducible, shared, logprobs, request })
    }

    async fn answer(self, app: Arc<App>) -> Result<Response, ApiError> {
        let Self { served, reproducible, shared, logprobs, request } = self;
        let prompt = request.prompt.clone();
        let mut generation = Generation::start(&served.machine(), vec![request], shared.output.clone())
            .map_err(|error| ApiError::from(error).or_param("messages"))?;
        let names = TokenNames::new(served.tokenizer.clone(), shared.tokens_as_ids);
        let answer = ChatAnswer { prompt, names, logprobs: logprobs.is_some(), token_ids: shared.return_token_ids };
        if let Some(options) = shared.stream {
            let envelope = Envelope::new("chatcmpl", "chat.completion.chunk", served.name(), reproducible);
            let chunks = ChatChunks { envelope, answer, begun: HashSet::new() };
            return Ok(sse::respond(app, generation, chunks, options));
        }
        let completed = app.unless_closing(generation.collect()).await?;
        let envelope = Envelope::new("chatcmpl", "chat.completion", served.name(), reproducible);
        Ok(answer::whole(answer.whole(&envelope, completed), generation.usage(), reproducible))
    }
}

/// The conversation through the model's template, as tokens.
///
/// # Errors
/// When the messages are malformed, or the template refuses them.
pub fn prompt(served: &Served, fields: Fields<'_>, add_special_tokens: bool) -> Result<Vec<u32>, ApiError> {
    let template = served.template.as_ref().ok_or_else(|| {
        let message = "This model has no chat template. Use /v1/completions.";
        ApiError::new(Kind::InvalidRequest, message).or_param("messages")
    })?;
    let messages = messages::parse(fields, template.source().contains("developer"))?;
    let text = template.render(&messages, &render_options(fields)?).map_err(|error| {
        if error.is_callers_mistake() {
            ApiError::invalid("messages", sentence(&error.to_string()))
        } else {
            ApiError::internal(error)
        }
    })?;
    served.tokenizer.encode(&text, add_special_tokens).map_err(ApiError::internal)
}

fn render_options(fields: Fields<'_>) -> Result<RenderOptions, ApiError> {
    let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
    let asked = fields.boolean("add_generation_prompt")?;
    if continue_final_message && asked == Some(true) {
        let message = "Cannot set both `continue_final_message` and `add_generation_prompt` to True.";
        return Err(ApiError::invalid("continue_final_message", message));
    }
    let mut kwargs = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
    if let Some(effort) = fields.string("reasoning_effort")? {
        if !REASONING_EFFORTS.contains(&effort) {
            let known = REASONING_EFFORTS.join(", ");
            let message = format!("`reasoning_effort` must be one of {known}, got \"{effort}\".");
            return Err(ApiError::invalid("reasoning_effort", message));
        }
        kwargs.entry("reasoning_effort").or_insert_with(|| effort.into());
    }
    Ok(RenderOptions {
        add_generation_prompt: asked.unwrap_or(!continue_final_message),
        continue_final_message,
        tools: None,
        kwargs,
    })
}

/// `max_completion_tokens`, else `max_tokens`, else what the context leaves.
fn max_tokens(fields: Fields<'_>) -> Result<MaxTokens, ApiError> {
    let old = fields.count("max_tokens", 1, u32::MAX)?;
    let new = fields.count("max_completion_tokens", 1, u32::MAX)?;
    Ok(new.or(old).map_or(MaxTokens::Default(u32::MAX), MaxTokens::Asked))
}

fn logprobs(fields: Fields<'_>) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0, MAX_LOGPROBS)?;
    match top {
        Some(top) if top > 0 && !wanted => {
            Err(ApiError::invalid("top_logprobs", format!("top_logprobs needs `logprobs` to be true, got {top}.")))
        }
        top => Ok(wanted.then_some(top.unwrap_or(0))),
    }
}

/// What the answer tells besides the text.
struct ChatAnswer {
    prompt: Vec<u32>,
    names: TokenNames,
    logprobs: bool,
    token_ids: bool,
}

impl ChatAnswer {
    fn whole(&self, envelope: &Envelope, completed: Completed) -> Map<String, Value> {
        let choice = |choice: &Delta| {
            let mut told =
                self.choice(choice, "message", &json!({"role": "assistant", "content": choice.text, "refusal": null}));
            self.add_token_ids(&mut told, choice);
            answer::add_routed_experts(&mut told, choice);
            Value::Object(told)
        };
        let mut body = envelope.with("choices", completed.choices.iter().map(choice).collect());
        body.insert("service_tier".to_owned(), "default".into());
        if let Some(Some(scores)) = completed.scores.first() {
            body.insert("prompt_logprobs".to_owned(), self.names.prompt(&self.prompt, &scores.prompt));
        }
        if self.token_ids {
            body.insert("prompt_token_ids".to_owned(), self.prompt.clone().into());
        }
        body
    }

    /// A choice with its text under `key`.
    fn choice(&self, delta: &Delta, key: &str, text: &Value) -> Map<String, Value> {
        let logprobs =
            if self.logprobs && !delta.tokens.is_empty() { self.names.chat(&delta.tokens) } else { Value::Null };
        let mut choice = Map::new();
        choice.insert("index".to_owned(), delta.choice.into());
        choice.insert(key.to_owned(), text.clone());
        choice.insert("logprobs".to_owned(), logprobs);
        choice.insert("finish_reason".to_owned(), answer::finish_reason(delta.finish.as_ref()));
        if delta.finish.is_some() {
            choice.insert("stop_reason".to_owned(), answer::stop_reason(delta.finish.as_ref()));
        }
        choice
    }

    fn add_token_ids(&self, choice: &mut Map<String, Value>, delta: &Delta) {
        if self.token_ids {
            let ids: Vec<u32> = delta.tokens.iter().map(|token| token.id).collect();
            choice.insert("token_ids".to_owned(), ids.into());
        }
    }
}

/// The chunks of a streamed chat: each choice begins with its role.
struct ChatChunks {
    envelope: Envelope,
    answer: ChatAnswer,
    begun: HashSet<usize>,
}

impl ChatChunks {
    fn first(&self, index: usize) -> Map<String, Value> {
        let role = Delta { choice: index, ..Delta::default() };
        let choice = self.answer.choice(&role, "delta", &json!({"role": "assistant", "content": ""}));
        let mut chunk = self.envelope.with("choices", vec![choice.into()]);
        if self.answer.token_ids && self.begun.len() == 1 {
            chunk.insert("prompt_token_ids".to_owned(), self.answer.prompt.clone().into());
        }
        chunk
    }
}

impl Chunks for ChatChunks {
    fn chunks(&mut self, update: Update) -> Vec<Map<String, Value>> {
        let Update::Delta(delta) = update else { return Vec::new() };
        let mut chunks = Vec::new();
        if self.begun.insert(delta.choice) {
            chunks.push(self.first(delta.choice));
        }
        let text = if delta.text.is_empty() { json!({}) } else { json!({"content": delta.text}) };
        let mut choice = self.answer.choice(&delta, "delta", &text);
        self.answer.add_token_ids(&mut choice, &delta);
        chunks.push(self.envelope.with("choices", vec![choice.into()]));
        chunks
    }

    fn envelope(&self) -> &Envelope {
        &self.envelope
    }
}
