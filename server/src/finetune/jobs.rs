//! Fine-tuning jobs of a server: one at a time, on the weights that are served, on threads that give way to serving.
//!
//! What happens to a job is written to the [`Storage`] before anybody is told, so a server that is killed goes on where
//! the job's latest checkpoint is. A job that ends serves its adapter, and so does each of its latest checkpoints.

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, bail};
use cadre_models::DatasetError;
use serde_json::{Map, Value, json};

use super::{
    Ended, FinetuneArgs, Prepared, Watcher, Weights, checkpoint,
    prepare::EVAL_FLAG,
    run::{self, LOG_FILE},
    settings::Settings,
    step_log::{EvaluationLine, Line, StepLine, StepLog},
};
use crate::{
    adapters::{AdapterSource, Adapters},
    metrics,
    storage::{EventKind, Job, JobError, JobStatus, Level, NewJob, Purpose, Storage, StorageError},
};

/// What model names have in the place of OpenAI's organization.
const ORGANIZATION: &str = "cadre";
/// The learning rate that a multiplier of 1 stands for.
const LEARNING_RATE: f64 = 2e-4;
/// Steps between checkpoints at most: what a killed server loses.
const MOST_STEPS_UNSAVED: u64 = 100;
/// Steps that are told of in the course of a job, if that leaves out no more than so many in a row.
const STEPS_TOLD: u64 = 200;
const MOST_STEPS_UNTOLD: u64 = 10;
/// Settings that a job may give besides OpenAI's, by the names of `cadre finetune`'s flags with underscores.
const SETTINGS: [&str; 20] = [
    "rank",
    "alpha",
    "rslora",
    "dropout",
    "targets",
    "adapter_layout",
    "learning_rate",
    "scheduler",
    "warmup_ratio",
    "max_steps",
    "grad_accum",
    "weight_decay",
    "clip",
    "spike_threshold",
    "max_length",
    "packing",
    "loss_on",
    "aux_loss_coef",
    "z_loss_coef",
    "routing_warmup_steps",
];

/// What jobs train on top of.
#[derive(Clone)]
pub struct Base {
    /// As it was opened for serving.
    pub model: Option<String>,
    /// The names that it is served under.
    pub names: Vec<String>,
    /// Its weights.
    pub weights: Weights,
    /// Where adapters are served.
    pub adapters: Arc<Adapters>,
    /// Worker threads.
    pub threads: usize,
    /// Bytes that a job may use; what is free if absent.
    pub memory: Option<u64>,
}

/// Why something can't be done with a job.
#[derive(Debug, thiserror::Error)]
pub enum JobsError {
    /// There is no such job.
    #[error("no fine-tuning job has the id `{0}`")]
    NotFound(String),
    /// It is too late, or too early.
    #[error("the fine-tuning job `{id}` is {status}: it can't be {wanted}")]
    Status {
        /// The job.
        id: String,
        /// What it is.
        status: &'static str,
        /// What was asked for.
        wanted: &'static str,
    },
    /// The storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// The jobs of a server.
pub struct Jobs {
    storage: Arc<Storage>,
    base: Base,
    state: Mutex<State>,
    /// There may be something to do.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The job that trains, and what stops it.
    current: Option<(String, Arc<AtomicBool>)>,
    /// The server ends.
    is_ending: bool,
}

/// The thread that jobs train on.
pub struct Runner {
    jobs: Arc<Jobs>,
    thread: JoinHandle<()>,
}

impl Runner {
    /// Ends after the step that is running, whose job goes on when the server starts again.
    pub fn end(self) {
        let mut state = self.jobs.state();
        state.is_ending = true;
        if let Some((_, stop)) = &state.current {
            stop.store(true, Ordering::Relaxed);
        }
        drop(state);
        self.jobs.changed.notify_all();
        if self.thread.join().is_err() {
            tracing::error!("the thread of fine-tuning jobs has panicked");
        }
    }
}

impl Jobs {
    /// Serves what former jobs have made, and goes on with those that aren't done.
    ///
    /// # Errors
    /// When the storage can't be read.
    pub fn start(storage: Arc<Storage>, base: Base) -> Result<(Arc<Self>, Runner)> {
        let jobs = Arc::new(Self { storage, base, state: Mutex::default(), changed: Condvar::new() });
        for status in JobStatus::ALL {
            for job in jobs.storage.jobs_that_are(status)? {
                jobs.serve_again(&job)?;
                if job.status == JobStatus::ValidatingFiles {
                    jobs.clone().validate(job);
                }
            }
        }
        jobs.show_counts();
        let worker = jobs.clone();
        let thread = thread::Builder::new().name("finetune".into()).spawn(move || worker.work())?;
        Ok((jobs.clone(), Runner { jobs, thread }))
    }

    /// The names that the base model is served under.
    pub fn base_models(&self) -> &[String] {
        &self.base.names
    }

    /// Adds a job, whose data are looked at meanwhile.
    ///
    /// # Errors
    /// When the storage fails.
    pub fn create(self: &Arc<Self>, asked: NewJob) -> Result<Job, StorageError> {
        let job = self.storage.add_job(asked)?;
        let id = &job.id;
        self.storage.add_event(id, Level::Info, &format!("Created fine-tuning job: {id}"), EventKind::Message)?;
        self.clone().validate(job.clone());
        self.show_counts();
        Ok(job)
    }

    /// The settings of a job with these hyperparameters, which are completed by what OpenAI's own default to.
    ///
    /// # Errors
    /// When one is unknown, of another type, or out of its range.
    pub fn check(&self, hyperparameters: &mut Map<String, Value>) -> Result<()> {
        for (name, default) in
            [("n_epochs", json!(3)), ("batch_size", json!(4)), ("learning_rate_multiplier", json!(1))]
        {
            let value = hyperparameters.entry(name).or_insert(Value::Null);
            if value.is_null() || value == "auto" {
                *value = default;
            }
        }
        let nowhere = NewJob {
            model: String::new(),
            training_file: String::new(),
            validation_file: None,
            suffix: None,
            seed: 0,
            metadata: Map::new(),
            hyperparameters: hyperparameters.clone(),
        };
        self.settings("", &nowhere).map(|_| ())
    }

    fn settings(&self, id: &str, asked: &NewJob) -> Result<Settings> {
        let mut fields = Map::new();
        for (name, value) in &asked.hyperparameters {
            let (name, value) = match name.as_str() {
                "n_epochs" if asked.hyperparameters.contains_key("max_steps") => continue,
                "n_epochs" => ("epochs".to_owned(), value.clone()),
                "batch_size" => ("batch-size".to_owned(), value.clone()),
                "learning_rate_multiplier" if asked.hyperparameters.contains_key("learning_rate") => continue,
                "learning_rate_multiplier" => {
                    let factor = value.as_f64().with_context(|| format!("{name} must be a number, got {value}"))?;
                    ("learning-rate".to_owned(), json!(LEARNING_RATE * factor))
                }
                known if SETTINGS.contains(&known) => (known.replace('_', "-"), value.clone()),
                _ => bail!(
                    "`{name}` is not a hyperparameter: n_epochs, batch_size, learning_rate_multiplier, {}",
                    SETTINGS.join(", ")
                ),
            };
            fields.insert(name, value);
        }
        let path = |file: &str| json!([self.storage.file_path(file, Purpose::FineTune)]);
        fields.insert("model".to_owned(), json!(self.base.model));
        fields.insert("data".to_owned(), path(&asked.training_file));
        if let Some(file) = &asked.validation_file {
            fields.insert("eval".to_owned(), path(file));
        }
        fields.insert("output".to_owned(), json!(self.storage.job_folder(id)));
        fields.insert("seed".to_owned(), json!(asked.seed));
        fields.insert("report-to".to_owned(), json!("none"));
        fields.insert("threads".to_owned(), json!(self.base.threads));
        let mut settings = FinetuneArgs::settings_of(fields)?;
        settings.memory = self.base.memory;
        Ok(settings)
    }

    /// Cancels a job that isn't done.
    ///
    /// # Errors
    /// When it is, or there is no such job.
    pub fn cancel(&self, id: &str) -> Result<Job, JobsError> {
        let open = [JobStatus::ValidatingFiles, JobStatus::Queued, JobStatus::Running];
        if !self.storage.set_status(id, &open, JobStatus::Cancelled)? {
            return Err(self.refuse(id, "cancelled"));
        }
        self.storage.add_event(id, Level::Info, "The job was cancelled", EventKind::Message)?;
        self.stop(id);
        self.show_counts();
        self.job(id)
    }

    /// Lets a job wait until it is resumed; one that trains saves first.
    ///
    /// # Errors
    /// When it is done or paused, or there is no such job.
    pub fn pause(&self, id: &str) -> Result<Job, JobsError> {
        let job = self.job(id)?;
        if job.status.is_final() || job.is_paused {
            return Err(self.refuse(id, "paused"));
        }
        self.storage.set_paused(id, true)?;
        self.storage.add_event(id, Level::Info, "The job was paused", EventKind::Message)?;
        self.stop(id);
        self.job(id)
    }

    /// Lets a paused job go on.
    ///
    /// # Errors
    /// When it isn't paused, or there is no such job.
    pub fn resume(&self, id: &str) -> Result<Job, JobsError> {
        let job = self.job(id)?;
        if job.status.is_final() || !job.is_paused {
            return Err(self.refuse(id, "resumed"));
        }
        self.storage.set_paused(id, false)?;
        self.storage.add_event(id, Level::Info, "The job was resumed", EventKind::Message)?;
        self.changed.notify_all();
        self.job(id)
    }

    fn job(&self, id: &str) -> Result<Job, JobsError> {
        self.storage.job(id)?.ok_or_else(|| JobsError::NotFound(id.to_owned()))
    }

    fn refuse(&self, id: &str, wanted: &'static str) -> JobsError {
        match self.job(id) {
            Ok(job) if job.is_paused => JobsError::Status { id: job.id, status: "paused", wanted },
            Ok(job) => JobsError::Status { id: job.id, status: job.status.name(), wanted },
            Err(error) => error,
        }
    }

    fn stop(&self, id: &str) {
        if let Some((_, stop)) = self.state().current.as_ref().filter(|(current, _)| current == id) {
            stop.store(true, Ordering::Relaxed);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock can leave it half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show_counts(&self) {
        for status in JobStatus::ALL {
            if let Ok(count) = self.storage.count_jobs(status) {
                metrics::finetune_jobs(status.name(), count);
            }
        }
    }

    /// Looks at a job's data on a thread of its own; then it waits for its turn, or has failed.
    fn validate(self: Arc<Self>, job: Job) {
        let id = job.id.clone();
        let jobs = self.clone();
        let spawned = thread::Builder::new().name("validate".into()).spawn(move || {
            give_way();
            if let Err(error) = jobs.validated(&job) {
                tracing::error!(job = job.id, %error, "a fine-tuning job could not be validated");
            }
            jobs.show_counts();
            jobs.changed.notify_all();
        });
        if let Err(error) = spawned {
            tracing::error!(job = id, %error, "a fine-tuning job is validated at the next start");
        }
    }

    fn validated(&self, job: &Job) -> Result<(), StorageError> {
        let id = &job.id;
        let files = [
            ("training_file", Some(&job.asked.training_file)),
            ("validation_file", job.asked.validation_file.as_ref()),
        ];
        for (param, file) in files.into_iter().filter_map(|(param, file)| Some((param, file?))) {
            let what = param.replace('_', " ");
            self.storage.add_event(id, Level::Info, &format!("Validating {what}: {file}"), EventKind::Message)?;
        }
        let prepared = self
            .settings(id, &job.asked)
            .and_then(|settings| Prepared::new(&settings, Some(self.base.weights.clone()), &mut |_| {}));
        if let Err(error) = prepared {
            if let (Some(found), Some(flag)) = (error.downcast_ref::<DatasetError>(), error.downcast_ref::<&str>()) {
                let (param, file) = files[usize::from(*flag == EVAL_FLAG)];
                let file = file.map_or("", String::as_str);
                // A client knows its file by its id.
                let path = self.storage.file_path(file, Purpose::FineTune);
                let message = found.to_string().replace(&path.display().to_string(), file);
                return self.fail(id, &format!("invalid_{param}"), &message, Some(param));
            }
            return self.fail(id, "invalid_hyperparameters", &format!("{error:#}"), Some("hyperparameters"));
        }
        if self.storage.set_status(id, &[JobStatus::ValidatingFiles], JobStatus::Queued)? {
            let message = "Files validated, moving job to queued state";
            self.storage.add_event(id, Level::Info, message, EventKind::Message)?;
        }
        Ok(())
    }

    fn fail(&self, id: &str, code: &str, message: &str, param: Option<&str>) -> Result<(), StorageError> {
        tracing::warn!(job = id, message, "a fine-tuning job has failed");
        let error = JobError { code: code.to_owned(), message: message.to_owned(), param: param.map(str::to_owned) };
        self.storage.add_event(id, Level::Error, &format!("The job failed: {message}"), EventKind::Message)?;
        self.storage.fail_job(id, &error)
    }

    /// Trains one job after the other until the server ends.
    fn work(&self) {
        give_way();
        while let Some((job, stop)) = self.wait() {
            if let Err(error) = self.turn(&job, &stop) {
                tracing::error!(job = job.id, %error, "a fine-tuning job can't be kept up with");
                let _ = self.fail(&job.id, "server_error", &error.to_string(), None);
            }
            self.state().current = None;
            self.show_counts();
        }
    }

    /// The next job; `None` when the server ends.
    fn wait(&self) -> Option<(Job, Arc<AtomicBool>)> {
        let mut state = self.state();
        loop {
            if state.is_ending {
                return None;
            }
            match self.storage.next_job() {
                Ok(Some(job)) => {
                    let stop = Arc::new(AtomicBool::new(false));
                    state.current = Some((job.id.clone(), stop.clone()));
                    return Some((job, stop));
                }
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "the next fine-tuning job is unknown"),
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Trains a job until it ends or is stopped.
    fn turn(&self, job: &Job, stop: &AtomicBool) -> Result<(), StorageError> {
        let id = &job.id;
        if !self.storage.set_status(id, &[JobStatus::Queued, JobStatus::Running], JobStatus::Running)? {
            return Ok(());
        }
        self.show_counts();
        let message =
            if self.storage.job_folder(id).exists() { "Fine-tuning job goes on" } else { "Fine-tuning job started" };
        self.storage.add_event(id, Level::Info, message, EventKind::Message)?;
        match self.train(job, stop) {
            Ok(true) => self.publish(job)?,
            Ok(false) if self.state().is_ending => {}
            // It was cancelled, or paused; it may have been resumed since.
            Ok(false) => {
                self.storage.set_status(id, &[JobStatus::Running], JobStatus::Queued)?;
            }
            Err(error) => self.fail(id, "training_failed", &format!("{error:#}"), None)?,
        }
        Ok(())
    }

    /// Whether the job made all its steps.
    fn train(&self, job: &Job, stop: &AtomicBool) -> Result<bool> {
        let mut settings = self.settings(&job.id, &job.asked)?;
        let prepared = Prepared::new(&settings, Some(self.base.weights.clone()), &mut |_| {})?;
        // As the same job would be whenever it is gone on with.
        let epoch = prepared.data.steps(1.0).clamp(1, MOST_STEPS_UNSAVED);
        (settings.save_every, settings.eval_every) = (epoch, epoch);
        let resume = run::has_begun(&settings.output)?;
        let mut watcher =
            JobWatcher { jobs: self, job, steps: 0, tokens: 0, first: None, trained: None, held_out: None };
        let ended = run::run(&settings, prepared, resume, stop, &mut watcher)?;
        Ok(matches!(ended, Ended::Finished { .. }))
    }

    /// Serves what a job has made.
    fn publish(&self, job: &Job) -> Result<(), StorageError> {
        let (id, model) = (&job.id, self.model_name(job));
        let folder = self.storage.job_folder(id);
        let made = self.serve(&model, &folder).and_then(|()| self.keep_results(id, &folder));
        let results = match made {
            Ok(results) => results,
            Err(error) => return self.fail(id, "server_error", &format!("{error:#}"), None),
        };
        if self.storage.finish_job(id, &model, &results)? {
            let message = format!("New fine-tuned model created: {model}");
            self.storage.add_event(id, Level::Info, &message, EventKind::Message)?;
            let message = "The job has successfully completed";
            self.storage.add_event(id, Level::Info, message, EventKind::Message)?;
        }
        Ok(())
    }

    /// Writes the CSV file of a job's results, and returns its id.
    fn keep_results(&self, id: &str, folder: &Path) -> Result<String> {
        let mut text = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n".to_owned();
        let lines = StepLog::read(&folder.join(LOG_FILE))?;
        for line in &lines {
            match line {
                Line::Step(StepLine { step, loss, accuracy, .. }) => {
                    writeln!(text, "{},{loss},{accuracy},,", step + 1)?
                }
                Line::Evaluation(EvaluationLine { step, loss, accuracy }) => {
                    writeln!(text, "{step},,,{loss},{accuracy}")?
                }
                Line::Guard(_) | Line::Routing(_) => {}
            }
        }
        let upload = self.storage.new_upload();
        fs::write(&upload.path, text).with_context(|| format!("cannot write {}", upload.path.display()))?;
        Ok(self.storage.add_file(upload, &format!("step_metrics-{id}.csv"), Purpose::FineTuneResults)?.id)
    }

    /// `ft:BASE:ORGANIZATION:SUFFIX:ID`
    fn model_name(&self, job: &Job) -> String {
        let suffix = job.asked.suffix.as_deref().unwrap_or_default();
        let id = job.id.trim_start_matches("ftjob-");
        format!("ft:{}:{ORGANIZATION}:{suffix}:{id}", job.asked.model)
    }

    fn serve(&self, name: &str, folder: &Path) -> Result<()> {
        let source = AdapterSource { name: name.to_owned(), directory: folder.to_owned() };
        Ok(self.base.adapters.load(&source, true)?)
    }

    /// Serves what a job had made when the server ended.
    fn serve_again(&self, job: &Job) -> Result<(), StorageError> {
        let folder = self.storage.job_folder(&job.id);
        let checkpoints = self.storage.checkpoints(&job.id, None, u32::MAX as usize)?.data;
        let checkpoints = checkpoints.into_iter().map(|one| (one.model, checkpoint::folder(&folder, one.step)));
        for (name, folder) in checkpoints.chain(job.fine_tuned_model.clone().map(|name| (name, folder.clone()))) {
            if let Err(error) = self.serve(&name, &folder) {
                tracing::warn!(model = name, error = format!("{error:#}"), "a fine-tuned model isn't served");
            }
        }
        Ok(())
    }

    /// Forgets a model that a job has made, with its checkpoints; whether there was one.
    ///
    /// # Errors
    /// When the storage fails.
    pub fn delete_model(&self, name: &str) -> Result<bool, StorageError> {
        let Some(checkpoints) = self.storage.forget_model(name)? else { return Ok(false) };
        for model in checkpoints.iter().map(String::as_str).chain([name]) {
            self.base.adapters.unload(model);
        }
        Ok(true)
    }
}

/// Writes down what happens to a job.
struct JobWatcher<'a> {
    jobs: &'a Jobs,
    job: &'a Job,
    steps: u64,
    /// Tokens that went through the model, in all steps.
    tokens: u64,
    /// The first step that this process makes.
    first: Option<(u64, std::time::Instant)>,
    /// What the latest step found.
    trained: Option<(f64, f64)>,
    /// What the latest evaluation found.
    held_out: Option<EvaluationLine>,
}

impl JobWatcher<'_> {
    fn event(&self, level: Level, message: &str, kind: EventKind) {
        note(self.jobs.storage.add_event(&self.job.id, level, message, kind));
    }
}

/// A job goes on if something about it can't be written down.
fn note(result: Result<(), StorageError>) {
    if let Err(error) = result {
        tracing::error!(%error, "what happened to a fine-tuning job isn't kept");
    }
}

impl Watcher for JobWatcher<'_> {
    fn begins(&mut self, step: u64, steps: u64) {
        self.steps = steps;
        self.first = Some((step, std::time::Instant::now()));
        note(self.jobs.storage.forget_metrics_after(&self.job.id, step));
        let lines = StepLog::read(&self.jobs.storage.job_folder(&self.job.id).join(LOG_FILE)).unwrap_or_default();
        let tokens = lines.iter().map(|line| if let Line::Step(step) = line { step.tokens } else { 0 });
        self.tokens = tokens.sum();
    }

    fn step(&mut self, line: &StepLine) {
        self.tokens += line.tokens;
        self.trained = Some((line.loss, line.accuracy));
        metrics::finetune_step(line.loss, line.tokens, line.seconds);
        let done = line.step + 1;
        if done.is_multiple_of(self.steps.div_ceil(STEPS_TOLD).clamp(1, MOST_STEPS_UNTOLD)) || done == self.steps {
            let message = format!("Step {done}/{}: training loss={:.4}", self.steps, line.loss);
            let data = json!({
                "step": done, "total_steps": self.steps, "train_loss": line.loss,
                "train_mean_token_accuracy": line.accuracy, "learning_rate": line.learning_rate,
            });
            self.event(Level::Info, &message, EventKind::Metrics(object(data)));
            let (first, since) = self.first.unwrap_or((line.step, std::time::Instant::now()));
            let each = since.elapsed().as_secs_f64() / (done - first).max(1) as f64;
            let left = each * (self.steps - done) as f64;
            note(self.jobs.storage.set_progress(&self.job.id, self.tokens, left));
        }
    }

    fn guard(&mut self, step: u64, decision: &str) {
        self.event(Level::Warn, &format!("Step {}: {decision}", step + 1), EventKind::Message);
    }

    fn evaluated(&mut self, line: &EvaluationLine) {
        let message = format!("Step {}/{}: validation loss={:.4}", line.step, self.steps, line.loss);
        let data = json!({
            "step": line.step, "total_steps": self.steps, "full_valid_loss": line.loss,
            "full_valid_mean_token_accuracy": line.accuracy,
        });
        self.event(Level::Info, &message, EventKind::Metrics(object(data)));
        self.held_out = Some(line.clone());
    }

    fn saved(&mut self, step: u64) {
        let id = &self.job.id;
        let folder = self.jobs.storage.job_folder(id);
        let model = format!("{}:ckpt-step-{step}", self.jobs.model_name(self.job));
        let mut found = Map::from_iter([("step".to_owned(), step.into())]);
        if let Some((loss, accuracy)) = self.trained {
            found.extend([
                ("train_loss".to_owned(), loss.into()),
                ("train_mean_token_accuracy".to_owned(), accuracy.into()),
            ]);
        }
        if let Some(EvaluationLine { loss, accuracy, .. }) = self.held_out.as_ref().filter(|line| line.step == step) {
            let values = [("full_valid_loss", *loss), ("full_valid_mean_token_accuracy", *accuracy)];
            found.extend(values.map(|(name, value)| (name.to_owned(), value.into())));
        }
        if let Err(error) = self.jobs.serve(&model, &checkpoint::folder(&folder, step)) {
            tracing::warn!(model, error = format!("{error:#}"), "a checkpoint isn't served");
            return;
        }
        note(self.jobs.storage.add_checkpoint(id, step, &model, &found.into()));
        let known =
            self.jobs.storage.checkpoints(id, None, u32::MAX as usize).map(|page| page.data).unwrap_or_default();
        for old in known.into_iter().filter(|one| !checkpoint::folder(&folder, one.step).exists()) {
            note(self.jobs.storage.remove_checkpoint(id, old.step));
            self.jobs.base.adapters.unload(&old.model);
        }
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Lets all other threads go first, those of serving among them; the threads that this one starts do as well.
fn give_way() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, 19) {
        tracing::warn!(%error, "fine-tuning jobs share the processor with serving as equals");
    }
}
