//! `/v1/batches`: create, list, get, cancel; there only with `--storage`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};

use super::{
    App, answer, blocking,
    body::JsonBody,
    error::{ApiError, Kind, sentence},
    fields::{Fields, metadata},
    files::list_of,
    messages::required,
    params::{self, Endpoint},
    query::Parameters,
};
use crate::{
    batch::{jobs::BatchJobsError, request::URLS},
    storage::{Batch, BatchError, NewBatch},
};

const MAX_LIMIT: usize = 100;
const OUTPUT_EXPIRES_AFTER: &str = "output_expires_after";
const HOUR: i64 = 3600;
/// The longest window, in hours.
const MAX_HOURS: i64 = 30 * 24;
/// How long files may be told to stay, in seconds, as OpenAI has it.
const OUTPUT_SECONDS: [i64; 2] = [HOUR, 30 * 24 * HOUR];

/// Adds a batch.
///
/// # Errors
/// When the request is at fault, or the file isn't there.
pub async fn create(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let unknown = params::admit(&body, Endpoint::Batches, app.options.strict_params)?;
    let batches = app.batches()?.clone();
    let asked = asked(&body)?;
    let batch = blocking(move || Ok(batches.create(asked)?)).await?;
    let mut response = Json(object(&batch)).into_response();
    answer::name_ignored(&mut response, &unknown);
    Ok(response)
}

fn asked(body: &Map<String, Value>) -> Result<NewBatch, ApiError> {
    let fields = Fields::new(body);
    let text = |name| fields.string(name)?.ok_or_else(|| required(name));
    let endpoint = text("endpoint")?;
    if !URLS.contains(&endpoint) {
        let message = format!("endpoint must be one of {}, got \"{endpoint}\".", URLS.join(", "));
        return Err(ApiError::invalid("endpoint", message));
    }
    let completion_window = text("completion_window")?;
    let hours = hours(completion_window).ok_or_else(|| {
        let message = format!("completion_window must be \"24h\", or another number of hours up to {MAX_HOURS} or of days, got \"{completion_window}\".");
        ApiError::invalid("completion_window", message)
    })?;
    Ok(NewBatch {
        input_file: text("input_file_id")?.to_owned(),
        endpoint: endpoint.to_owned(),
        completion_window: completion_window.to_owned(),
        window_seconds: hours * HOUR,
        metadata: fields.get("metadata").is_some().then(|| metadata(fields)).transpose()?,
        output_seconds: fields
            .get(OUTPUT_EXPIRES_AFTER)
            .map(|after| seconds_after(after, OUTPUT_EXPIRES_AFTER))
            .transpose()?,
    })
}

/// `24h`, or `1d`.
fn hours(window: &str) -> Option<i64> {
    let (digits, unit) = window.split_at_checked(window.len().checked_sub(1)?)?;
    let unit = match unit {
        "h" => 1,
        "d" => 24,
        _ => return None,
    };
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let hours = digits.parse::<i64>().ok().filter(|_| is_number)?.checked_mul(unit)?;
    (1..=MAX_HOURS).contains(&hours).then_some(hours)
}

/// How long a file stays, in seconds, as `after` says it, a field called `name`.
pub(super) fn seconds_after(after: &Value, name: &str) -> Result<i64, ApiError> {
    let after = Fields::nested(after, name)?;
    after.has_only(&["anchor", "seconds"])?;
    match after.string("anchor")? {
        Some("created_at") => {}
        other => {
            let message = format!("{name}.anchor must be \"created_at\", got {}.", Value::from(other));
            return Err(ApiError::invalid(after.path("anchor"), message));
        }
    }
    let [least, most] = OUTPUT_SECONDS;
    after.integer("seconds", least, most)?.ok_or_else(|| required(&after.path("seconds")))
}

/// All batches, the latest first.
///
/// # Errors
/// When a parameter is out of range.
pub async fn list(State(app): State<Arc<App>>, query: Parameters) -> Result<Json<Value>, ApiError> {
    let storage = app.storage()?.clone();
    let (after, limit) = (query.after(), query.limit(20, MAX_LIMIT)?);
    let page = blocking(move || Ok(storage.batches(after.as_deref(), limit)?)).await?;
    Ok(Json(list_of(&page, object)))
}

/// A batch.
///
/// # Errors
/// When there is no such batch.
pub async fn retrieve(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let storage = app.storage()?.clone();
    let batch = blocking(move || storage.batch(&id)?.ok_or_else(|| BatchJobsError::NotFound(id).into())).await?;
    Ok(Json(object(&batch)))
}

/// Cancels a batch.
///
/// # Errors
/// When it is done, or there is no such batch.
pub async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let batches = app.batches()?.clone();
    let batch = blocking(move || Ok(batches.cancel(&id)?)).await?;
    Ok(Json(object(&batch)))
}

fn object(batch: &Batch) -> Value {
    let usage = &batch.progress.usage;
    let mut object = json!({
        "id": batch.id, "object": "batch", "endpoint": batch.endpoint, "model": batch.model,
        "errors": errors(&batch.errors), "input_file_id": batch.input_file, "completion_window": batch.completion_window,
        "status": batch.status.name(), "output_file_id": batch.output_file, "error_file_id": batch.error_file,
        "created_at": batch.created, "expires_at": batch.expires,
        "request_counts": {
            "total": batch.total, "completed": batch.progress.completed, "failed": batch.progress.failed,
        },
        "usage": {
            "input_tokens": usage.prompt_tokens, "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
        "metadata": batch.metadata,
    });
    for (status, time) in &batch.times {
        object[format!("{}_at", status.name())] = (*time).into();
    }
    object
}

fn errors(errors: &[BatchError]) -> Value {
    if errors.is_empty() {
        return Value::Null;
    }
    json!({"object": "list", "data": errors.iter().map(BatchError::object).collect::<Vec<_>>()})
}

impl From<BatchJobsError> for ApiError {
    fn from(error: BatchJobsError) -> Self {
        match error {
            BatchJobsError::NotFound(id) => {
                Self::new(Kind::ObjectNotFound, format!("No such Batch object: {id}")).or_param("id")
            }
            BatchJobsError::Done { .. } => Self::new(Kind::Conflict, sentence(&error.to_string())),
            BatchJobsError::Storage(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_hours_or_days() {
        for (window, expected) in [("24h", Some(24)), ("1h", Some(1)), ("2d", Some(48)), ("30d", Some(720))] {
            assert_eq!(hours(window), expected, "{window}");
        }
        for window in ["", "h", "24", "24m", "0h", "-1h", "+1h", "31d", "721h", "99999999999999999999h", "1é"] {
            assert_eq!(hours(window), None, "{window}");
        }
    }
}
