//! `GET /v1/models` and `GET /v1/models/{model}`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};

use super::{
    App, blocking,
    error::{ApiError, Kind},
};
use crate::{adapters::ServedAdapter, engine::Served};

/// The served model under each of its names, and its adapters.
///
/// # Errors
/// While there is no model.
pub async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let served = app.served()?;
    let mut data: Vec<Value> = served.names.iter().map(|name| own_card(served, name)).collect();
    data.extend(served.adapters.list().iter().map(|adapter| adapter_card(served, adapter)));
    Ok(Json(json!({"object": "list", "data": data})))
}

/// The served model under one of its names, or one of its adapters.
///
/// # Errors
/// When no model of that name is served.
pub async fn retrieve(State(app): State<Arc<App>>, Path(model): Path<String>) -> Result<Json<Value>, ApiError> {
    let served = app.served()?;
    if served.names.contains(&model) {
        return Ok(Json(own_card(served, &model)));
    }
    let adapter = served.adapters.find(&model).ok_or_else(|| no_model(served, &model))?;
    Ok(Json(adapter_card(served, &adapter)))
}

/// Removes a model that a fine-tuning job has made, with its checkpoints; requests that use it are answered to their end.
///
/// # Errors
/// When no job has made a model of that name.
pub async fn delete(State(app): State<Arc<App>>, Path(model): Path<String>) -> Result<Json<Value>, ApiError> {
    let jobs = app.jobs()?.clone();
    let name = model.clone();
    if !blocking(move || Ok(jobs.delete_model(&name)?)).await? {
        let message = format!("The model `{model}` does not exist, or no fine-tuning job has made it.");
        return Err(ApiError::new(Kind::ModelNotFound, message).or_param("model"));
    }
    Ok(Json(json!({"id": model, "object": "model", "deleted": true})))
}

/// No model of this name is served; some that are.
pub fn no_model(served: &Served, name: &str) -> ApiError {
    const TOLD: usize = 5;
    let adapters = served.adapters.list();
    let told = adapters.iter().take(TOLD).map(|adapter| adapter.name.as_str());
    let known = served.names.iter().map(String::as_str).chain(told).collect::<Vec<_>>().join("`, `");
    let others = match adapters.len().saturating_sub(TOLD) {
        0 => String::new(),
        count => format!(" and {count} others: see /v1/models"),
    };
    let message = format!("The model `{name}` does not exist. This server has `{known}`{others}.");
    ApiError::new(Kind::ModelNotFound, message).or_param("model")
}

fn own_card(served: &Served, name: &str) -> Value {
    card(name, served.created, &served.root, None, served.max_model_len)
}

fn adapter_card(served: &Served, adapter: &ServedAdapter) -> Value {
    card(&adapter.name, adapter.created, &adapter.root, Some(served.name()), served.max_model_len)
}

fn card(name: &str, created: u64, root: &str, parent: Option<&str>, max_model_len: usize) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "cadre",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
    })
}
