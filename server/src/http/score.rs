//! `POST /v1/score`, `/score`: how likely a label follows prompts, or how well texts go together, as vLLM shapes it.

use std::sync::Arc;

use axum::{Extension, extract::State, response::Response};
use serde_json::{Map, Value, json};

use super::{
    App,
    answer::{self, Envelope},
    body::JsonBody,
    error::ApiError,
    fields::{Fields, token_ids, wrong},
    messages::required,
    pairs::{Asked, Asking, Prepared, check_count, texts},
    params::Endpoint,
    reproducible::Reproducible,
};
use crate::engine::Served;

/// The names that the two sides of pairs may have.
const SIDES: [(&str, &str); 4] =
    [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")];

/// Scores prompts or pairs.
///
/// # Errors
/// When the request is at fault, or the engine fails.
pub async fn create(
    State(app): State<Arc<App>>,
    reproducible: Option<Extension<Reproducible>>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let reproducible = reproducible.map(|Extension(reproducible)| reproducible);
    let (prepared, unknown) = app.admitted(body, Endpoint::Score, prepare).await?;
    let envelope = Envelope::new("score", "list", prepared.model(), reproducible);
    let (scores, usage) = prepared.score(&app, Reproducible::priority(reproducible)).await?;
    let score = |(index, score): (usize, f64)| json!({"index": index, "object": "score", "score": score});
    let data = scores.into_iter().enumerate().map(score).collect();
    let mut response = answer::whole(envelope.with("data", data), usage, reproducible);
    answer::name_ignored(&mut response, &unknown);
    Ok(response)
}

fn prepare(served: &Arc<Served>, body: &Map<String, Value>) -> Result<Prepared, ApiError> {
    let fields = Fields::new(body);
    let asked = if fields.get("query").is_some() { joined(served, fields)? } else { pairs(served, fields)? };
    Prepared::new(served, fields, asked)
}

/// `query` and each of `items` are one prompt together.
fn joined(served: &Served, fields: Fields<'_>) -> Result<Vec<Asked>, ApiError> {
    let special = fields.boolean("add_special_tokens")?.unwrap_or(true);
    let item_first = fields.boolean("item_first")?.unwrap_or(false);
    let query = fields.get("query").ok_or_else(|| required("query"))?;
    let query = part(served, query, "query", special)?;
    let items = fields.array("items")?.ok_or_else(|| required("items"))?;
    check_count(items.len(), "items")?;
    let prompt = |(place, item): (usize, &Value)| {
        let path = format!("items[{place}]");
        let item = part(served, item, &path, false)?;
        let prompt = if item_first { [item, query.clone()].concat() } else { [query.clone(), item].concat() };
        Ok(Asked { prompt, path })
    };
    items.iter().enumerate().map(prompt).collect()
}

/// A part of a prompt: a text or token ids.
fn part(served: &Served, value: &Value, path: &str, special: bool) -> Result<Vec<u32>, ApiError> {
    match value {
        Value::String(text) => served.tokenizer.encode(text, special).map_err(ApiError::internal),
        Value::Array(ids) => token_ids(ids, path, served.vocab_size),
        other => Err(wrong(path, "a string or an array of token ids", other)),
    }
}

/// One text with each of several, or as many with as many.
fn pairs(served: &Served, fields: Fields<'_>) -> Result<Vec<Asked>, ApiError> {
    let given = |(one, other): &&(&str, &str)| fields.get(one).is_some() && fields.get(other).is_some();
    let Some(&(one, other)) = SIDES.iter().find(given) else {
        let message = "Expected `text_1` and `text_2`, `queries` and `documents`, or `query` and `items`.";
        return Err(ApiError::invalid("text_1", message));
    };
    let (queries, documents) = (texts(fields, one)?, texts(fields, other)?);
    if queries.len() != 1 && queries.len() != documents.len() {
        let (queries, documents) = (queries.len(), documents.len());
        let message = format!("`{one}` holds {queries} texts and `{other}` {documents}: expected one, or as many.");
        return Err(ApiError::invalid(one, message));
    }
    let asking = Asking::new(served, fields)?;
    let ask = |(place, (query, document))| asking.ask(query, document, format!("{other}[{place}]"));
    queries.into_iter().cycle().zip(documents).enumerate().map(ask).collect()
}
