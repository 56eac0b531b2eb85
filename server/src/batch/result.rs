//! A line of the output: `{"id", "custom_id", "response", "error"}`.

use std::fmt::Display;

use axum::body::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use super::request::BadLine;
use crate::{http::reproducible::Reproducible, lines::output::Told};

/// What a line's id begins with; the number of the input's line follows.
const ID: &str = "batch_req_";

/// What became of a line.
#[derive(Debug)]
pub enum Outcome {
    /// The server's answer; an error too is one.
    Answered {
        /// The HTTP status.
        status: u16,
        /// JSON.
        body: String,
    },
    /// It was no request.
    Bad(BadLine),
    /// There is no answer.
    Lost(String),
}

impl Outcome {
    /// An answer.
    pub fn answered(status: u16, body: Bytes) -> Self {
        match String::from_utf8(body.into()) {
            Ok(body) => Self::Answered { status, body },
            Err(error) => Self::lost(&error),
        }
    }

    /// An answer that can't be told: a defect.
    pub fn lost(error: &dyn Display) -> Self {
        tracing::error!(%error, "a line has no answer");
        Self::Lost(error.to_string())
    }

    /// Whether it has not what was asked for.
    pub fn failed(&self) -> bool {
        !matches!(self, Self::Answered { status: 200..=299, .. })
    }

    /// The line. An answer stays as the server has written it, to the last digit.
    pub fn line(&self, custom_id: Option<&str>, of: Reproducible) -> String {
        let (response, error) = match self {
            Self::Answered { status, body } => {
                let response = format!(r#"{{"status_code":{status},"request_id":"req_{}","body":{body}}}"#, of.id());
                (response, Value::Null)
            }
            Self::Bad(BadLine { code, message, .. }) => {
                ("null".to_owned(), json!({"code": code, "message": format!("line {}: {message}", of.number)}))
            }
            Self::Lost(message) => ("null".to_owned(), json!({"code": "server_error", "message": message})),
        };
        let custom_id = Value::from(custom_id);
        format!(r#"{{"id":"{ID}{:010}","custom_id":{custom_id},"response":{response},"error":{error}}}"#, of.number)
    }
}

/// What tells an output's line.
#[derive(Deserialize)]
struct Known<'a> {
    id: &'a str,
    response: Option<KnownResponse>,
}

#[derive(Deserialize)]
struct KnownResponse {
    status_code: u16,
}

/// Which line of the input a line of an output is of, if it is of one.
pub fn told(line: &[u8]) -> Option<Told> {
    let known: Known<'_> = serde_json::from_slice(line).ok()?;
    let number = known.id.strip_prefix(ID)?.parse().ok()?;
    let failed = !known.response.is_some_and(|response| (200..300).contains(&response.status_code));
    Some(Told { number, failed })
}
