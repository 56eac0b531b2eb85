//! `GET /v1/models` and `GET /v1/models/{model}`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};

use super::{App, error::ApiError};
use crate::engine::Served;

/// The served model under each of its names.
///
/// # Errors
/// While there is no model.
pub async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let served = app.served()?;
    let data: Vec<Value> = served.names.iter().map(|name| card(served, name)).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// The served model under one of its names.
///
/// # Errors
/// When no model of that name is served.
pub async fn retrieve(State(app): State<Arc<App>>, Path(model): Path<String>) -> Result<Json<Value>, ApiError> {
    let served = app.served_as(Some(&model))?;
    Ok(Json(card(served, &model)))
}

fn card(served: &Served, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "cadre",
        "root": served.root,
        "parent": null,
        "max_model_len": served.max_model_len,
    })
}
