//! `/v1/fine_tuning/jobs`: create, list, get, cancel, pause, resume, events, checkpoints; there only with `--storage`.

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
    adapters::fits_names,
    finetune::{
        hyperparameters::{self, HyperparameterError},
        jobs::{Jobs, JobsError},
    },
    random::random_seed,
    storage::{Checkpoint, Event, Job, JobStatus, NewJob},
};

/// Of a suffix, in characters.
const MAX_SUFFIX: usize = 64;
const MAX_LIMIT: usize = 100;

/// Adds a job.
///
/// # Errors
/// When the request is at fault, or a file isn't there.
pub async fn create(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let unknown = params::admit(&body, Endpoint::FineTuning, app.options.strict_params)?;
    let jobs = app.jobs()?.clone();
    let asked = asked(&jobs, &body)?;
    let job = blocking(move || Ok(jobs.create(asked)?));
    let mut response = Json(object(&job.await?)).into_response();
    answer::name_ignored(&mut response, &unknown);
    Ok(response)
}

fn asked(jobs: &Jobs, body: &Map<String, Value>) -> Result<NewJob, ApiError> {
    let fields = Fields::new(body);
    let model = fields.string("model")?.ok_or_else(|| required("model"))?;
    if !jobs.base_models().iter().any(|name| name == model) {
        let known = jobs.base_models().join("`, `");
        let message = format!("The model `{model}` can't be fine-tuned here. This server fine-tunes `{known}`.");
        return Err(ApiError::new(Kind::ModelNotFound, message).or_param("model"));
    }
    let (mut hyperparameters, path) = hyperparameters(fields)?;
    hyperparameters::complete(&mut hyperparameters).map_err(|HyperparameterError { name, message }| {
        let path = name.map_or_else(|| path.to_owned(), |name| format!("{path}.{name}"));
        ApiError::invalid(path, sentence(&message))
    })?;
    let suffix = fields.string("suffix")?.filter(|suffix| !suffix.is_empty());
    if let Some(suffix) = suffix.filter(|suffix| suffix.chars().count() > MAX_SUFFIX) {
        let message = format!("suffix must have at most {MAX_SUFFIX} characters, got {}.", suffix.chars().count());
        return Err(ApiError::invalid("suffix", message));
    }
    if suffix.is_some_and(|suffix| !suffix.chars().all(fits_names)) {
        let message =
            "suffix may hold neither a comma, a slash nor a control character: it is a part of the model's name.";
        return Err(ApiError::invalid("suffix", message));
    }
    let seed = fields.integer("seed", 0, i64::from(u32::MAX))?.map(i64::cast_unsigned);
    Ok(NewJob {
        model: model.to_owned(),
        training_file: fields.string("training_file")?.ok_or_else(|| required("training_file"))?.to_owned(),
        validation_file: fields.string("validation_file")?.map(str::to_owned),
        suffix: suffix.map(str::to_owned),
        seed: seed.unwrap_or_else(|| random_seed() % (1 << 31)),
        metadata: metadata(fields)?,
        hyperparameters,
    })
}

/// Those of the method, or of the body itself as in older versions of the API, and where they lie.
fn hyperparameters(fields: Fields<'_>) -> Result<(Map<String, Value>, &'static str), ApiError> {
    const BESIDE: &str = "hyperparameters";
    const WITHIN: &str = "method.supervised.hyperparameters";
    let beside = fields.object(BESIDE)?;
    let Some(method) = fields.get("method") else { return Ok((beside.cloned().unwrap_or_default(), BESIDE)) };
    if beside.is_some_and(|beside| !beside.is_empty()) {
        return Err(ApiError::invalid(BESIDE, format!("Give the hyperparameters in {WITHIN} only, not beside it.")));
    }
    let method = Fields::nested(method, "method")?;
    match method.string("type")? {
        None | Some("supervised") => {}
        Some(other) => {
            let message =
                format!("method.type must be \"supervised\", got \"{other}\": this server trains by no other.");
            return Err(ApiError::invalid("method.type", message));
        }
    }
    method.has_only(&["type", "supervised"])?;
    let Some(supervised) = method.get("supervised") else { return Ok((Map::new(), WITHIN)) };
    let supervised = Fields::nested(supervised, "method.supervised")?;
    supervised.has_only(&["hyperparameters"])?;
    Ok((supervised.object("hyperparameters")?.cloned().unwrap_or_default(), WITHIN))
}

/// All jobs, the latest first.
///
/// # Errors
/// When a parameter is out of range.
pub async fn list(State(app): State<Arc<App>>, query: Parameters) -> Result<Json<Value>, ApiError> {
    let storage = app.storage()?.clone();
    let (after, limit, metadata) = (query.after(), query.limit(20, MAX_LIMIT)?, query.below("metadata"));
    let page = blocking(move || Ok(storage.jobs(after.as_deref(), limit, &metadata)?)).await?;
    Ok(Json(list_of(&page, object)))
}

/// A job.
///
/// # Errors
/// When there is no such job.
pub async fn retrieve(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let storage = app.storage()?.clone();
    let job = blocking(move || storage.job(&id)?.ok_or_else(|| JobsError::NotFound(id).into())).await?;
    Ok(Json(object(&job)))
}

/// Cancels a job.
///
/// # Errors
/// When it is done, or there is no such job.
pub async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    change(&app, move |jobs| jobs.cancel(&id)).await
}

/// Pauses a job.
///
/// # Errors
/// When it is done or paused, or there is no such job.
pub async fn pause(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    change(&app, move |jobs| jobs.pause(&id)).await
}

/// Lets a paused job go on.
///
/// # Errors
/// When it isn't paused, or there is no such job.
pub async fn resume(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    change(&app, move |jobs| jobs.resume(&id)).await
}

async fn change(
    app: &App,
    change: impl FnOnce(&Jobs) -> Result<Job, JobsError> + Send + 'static,
) -> Result<Json<Value>, ApiError> {
    let jobs = app.jobs()?.clone();
    Ok(Json(object(&blocking(move || Ok(change(&jobs)?)).await?)))
}

/// What has happened to a job, the latest first.
///
/// # Errors
/// When there is no such job, or a parameter is out of range.
pub async fn events(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    query: Parameters,
) -> Result<Json<Value>, ApiError> {
    let storage = app.storage()?.clone();
    let (after, limit) = (query.after(), query.limit(20, MAX_LIMIT)?);
    let page = blocking(move || {
        let job = storage.job(&id)?.ok_or(JobsError::NotFound(id))?;
        Ok(storage.events(&job.id, after.as_deref(), limit)?)
    });
    Ok(Json(list_of(&page.await?, event)))
}

/// A job's checkpoints, the latest first.
///
/// # Errors
/// When there is no such job, or a parameter is out of range.
pub async fn checkpoints(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    query: Parameters,
) -> Result<Json<Value>, ApiError> {
    let storage = app.storage()?.clone();
    let (after, limit) = (query.after(), query.limit(10, MAX_LIMIT)?);
    let job = id.clone();
    let page = blocking(move || {
        let job = storage.job(&job)?.ok_or(JobsError::NotFound(job))?;
        Ok(storage.checkpoints(&job.id, after.as_deref(), limit)?)
    });
    Ok(Json(list_of(&page.await?, |one| checkpoint(&id, one))))
}

fn object(job: &Job) -> Value {
    let Job { asked, status, error, .. } = job;
    let error = error.as_ref().map(|error| json!({"code": error.code, "message": error.message, "param": error.param}));
    json!({
        "object": "fine_tuning.job", "id": job.id, "created_at": job.created, "model": asked.model,
        "fine_tuned_model": job.fine_tuned_model, "organization_id": "org-cadre", "status": status.name(),
        "paused": job.is_paused && !status.is_final(), "hyperparameters": asked.hyperparameters,
        "training_file": asked.training_file, "validation_file": asked.validation_file,
        "result_files": job.result_file.iter().collect::<Vec<_>>(), "trained_tokens": job.trained_tokens,
        "finished_at": job.finished, "estimated_finish": job.estimated_finish.filter(|_| *status == JobStatus::Running),
        "seed": asked.seed, "suffix": asked.suffix, "error": error, "integrations": [], "metadata": asked.metadata,
        "method": {"type": "supervised", "supervised": {"hyperparameters": asked.hyperparameters}},
    })
}

fn event(event: &Event) -> Value {
    json!({
        "object": "fine_tuning.job.event", "id": event.id, "created_at": event.created, "level": event.level,
        "message": event.message, "type": event.kind, "data": event.data,
    })
}

fn checkpoint(job: &str, checkpoint: &Checkpoint) -> Value {
    json!({
        "object": "fine_tuning.job.checkpoint", "id": checkpoint.id, "created_at": checkpoint.created,
        "fine_tuning_job_id": job, "step_number": checkpoint.step, "fine_tuned_model_checkpoint": checkpoint.model,
        "metrics": checkpoint.metrics,
    })
}

impl From<JobsError> for ApiError {
    fn from(error: JobsError) -> Self {
        let kind = match error {
            JobsError::NotFound(_) => Kind::ObjectNotFound,
            JobsError::Status { .. } | JobsError::Needed { .. } => Kind::Conflict,
            JobsError::Storage(error) => return error.into(),
        };
        Self::new(kind, sentence(&error.to_string()))
    }
}
