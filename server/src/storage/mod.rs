//! What outlives the server: uploaded files, fine-tuning jobs and batches, in one folder.
//!
//! | in the folder | is |
//! |---|---|
//! | `cadre.db` | SQLite: what is known of files, jobs, their events and checkpoints, and batches |
//! | `files/` | the files' bytes, each under its id |
//! | `jobs/` | a folder a job: its run |
//! | `batches/` | a folder a batch: what is answered so far |
//!
//! A change is on disk when its call returns. Bytes come before the row that names them, and go after it: a process that
//! is killed leaves at most files and folders that no row needs, which the next start removes. What has other names than
//! those that are given here is somebody's own, and stays.

mod batches;
mod files;
mod jobs;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rusqlite::{
    Connection, OptionalExtension, ToSql,
    types::{FromSqlError, Type},
};

pub use batches::{Batch, BatchError, BatchStatus, Made, NewBatch, Progress};
pub use files::{FileQuery, MAX_FILE_BYTES, Purpose, StoredFile, Upload};
pub use jobs::{Checkpoint, Event, EventKind, Job, JobError, JobStatus, Level, NewJob};

use crate::random::random_seed;

/// The layout of the tables below.
const VERSION: i64 = 3;
/// The tables of layout 2.
const FILES_AND_JOBS: &str = "
    CREATE TABLE files (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, created INTEGER NOT NULL,
        filename TEXT NOT NULL, purpose TEXT NOT NULL
    );
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL, model TEXT NOT NULL,
        base TEXT NOT NULL, training_file TEXT NOT NULL, validation_file TEXT, suffix TEXT, seed INTEGER NOT NULL, metadata TEXT NOT NULL,
        hyperparameters TEXT NOT NULL, status TEXT NOT NULL, paused INTEGER NOT NULL DEFAULT 0, fine_tuned_model TEXT,
        result_file TEXT, trained_tokens INTEGER, finished INTEGER, estimated_finish INTEGER, error TEXT
    );
    CREATE TABLE events (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, created INTEGER NOT NULL,
        level TEXT NOT NULL, message TEXT NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL
    );
    CREATE INDEX events_of_job ON events (job, number);
    CREATE TABLE checkpoints (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL, created INTEGER NOT NULL,
        step INTEGER NOT NULL, model TEXT NOT NULL, metrics TEXT NOT NULL, UNIQUE (job, step)
    );
";
/// What layout 3 adds to it.
const BATCHES: &str = "
    ALTER TABLE files ADD COLUMN expires INTEGER;
    CREATE TABLE batches (
        number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created INTEGER NOT NULL, base TEXT NOT NULL,
        input_file TEXT NOT NULL, endpoint TEXT NOT NULL, completion_window TEXT NOT NULL, expires INTEGER NOT NULL,
        metadata TEXT, output_seconds INTEGER, model TEXT, status TEXT NOT NULL, total INTEGER NOT NULL DEFAULT 0,
        completed INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0, input_tokens INTEGER NOT NULL DEFAULT 0,
        cached_tokens INTEGER NOT NULL DEFAULT 0, output_tokens INTEGER NOT NULL DEFAULT 0, in_progress_at INTEGER,
        finalizing_at INTEGER, completed_at INTEGER, failed_at INTEGER, expired_at INTEGER, cancelling_at INTEGER,
        cancelled_at INTEGER, output_file TEXT, error_file TEXT, errors TEXT NOT NULL DEFAULT '[]'
    );
";
/// How long another process may hold the database before that is an error.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why something is not stored, or not found.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The folder, or something in it.
    #[error("{path}: {reason}")]
    Io {
        /// Where.
        path: String,
        /// Why.
        reason: io::Error,
    },
    /// Another process has it open.
    #[error("{0} is in use by another process: stop that one, or give another --storage")]
    InUse(String),
    /// Of another version of cadre.
    #[error(
        "{folder}: expected a storage folder of layout {VERSION}, found layout {found}: use the cadre that made it"
    )]
    Version {
        /// The folder.
        folder: String,
        /// The layout that it has.
        found: i64,
    },
    /// The database.
    #[error("the database of --storage: {0}")]
    Database(rusqlite::Error),
    /// There is no such file, or it is for something else.
    #[error("there is no file `{file}` of the purpose {purpose}")]
    NoFile {
        /// What it is needed for.
        role: &'static str,
        /// The file.
        file: String,
        /// What it would have to be for, in OpenAI's words.
        purpose: &'static str,
    },
    /// A page is to come after what isn't in the list.
    #[error("nothing in this list has the id `{0}`, after which a page was asked for")]
    NothingToComeAfter(String),
    /// A file is needed by a job or a batch that isn't done.
    #[error("file `{file}` is used by the {user}, which is not done")]
    FileInUse {
        /// The file.
        file: String,
        /// Who needs it.
        user: String,
    },
}

// The texts above say why: a source as well would be told twice.
impl From<rusqlite::Error> for StorageError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

/// A page of a list, and whether there is more of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// What is on it.
    pub data: Vec<T>,
    /// Whether others come after it.
    pub has_more: bool,
}

/// The folder, opened by this process alone.
#[derive(Debug)]
pub struct Storage {
    folder: PathBuf,
    database: Mutex<Connection>,
}

impl Storage {
    /// Opens the folder, which is made if it isn't there, and removes what an interrupted process left.
    ///
    /// # Errors
    /// When another process has it, it is of another layout, or the system refuses.
    pub fn open(folder: &Path) -> Result<Self, StorageError> {
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |reason| StorageError::Io { path, reason }
        };
        fs::create_dir_all(folder).map_err(failed(folder))?;
        for directory in ["files", "jobs", "batches"].map(|name| folder.join(name)) {
            fs::create_dir_all(&directory).map_err(failed(&directory))?;
        }
        let folder = folder.canonicalize().map_err(failed(folder))?;
        let database = Connection::open(folder.join("cadre.db"))?;
        database.busy_timeout(PATIENCE)?;
        prepare(&database, &folder).map_err(|error| match error {
            StorageError::Database(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy) => {
                StorageError::InUse(folder.display().to_string())
            }
            other => other,
        })?;
        let storage = Self { folder, database: Mutex::new(database) };
        storage.sweep_files()?;
        storage.sweep_jobs()?;
        storage.sweep_batches()?;
        Ok(storage)
    }

    /// The folder of a job's run.
    pub fn job_folder(&self, job: &str) -> PathBuf {
        self.folder.join("jobs").join(job)
    }

    fn database(&self) -> MutexGuard<'_, Connection> {
        // A transaction that panicked was rolled back.
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes the database for this process, and makes the tables that it lacks.
fn prepare(database: &Connection, folder: &Path) -> Result<(), StorageError> {
    // With WAL, FULL syncs the log at each commit: what was answered survives a power failure.
    database.execute_batch(
        "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; BEGIN EXCLUSIVE; COMMIT;",
    )?;
    let found: i64 = database.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    match found {
        VERSION => Ok(()),
        0 | 2 => {
            let before = if found == 0 { FILES_AND_JOBS } else { "" };
            let text = format!("BEGIN; {before} {BATCHES} PRAGMA user_version = {VERSION}; COMMIT;");
            Ok(database.execute_batch(&text)?)
        }
        found => Err(StorageError::Version { folder: folder.display().to_string(), found }),
    }
}

/// A new id.
fn new_id(prefix: &str) -> String {
    format!("{prefix}{:016x}{:08x}", random_seed(), random_seed() as u32)
}

/// Whether [`new_id`] could have given this.
fn is_id(prefix: &str, text: &str) -> bool {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.strip_prefix(prefix).is_some_and(|digits| digits.len() == 24 && digits.bytes().all(is_digit))
}

/// What a folder holds, each with its name and what it is: a link is neither file nor folder.
fn entries(folder: &Path) -> Result<Vec<(PathBuf, String, fs::FileType)>, StorageError> {
    let failed = |reason| StorageError::Io { path: folder.display().to_string(), reason };
    let read = |entry: io::Result<fs::DirEntry>| {
        let entry = entry?;
        Ok((entry.path(), entry.file_name().to_string_lossy().into_owned(), entry.file_type()?))
    };
    fs::read_dir(folder).map_err(failed)?.map(read).collect::<io::Result<_>>().map_err(failed)
}

/// What no row names may stay until the next start, if it can't be removed now.
fn swept_later(path: &Path, removed: io::Result<()>) {
    if let Err(error) =
        removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
    {
        tracing::warn!(path = %path.display(), %error, "what nothing needs any more can't be removed");
    }
}

/// Seconds since 1970.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs().cast_signed())
}

/// The value by which a list is in order, of the row that a page is to come after: what `query` finds.
fn place_of(
    database: &Connection,
    query: &str,
    after: Option<&str>,
    more: &[&dyn ToSql],
) -> Result<Option<i64>, StorageError> {
    let Some(after) = after else { return Ok(None) };
    let parameters: Vec<&dyn ToSql> = [&after as &dyn ToSql].iter().chain(more).copied().collect();
    let found = database.query_row(query, &parameters[..], |row| row.get(0)).optional()?;
    found.map(Some).ok_or_else(|| StorageError::NothingToComeAfter(after.to_owned()))
}

/// The rows of a query that asked for one more than `limit`.
fn page<T>(mut data: Vec<T>, limit: usize) -> Page<T> {
    let has_more = data.len() > limit;
    data.truncate(limit);
    Page { data, has_more }
}

/// A column has what no version of cadre writes.
fn unreadable(column: usize, error: FromSqlError) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error.into())
}
