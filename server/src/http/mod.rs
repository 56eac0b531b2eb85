//! The OpenAI-compatible API: one file an endpoint, one table of errors, one place for the parameters.
//!
//! | route | file |
//! |---|---|
//! | `/v1/chat/completions` | [`chat`], [`messages`] |
//! | `/v1/completions` | [`completions`] |
//! | `/v1/score`, `/v1/rerank` | [`score`], [`rerank`], [`pairs`] |
//! | `/tokenize`, `/detokenize`, `/tokenizer_info` | [`tokenize`] |
//! | `/v1/models` | [`models`] |
//! | `/v1/files` | [`files`] |
//! | `/v1/fine_tuning/jobs` | [`fine_tuning`] |
//! | `/v1/batches` | [`batches`] |
//! | `/v1/load_lora_adapter`, `/v1/unload_lora_adapter` | [`adapters`] |
//! | `/health`, `/version`, `/metrics` | [`health`] |
//!
//! What they share: [`body`] reads JSON, [`fields`] its fields, [`query`] what stands behind a `?`, [`params`] knows every parameter, [`error`]
//! every error, [`logprobs`] and [`answer`] the shapes of answers, [`sse`] streams,
//! [`reproducible`] answers that depend on nothing but the request.

pub mod adapters;
pub mod answer;
pub mod batches;
pub mod body;
pub mod chat;
pub mod completions;
pub mod error;
pub mod fields;
pub mod files;
pub mod fine_tuning;
pub mod health;
pub mod logprobs;
pub mod messages;
pub mod models;
pub mod pairs;
pub mod params;
pub mod query;
pub mod reproducible;
pub mod rerank;
pub mod score;
pub mod sse;
pub mod tokenize;

use std::{
    future::{Future, IntoFuture, poll_fn},
    io,
    pin::pin,
    sync::{Arc, OnceLock},
    task::Poll,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Map, Value};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot, watch},
    time::timeout,
};

use crate::{
    adapters::AdapterError, batch::jobs::BatchJobs, engine::Served, finetune::jobs::Jobs, lines::input::MAX_LINE_BYTES,
    metrics, storage::Storage, turns::unless_panics,
};
use error::{ApiError, Kind};
use fields::Fields;
use params::Endpoint;

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
    storage: Option<Arc<Storage>>,
    jobs: OnceLock<Arc<Jobs>>,
    batches: OnceLock<Arc<BatchJobs>>,
}

/// Prompts that are tokenised at a time: a body of the largest size takes some hundred times its bytes meanwhile.
const MAX_PREPARATIONS: usize = 2;

impl App {
    /// A server without a model: it answers that it is loading. Files and jobs are kept in `storage`, if they are kept.
    pub fn new(metrics: PrometheusHandle, options: HttpOptions, storage: Option<Arc<Storage>>) -> Self {
        Self {
            served: OnceLock::new(),
            phase: watch::Sender::new(Phase::Open),
            metrics,
            options,
            preparations: Semaphore::new(MAX_PREPARATIONS),
            storage,
            jobs: OnceLock::new(),
            batches: OnceLock::new(),
        }
    }

    /// One that answers as this one does, for lines of files: it goes on while this one's server ends.
    #[must_use]
    pub fn for_lines(&self) -> Self {
        let options = HttpOptions { max_body_bytes: MAX_LINE_BYTES, runtime_adapters: false, ..self.options };
        Self::new(self.metrics.clone(), options, None)
    }

    /// What outlives the server.
    ///
    /// # Errors
    /// When nothing does.
    pub fn storage(&self) -> Result<&Arc<Storage>, ApiError> {
        self.storage.as_ref().ok_or_else(|| ApiError::internal("a route of --storage was asked without it"))
    }

    /// Fine-tuning jobs can run.
    pub fn jobs_ready(&self, jobs: Arc<Jobs>) {
        let _ = self.jobs.set(jobs);
    }

    /// The fine-tuning jobs.
    ///
    /// # Errors
    /// As [`App::served`].
    pub fn jobs(&self) -> Result<&Arc<Jobs>, ApiError> {
        self.served()?;
        self.jobs.get().ok_or_else(ApiError::loading)
    }

    /// Batches can run.
    pub fn batches_ready(&self, batches: Arc<BatchJobs>) {
        let _ = self.batches.set(batches);
    }

    /// The batches.
    ///
    /// # Errors
    /// As [`App::served`].
    pub fn batches(&self) -> Result<&Arc<BatchJobs>, ApiError> {
        self.served()?;
        self.batches.get().ok_or_else(ApiError::loading)
    }

    /// What `make` makes of a body, with the model that it names; and the names of the fields that nobody knows.
    ///
    /// # Errors
    /// As [`params::admit`], [`App::served_as`] and `make`.
    pub async fn admitted<T: Send + 'static>(
        &self,
        body: Map<String, Value>,
        endpoint: Endpoint,
        make: impl FnOnce(&Arc<Served>, &Map<String, Value>) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<(T, Vec<String>), ApiError> {
        let unknown = params::admit(&body, endpoint, self.options.strict_params)?;
        let served = self.served_as(Fields::new(&body).string("model")?).await?;
        Ok((self.prepare(move || make(&served, &body)).await?, unknown))
    }

    /// Runs `work`, which templates and tokenises, beside few others; a client that leaves while it waits gives its
    /// turn away.
    ///
    /// # Errors
    /// As `work`.
    async fn prepare<T: Send + 'static>(
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
    /// Also when no model of that name is served, or there is no memory for its adapter.
    async fn served_as(&self, model: Option<&str>) -> Result<Arc<Served>, ApiError> {
        let served = self.served()?.clone();
        let Some(name) = model.filter(|name| !served.names.iter().any(|known| known == name)) else {
            return Ok(served);
        };
        let name = name.to_owned();
        blocking(move || match served.adapted(&name) {
            Ok(Some(adapted)) => Ok(Arc::new(adapted)),
            Ok(None) => Err(models::no_model(&served, &name)),
            Err(error @ (AdapterError::NoRoom(_) | AdapterError::TooLarge { .. })) => {
                Err(ApiError { param: Some("model".to_owned()), ..error.into() })
            }
            Err(error) => Err(ApiError::internal(format_args!("{name}: {error}"))),
        })
        .await
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
    if app.storage.is_some() {
        router = router
            .route("/v1/files", get(files::list).post(files::upload))
            .route("/v1/files/{id}", get(files::retrieve).delete(files::delete))
            .route("/v1/files/{id}/content", get(files::content))
            .route("/v1/batches", get(batches::list).post(batches::create))
            .route("/v1/batches/{id}", get(batches::retrieve))
            .route("/v1/batches/{id}/cancel", post(batches::cancel))
            .route("/v1/fine_tuning/jobs", get(fine_tuning::list).post(fine_tuning::create))
            .route("/v1/fine_tuning/jobs/{id}", get(fine_tuning::retrieve))
            .route("/v1/fine_tuning/jobs/{id}/cancel", post(fine_tuning::cancel))
            .route("/v1/fine_tuning/jobs/{id}/pause", post(fine_tuning::pause))
            .route("/v1/fine_tuning/jobs/{id}/resume", post(fine_tuning::resume))
            .route("/v1/fine_tuning/jobs/{id}/events", get(fine_tuning::events))
            .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(fine_tuning::checkpoints))
            .route("/v1/models/{*model}", delete(models::delete));
    }
    router
        .route("/health", get(health::health))
        .route("/version", get(health::version))
        .route("/metrics", get(health::metrics))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/score", post(score::create))
        .route("/score", post(score::create))
        .route("/v1/rerank", post(rerank::create))
        .route("/rerank", post(rerank::create))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/tokenizer_info", get(tokenize::info))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn(unless_it_panics))
        .layer(middleware::from_fn(observe))
        .with_state(app)
}

/// A handler that panics fails its own request.
async fn unless_it_panics(request: Request, next: Next) -> Response {
    let mut answering = pin!(next.run(request));
    let answered = poll_fn(|context| match unless_panics(|| answering.as_mut().poll(context)) {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(response)) => Poll::Ready(Ok(response)),
        Err(said) => Poll::Ready(Err(said)),
    });
    answered.await.unwrap_or_else(|said| ApiError::internal(said).into_response())
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
        "/v1/files",
        "/v1/batches",
        "/v1/fine_tuning/jobs",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/score",
        "/score",
        "/v1/rerank",
        "/rerank",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
    ];
    const BELOW: &[(&str, &str)] = &[
        ("/v1/models/", "/v1/models/{model}"),
        ("/v1/files/", "/v1/files/{file}"),
        ("/v1/batches/", "/v1/batches/{batch}"),
        ("/v1/fine_tuning/jobs/", "/v1/fine_tuning/jobs/{job}"),
    ];
    let exact = EXACT.iter().find(|&&route| route == path).copied();
    let below = |(prefix, _): &&(&str, &'static str)| path.starts_with(prefix);
    exact.or_else(|| BELOW.iter().find(below).map(|(_, label)| *label)).unwrap_or("other")
}

fn method_label(method: &str) -> &'static str {
    const METHODS: &[&str] = &["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"];
    METHODS.iter().find(|&&known| known == method).copied().unwrap_or("other")
}

#[cfg(test)]
mod tests;
