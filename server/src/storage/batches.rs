//! Batches: files of requests that are answered in the background.

use std::{fs, path::PathBuf};

use rusqlite::{OptionalExtension, Row, params, types::FromSqlError};
use serde_json::{Map, Value, json};

use crate::generation::Usage;

use super::{
    Page, Purpose, Storage, StorageError, Upload, entries,
    files::{check_file, insert},
    is_id, new_id, now, page, place_of, swept_later, unreadable,
};

/// How far a batch is, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchStatus {
    /// Its file is looked at.
    Validating,
    /// Its file is no file of requests.
    Failed,
    /// It is answered, or waits for its turn.
    InProgress,
    /// All is answered, its files are made.
    Finalizing,
    /// Its files are there.
    Completed,
    /// Its time was over.
    Expired,
    /// Somebody has cancelled it; what is under way ends.
    Cancelling,
    /// What was answered until then is there.
    Cancelled,
}

impl BatchStatus {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Validating,
        Self::Failed,
        Self::InProgress,
        Self::Finalizing,
        Self::Completed,
        Self::Expired,
        Self::Cancelling,
        Self::Cancelled,
    ];

    /// OpenAI's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Failed => "failed",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What a batch is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct NewBatch {
    /// The file with its requests.
    pub input_file: String,
    /// The route that all of them ask.
    pub endpoint: String,
    /// How long it may take, as the client says it.
    pub completion_window: String,
    /// The same in seconds.
    pub window_seconds: i64,
    /// What the client keeps with it.
    pub metadata: Option<Map<String, Value>>,
    /// How long its files stay, in seconds; for good if absent.
    pub output_seconds: Option<i64>,
}

/// What is wrong with a batch's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchError {
    /// A word for programs.
    pub code: String,
    /// For people.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
    /// The line at fault, counted from 1.
    pub line: Option<u64>,
}

/// How much of a batch is done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Requests that are answered.
    pub completed: u64,
    /// Requests that have failed.
    pub failed: u64,
    /// What they have used.
    pub usage: Usage,
}

impl Progress {
    /// A request is done, or has failed, and has used so much.
    pub fn add(&mut self, has_failed: bool, usage: Usage) {
        *if has_failed { &mut self.failed } else { &mut self.completed } += 1;
        self.usage += usage;
    }
}

/// A batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `batch_…`
    pub id: String,
    /// When it came, in seconds since 1970.
    pub created: i64,
    /// The route that all of its requests ask.
    pub endpoint: String,
    /// The file with its requests.
    pub input_file: String,
    /// How long it may take, as the client says it.
    pub completion_window: String,
    /// When its time is over.
    pub expires: i64,
    /// What the client keeps with it.
    pub metadata: Option<Map<String, Value>>,
    /// How long its files stay, in seconds; for good if absent.
    pub output_seconds: Option<i64>,
    /// The model that all of its requests ask.
    pub model: Option<String>,
    /// How far it is.
    pub status: BatchStatus,
    /// How many requests it has; 0 while that isn't known.
    pub total: u64,
    /// How many of them are done.
    pub progress: Progress,
    /// When it came to each status but the first.
    pub times: Vec<(BatchStatus, Option<i64>)>,
    /// The file with the answers.
    pub output_file: Option<String>,
    /// The file with the errors.
    pub error_file: Option<String>,
    /// Why it failed.
    pub errors: Vec<BatchError>,
}

/// What a batch that ends has made.
#[derive(Debug)]
pub struct Made {
    /// Answers, if there are any.
    pub output: Option<Upload>,
    /// Errors, if there are any.
    pub errors: Option<Upload>,
    /// How much is done.
    pub progress: Progress,
}

/// Of a batch's row: it isn't done.
pub(super) const IS_OPEN: &str = "status IN ('validating', 'in_progress', 'finalizing', 'cancelling')";
/// What a batch's id begins with.
const BATCH_PREFIX: &str = "batch_";
const BATCH: &str =
    "SELECT id, created, endpoint, input_file, completion_window, expires, metadata, output_seconds, model, status,
    total, completed, failed, input_tokens, cached_tokens, output_tokens, output_file, error_file, errors, failed_at,
    in_progress_at, finalizing_at, completed_at, expired_at, cancelling_at, cancelled_at FROM batches";
/// The column of the first time; the others follow in the order of [`BatchStatus::ALL`].
const FIRST_TIME: usize = 19;

impl Storage {
    /// The folder of what is answered of a batch so far.
    pub fn batch_folder(&self, batch: &str) -> PathBuf {
        self.folder.join("batches").join(batch)
    }

    /// Adds a batch, whose file is to be looked at; `base` is the fingerprint of the weights that answer it.
    ///
    /// # Errors
    /// When the file isn't there, or the database fails.
    pub fn add_batch(&self, asked: NewBatch, base: &str) -> Result<Batch, StorageError> {
        let (id, created) = (new_id(BATCH_PREFIX), now());
        let NewBatch { input_file, endpoint, completion_window, window_seconds, metadata, output_seconds } = asked;
        let mut database = self.database();
        let transaction = database.transaction()?;
        check_file(&transaction, "input_file_id", &input_file, Purpose::Batch)?;
        transaction.execute(
            "INSERT INTO batches (id, created, base, input_file, endpoint, completion_window, expires, metadata,
             output_seconds, status) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'validating')",
            params![
                id,
                created,
                base,
                input_file,
                endpoint,
                completion_window,
                created + window_seconds,
                metadata.map(|metadata| Value::from(metadata).to_string()),
                output_seconds
            ],
        )?;
        let added = transaction.query_row(&format!("{BATCH} WHERE id = ?"), [&id], read)?;
        transaction.commit()?;
        Ok(added)
    }

    /// What is known of a batch.
    ///
    /// # Errors
    /// When the database fails.
    pub fn batch(&self, id: &str) -> Result<Option<Batch>, StorageError> {
        Ok(self.database().query_row(&format!("{BATCH} WHERE id = ?"), [id], read).optional()?)
    }

    /// Batches, the latest first, from the one that comes after `after` on.
    ///
    /// # Errors
    /// When the database fails.
    pub fn batches(&self, after: Option<&str>, limit: usize) -> Result<Page<Batch>, StorageError> {
        let database = self.database();
        let after = place_of(&database, "SELECT number FROM batches WHERE id = ?1", after, &[])?;
        let query = format!("{BATCH} WHERE (?1 IS NULL OR number < ?1) ORDER BY number DESC LIMIT ?2");
        let mut statement = database.prepare(&query)?;
        let rows = statement.query_map(params![after, limit as i64 + 1], read)?;
        Ok(page(rows.collect::<Result<_, _>>()?, limit))
    }

    /// How many batches have a status.
    ///
    /// # Errors
    /// When the database fails.
    pub fn count_batches(&self, status: BatchStatus) -> Result<i64, StorageError> {
        let query = "SELECT COUNT(*) FROM batches WHERE status = ?";
        Ok(self.database().query_row(query, [status.name()], |row| row.get(0))?)
    }

    /// Batches that aren't done and are for other weights than `base`.
    ///
    /// # Errors
    /// When the database fails.
    pub fn batches_of_others(&self, base: &str) -> Result<Vec<Batch>, StorageError> {
        let query = format!("{BATCH} WHERE base != ? AND {IS_OPEN}");
        let database = self.database();
        let mut statement = database.prepare(&query)?;
        let rows = statement.query_map([base], read)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// The batch, other than `current`, that is to be looked at or brought to an end, whatever its weights: one that is new, was
    /// cancelled, has answered all, or whose time is over.
    ///
    /// # Errors
    /// When the database fails.
    pub fn next_to_settle(&self, current: Option<&str>) -> Result<Option<Batch>, StorageError> {
        let query = format!(
            "{BATCH} WHERE id IS NOT ?1 AND (status IN ('validating', 'finalizing', 'cancelling')
             OR (status = 'in_progress' AND expires <= ?2)) ORDER BY number LIMIT 1"
        );
        Ok(self.database().query_row(&query, params![current, now()], read).optional()?)
    }

    /// The batch for the weights `base` whose turn it is.
    ///
    /// # Errors
    /// When the database fails.
    pub fn next_to_answer(&self, base: &str) -> Result<Option<Batch>, StorageError> {
        let query =
            format!("{BATCH} WHERE base = ? AND status = 'in_progress' AND expires > ? ORDER BY number LIMIT 1");
        Ok(self.database().query_row(&query, params![base, now()], read).optional()?)
    }

    /// A batch comes to the status `to` if it is in one of `from`; whether it was.
    ///
    /// # Errors
    /// When the database fails.
    pub fn set_batch_status(&self, id: &str, from: &[BatchStatus], to: BatchStatus) -> Result<bool, StorageError> {
        let from = from.iter().map(|status| format!("'{}'", status.name())).collect::<Vec<_>>().join(", ");
        let name = to.name();
        let query = format!("UPDATE batches SET status = ?, {name}_at = ? WHERE id = ? AND status IN ({from})");
        Ok(self.database().execute(&query, params![name, now(), id])? > 0)
    }

    /// The file of a new batch is one of `total` requests, which all ask `model`, if one; whether the batch still is new.
    ///
    /// # Errors
    /// When the database fails.
    pub fn begin_batch(&self, id: &str, total: u64, model: Option<&str>) -> Result<bool, StorageError> {
        let query = "UPDATE batches SET status = 'in_progress', in_progress_at = ?, total = ?, model = ?
                     WHERE id = ? AND status = 'validating'";
        Ok(self.database().execute(query, params![now(), total.cast_signed(), model, id])? > 0)
    }

    /// A new batch has failed.
    ///
    /// # Errors
    /// When the database fails.
    pub fn fail_batch(&self, id: &str, errors: &[BatchError]) -> Result<(), StorageError> {
        let query =
            format!("UPDATE batches SET status = 'failed', failed_at = ?, errors = ? WHERE id = ? AND {IS_OPEN}");
        let errors: Vec<Value> = errors.iter().map(BatchError::object).collect();
        self.database().execute(&query, params![now(), Value::from(errors).to_string(), id])?;
        Ok(())
    }

    /// How much of a batch is done.
    ///
    /// # Errors
    /// When the database fails.
    pub fn set_batch_progress(&self, id: &str, progress: &Progress) -> Result<(), StorageError> {
        set_progress(&self.database(), id, progress)
    }

    /// A batch that isn't done comes to its end: it is `to`, and its files are there.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn finish_batch(&self, batch: &Batch, to: BatchStatus, made: Made) -> Result<(), StorageError> {
        let id = &batch.id;
        let settle = |upload: Option<Upload>, kind: &str| {
            let name = format!("{id}_{kind}.jsonl");
            let file = upload.map(|upload| self.settle(upload, &name, Purpose::BatchOutput)).transpose()?;
            Ok::<_, StorageError>(file.map(|mut file| {
                file.expires = batch.output_seconds.map(|seconds| file.created + seconds);
                file
            }))
        };
        let files = [settle(made.output, "output")?, settle(made.errors, "error")?];
        let mut database = self.database();
        let transaction = database.transaction()?;
        for file in files.iter().flatten() {
            insert(&transaction, file)?;
        }
        set_progress(&transaction, id, &made.progress)?;
        let [output, errors] = files.map(|file| file.map(|file| file.id));
        let name = to.name();
        transaction.execute(
            &format!("UPDATE batches SET status = ?, {name}_at = ?, output_file = ?, error_file = ? WHERE id = ?"),
            params![name, now(), output, errors, id],
        )?;
        transaction.commit()?;
        drop(database);
        let folder = self.batch_folder(id);
        swept_later(&folder, fs::remove_dir_all(&folder));
        Ok(())
    }

    /// Removes what was answered of batches that are done.
    pub(super) fn sweep_batches(&self) -> Result<(), StorageError> {
        for (path, name, kind) in entries(&self.folder.join("batches"))? {
            let query = format!("SELECT COUNT(*) FROM batches WHERE id = ? AND {IS_OPEN}");
            let is_open = || self.database().query_row(&query, [&name], |row| row.get::<_, i64>(0));
            if is_id(BATCH_PREFIX, &name) && kind.is_dir() && is_open()? == 0 {
                swept_later(&path, fs::remove_dir_all(&path));
            }
        }
        Ok(())
    }
}

impl BatchError {
    /// OpenAI's object.
    pub fn object(&self) -> Value {
        json!({"code": self.code, "message": self.message, "param": self.param, "line": self.line})
    }

    fn of(object: &Value) -> Self {
        let text = |name: &str| object[name].as_str().map(str::to_owned);
        Self {
            code: text("code").unwrap_or_default(),
            message: text("message").unwrap_or_default(),
            param: text("param"),
            line: object["line"].as_u64(),
        }
    }
}

fn set_progress(database: &rusqlite::Connection, id: &str, progress: &Progress) -> Result<(), StorageError> {
    let Progress { completed, failed, usage: Usage { prompt_tokens, cached_tokens, completion_tokens } } = *progress;
    let [completed, failed] = [completed, failed].map(u64::cast_signed);
    let [input, cached, output] = [prompt_tokens, cached_tokens, completion_tokens].map(|tokens| tokens as i64);
    database.execute(
        "UPDATE batches SET completed = ?, failed = ?, input_tokens = ?, cached_tokens = ?, output_tokens = ? WHERE id = ?",
        params![completed, failed, input, cached, output, id],
    )?;
    Ok(())
}

fn read(row: &Row<'_>) -> rusqlite::Result<Batch> {
    let count = |column: usize| row.get::<_, i64>(column).map(i64::cast_unsigned);
    let tokens = |column: usize| count(column).map(|tokens| tokens as usize);
    let json = |column: usize, text: &str| {
        serde_json::from_str(text).map_err(|error| unreadable(column, FromSqlError::Other(error.into())))
    };
    let status: String = row.get(9)?;
    let unknown = || unreadable(9, FromSqlError::Other(format!("the status `{status}`").into()));
    let (metadata, errors): (Option<String>, String) = (row.get(6)?, row.get(18)?);
    let metadata = metadata.map(|text| json(6, &text)).transpose()?;
    let errors: Value = json(18, &errors)?;
    let later = BatchStatus::ALL.into_iter().skip(1).enumerate();
    Ok(Batch {
        id: row.get(0)?,
        created: row.get(1)?,
        endpoint: row.get(2)?,
        input_file: row.get(3)?,
        completion_window: row.get(4)?,
        expires: row.get(5)?,
        metadata: metadata.and_then(|value: Value| value.as_object().cloned()),
        output_seconds: row.get(7)?,
        model: row.get(8)?,
        status: BatchStatus::ALL.into_iter().find(|known| known.name() == status).ok_or_else(unknown)?,
        total: count(10)?,
        progress: Progress {
            completed: count(11)?,
            failed: count(12)?,
            usage: Usage { prompt_tokens: tokens(13)?, cached_tokens: tokens(14)?, completion_tokens: tokens(15)? },
        },
        output_file: row.get(16)?,
        error_file: row.get(17)?,
        errors: errors.as_array().into_iter().flatten().map(BatchError::of).collect(),
        times: later.map(|(at, status)| Ok((status, row.get(FIRST_TIME + at)?))).collect::<rusqlite::Result<_>>()?,
    })
}
