//! The one table of API errors: what happened, its HTTP status, and OpenAI's `type` and `code`.

use std::io;

use axum::{
    Json,
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use cadre_engine::request::{RequestError, SubmitError};
use serde_json::{Value, json};

use crate::generation::GenerationError;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A parameter is malformed, out of range or asks for what cadre cannot do.
    InvalidRequest,
    /// The prompt and the tokens asked for don't fit the context.
    ContextLength,
    /// No model of that name is served.
    ModelNotFound,
    /// No such route.
    NotFound,
    /// No file or job of that id.
    ObjectNotFound,
    /// The state of things forbids it.
    Conflict,
    /// The route exists, but not for this method.
    MethodNotAllowed,
    /// The body is longer than the server reads.
    BodyTooLarge,
    /// The body is not declared as JSON.
    UnsupportedMediaType,
    /// The model is still being loaded.
    ModelLoading,
    /// Requests for other adapters hold the memory that this one's needs.
    AdaptersBusy,
    /// The server is about to end.
    ShuttingDown,
    /// The disk has no room.
    DiskFull,
    /// A defect in cadre.
    Internal,
}

/// One row of the table.
struct Row {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    retry_after_seconds: Option<u32>,
}

impl Kind {
    fn row(self) -> Row {
        let (status, kind, code, retry_after_seconds) = match self {
            Self::InvalidRequest => (StatusCode::BAD_REQUEST, "invalid_request_error", None, None),
            Self::ContextLength => {
                (StatusCode::BAD_REQUEST, "invalid_request_error", Some("context_length_exceeded"), None)
            }
            Self::ModelNotFound => (StatusCode::NOT_FOUND, "invalid_request_error", Some("model_not_found"), None),
            Self::NotFound => (StatusCode::NOT_FOUND, "invalid_request_error", Some("unknown_url"), None),
            Self::ObjectNotFound => (StatusCode::NOT_FOUND, "invalid_request_error", Some("not_found"), None),
            Self::Conflict => (StatusCode::CONFLICT, "invalid_request_error", Some("conflict"), None),
            Self::MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), None)
            }
            Self::BodyTooLarge => {
                (StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("request_too_large"), None)
            }
            Self::UnsupportedMediaType => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", Some("unsupported_media_type"), None)
            }
            Self::ModelLoading => (StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("model_loading"), Some(2)),
            Self::AdaptersBusy => (StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("adapters_busy"), Some(2)),
            Self::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("shutting_down"), Some(1)),
            Self::DiskFull => (StatusCode::INSUFFICIENT_STORAGE, "server_error", Some("disk_full"), None),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, None),
        };
        Row { status, kind, code, retry_after_seconds }
    }
}

/// An error as a client sees it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// What happened.
    pub kind: Kind,
    /// What was expected, and what was found.
    pub message: String,
    /// The path of the parameter at fault, as `messages[2].content`.
    pub param: Option<String>,
}

impl ApiError {
    /// An error without a parameter.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None }
    }

    /// A parameter that is malformed, out of range or unsupported.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind: Kind::InvalidRequest, message: message.into(), param: Some(param.into()) }
    }

    /// A defect: logged in full, told without its details.
    pub fn internal(detail: impl std::fmt::Display) -> Self {
        tracing::error!(%detail, "a request failed");
        Self::new(Kind::Internal, "The server failed while it worked on this request. Its log says why.")
    }

    /// What was to be written isn't.
    pub fn unwritten(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::StorageFull { Self::disk_full() } else { Self::internal(error) }
    }

    /// The disk has no room.
    pub fn disk_full() -> Self {
        Self::new(Kind::DiskFull, "The server's disk is full. Delete files that aren't needed, or ask again later.")
    }

    /// The model is still being loaded.
    pub fn loading() -> Self {
        Self::new(Kind::ModelLoading, "The model is still being loaded. Try again in a moment.")
    }

    /// The server is about to end.
    pub fn shutting_down() -> Self {
        Self::new(Kind::ShuttingDown, "The server is shutting down.")
    }

    /// The same error, blaming `param` if it blames nothing yet.
    #[must_use]
    pub fn or_param(mut self, param: &str) -> Self {
        self.param.get_or_insert_with(|| param.to_owned());
        self
    }

    /// OpenAI's error object.
    pub fn body(&self) -> Value {
        let row = self.kind.row();
        json!({"error": {"message": self.message, "type": row.kind, "param": self.param, "code": row.code}})
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.kind.row().status
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        response.extensions_mut().insert(self.kind);
        if let Some(seconds) = self.kind.row().retry_after_seconds {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(seconds * 1000));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let kind = match error {
            SubmitError::ContextLength { .. } => Kind::ContextLength,
            SubmitError::ShuttingDown => return Self::shutting_down(),
            _ => Kind::InvalidRequest,
        };
        Self::new(kind, sentence(&error.to_string()))
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::ShuttingDown => Self::shutting_down(),
            RequestError::NothingAllowed(reason) => Self::new(Kind::InvalidRequest, sentence(&reason)),
            weights @ RequestError::Weights(_) => Self::new(
                Kind::Internal,
                format!("{} The server's log says why; ask again when that is mended.", sentence(&weights.to_string())),
            ),
            RequestError::Internal(detail) => Self::internal(detail),
        }
    }
}

impl From<GenerationError> for ApiError {
    fn from(error: GenerationError) -> Self {
        match error {
            GenerationError::Submit(error) => error.into(),
            GenerationError::Request(error) => error.into(),
            GenerationError::Text(error) => Self::internal(error),
        }
    }
}

/// Capital letter first, full stop last: the library's messages are fragments, an API's are sentences.
pub fn sentence(fragment: &str) -> String {
    let mut letters = fragment.chars();
    let first = letters.next().map(char::to_uppercase).into_iter().flatten();
    let mut text: String = first.chain(letters).collect();
    if !text.ends_with(['.', '!', '?']) {
        text.push('.');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::StorageError;

    #[test]
    fn body_has_openais_four_fields() {
        let error = ApiError::invalid("messages[2].content", "Expected text.");
        assert_eq!(
            error.body(),
            json!({"error": {"message": "Expected text.", "type": "invalid_request_error",
                             "param": "messages[2].content", "code": null}})
        );
        assert_eq!(error.status(), 400);
    }

    #[test]
    fn temporary_errors_say_when_to_come_back() {
        for error in [ApiError::loading(), ApiError::shutting_down()] {
            let response = error.into_response();
            assert_eq!(response.status(), 503);
            let seconds: u32 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
            let millis: u32 = response.headers()["retry-after-ms"].to_str().unwrap().parse().unwrap();
            assert_eq!(millis, seconds * 1000);
        }
    }

    #[test]
    fn context_overflow_has_its_code_and_its_numbers() {
        let error: ApiError = SubmitError::ContextLength { max_model_len: 64, prompt_tokens: 60, max_tokens: 5 }.into();
        assert_eq!(error.body()["error"]["code"], "context_length_exceeded");
        assert_eq!(error.status(), 400);
        for number in ["64", "60", "5"] {
            assert!(error.message.contains(number), "{}", error.message);
        }
    }

    #[test]
    fn a_full_disk_is_told_and_other_faults_of_it_are_defects() {
        let io = |kind| StorageError::Io { path: "/there".to_owned(), reason: io::Error::from(kind) };
        let full = rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL), None);
        for error in [io(io::ErrorKind::StorageFull), StorageError::Database(full)] {
            let body = ApiError::from(error).body();
            assert_eq!(body["error"]["code"], "disk_full", "{body}");
        }
        assert_eq!(ApiError::unwritten(io::ErrorKind::StorageFull.into()).status(), 507);
        let error = ApiError::from(io(io::ErrorKind::PermissionDenied));
        assert!(error.status() == 500 && !error.message.contains("/there"), "{error}");
    }

    #[test]
    fn defects_keep_their_details() {
        let error: ApiError = RequestError::Internal("index 7 out of range".to_owned()).into();
        assert_eq!(error.status(), 500);
        assert!(!error.message.contains("index 7"));
    }
}
