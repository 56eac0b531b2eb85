//! Fine-tuning jobs, their events and their checkpoints.

use std::fs;

use rusqlite::{Connection, OptionalExtension, Row, ToSql, params, types::FromSqlError};
use serde_json::{Map, Value};

use super::{
    Page, Purpose, Storage, StorageError, Upload, entries,
    files::{check_file, insert},
    is_id, new_id, now, page, place_of, swept_later, unreadable,
};

/// How far a job is, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobStatus {
    /// Its data are looked at.
    ValidatingFiles,
    /// It waits for its turn, or is paused.
    Queued,
    /// It trains.
    Running,
    /// Its model is served.
    Succeeded,
    /// It can't go on.
    Failed,
    /// Somebody has cancelled it.
    Cancelled,
}

impl JobStatus {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::ValidatingFiles, Self::Queued, Self::Running, Self::Succeeded, Self::Failed, Self::Cancelled];

    /// OpenAI's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobError {
    /// A word for programs.
    pub code: String,
    /// For people.
    pub message: String,
    /// The parameter at fault.
    pub param: Option<String>,
}

/// What a job is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct NewJob {
    /// The model that it begins from.
    pub model: String,
    /// The file with its training data.
    pub training_file: String,
    /// The file with held-out data.
    pub validation_file: Option<String>,
    /// What its model's name has.
    pub suffix: Option<String>,
    /// Where its randomness begins.
    pub seed: u64,
    /// What the client keeps with it.
    pub metadata: Map<String, Value>,
    /// Its settings, by the names of `cadre finetune`'s flags.
    pub hyperparameters: Map<String, Value>,
}

impl NewJob {
    /// Its files, each with the field that names it.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let held_out = self.validation_file.as_deref().map(|file| ("validation_file", file));
        std::iter::once(("training_file", self.training_file.as_str())).chain(held_out)
    }
}

/// A job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// `ftjob-…`
    pub id: String,
    /// When it came, in seconds since 1970.
    pub created: i64,
    /// What it is made of.
    pub asked: NewJob,
    /// How far it is.
    pub status: JobStatus,
    /// It waits until it is resumed.
    pub is_paused: bool,
    /// The name that its model is served under.
    pub fine_tuned_model: Option<String>,
    /// The file with its results.
    pub result_file: Option<String>,
    /// Tokens that went through the model.
    pub trained_tokens: Option<u64>,
    /// When it ended.
    pub finished: Option<i64>,
    /// When it will probably end.
    pub estimated_finish: Option<i64>,
    /// Why it failed.
    pub error: Option<JobError>,
}

/// How important an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// As it should be.
    Info,
    /// Worth a look.
    Warn,
    /// The job fails.
    Error,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// What an event tells.
#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    /// Its message.
    Message,
    /// Numbers, too.
    Metrics(Map<String, Value>),
}

/// Something that happened to a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// `ft-event-…`
    pub id: String,
    /// When, in seconds since 1970.
    pub created: i64,
    /// How important it is.
    pub level: String,
    /// For people.
    pub message: String,
    /// `message` or `metrics`.
    pub kind: String,
    /// The numbers of `metrics`.
    pub data: Value,
}

/// A checkpoint whose adapter is served.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// `ftckpt_…`
    pub id: String,
    /// When it was saved, in seconds since 1970.
    pub created: i64,
    /// After which step.
    pub step: u64,
    /// The name that it is served under.
    pub model: String,
    /// How good it is.
    pub metrics: Value,
}

/// Of a job's row: it isn't done.
pub(super) const IS_OPEN: &str = "status IN ('validating_files', 'queued', 'running')";
/// Of a job's row: it has made models that are served.
const HAS_MODELS: &str = "(fine_tuned_model IS NOT NULL OR EXISTS (SELECT 1 FROM checkpoints WHERE job = jobs.id))";
/// What a job's id begins with.
pub(super) const JOB_PREFIX: &str = "ftjob-";
const JOB: &str =
    "SELECT id, created, model, training_file, validation_file, suffix, seed, metadata, hyperparameters, status,
                   paused, fine_tuned_model, result_file, trained_tokens, finished, estimated_finish, error FROM jobs";

impl Storage {
    /// Adds a job, whose files are to be looked at; `base` is the fingerprint of the weights that it begins from.
    ///
    /// # Errors
    /// When a file isn't there, or the database fails.
    pub fn add_job(&self, asked: NewJob, base: &str) -> Result<Job, StorageError> {
        let job = Job {
            id: new_id(JOB_PREFIX),
            created: now(),
            asked,
            status: JobStatus::ValidatingFiles,
            is_paused: false,
            fine_tuned_model: None,
            result_file: None,
            trained_tokens: None,
            finished: None,
            estimated_finish: None,
            error: None,
        };
        let NewJob { model, training_file, validation_file, suffix, seed, metadata, hyperparameters } = &job.asked;
        let [metadata, hyperparameters] = [metadata, hyperparameters].map(|map| Value::from(map.clone()).to_string());
        let mut database = self.database();
        let transaction = database.transaction()?;
        for (role, file) in job.asked.files() {
            check_file(&transaction, role, file, Purpose::FineTune)?;
        }
        transaction.execute(
            "INSERT INTO jobs (id, created, model, training_file, validation_file, suffix, seed, metadata, hyperparameters,
             status, base) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            params![
                job.id,
                job.created,
                model,
                training_file,
                validation_file,
                suffix,
                seed.cast_signed(),
                metadata,
                hyperparameters,
                job.status.name(),
                base
            ],
        )?;
        let message = format!("Created fine-tuning job: {}", job.id);
        insert_event(&transaction, &job.id, Level::Info, &message, EventKind::Message)?;
        transaction.commit()?;
        Ok(job)
    }

    /// A job.
    ///
    /// # Errors
    /// When the database fails.
    pub fn job(&self, id: &str) -> Result<Option<Job>, StorageError> {
        Ok(self.database().query_row(&format!("{JOB} WHERE id = ?"), [id], read).optional()?)
    }

    /// Jobs, the latest first, from the one that comes after `after` on; those with these metadata only.
    ///
    /// # Errors
    /// When the database fails.
    pub fn jobs(
        &self,
        after: Option<&str>,
        limit: usize,
        metadata: &[(String, String)],
    ) -> Result<Page<Job>, StorageError> {
        let database = self.database();
        let after = place_of(&database, "SELECT number FROM jobs WHERE id = ?1", after, &[])?;
        let mut statement =
            database.prepare(&format!("{JOB} WHERE (?1 IS NULL OR number < ?1) ORDER BY number DESC"))?;
        let has =
            |job: &Job, (name, value): &(String, String)| job.asked.metadata.get(name) == Some(&value.as_str().into());
        let is_meant =
            |job: &rusqlite::Result<Job>| job.as_ref().map_or(true, |job| metadata.iter().all(|pair| has(job, pair)));
        let rows = statement.query_map(params![after], read)?.filter(is_meant).take(limit + 1);
        Ok(page(rows.collect::<Result<_, _>>()?, limit))
    }

    /// The jobs on the weights `base` whose models are served, the first one first.
    ///
    /// # Errors
    /// When the database fails.
    pub fn jobs_with_models(&self, base: &str) -> Result<Vec<Job>, StorageError> {
        self.jobs_where(&format!("base = ? AND {HAS_MODELS}"), base)
    }

    /// The jobs on other weights than `base` that aren't done, or whose models are served with those, the first one first.
    ///
    /// # Errors
    /// When the database fails.
    pub fn jobs_of_others(&self, base: &str) -> Result<Vec<Job>, StorageError> {
        self.jobs_where(&format!("base != ? AND ({IS_OPEN} OR {HAS_MODELS})"), base)
    }

    fn jobs_where(&self, condition: &str, base: &str) -> Result<Vec<Job>, StorageError> {
        let database = self.database();
        let mut statement = database.prepare(&format!("{JOB} WHERE {condition} ORDER BY number"))?;
        Ok(statement.query_map([base], read)?.collect::<Result<_, _>>()?)
    }

    /// How many jobs have a status.
    ///
    /// # Errors
    /// When the database fails.
    pub fn count_jobs(&self, status: JobStatus) -> Result<i64, StorageError> {
        let query = "SELECT COUNT(*) FROM jobs WHERE status = ?";
        Ok(self.database().query_row(query, [status.name()], |row| row.get(0))?)
    }

    /// The job on the weights `base` whose files are looked at next.
    ///
    /// # Errors
    /// When the database fails.
    pub fn next_to_validate(&self, base: &str) -> Result<Option<Job>, StorageError> {
        let query = format!("{JOB} WHERE base = ? AND status = 'validating_files' ORDER BY number LIMIT 1");
        Ok(self.database().query_row(&query, [base], read).optional()?)
    }

    /// The job on the weights `base` whose turn to train it is: one that was interrupted, or the first that waits.
    ///
    /// # Errors
    /// When the database fails.
    pub fn next_to_train(&self, base: &str) -> Result<Option<Job>, StorageError> {
        let query = format!(
            "{JOB} WHERE base = ? AND status IN ('running', 'queued') AND paused = 0
             ORDER BY status = 'running' DESC, number LIMIT 1"
        );
        Ok(self.database().query_row(&query, [base], read).optional()?)
    }

    /// A job's status becomes `to` if it is one of `from`, and its events say so if it is `told`; whether it was.
    ///
    /// # Errors
    /// When the database fails.
    pub fn set_status(
        &self,
        id: &str,
        from: &[JobStatus],
        to: JobStatus,
        told: Option<&str>,
    ) -> Result<bool, StorageError> {
        let from = from.iter().map(|status| format!("'{}'", status.name())).collect::<Vec<_>>().join(", ");
        let finished = to.is_final().then(now);
        let query = format!("UPDATE jobs SET status = ?, finished = ? WHERE id = ? AND status IN ({from})");
        self.change(&query, params![to.name(), finished, id], id, told.map(|message| (Level::Info, message)))
    }

    /// A job that waits for its turn, or was interrupted in it, is running; whether it is.
    ///
    /// # Errors
    /// When the database fails.
    pub fn begin_job(&self, id: &str, told: &str) -> Result<bool, StorageError> {
        let query =
            "UPDATE jobs SET status = 'running' WHERE id = ? AND status IN ('queued', 'running') AND paused = 0";
        self.change(query, params![id], id, Some((Level::Info, told)))
    }

    /// Whether a job waits until it is resumed; one that is running does so when its turn has ended.
    ///
    /// # Errors
    /// When the database fails.
    pub fn set_paused(&self, id: &str, is_paused: bool, told: &str) -> Result<(), StorageError> {
        let query = "UPDATE jobs SET paused = ? WHERE id = ?";
        self.change(query, params![is_paused, id], id, Some((Level::Info, told)))?;
        Ok(())
    }

    /// A running job can't go on: it waits until it is resumed.
    ///
    /// # Errors
    /// When the database fails.
    pub fn interrupt_job(&self, id: &str, told: &str) -> Result<(), StorageError> {
        let query = "UPDATE jobs SET paused = 1, status = 'queued' WHERE id = ? AND status = 'running'";
        self.change(query, params![id], id, Some((Level::Warn, told)))?;
        Ok(())
    }

    /// A change of a job and the event that tells it, which nobody sees one without the other; whether the job changed.
    fn change(
        &self,
        query: &str,
        parameters: &[&dyn ToSql],
        id: &str,
        told: Option<(Level, &str)>,
    ) -> Result<bool, StorageError> {
        let mut database = self.database();
        let transaction = database.transaction()?;
        let is_changed = transaction.execute(query, parameters)? > 0;
        if let (true, Some((level, message))) = (is_changed, told) {
            insert_event(&transaction, id, level, message, EventKind::Message)?;
        }
        transaction.commit()?;
        Ok(is_changed)
    }

    /// A job has failed if it wasn't done, and forgets its checkpoints, whose models' names are returned; `None` if it was.
    ///
    /// # Errors
    /// When the database fails.
    pub fn fail_job(&self, id: &str, error: &JobError) -> Result<Option<Vec<String>>, StorageError> {
        let JobError { code, message, param } = error;
        let text = serde_json::json!({"code": code, "message": message, "param": param}).to_string();
        let mut database = self.database();
        let transaction = database.transaction()?;
        let changed = transaction.execute(
            "UPDATE jobs SET status = 'failed', finished = ?, estimated_finish = NULL, error = ?
             WHERE id = ? AND status IN ('validating_files', 'queued', 'running')",
            params![now(), text, id],
        )?;
        if changed == 0 {
            return Ok(None);
        }
        let models = forget_checkpoints(&transaction, id)?;
        insert_event(&transaction, id, Level::Error, &format!("The job failed: {message}"), EventKind::Message)?;
        transaction.commit()?;
        Ok(Some(models))
    }

    /// How far a running job is.
    ///
    /// # Errors
    /// When the database fails.
    pub fn set_progress(&self, id: &str, trained_tokens: u64, seconds_left: f64) -> Result<(), StorageError> {
        self.database().execute(
            "UPDATE jobs SET trained_tokens = ?, estimated_finish = ? WHERE id = ?",
            params![trained_tokens.cast_signed(), now() + seconds_left as i64, id],
        )?;
        Ok(())
    }

    /// A running job has succeeded: its model is served as `model`, its results were written to `results`. Whether it was
    /// running.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn finish_job(&self, id: &str, model: &str, results: Upload) -> Result<bool, StorageError> {
        let file = self.settle(results, &format!("step_metrics-{id}.csv"), Purpose::FineTuneResults)?;
        let mut database = self.database();
        let transaction = database.transaction()?;
        let changed = transaction.execute(
            "UPDATE jobs SET status = 'succeeded', finished = ?, estimated_finish = NULL, fine_tuned_model = ?, result_file = ?
             WHERE id = ? AND status = 'running'",
            params![now(), model, file.id, id],
        )?;
        if changed == 0 {
            let path = self.file_path(&file.id, file.purpose);
            swept_later(&path, fs::remove_file(&path));
            return Ok(false);
        }
        insert(&transaction, &file)?;
        for message in [&format!("New fine-tuned model created: {model}"), "The job has successfully completed"] {
            insert_event(&transaction, id, Level::Info, message, EventKind::Message)?;
        }
        transaction.commit()?;
        Ok(true)
    }

    /// The job that has made the model of this name, and after which step if it is a checkpoint's.
    ///
    /// # Errors
    /// When the database fails.
    pub fn maker_of(&self, model: &str) -> Result<Option<(Job, Option<u64>)>, StorageError> {
        let database = self.database();
        let whole = format!("{JOB} WHERE fine_tuned_model = ?");
        if let Some(job) = database.query_row(&whole, [model], read).optional()? {
            return Ok(Some((job, None)));
        }
        let query = "SELECT job, step FROM checkpoints WHERE model = ?";
        let found = database.query_row(query, [model], |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)));
        let Some((id, step)) = found.optional()? else { return Ok(None) };
        let job = database.query_row(&format!("{JOB} WHERE id = ?"), [id], read).optional()?;
        Ok(job.map(|job| (job, Some(step.cast_unsigned()))))
    }

    /// A job forgets its model with all checkpoints, whose models' names are returned.
    ///
    /// # Errors
    /// When the database fails.
    pub fn forget_models(&self, id: &str) -> Result<Vec<String>, StorageError> {
        let mut database = self.database();
        let transaction = database.transaction()?;
        transaction.execute("UPDATE jobs SET fine_tuned_model = NULL WHERE id = ?", [id])?;
        let models = forget_checkpoints(&transaction, id)?;
        transaction.commit()?;
        Ok(models)
    }

    /// Removes the run of a job that is done if none of its models is left.
    ///
    /// # Errors
    /// When the database fails.
    pub fn remove_run_of_no_model(&self, id: &str) -> Result<(), StorageError> {
        // A job that is made meanwhile has another id.
        let query = format!("SELECT COUNT(*) FROM jobs WHERE id = ? AND ({IS_OPEN} OR {HAS_MODELS})");
        let needed: i64 = self.database().query_row(&query, [id], |row| row.get(0))?;
        if needed == 0 {
            let folder = self.job_folder(id);
            swept_later(&folder, fs::remove_dir_all(&folder));
        }
        Ok(())
    }

    /// Removes runs that nothing needs, and ends the turn of a job that was about to pause when the process died.
    pub(super) fn sweep_jobs(&self) -> Result<(), StorageError> {
        self.database().execute("UPDATE jobs SET status = 'queued' WHERE status = 'running' AND paused = 1", [])?;
        for (_, name, kind) in entries(&self.folder.join("jobs"))? {
            if is_id(JOB_PREFIX, &name) && kind.is_dir() {
                self.remove_run_of_no_model(&name)?;
            }
        }
        Ok(())
    }

    /// Something has happened to a job.
    ///
    /// # Errors
    /// When the database fails.
    pub fn add_event(&self, job: &str, level: Level, message: &str, kind: EventKind) -> Result<(), StorageError> {
        insert_event(&self.database(), job, level, message, kind)
    }

    /// Something has happened to a job that is told once, however often it happens.
    ///
    /// # Errors
    /// When the database fails.
    pub fn add_event_once(&self, job: &str, level: Level, message: &str) -> Result<(), StorageError> {
        let database = self.database();
        let query = "SELECT COUNT(*) FROM events WHERE job = ? AND message = ?";
        let told: i64 = database.query_row(query, [job, message], |row| row.get(0))?;
        if told > 0 { Ok(()) } else { insert_event(&database, job, level, message, EventKind::Message) }
    }

    /// The last step of a job of which an event tells this number; 0 if there is none.
    ///
    /// # Errors
    /// When the database fails.
    pub fn last_step_with(&self, job: &str, number: &str) -> Result<u64, StorageError> {
        let query = "SELECT MAX(json_extract(data, '$.step')) FROM events
                     WHERE job = ? AND kind = 'metrics' AND json_extract(data, '$.' || ?) IS NOT NULL";
        let step: Option<i64> = self.database().query_row(query, [job, number], |row| row.get(0))?;
        Ok(step.unwrap_or(0).cast_unsigned())
    }

    /// A job's events, the latest first, from the one that comes after `after` on.
    ///
    /// # Errors
    /// When the database fails.
    pub fn events(&self, job: &str, after: Option<&str>, limit: usize) -> Result<Page<Event>, StorageError> {
        let query = "SELECT id, created, level, message, kind, data FROM events WHERE job = ?1
                     AND (?2 IS NULL OR number < ?2) ORDER BY number DESC LIMIT ?3";
        let read = |row: &Row<'_>| {
            Ok(Event {
                id: row.get(0)?,
                created: row.get(1)?,
                level: row.get(2)?,
                message: row.get(3)?,
                kind: row.get(4)?,
                data: json(row, 5)?,
            })
        };
        let database = self.database();
        let place = "SELECT number FROM events WHERE id = ?1 AND job = ?2";
        let after = place_of(&database, place, after, &[&job])?;
        let mut statement = database.prepare(query)?;
        let rows = statement.query_map(params![job, after, limit as i64 + 1], read)?;
        Ok(page(rows.collect::<Result<_, _>>()?, limit))
    }

    /// A job's checkpoint of a step is served as `model`. One that is made again after a kill is the one from before.
    ///
    /// # Errors
    /// When the database fails.
    pub fn add_checkpoint(&self, job: &str, step: u64, model: &str, metrics: &Value) -> Result<(), StorageError> {
        self.database().execute(
            "INSERT INTO checkpoints (id, job, created, step, model, metrics) VALUES (?, ?, ?, ?, ?, ?)
             ON CONFLICT (job, step) DO NOTHING",
            params![new_id("ftckpt_"), job, now(), step.cast_signed(), model, metrics.to_string()],
        )?;
        Ok(())
    }

    /// A job's checkpoint of a step is no more.
    ///
    /// # Errors
    /// When the database fails.
    pub fn remove_checkpoint(&self, job: &str, step: u64) -> Result<(), StorageError> {
        let query = "DELETE FROM checkpoints WHERE job = ? AND step = ?";
        self.database().execute(query, params![job, step.cast_signed()])?;
        Ok(())
    }

    /// A job's checkpoints, the latest first, from the one that comes after `after` on.
    ///
    /// # Errors
    /// When the database fails.
    pub fn checkpoints(&self, job: &str, after: Option<&str>, limit: usize) -> Result<Page<Checkpoint>, StorageError> {
        let query = "SELECT id, created, step, model, metrics FROM checkpoints WHERE job = ?1
                     AND (?2 IS NULL OR step < ?2) ORDER BY step DESC LIMIT ?3";
        let read = |row: &Row<'_>| {
            let step: i64 = row.get(2)?;
            Ok(Checkpoint {
                id: row.get(0)?,
                created: row.get(1)?,
                step: step.cast_unsigned(),
                model: row.get(3)?,
                metrics: json(row, 4)?,
            })
        };
        let database = self.database();
        let place = "SELECT step FROM checkpoints WHERE id = ?1 AND job = ?2";
        let after = place_of(&database, place, after, &[&job])?;
        let mut statement = database.prepare(query)?;
        let rows = statement.query_map(params![job, after, limit as i64 + 1], read)?;
        Ok(page(rows.collect::<Result<_, _>>()?, limit))
    }
}

fn insert_event(
    database: &Connection,
    job: &str,
    level: Level,
    message: &str,
    kind: EventKind,
) -> Result<(), StorageError> {
    let (kind, data) = match kind {
        EventKind::Message => ("message", Value::Null),
        EventKind::Metrics(data) => ("metrics", data.into()),
    };
    database.execute(
        "INSERT INTO events (id, job, created, level, message, kind, data) VALUES (?, ?, ?, ?, ?, ?, ?)",
        params![new_id("ft-event-"), job, now(), level.name(), message, kind, data.to_string()],
    )?;
    Ok(())
}

/// Forgets the checkpoints of a job, whose models' names are returned.
fn forget_checkpoints(database: &Connection, job: &str) -> Result<Vec<String>, StorageError> {
    let mut statement = database.prepare("SELECT model FROM checkpoints WHERE job = ?")?;
    let models = statement.query_map([job], |row| row.get(0))?.collect::<Result<_, _>>()?;
    database.execute("DELETE FROM checkpoints WHERE job = ?", [job])?;
    Ok(models)
}

fn read(row: &Row<'_>) -> rusqlite::Result<Job> {
    let status: String = row.get(9)?;
    let unknown = || unreadable(9, FromSqlError::Other(format!("the status `{status}`").into()));
    let seed: i64 = row.get(6)?;
    let trained_tokens: Option<i64> = row.get(13)?;
    let error: Option<String> = row.get(16)?;
    let error = error.map(|text| {
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let text = |name: &str| value[name].as_str().map(str::to_owned);
        JobError {
            code: text("code").unwrap_or_default(),
            message: text("message").unwrap_or_default(),
            param: text("param"),
        }
    });
    Ok(Job {
        id: row.get(0)?,
        created: row.get(1)?,
        asked: NewJob {
            model: row.get(2)?,
            training_file: row.get(3)?,
            validation_file: row.get(4)?,
            suffix: row.get(5)?,
            seed: seed.cast_unsigned(),
            metadata: object(row, 7)?,
            hyperparameters: object(row, 8)?,
        },
        status: JobStatus::ALL.into_iter().find(|known| known.name() == status).ok_or_else(unknown)?,
        is_paused: row.get(10)?,
        fine_tuned_model: row.get(11)?,
        result_file: row.get(12)?,
        trained_tokens: trained_tokens.map(i64::cast_unsigned),
        finished: row.get(14)?,
        estimated_finish: row.get(15)?,
        error,
    })
}

fn json(row: &Row<'_>, column: usize) -> rusqlite::Result<Value> {
    let text: String = row.get(column)?;
    serde_json::from_str(&text).map_err(|error| unreadable(column, FromSqlError::Other(error.into())))
}

fn object(row: &Row<'_>, column: usize) -> rusqlite::Result<Map<String, Value>> {
    match json(row, column)? {
        Value::Object(map) => Ok(map),
        _ => Err(unreadable(column, FromSqlError::InvalidType)),
    }
}
