//! `POST /v1/rerank`, `/rerank`: documents in the order of how well they answer a query, as Jina, Cohere and vLLM shape it.

use std::sync::Arc;

use axum::{Extension, extract::State, response::Response};
use serde_json::{Map, Value, json};

use super::{
    App,
    answer::{self, Envelope},
    body::JsonBody,
    error::ApiError,
    fields::{Fields, wrong},
    messages::required,
    pairs::{Asking, Prepared, check_count},
    params::Endpoint,
    reproducible::Reproducible,
};
use crate::engine::Served;

/// Orders documents.
///
/// # Errors
/// When the request is at fault, or the engine fails.
pub async fn create(
    State(app): State<Arc<App>>,
    reproducible: Option<Extension<Reproducible>>,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let reproducible = reproducible.map(|Extension(reproducible)| reproducible);
    let ((prepared, told), unknown) = app.admitted(body, Endpoint::Rerank, prepare).await?;
    let envelope = Envelope::new("rerank", "list", prepared.model(), reproducible);
    let (scores, usage) = prepared.score(&app, Reproducible::priority(reproducible)).await?;
    let mut response = answer::whole(envelope.with("results", told.results(&scores)), usage, reproducible);
    answer::name_ignored(&mut response, &unknown);
    Ok(response)
}

/// What is told of the documents.
struct Told {
    /// Their texts, if they are told.
    documents: Option<Vec<String>>,
    /// How many are told at most.
    top: usize,
}

impl Told {
    /// The best first; of equals, the first.
    fn results(&self, scores: &[f64]) -> Vec<Value> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&one, &other| scores[other].total_cmp(&scores[one]));
        let result = |&index: &usize| {
            let mut result = Map::new();
            result.insert("index".to_owned(), index.into());
            if let Some(documents) = &self.documents {
                result.insert("document".to_owned(), json!({"text": documents[index]}));
            }
            result.insert("relevance_score".to_owned(), scores[index].into());
            Value::Object(result)
        };
        order.iter().take(self.top).map(result).collect()
    }
}

fn prepare(served: &Arc<Served>, body: &Map<String, Value>) -> Result<(Prepared, Told), ApiError> {
    let fields = Fields::new(body);
    let query = fields.string("query")?.ok_or_else(|| required("query"))?;
    let documents = fields.array("documents")?.ok_or_else(|| required("documents"))?;
    check_count(documents.len(), "documents")?;
    let documents = documents.iter().enumerate().map(document).collect::<Result<Vec<_>, _>>()?;
    let top = match fields.count("top_n", 0, u32::MAX)? {
        None | Some(0) => usize::MAX,
        Some(top) => top as usize,
    };
    let asking = Asking::new(served, fields)?;
    let ask = |(place, document): (usize, &String)| asking.ask(query, document, format!("documents[{place}]"));
    let asked = documents.iter().enumerate().map(ask).collect::<Result<_, _>>()?;
    let prepared = Prepared::new(served, fields, asked)?;
    let told = fields.boolean("return_documents")?.unwrap_or(true);
    Ok((prepared, Told { documents: told.then_some(documents), top }))
}

/// A text, or an object with one.
fn document((place, value): (usize, &Value)) -> Result<String, ApiError> {
    let text = value.as_str().or_else(|| value.get("text").and_then(Value::as_str));
    let wrong = || wrong(&format!("documents[{place}]"), "a string, or an object with a string `text`", value);
    text.map(str::to_owned).ok_or_else(wrong)
}
