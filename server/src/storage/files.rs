//! Uploaded files, and those that jobs and batches make.

use std::{collections::HashSet, fs, path::PathBuf};

use rusqlite::{Connection, OptionalExtension, Row, params, types::FromSqlError};

use super::{
    Page, Storage, StorageError, entries, is_id, jobs::JOB_PREFIX, new_id, now, page, place_of, swept_later, unreadable,
};

/// What a file is for, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Training and validation data.
    FineTune,
    /// The results of a job.
    FineTuneResults,
    /// The requests of a batch.
    Batch,
    /// Its answers, or its errors.
    BatchOutput,
}

impl Purpose {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::FineTune, Self::FineTuneResults, Self::Batch, Self::BatchOutput];
    /// Those that clients upload.
    pub const UPLOADED: [Self; 2] = [Self::FineTune, Self::Batch];

    /// OpenAI's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::FineTune => "fine-tune",
            Self::FineTuneResults => "fine-tune-results",
            Self::Batch => "batch",
            Self::BatchOutput => "batch_output",
        }
    }

    /// What the names of such files end in.
    fn ending(self) -> &'static str {
        match self {
            Self::FineTune | Self::Batch | Self::BatchOutput => "jsonl",
            Self::FineTuneResults => "csv",
        }
    }
}

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// `file-…`
    pub id: String,
    /// Its size.
    pub bytes: u64,
    /// When it came, in seconds since 1970.
    pub created: i64,
    /// What the client calls it.
    pub filename: String,
    /// What it is for.
    pub purpose: Purpose,
    /// When it goes, if it isn't kept for good.
    pub expires: Option<i64>,
}

/// Which files are listed, and in which order.
#[derive(Debug, Clone, Default)]
pub struct FileQuery {
    /// Those for this only, in OpenAI's words.
    pub purpose: Option<String>,
    /// Those that come after this one.
    pub after: Option<String>,
    /// At most so many.
    pub limit: usize,
    /// The oldest first.
    pub ascending: bool,
}

/// The longest file that is kept, in bytes: as OpenAI has it.
pub const MAX_FILE_BYTES: u64 = 512 << 20;

const FILE: &str = "SELECT id, bytes, created, filename, purpose, expires FROM files WHERE id = ?";
/// What the name of a file that is being written ends in.
const UPLOAD: &str = "upload";

/// A file that is being written; nobody sees it before it is added.
#[derive(Debug)]
pub struct Upload {
    id: String,
    /// Where its bytes go.
    pub path: PathBuf,
}

impl Drop for Upload {
    fn drop(&mut self) {
        // One that was added has another name by now.
        let _ = fs::remove_file(&self.path);
    }
}

impl Storage {
    /// A place for the bytes of a new file.
    pub fn new_upload(&self) -> Upload {
        let id = new_id("file-");
        let path = self.folder.join("files").join(format!("{id}.{UPLOAD}"));
        Upload { id, path }
    }

    /// A place for the bytes of a job's results. Written anew they are the same file.
    pub fn new_results(&self, job: &str) -> Upload {
        let id = format!("file-{}", job.trim_start_matches(JOB_PREFIX));
        let path = self.folder.join("files").join(format!("{id}.{UPLOAD}"));
        Upload { id, path }
    }

    /// Adds the file that was written to `upload`, for good or for so many seconds.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn add_file(
        &self,
        upload: Upload,
        filename: &str,
        purpose: Purpose,
        seconds: Option<i64>,
    ) -> Result<StoredFile, StorageError> {
        let mut file = self.settle(upload, filename, purpose)?;
        file.expires = seconds.map(|seconds| file.created + seconds);
        insert(&self.database(), &file)?;
        Ok(file)
    }

    /// Puts the bytes of `upload` where those of a file are; that it is there is not yet known.
    pub(super) fn settle(&self, upload: Upload, filename: &str, purpose: Purpose) -> Result<StoredFile, StorageError> {
        let path = self.file_path(&upload.id, purpose);
        let failed = |reason| StorageError::Io { path: path.display().to_string(), reason };
        let written = fs::File::open(&upload.path).map_err(failed)?;
        written.sync_all().map_err(failed)?;
        let bytes = written.metadata().map_err(failed)?.len();
        fs::rename(&upload.path, &path).map_err(failed)?;
        fs::File::open(self.folder.join("files")).and_then(|files| files.sync_all()).map_err(failed)?;
        Ok(StoredFile {
            id: upload.id.clone(),
            bytes,
            created: now(),
            filename: filename.to_owned(),
            purpose,
            expires: None,
        })
    }

    /// What is known of a file.
    ///
    /// # Errors
    /// When the database fails.
    pub fn file(&self, id: &str) -> Result<Option<StoredFile>, StorageError> {
        Ok(self.database().query_row(FILE, [id], read).optional()?)
    }

    /// Files, the latest first unless asked otherwise.
    ///
    /// # Errors
    /// When the database fails.
    pub fn files(&self, query: &FileQuery) -> Result<Page<StoredFile>, StorageError> {
        let (compare, order) = if query.ascending { (">", "ASC") } else { ("<", "DESC") };
        let text = format!(
            "SELECT id, bytes, created, filename, purpose, expires FROM files WHERE (?1 IS NULL OR purpose = ?1)
             AND (?2 IS NULL OR number {compare} ?2) ORDER BY number {order} LIMIT ?3"
        );
        let database = self.database();
        let after = place_of(&database, "SELECT number FROM files WHERE id = ?1", query.after.as_deref(), &[])?;
        let mut statement = database.prepare(&text)?;
        let rows = statement.query_map(params![query.purpose, after, query.limit as i64 + 1], read)?;
        Ok(page(rows.collect::<Result<_, _>>()?, query.limit))
    }

    /// Where a file's bytes are.
    pub fn file_path(&self, id: &str, purpose: Purpose) -> PathBuf {
        self.folder.join("files").join(format!("{id}.{}", purpose.ending()))
    }

    /// Removes a file, and says whether there was one.
    ///
    /// # Errors
    /// When a job or a batch that isn't done needs it, or the system refuses.
    pub fn delete_file(&self, id: &str) -> Result<bool, StorageError> {
        let mut database = self.database();
        let transaction = database.transaction()?;
        let users = format!(
            "SELECT 'fine-tuning job `' || id || '`' FROM jobs
             WHERE (training_file = ?1 OR validation_file = ?1) AND {}
             UNION ALL SELECT 'batch `' || id || '`' FROM batches WHERE input_file = ?1 AND {} LIMIT 1",
            super::jobs::IS_OPEN,
            super::batches::IS_OPEN
        );
        if let Some(user) = transaction.query_row(&users, [id], |row| row.get(0)).optional()? {
            return Err(StorageError::FileInUse { file: id.to_owned(), user });
        }
        let Some(file) = transaction.query_row(FILE, [id], read).optional()? else { return Ok(false) };
        transaction.execute("DELETE FROM files WHERE id = ?", [id])?;
        transaction.execute("UPDATE jobs SET result_file = NULL WHERE result_file = ?", [id])?;
        for column in ["output_file", "error_file"] {
            transaction.execute(&format!("UPDATE batches SET {column} = NULL WHERE {column} = ?"), [id])?;
        }
        transaction.commit()?;
        drop(database);
        let path = self.file_path(id, file.purpose);
        swept_later(&path, fs::remove_file(&path));
        Ok(true)
    }

    /// Removes files whose time has come.
    ///
    /// # Errors
    /// When the database fails.
    pub fn remove_expired_files(&self) -> Result<(), StorageError> {
        let query = "SELECT id FROM files WHERE expires <= ?";
        let expired: Vec<String> = {
            let database = self.database();
            let mut statement = database.prepare(query)?;
            statement.query_map([now()], |row| row.get(0))?.collect::<Result<_, _>>()?
        };
        for id in expired {
            match self.delete_file(&id) {
                // It goes when that one is done.
                Err(StorageError::FileInUse { .. }) => {}
                deleted => drop(deleted?),
            }
        }
        Ok(())
    }

    /// Removes files that no row names, and uploads that were cut off.
    pub(super) fn sweep_files(&self) -> Result<(), StorageError> {
        let all = FileQuery { limit: u32::MAX as usize, ..FileQuery::default() };
        let known: HashSet<PathBuf> =
            self.files(&all)?.data.iter().map(|file| self.file_path(&file.id, file.purpose)).collect();
        for (path, name, kind) in entries(&self.folder.join("files"))? {
            let is_ours = name.split_once('.').is_some_and(|(id, ending)| {
                let endings = Purpose::ALL.map(Purpose::ending);
                is_id("file-", id) && (ending == UPLOAD || endings.contains(&ending))
            });
            if is_ours && kind.is_file() && !known.contains(&path) {
                swept_later(&path, fs::remove_file(&path));
            }
        }
        Ok(())
    }
}

/// Checks that there is a file for this purpose; `role` is what it is needed for.
pub(super) fn check_file(
    database: &Connection,
    role: &'static str,
    file: &str,
    purpose: Purpose,
) -> Result<(), StorageError> {
    let (query, purpose) = ("SELECT COUNT(*) FROM files WHERE id = ? AND purpose = ?", purpose.name());
    let count: i64 = database.query_row(query, [file, purpose], |row| row.get(0))?;
    if count > 0 { Ok(()) } else { Err(StorageError::NoFile { role, file: file.to_owned(), purpose }) }
}

/// Says that a file is there.
pub(super) fn insert(database: &Connection, file: &StoredFile) -> Result<(), StorageError> {
    let StoredFile { id, bytes, created, filename, purpose, expires } = file;
    database.execute(
        "INSERT INTO files (id, bytes, created, filename, purpose, expires) VALUES (?, ?, ?, ?, ?, ?)",
        params![id, bytes.cast_signed(), created, filename, purpose.name(), expires],
    )?;
    Ok(())
}

fn read(row: &Row<'_>) -> rusqlite::Result<StoredFile> {
    let (bytes, purpose): (i64, String) = (row.get(1)?, row.get(4)?);
    let unknown = || unreadable(4, FromSqlError::Other(format!("the purpose `{purpose}`").into()));
    Ok(StoredFile {
        id: row.get(0)?,
        bytes: bytes.cast_unsigned(),
        created: row.get(2)?,
        filename: row.get(3)?,
        purpose: Purpose::ALL.into_iter().find(|known| known.name() == purpose).ok_or_else(unknown)?,
        expires: row.get(5)?,
    })
}
