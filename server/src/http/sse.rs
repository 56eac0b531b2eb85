//! Streams a generation as server-sent events. Dropping the response drops the generation, which cancels it.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderName, header},
    response::{IntoResponse, Response},
};
use futures_util::stream;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{
    App,
    answer::{self, Envelope},
    error::ApiError,
    params::shared::StreamOptions,
};
use crate::generation::{Generation, Update, Usage};

/// A comment goes out after so long without news, lest a proxy close the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// One endpoint's chunks.
pub trait Chunks: Send + 'static {
    /// The chunks that tell an update; usage is added to them.
    fn chunks(&mut self, update: Update) -> Vec<Map<String, Value>>;

    /// What each chunk begins with.
    fn envelope(&self) -> &Envelope;
}

/// The response that streams `generation`.
pub fn respond(app: Arc<App>, generation: Generation, chunks: impl Chunks, options: StreamOptions) -> Response {
    let streaming = Streaming { app, generation: Some(generation), chunks, options, out: VecDeque::new() };
    let events = stream::unfold(streaming, |mut streaming| async move {
        let bytes = streaming.next().await?;
        Some((Ok::<_, Infallible>(bytes), streaming))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(events)).into_response()
}

struct Streaming<C> {
    app: Arc<App>,
    /// `None` once it has ended.
    generation: Option<Generation>,
    chunks: C,
    options: StreamOptions,
    out: VecDeque<Bytes>,
}

impl<C: Chunks> Streaming<C> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.out.pop_front() {
                return Some(bytes);
            }
            let generation = self.generation.as_mut()?;
            let step = timeout(KEEP_ALIVE, self.app.unless_closing(generation.next())).await;
            match step {
                Err(_) => self.out.push_back(Bytes::from_static(b": keep-alive\n\n")),
                Ok(Ok(Some(update))) => {
                    let usage = generation.usage();
                    self.tell(update, usage);
                }
                Ok(Ok(None)) => {
                    let usage = generation.usage();
                    self.end(usage);
                }
                Ok(Err(error)) => self.fail(&error),
            }
        }
    }

    fn tell(&mut self, update: Update, usage: Usage) {
        for mut chunk in self.chunks.chunks(update) {
            if self.options.continuous_usage_stats {
                chunk.insert("usage".to_owned(), answer::usage(usage));
            } else if self.options.include_usage {
                chunk.insert("usage".to_owned(), Value::Null);
            }
            self.out.push_back(event(&chunk.into()));
        }
    }

    fn end(&mut self, usage: Usage) {
        self.generation = None;
        if self.options.include_usage {
            let mut chunk = self.chunks.envelope().with("choices", Vec::new());
            chunk.insert("usage".to_owned(), answer::usage(usage));
            self.out.push_back(event(&chunk.into()));
        }
        self.out.push_back(done());
    }

    fn fail(&mut self, error: &ApiError) {
        self.generation = None;
        self.out.push_back(event(&error.body()));
        self.out.push_back(done());
    }
}

fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}

fn done() -> Bytes {
    Bytes::from_static(b"data: [DONE]\n\n")
}
