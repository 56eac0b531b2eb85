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
use crate::engine::Served;

/// The served model under each of its names, and its adapters.
///
/// # Errors
/// While there is no model.
pub async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let served = app.served()?;
    let mut data: Vec<Value> = served.names.iter().map(|name| card(served, name, None)).collect();
    for adapter in served.adapters.list() {
        // It may have been unloaded meanwhile.
        let name = adapter.adapter.name();
        data.extend(served.adapted(name).map(|adapted| card(&adapted, name, Some(served.name()))));
    }
    Ok(Json(json!({"object": "list", "data": data})))
}

/// The served model under one of its names, or one of its adapters.
///
/// # Errors
/// When no model of that name is served.
pub async fn retrieve(State(app): State<Arc<App>>, Path(model): Path<String>) -> Result<Json<Value>, ApiError> {
    let served = app.served_as(Some(&model))?;
    let parent = served.adapter.is_some().then_some(app.served()?.name());
    Ok(Json(card(&served, &model, parent)))
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

fn card(served: &Served, name: &str, parent: Option<&str>) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "cadre",
        "root": served.root,
        "parent": parent,
        "max_model_len": served.max_model_len,
    })
}
