//! The shapes that chat and text completions share: envelope, usage, finish.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::{
    Json,
    http::{HeaderName, HeaderValue},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Map, Value, json};

use super::reproducible::Reproducible;
use crate::{
    generation::{Delta, Finish, Usage},
    metrics,
    random::random_seed,
};

/// What every answer and every chunk of it begins with.
#[derive(Debug, Clone)]
pub struct Envelope {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl Envelope {
    /// A new answer, whose id begins with `prefix`.
    pub fn new(prefix: &str, object: &'static str, model: &str, reproducible: Option<Reproducible>) -> Self {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let random = || format!("{:016x}{:016x}", random_seed(), random_seed());
        let id = format!("{prefix}-{}", reproducible.map_or_else(random, Reproducible::id));
        let created = reproducible.map_or_else(now, |reproducible| reproducible.created);
        Self { id, object, created, model: model.to_owned() }
    }

    /// The answer, or chunk, with these choices.
    pub fn with(&self, choices: Vec<Value>) -> Map<String, Value> {
        let mut answer = Map::new();
        answer.insert("id".to_owned(), self.id.clone().into());
        answer.insert("object".to_owned(), self.object.into());
        answer.insert("created".to_owned(), self.created.into());
        answer.insert("model".to_owned(), self.model.clone().into());
        answer.insert("choices".to_owned(), choices.into());
        answer
    }
}

/// The answer with its usage, which who asks within this process finds among the response's extensions too.
pub fn whole(mut answer: Map<String, Value>, used: Usage, reproducible: Option<Reproducible>) -> Response {
    let mut told = usage(used);
    if let (Some(_), Some(told)) = (reproducible, told.as_object_mut()) {
        told.remove("prompt_tokens_details");
    }
    answer.insert("usage".to_owned(), told);
    let mut response = Json(answer).into_response();
    response.extensions_mut().insert(used);
    response
}

/// OpenAI's usage object.
pub fn usage(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

/// `finish_reason`: null while a choice goes on.
pub fn finish_reason(finish: Option<&Finish>) -> Value {
    finish.map(Finish::reason).into()
}

/// vLLM's `stop_reason`: the stop string or stop token that was met.
pub fn stop_reason(finish: Option<&Finish>) -> Value {
    match finish {
        Some(Finish::StopString(text)) => text.as_str().into(),
        Some(Finish::StopToken(token)) => (*token).into(),
        _ => Value::Null,
    }
}

/// vLLM's `routed_experts`, in a choice whose delta has them: a file of NumPy's in base64.
pub fn add_routed_experts(choice: &mut Map<String, Value>, delta: &Delta) {
    if let Some(file) = &delta.routed_experts {
        choice.insert("routed_experts".to_owned(), BASE64_STANDARD.encode(file).into());
    }
}

/// The header that names fields of the request that were ignored.
pub const IGNORED: HeaderName = HeaderName::from_static("x-cadre-ignored");

/// Tells the client which of its fields were ignored.
pub fn name_ignored(response: &mut Response, unknown: &[String]) {
    const LIMIT: usize = 16;
    if unknown.is_empty() {
        return;
    }
    metrics::ignored_parameters(unknown.len());
    let plain =
        |name: &&String| name.len() <= 64 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b));
    let names: Vec<&str> = unknown.iter().filter(plain).take(LIMIT).map(String::as_str).collect();
    if let Ok(value) = HeaderValue::from_str(&names.join(",")) {
        response.headers_mut().insert(IGNORED, value);
    }
}
