//! `POST /tokenize`, `POST /detokenize`, `GET /tokenizer_info`.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{App, answer, body::JsonBody, chat, error::ApiError, fields::Fields, messages::required, params::Endpoint};
use crate::engine::Served;

/// A text, or a conversation through the chat template, to token ids.
///
/// # Errors
/// When the request is at fault.
pub async fn tokenize(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let (made, unknown) = app.admitted(body, Endpoint::Tokenize, |served, body| tokens(served, body)).await?;
    Ok(told(made, &unknown))
}

fn told(made: Value, unknown: &[String]) -> Response {
    let mut response = Json(made).into_response();
    answer::name_ignored(&mut response, unknown);
    response
}

fn tokens(served: &Served, body: &Map<String, Value>) -> Result<Value, ApiError> {
    let fields = Fields::new(body);
    let add_special_tokens = fields.boolean("add_special_tokens")?;
    let ids = if fields.get("messages").is_some() {
        if fields.get("prompt").is_some() {
            return Err(ApiError::invalid("prompt", "Give `prompt` or `messages`, not both."));
        }
        chat::prompt(served, fields, add_special_tokens.unwrap_or(false))?
    } else {
        let text = fields.string("prompt")?.ok_or_else(|| required("prompt"))?;
        served.tokenizer.encode(text, add_special_tokens.unwrap_or(true)).map_err(ApiError::internal)?
    };
    let named = fields.boolean("return_token_strs")?.unwrap_or(false);
    let names: Option<Vec<Option<String>>> = named.then(|| ids.iter().map(|&id| served.tokenizer.token(id)).collect());
    Ok(json!({"count": ids.len(), "max_model_len": served.max_model_len, "tokens": ids, "token_strs": names}))
}

/// Token ids to their text, special tokens included.
///
/// # Errors
/// When the request is at fault.
pub async fn detokenize(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let (made, unknown) = app.admitted(body, Endpoint::Tokenize, |served, body| text(served, body)).await?;
    Ok(told(made, &unknown))
}

fn text(served: &Served, body: &Map<String, Value>) -> Result<Value, ApiError> {
    let fields = Fields::new(body);
    let ids = fields.token_ids("tokens", served.vocab_size)?.ok_or_else(|| required("tokens"))?;
    let text = served.tokenizer.decode(&ids, false).map_err(ApiError::internal)?;
    Ok(json!({"prompt": text}))
}

/// The tokenizer's configuration and the chat template in use.
///
/// # Errors
/// While there is no model.
pub async fn info(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let served = app.served()?;
    let mut info = served.tokenizer.config().as_object().cloned().unwrap_or_default();
    info.entry("tokenizer_class").or_insert(Value::Null);
    info.insert("vocab_size".to_owned(), served.tokenizer.vocab_size().into());
    info.insert("max_model_len".to_owned(), served.max_model_len.into());
    info.insert("chat_template".to_owned(), served.template.as_ref().map(|template| template.source()).into());
    Ok(Json(info.into()))
}
