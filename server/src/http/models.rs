//! `GET /v1/models` and `GET /v1/models/{model}`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};

use super::{App, error::ApiError};
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
