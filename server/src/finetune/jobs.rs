//! Fine-tuning jobs of a server: one at a time, on the weights that are served, on threads that give way to serving.
//!
//! What happens to a job is written to the [`Storage`] before anybody is told, so a server that is killed goes on where
//! the job's latest checkpoint is. A job that succeeds serves its adapter, and it serves its latest checkpoints, also once it
//! is cancelled. A job that fails leaves nothing.
//!
//! One thread looks at the data of new jobs, another one trains. A job that panics fails; where the storage fails, the thread
//! tries again later.

use std::{
    fmt::Write as _,
    fs, io,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    thread::{self, JoinHandle},
    time::Instant,
};

use anyhow::{Context, Result};
use cadre_models::DatasetError;
use serde_json::{Map, Value, json};

use super::{
    Ended, FinetuneArgs, Prepared, Watcher, Weights, checkpoint, hyperparameters,
    prepare::EVAL_FLAG,
    run::{self, LOG_FILE},
    settings::Settings,
    step_log::{EvaluationLine, Line, StepLine, StepLog},
};
use crate::{
    adapters::{self, AdapterSource, Adapters},
    metrics,
    storage::{Checkpoint, EventKind, Job, JobError, JobStatus, Level, NewJob, Purpose, Storage, StorageError, Upload},
    turns::{State, Turn, Turns, unless_panics},
};

/// What model names have in the place of OpenAI's organization.
const ORGANIZATION: &str = "cadre";
/// Steps between checkpoints at most: what a killed server loses.
const MOST_STEPS_UNSAVED: u64 = 100;
/// Checkpoints in the course of a job, if that leaves no more steps than those unsaved.
const CHECKPOINTS: u64 = 20;
/// Steps that are told of in the course of a job, if that leaves out no more than so many in a row.
const STEPS_TOLD: u64 = 200;
const MOST_STEPS_UNTOLD: u64 = 10;
/// What events and checkpoints call the losses of the training and of the validation data.
const TRAIN_LOSS: &str = "train_loss";
const VALID_LOSS: &str = "full_valid_loss";
/// What jobs train on top of.
#[derive(Clone)]
pub struct Base {
    /// As it was opened for serving.
    pub model: Option<String>,
    /// What tells its weights from others.
    pub fingerprint: String,
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
    /// A model that a job goes on from.
    #[error("the model `{model}` is needed by the fine-tuning job `{job}`, which is not done")]
    Needed {
        /// The model.
        model: String,
        /// The job.
        job: String,
    },
    /// The storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// The jobs of a server.
pub struct Jobs {
    storage: Arc<Storage>,
    base: Base,
    turns: Turns,
}

/// The thread that jobs train on.
pub struct Runner {
    jobs: Arc<Jobs>,
    thread: JoinHandle<()>,
}

impl Runner {
    /// Ends after the step that is running, whose job goes on when the server starts again.
    pub fn end(self) {
        self.jobs.turns.end();
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
        let jobs = Arc::new(Self { storage, base, turns: Turns::default() });
        for job in jobs.storage.jobs_with_models(&jobs.base.fingerprint)? {
            jobs.serve_again(&job)?;
        }
        for job in jobs.storage.jobs_of_others(&jobs.base.fingerprint)? {
            tracing::warn!(
                job = job.id,
                model = job.asked.model,
                "a fine-tuning job of another model: nothing of it is served"
            );
            if !job.status.is_final() {
                jobs.storage.set_status(&job.id, &[JobStatus::Running], JobStatus::Queued, None)?;
                let message = format!(
                    "The job belongs to another model than this server's, {}: it waits for a server with its own",
                    jobs.base.names.join(", ")
                );
                jobs.storage.add_event_once(&job.id, Level::Warn, &message)?;
            }
        }
        jobs.show_counts();
        let [looker, trainer] = [(); 2].map(|()| jobs.clone());
        let look = move || looker.work(Storage::next_to_validate, Self::validate);
        thread::Builder::new().name("validate".into()).spawn(look)?;
        let train = move || trainer.work(Storage::next_to_train, Self::train);
        let thread = thread::Builder::new().name("finetune".into()).spawn(train)?;
        Ok((jobs.clone(), Runner { jobs, thread }))
    }

    /// The names that the base model is served under.
    pub fn base_models(&self) -> &[String] {
        &self.base.names
    }

    /// Adds a job, whose data are looked at meanwhile.
    ///
    /// # Errors
    /// When a file isn't there, or the storage fails.
    pub fn create(&self, asked: NewJob) -> Result<Job, StorageError> {
        let job = self.storage.add_job(asked, &self.base.fingerprint)?;
        self.turns.wake();
        self.show_counts();
        Ok(job)
    }

    fn settings(&self, id: &str, asked: &NewJob) -> Result<Settings> {
        let mut fields = hyperparameters::fields(&asked.hyperparameters)?;
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
        let state = self.turns.state();
        if !self.storage.set_status(id, &open, JobStatus::Cancelled, Some("The job was cancelled"))? {
            return Err(self.refuse(id, "cancelled"));
        }
        if !state.stop(id) {
            self.storage.remove_run_of_no_model(id)?;
        }
        drop(state);
        self.show_counts();
        self.job(id)
    }

    /// Lets a job wait until it is resumed; one that trains saves first.
    ///
    /// # Errors
    /// When it is done or paused, or there is no such job.
    pub fn pause(&self, id: &str) -> Result<Job, JobsError> {
        let state = self.turns.state();
        let job = self.job(id)?;
        if job.status.is_final() || job.is_paused {
            return Err(self.refuse(id, "paused"));
        }
        self.storage.set_paused(id, true, "The job was paused")?;
        state.stop(id);
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
        self.storage.set_paused(id, false, "The job was resumed")?;
        self.turns.wake();
        self.job(id)
    }

    fn job(&self, id: &str) -> Result<Job, JobsError> {
        self.storage.job(id)?.ok_or_else(|| JobsError::NotFound(id.to_owned()))
    }

    fn refuse(&self, id: &str, wanted: &'static str) -> JobsError {
        match self.job(id) {
            Ok(job) if job.is_paused && !job.status.is_final() => {
                JobsError::Status { id: job.id, status: "paused", wanted }
            }
            Ok(job) => JobsError::Status { id: job.id, status: job.status.name(), wanted },
            Err(error) => error,
        }
    }

    fn show_counts(&self) {
        for status in JobStatus::ALL {
            if let Ok(count) = self.storage.count_jobs(status) {
                metrics::finetune_jobs(status.name(), count);
            }
        }
    }

    /// Does a `part` of one job after the other until the server ends; `next` says which one's.
    fn work(
        &self,
        next: fn(&Storage, &str) -> Result<Option<Job>, StorageError>,
        part: fn(&Self, &Job) -> Result<(), StorageError>,
    ) {
        give_way();
        let next = |_: &mut State| next(&self.storage, &self.base.fingerprint);
        let part = |job: Job| {
            let done = self.guarded(&job, part);
            self.show_counts();
            done
        };
        self.turns.work("fine-tuning jobs wait for the storage", next, || None, part);
    }

    /// Does a `part` of a job, which fails if that panics.
    fn guarded(&self, job: &Job, part: fn(&Self, &Job) -> Result<(), StorageError>) -> Result<(), StorageError> {
        unless_panics(|| part(self, job)).unwrap_or_else(|said| {
            let message = format!("the server failed while it worked on the job: {said}");
            self.fail(&job.id, "server_error", &message, None)
        })
    }

    /// Looks at a job's data; then it waits for its turn, or has failed.
    fn validate(&self, job: &Job) -> Result<(), StorageError> {
        let id = &job.id;
        for (param, file) in job.asked.files() {
            let message = format!("Validating {}: {file}", param.replace('_', " "));
            self.storage.add_event(id, Level::Info, &message, EventKind::Message)?;
        }
        let fits = self.settings(id, &job.asked).and_then(|settings| {
            let prepared = Prepared::new(&settings, Some(self.base.weights.clone()), &mut |_| {})?;
            let bytes = prepared.trainee.numbers().saturating_mul(size_of::<f32>() as u64);
            Ok(self.base.adapters.check_size(&self.model_name(job), bytes)?)
        });
        if let Err(error) = fits {
            if let (Some(found), Some(flag)) = (error.downcast_ref::<DatasetError>(), error.downcast_ref::<&str>()) {
                let mut files = job.asked.files();
                let (param, file) = if *flag == EVAL_FLAG { files.last() } else { files.next() }.unwrap_or_default();
                // A client knows its file by its id.
                let path = self.storage.file_path(file, Purpose::FineTune);
                let message = found.to_string().replace(&path.display().to_string(), file);
                return self.fail(id, &format!("invalid_{param}"), &message, Some(param));
            }
            let message = hyperparameters::by_names(&format!("{error:#}"));
            return self.fail(id, "invalid_hyperparameters", &message, Some("hyperparameters"));
        }
        let message = "Files validated, moving job to queued state";
        if self.storage.set_status(id, &[JobStatus::ValidatingFiles], JobStatus::Queued, Some(message))? {
            self.turns.wake();
        }
        Ok(())
    }

    fn fail(&self, id: &str, code: &str, message: &str, param: Option<&str>) -> Result<(), StorageError> {
        let error = JobError { code: code.to_owned(), message: message.to_owned(), param: param.map(str::to_owned) };
        let _state = self.turns.state();
        let Some(models) = self.storage.fail_job(id, &error)? else { return Ok(()) };
        tracing::warn!(job = id, message, "a fine-tuning job has failed");
        models.iter().for_each(|model| _ = self.base.adapters.unload(model));
        self.storage.remove_run_of_no_model(id)
    }

    /// The turn of a job that waits for it.
    fn begin(&self, id: &str) -> Result<Option<Turn<'_>>, StorageError> {
        let message =
            if self.storage.job_folder(id).exists() { "Fine-tuning job goes on" } else { "Fine-tuning job started" };
        let mut state = self.turns.state();
        if state.is_ending || !self.storage.begin_job(id, message)? {
            return Ok(None);
        }
        Ok(Some(self.turns.begin(&mut state, id)))
    }

    /// Trains a job until it ends or is stopped.
    fn train(&self, job: &Job) -> Result<(), StorageError> {
        let id = &job.id;
        let Some(turn) = self.begin(id)? else { return Ok(()) };
        self.show_counts();
        match self.make_steps(job, &turn.stop) {
            Ok(Ended::Finished { .. }) => {}
            Ok(Ended::Stopped { .. }) if self.turns.state().is_ending => {}
            // It was cancelled, or paused; it may have been resumed since.
            Ok(Ended::Stopped { .. }) => {
                self.storage.set_status(id, &[JobStatus::Running], JobStatus::Queued, None)?;
            }
            Err(error) => match error.downcast::<StorageError>() {
                Ok(error) => return Err(error),
                Err(error) if lacks_space(&error) => {
                    const FULL: &str = "The job was paused: the server's disk has no space left. Make room and resume it: it \
                                        goes on from its latest checkpoint";
                    tracing::warn!(
                        job = id,
                        error = format!("{error:#}"),
                        "a fine-tuning job waits for space on the disk"
                    );
                    self.storage.interrupt_job(id, FULL)?;
                }
                Err(error) if is_servers(&error) => {
                    const WHY: &str = "the server failed while it trained; its log says why";
                    tracing::error!(job = id, error = format!("{error:#}"), "a fine-tuning job can't go on");
                    self.fail(id, "server_error", WHY, None)?;
                }
                Err(error) => {
                    self.fail(id, "training_failed", &hyperparameters::by_names(&format!("{error:#}")), None)?;
                }
            },
        }
        drop(turn);
        self.storage.remove_run_of_no_model(id)
    }

    /// Makes the steps that a job has not yet made; if those are all, it has succeeded.
    fn make_steps(&self, job: &Job, stop: &AtomicBool) -> Result<Ended> {
        let mut settings = self.settings(&job.id, &job.asked)?;
        let prepared = Prepared::new(&settings, Some(self.base.weights.clone()), &mut |_| {})?;
        // As the same job would be whenever it is gone on with.
        let each = steps_between_checkpoints(prepared.data.steps(1.0), prepared.steps);
        (settings.save_every, settings.eval_every) = (each, each);
        let resume = run::has_begun(&settings.output)?;
        let mut watcher =
            JobWatcher { jobs: self, job, steps: 0, told: [0; 2], tokens: 0, first: None, latest: [None, None] };
        let ended = run::run(&settings, prepared, resume, stop, &mut watcher)?;
        if let Ended::Finished { .. } = ended {
            let model = self.model_name(job);
            let results = self.write_results(&job.id)?;
            // Nobody deletes a model that is about to be, and who sees that the job has succeeded finds its model served.
            let _state = self.turns.state();
            self.serve(&model, &settings.output);
            let finished = self.storage.finish_job(&job.id, &model, results);
            if !matches!(finished, Ok(true)) {
                self.base.adapters.unload(&model);
            }
            finished?;
        }
        Ok(ended)
    }

    /// Writes the CSV file of a job's results.
    fn write_results(&self, id: &str) -> Result<Upload> {
        let mut text = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n".to_owned();
        for line in StepLog::read(&self.storage.job_folder(id).join(LOG_FILE))? {
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
        let results = self.storage.new_results(id);
        fs::write(&results.path, text).with_context(|| format!("cannot write {}", results.path.display()))?;
        Ok(results)
    }

    /// `ft:BASE:ORGANIZATION:SUFFIX:ID`
    fn model_name(&self, job: &Job) -> String {
        let suffix = job.asked.suffix.as_deref().unwrap_or_default();
        let id = job.id.trim_start_matches("ftjob-");
        format!("ft:{}:{ORGANIZATION}:{suffix}:{id}", job.asked.model)
    }

    fn serve(&self, name: &str, folder: &Path) {
        self.base.adapters.add(AdapterSource { name: name.to_owned(), directory: folder.to_owned() });
    }

    /// Serves what a job had made when the server ended.
    fn serve_again(&self, job: &Job) -> Result<(), StorageError> {
        let folder = self.storage.job_folder(&job.id);
        let checkpoints = self.storage.checkpoints(&job.id, None, u32::MAX as usize)?.data;
        let checkpoints = checkpoints.into_iter().map(|one| (one.model, checkpoint::folder(&folder, one.step)));
        for (name, folder) in checkpoints.chain(job.fine_tuned_model.clone().map(|name| (name, folder.clone()))) {
            if adapters::is_in(&folder) {
                self.serve(&name, &folder);
            } else {
                tracing::warn!(model = name, folder = %folder.display(), "a fine-tuned model is gone: it isn't served");
            }
        }
        Ok(())
    }

    /// Removes what a job has made: a checkpoint, or by the name of its model everything; whether there was one of that name.
    ///
    /// # Errors
    /// When a job that isn't done needs it, or the storage fails.
    pub fn delete_model(&self, name: &str) -> Result<bool, JobsError> {
        let state = self.turns.state();
        let Some((job, step)) = self.storage.maker_of(name)? else { return Ok(false) };
        let is_current = state.current() == Some(job.id.as_str());
        if !job.status.is_final() || job.status == JobStatus::Cancelled && is_current {
            return Err(JobsError::Needed { model: name.to_owned(), job: job.id });
        }
        // What is not served any more may stay, but not the other way round.
        self.base.adapters.unload(name);
        match step {
            Some(step) => {
                self.storage.remove_checkpoint(&job.id, step)?;
                let folder = checkpoint::folder(&self.storage.job_folder(&job.id), step);
                if let Err(error) = fs::remove_dir_all(&folder) {
                    tracing::warn!(folder = %folder.display(), %error, "a checkpoint can't be removed");
                }
            }
            None => {
                let checkpoints = self.storage.forget_models(&job.id)?;
                checkpoints.iter().for_each(|model| _ = self.base.adapters.unload(model));
            }
        }
        self.storage.remove_run_of_no_model(&job.id)?;
        Ok(true)
    }
}

/// Steps between checkpoints of a job of so many `steps`: whole epochs, but for long ones.
fn steps_between_checkpoints(epoch: u64, steps: u64) -> u64 {
    let epoch = epoch.clamp(1, MOST_STEPS_UNSAVED);
    let apart = steps.div_ceil(CHECKPOINTS).min(MOST_STEPS_UNSAVED);
    epoch * (apart / epoch).max(1)
}

/// Whether something could not be written for lack of space.
fn lacks_space(error: &anyhow::Error) -> bool {
    let kinds = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    kinds.into_iter().any(|kind| matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
}

/// Whether something is wrong with the server's files, of which clients know neither names nor places.
fn is_servers(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let is_read = matches!(cause.downcast_ref(), Some(cadre_engine::Error::Fetch { .. }));
        is_read || cause.is::<io::Error>() || cause.is::<cadre_models::Error>() || cause.is::<DatasetError>()
    })
}

/// Writes down what happens to a job.
struct JobWatcher<'a> {
    jobs: &'a Jobs,
    job: &'a Job,
    steps: u64,
    /// The last steps whose training loss and whose validation loss were told of.
    told: [u64; 2],
    /// Tokens that went through the model, in all steps.
    tokens: u64,
    /// The first step that this process makes.
    first: Option<(u64, Instant)>,
    /// What the latest step and the latest evaluation found.
    latest: [Option<Line>; 2],
}

impl JobWatcher<'_> {
    fn event(&self, level: Level, message: &str, kind: EventKind) {
        note(self.jobs.storage.add_event(&self.job.id, level, message, kind));
    }

    /// What is known of the job's checkpoints.
    fn rows(&self) -> Vec<Checkpoint> {
        self.jobs.storage.checkpoints(&self.job.id, None, u32::MAX as usize).map(|page| page.data).unwrap_or_default()
    }

    /// Whether nothing follows, because the job was cancelled.
    fn is_done(&self) -> bool {
        self.jobs.job(&self.job.id).is_ok_and(|job| job.status.is_final())
    }

    /// Serves the checkpoint of a step, which is as good as these lines of the log say, and no longer those that are gone.
    fn list<'a>(&self, step: u64, lines: impl IntoIterator<Item = &'a Line>) {
        let (id, storage) = (&self.job.id, &self.jobs.storage);
        let folder = storage.job_folder(id);
        let model = format!("{}:ckpt-step-{step}", self.jobs.model_name(self.job));
        let mut found = Map::from_iter([("step".to_owned(), step.into())]);
        for line in lines {
            let values = match line {
                Line::Step(line) if line.step + 1 == step => {
                    [(TRAIN_LOSS, line.loss), ("train_mean_token_accuracy", line.accuracy)]
                }
                Line::Evaluation(line) if line.step == step => {
                    [(VALID_LOSS, line.loss), ("full_valid_mean_token_accuracy", line.accuracy)]
                }
                _ => continue,
            };
            found.extend(values.map(|(name, value)| (name.to_owned(), value.into())));
        }
        let _state = self.jobs.turns.state();
        // Nothing has been learnt before the first step, and a job that was cancelled gets no more checkpoints.
        if step == 0 || self.is_done() {
            return;
        }
        // Who finds the checkpoint in the list finds its model served.
        self.jobs.serve(&model, &checkpoint::folder(&folder, step));
        note(storage.add_checkpoint(id, step, &model, &found.into()));
        for old in self.rows().into_iter().filter(|one| !checkpoint::folder(&folder, one.step).exists()) {
            note(storage.remove_checkpoint(id, old.step));
            self.jobs.base.adapters.unload(&old.model);
        }
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
        self.first = Some((step, Instant::now()));
        // Steps that are made again after a kill are told once.
        self.told = [TRAIN_LOSS, VALID_LOSS]
            .map(|number| self.jobs.storage.last_step_with(&self.job.id, number).unwrap_or_default());
        let folder = self.jobs.storage.job_folder(&self.job.id);
        let lines = StepLog::read(&folder.join(LOG_FILE)).unwrap_or_default();
        let tokens = lines.iter().map(|line| if let Line::Step(step) = line { step.tokens } else { 0 });
        self.tokens = tokens.sum();
        // The server may have been killed between a checkpoint and its row.
        let rows = self.rows();
        let saved = checkpoint::found(&folder).unwrap_or_default().into_iter().map(|(step, _)| step);
        saved.filter(|step| rows.iter().all(|row| row.step != *step)).for_each(|step| self.list(step, &lines));
    }

    fn step(&mut self, line: &StepLine) {
        self.tokens += line.tokens;
        self.latest[0] = Some(Line::Step(line.clone()));
        metrics::finetune_step(line.loss, line.tokens, line.seconds);
        let done = line.step + 1;
        if done.is_multiple_of(self.steps.div_ceil(STEPS_TOLD).clamp(1, MOST_STEPS_UNTOLD)) || done == self.steps {
            let message = format!("Step {done}/{}: training loss={:.4}", self.steps, line.loss);
            let data = json!({
                "step": done, "total_steps": self.steps, TRAIN_LOSS: line.loss,
                "train_mean_token_accuracy": line.accuracy, "learning_rate": line.learning_rate,
            });
            if done > self.told[0] {
                self.event(Level::Info, &message, EventKind::Metrics(object(data)));
            }
            let (first, since) = self.first.unwrap_or((line.step, Instant::now()));
            let each = since.elapsed().as_secs_f64() / (done - first).max(1) as f64;
            let left = each * (self.steps - done) as f64;
            note(self.jobs.storage.set_progress(&self.job.id, self.tokens, left));
        }
    }

    fn guard(&mut self, step: u64, decision: &str) {
        if step < self.told[0] {
            return;
        }
        self.event(Level::Warn, &format!("Step {}: {decision}", step + 1), EventKind::Message);
    }

    fn evaluated(&mut self, line: &EvaluationLine) {
        let message = format!("Step {}/{}: validation loss={:.4}", line.step, self.steps, line.loss);
        let data = json!({
            "step": line.step, "total_steps": self.steps, VALID_LOSS: line.loss,
            "full_valid_mean_token_accuracy": line.accuracy,
        });
        if line.step > self.told[1] {
            self.event(Level::Info, &message, EventKind::Metrics(object(data)));
        }
        self.latest[1] = Some(Line::Evaluation(line.clone()));
    }

    fn saved(&mut self, step: u64) {
        self.list(step, self.latest.iter().flatten());
    }

    fn saves_what_is_stopped(&mut self) -> bool {
        !self.is_done()
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

#[cfg(test)]
mod tests;
