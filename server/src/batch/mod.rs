//! Requests from a file: OpenAI's batch lines, each through the routes that answer them over HTTP.
//!
//! [`request`] reads a line, [`result`] writes one; [`Answerer`] does what is between. [`order`] sorts requests so that they help each
//! other, [`duplicates`] finds those of one `custom_id`, [`run`] puts a whole file through,
//! [`totals`] sums up. [`jobs`] does it for files that the server keeps.

pub mod duplicates;
pub mod jobs;
pub mod order;
pub mod request;
pub mod result;
pub mod run;
pub mod totals;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
    http::{Request, header},
};
use tokio::time::sleep;
use tower::ServiceExt;

use crate::{
    generation::Usage,
    http::{self, App, error::Kind, reproducible::Reproducible},
    lines::{
        input::Line,
        output::{Finished, Told},
    },
};
use request::BatchRequest;
use result::Outcome;

/// How long a line waits for memory for its adapter, before it asks again.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers lines as the server does.
#[derive(Clone)]
pub struct Answerer {
    router: Router,
    seed: u64,
    created: u64,
}

/// An answered line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// Its line of the output.
    pub line: Finished,
    /// Its tokens.
    pub usage: Usage,
    /// Fields of its body that nobody knows, as far as they are told.
    pub ignored: Option<String>,
}

impl Answerer {
    /// By the model of `app`. Answers were made at `created`, in seconds since 1970; `seed` stands for the draws of requests without
    /// one, and for ids: both the same give the same bytes.
    pub fn new(app: Arc<App>, seed: u64, created: u64) -> Self {
        Self { router: http::router(app), seed, created }
    }

    /// Answers a line; whatever it is, there is a line about it.
    pub async fn answer(&self, line: &Line) -> Answered {
        let reproducible = Reproducible { number: line.number, seed: self.seed, created: self.created };
        let parsed = line.text.as_deref().map_err(|reason| request::bad(reason.clone())).and_then(BatchRequest::parse);
        let (custom_id, outcome, usage, ignored) = match parsed {
            Ok(request) => {
                let (outcome, usage, ignored) = self.ask(&request, reproducible).await;
                (Some(request.custom_id), outcome, usage, ignored)
            }
            Err(bad) => (bad.custom_id.clone(), Outcome::Bad(bad), Usage::default(), None),
        };
        let failed = outcome.failed();
        let text = outcome.line(custom_id.as_deref(), reproducible);
        Answered { line: Finished { told: Told { number: line.number, failed }, text }, usage, ignored }
    }

    async fn ask(&self, request: &BatchRequest<'_>, reproducible: Reproducible) -> (Outcome, Usage, Option<String>) {
        let (parts, body) = loop {
            let asked = Request::post(request.url)
                .header(header::CONTENT_TYPE, "application/json")
                .extension(reproducible)
                .body(Body::from(request.body.get().to_owned()));
            let asked = match asked {
                Ok(asked) => asked,
                Err(error) => return (Outcome::lost(&error), Usage::default(), None),
            };
            let (parts, body) = match self.router.clone().oneshot(asked).await {
                Ok(response) => response.into_parts(),
                Err(never) => match never {},
            };
            // A line has time: those that hold the memory come to their end.
            if parts.extensions.get::<Kind>() != Some(&Kind::AdaptersBusy) {
                break (parts, body);
            }
            sleep(PAUSE).await;
        };
        let usage = parts.extensions.get::<Usage>().copied().unwrap_or_default();
        let ignored = parts.headers.get(http::answer::IGNORED).and_then(|names| names.to_str().ok()).map(str::to_owned);
        let outcome = match to_bytes(body, usize::MAX).await {
            Ok(bytes) => Outcome::answered(parts.status.as_u16(), bytes),
            Err(error) => Outcome::lost(&error),
        };
        (outcome, usage, ignored)
    }
}

#[cfg(test)]
mod tests;
