//! `GET /health`, `GET /version`, `GET /metrics`.

use std::sync::Arc;

use axum::{Json, extract::State, http::header, response::IntoResponse};
use serde_json::{Value, json};

use super::{App, error::ApiError};

/// Whether requests are welcome.
///
/// # Errors
/// While the model is loaded, and once the server is about to end.
pub async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    app.served().map(|_| Json(json!({"status": "ok"})))
}

/// This binary's version.
pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Everything that is measured, in Prometheus' text format.
pub async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.render())
}
