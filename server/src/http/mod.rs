//! The OpenAI-compatible API: one file an endpoint, one table of errors, one place for the parameters.
//!
//! | route | file |
//! |---|---|
//! | `/v1/chat/completions` | [`chat`], [`messages`] |
//! | `/v1/completions` | [`completions`] |
//! | `/tokenize`, `/detokenize`, `/tokenizer_info` | [`tokenize`] |
//! | `/v1/models` | [`models`] |
//! | `/v1/load_lora_adapter`, `/v1/unload_lora_adapter` | [`adapters`] |
//! | `/health`, `/version`, `/metrics` | [`health`] |
//!
//! What they share: [`body`] reads JSON, [`fields`] its fields, [`params`] knows every parameter, [`error`]
//! every error, [`logprobs`] and [`answer`] the shapes of answers, [`sse`] streams.

pub mod adapters;
pub mod answer;
pub mod body;
pub mod chat;
pub mod completions;
pub mod error;
pub mod fields;
pub mod health;
pub mod logprobs;
pub mod messages;
pub mod models;
pub mod params;
pub mod sse;
pub mod tokenize;

use std::{
    future::{Future, IntoFuture},
    io,
    pin::pin,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    middleware::{self, Next},
    response::Response,
    routing::{get, post},
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot, watch},
    time::timeout,
};

use crate::{engine::Served, metrics};
use error::{ApiError, Kind};

/// How long answered connections may take to be read to their end when the server ends.
const FLUSH: Duration = Duration::from_millis(700);

/// What the API can be told.
#[derive(Debug, Clone, Copy)]
pub struct HttpOptions {
    /// The longest body that is read.
    pub max_body_bytes: usize,
    /// Fields that nobody knows are errors.
    pub strict_params: bool,
    /// Adapters may be loaded and unloaded.
    pub runtime_adapters: bool,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self { max_body_bytes: 4 << 20, strict_params: false, runtime_adapters: false }
    }
}

/// How far the server's life has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Requests are welcome.
    Open,
    /// No new requests; those under way go on.
    Draining,
    /// Those under way are told that the server ends.
    Closing,
}

/// What the handlers share.
pub struct App {
    served: OnceLock<Arc<Served>>,
    phase: watch::Sender<Phase>,
    metrics: PrometheusHandle,
    options: HttpOptions,
    preparations: Semaphore,
}

/// Prompts that are tokenised at a time: a body of the largest size takes some hundred times its bytes meanwhile.
const MAX_PREPARATIONS: usize = 2;

impl App {
    /// A server without a model: it answers that it is loading.
    pub fn new(metrics: PrometheusHandle, options: HttpOptions) -> Self {
        let preparations = Semaphore::new(MAX_PREPARATIONS);
        Self { served: OnceLock::new(), phase: watch::Sender::new(Phase::Open), metrics, options, preparations }
    }

    /// Runs `work`, which templates and tokenises, beside few others; a client that leaves while it waits gives its
    /// turn away.
    ///
    /// # Errors
    /// As `work`.
    pub async fn prepare<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let _turn = self.preparations.acquire().await.map_err(ApiError::internal)?;
        blocking(work).await
    }

    /// The model is ready.
    pub fn ready(&self, served: Arc<Served>) {
        if self.served.set(served).is_err() {
            tracing::warn!("a second model was announced; the first one stays");
        }
    }

    /// The model, if requests are welcome.
    ///
    /// # Errors
    /// While the model is loaded, and once the server is about to end.
    pub fn served(&self) -> Result<&Arc<Served>, ApiError> {
        if *self.phase.borrow() != Phase::Open {
            return Err(ApiError::shutting_down());
        }
        self.served.get().ok_or_else(ApiError::loading)
    }

    /// The same, if `model` is one of its names, or with the adapter of that name. No name is as good as the right one.
    ///
    /// # Errors
    /// Also when no model of that name is served.
    pub fn served_as(&self, model: Option<&str>) -> Result<Arc<Served>, ApiError> {
        let served = self.served()?;
        let Some(name) = model.filter(|name| !served.names.iter().any(|known| known == name)) else {
            return Ok(served.clone());
        };
        served.adapted(name).map(Arc::new).ok_or_else(|| {
            let adapters = served.adapters.list();
            let known = served.names.iter().map(String::as_str).chain(adapters.iter().map(|one| one.adapter.name()));
            let known = known.collect::<Vec<_>>().join("`, `");
            let message = format!("The model `{name}` does not exist. This server has `{known}`.");
            ApiError::new(Kind::ModelNotFound, message).or_param("model")
        })
    }

    /// Resolves when requests under way have to end.
    pub async fn closing(&self) {
        let mut phase = self.phase.subscribe();
        // The sender lives as long as `self`: this can't fail.
        let _ = phase.wait_for(|phase| *phase == Phase::Closing).await;
    }

    /// What `work` gives, unless the server ends before.
    ///
    /// # Errors
    /// When `work` fails, or the server ends.
    pub async fn unless_closing<T, E: Into<ApiError>>(
        &self,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, ApiError> {
        tokio::select! {
            result = work => result.map_err(Into::into),
            () = self.closing() => Err(ApiError::shutting_down()),
        }
    }
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    let mut router = Router::new();
    if app.options.runtime_adapters {
        router = router
            .route("/v1/load_lora_adapter", post(adapters::load))
            .route("/v1/unload_lora_adapter", post(adapters::unload));
    }
    router
        .route("/health", get(health::health))
        .route("/version", get(health::version))
        .route("/metrics", get(health::metrics))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/tokenizer_info", get(tokenize::info))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn(observe))
        .with_state(app)
}

/// Serves until `shutdown` resolves, then ends in order: no new connections; requests under way have `drain` to
/// finish; those that haven't are told; what was written gets a moment to be read.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    shutdown: impl Future<Output = ()>,
    drain: Duration,
) -> io::Result<()> {
    let (stop, stopped) = oneshot::channel::<()>();
    let server = axum::serve(listener, router(app.clone())).with_graceful_shutdown(async {
        let _ = stopped.await;
    });
    let mut server = pin!(server.into_future());
    tokio::select! {
        ended = &mut server => return ended,
        () = shutdown => {}
    }
    tracing::info!("shutting down");
    app.phase.send_replace(Phase::Draining);
    drop(stop);
    if let Ok(ended) = timeout(drain, &mut server).await {
        return ended;
    }
    app.phase.send_replace(Phase::Closing);
    timeout(FLUSH, &mut server).await.unwrap_or_else(|_| {
        tracing::warn!("some clients didn't read their answers to the end");
        Ok(())
    })
}

/// Runs work that takes longer than an async task should.
///
/// # Errors
/// When the work fails or panics.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(ApiError::internal)?
}

async fn not_found(request: Request) -> ApiError {
    let message = format!("There is no `{} {}`.", request.method(), request.uri().path());
    ApiError::new(Kind::NotFound, message)
}

async fn method_not_allowed(request: Request) -> ApiError {
    let message = format!("`{}` does not answer {}.", request.uri().path(), request.method());
    ApiError::new(Kind::MethodNotAllowed, message)
}

/// Counts and logs every request.
async fn observe(request: Request, next: Next) -> Response {
    let route = route_label(request.uri().path());
    let method = method_label(request.method().as_str());
    let start = Instant::now();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    metrics::http_request(route, method, status);
    tracing::debug!(method, route, status, seconds = start.elapsed().as_secs_f64(), "answered");
    response
}

/// The route as a metric's label: one of few, whatever the client asks for.
fn route_label(path: &str) -> &'static str {
    const EXACT: &[&str] = &[
        "/health",
        "/version",
        "/metrics",
        "/v1/models",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/chat/completions",
        "/v1/completions",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
    ];
    let exact = EXACT.iter().find(|&&route| route == path).copied();
    exact.unwrap_or(if path.starts_with("/v1/models/") { "/v1/models/{model}" } else { "other" })
}

fn method_label(method: &str) -> &'static str {
    const METHODS: &[&str] = &["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"];
    METHODS.iter().find(|&&known| known == method).copied().unwrap_or("other")
}

#[cfg(test)]
mod tests;
