//! Reads a request's body: bounded, declared as JSON, an object.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, BodyDataStream},
    extract::{FromRequest, Request},
    http::{HeaderMap, header},
};
use futures_util::StreamExt;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{
    App, blocking,
    error::{ApiError, Kind},
    fields::shown,
};

/// From here on parsing takes so long that it would hold up other requests.
const LARGE_BYTES: usize = 64 << 10;
/// How long, and for how many times the limit, a body that is too long is read on: a client that is still
/// writing would else see a broken connection in place of the error.
const DISCARD_TIME: Duration = Duration::from_secs(2);
const DISCARD_LIMITS: usize = 4;

/// The JSON object in a request's body.
pub struct JsonBody(pub Map<String, Value>);

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let bytes = read(body, app.options.max_body_bytes).await?;
        check_content_type(&parts.headers)?;
        if bytes.len() < LARGE_BYTES {
            return parse(&bytes).map(Self);
        }
        blocking(move || parse(&bytes)).await.map(Self)
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let found = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("nothing");
    let essence = found.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    let message = format!("The content type must be `application/json`, got {found}.");
    Err(ApiError::new(Kind::UnsupportedMediaType, message))
}

async fn read(body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|error| {
            ApiError::new(Kind::InvalidRequest, format!("The body could not be read to its end: {error}."))
        })?;
        if bytes.len() + piece.len() > limit {
            let _ = timeout(DISCARD_TIME, discard(stream, limit.saturating_mul(DISCARD_LIMITS))).await;
            let message = format!("The body is too large: this server reads at most {limit} bytes.");
            return Err(ApiError::new(Kind::BodyTooLarge, message));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

async fn discard(mut stream: BodyDataStream, mut budget: usize) {
    while let Some(Ok(piece)) = stream.next().await {
        match budget.checked_sub(piece.len()) {
            Some(rest) => budget = rest,
            None => return,
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => {
            let message = format!("The body must be a JSON object, got {}.", shown(&other));
            Err(ApiError::new(Kind::InvalidRequest, message))
        }
        Err(error) => Err(ApiError::new(
            Kind::InvalidRequest,
            format!("The body must be a JSON object, but it isn't JSON: {error}."),
        )),
    }
}
