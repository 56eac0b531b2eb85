//! Uploaded files, and those that jobs make.

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
}

impl Purpose {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::FineTune, Self::FineTuneResults];

    /// OpenAI's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::FineTune => "fine-tune",
            Self::FineTuneResults => "fine-tune-results",
        }
    }

    /// What the names of such files end in.
    fn ending(self) -> &'static str {
        match self {
            Self::FineTune => "jsonl",
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

const FILE: &str = "SELECT id, bytes, created, filename, purpose FROM files WHERE id = ?";
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

    /// Adds the file that was written to `upload`.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn add_file(&self, upload: Upload, filename: &str, purpose: Purpose) -> Result<StoredFile, StorageError> {
        let file = self.settle(upload, filename, purpose)?;
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
        Ok(StoredFile { id: upload.id.clone(), bytes, created: now(), filename: filename.to_owned(), purpose })
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
            "SELECT id, bytes, created, filename, purpose FROM files WHERE (?1 IS NULL OR purpose = ?1)
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
    /// When a job that isn't done needs it, or the system refuses.
    pub fn delete_file(&self, id: &str) -> Result<bool, StorageError> {
        let mut database = self.database();
        let transaction = database.transaction()?;
        let user = "SELECT id FROM jobs WHERE (training_file = ?1 OR validation_file = ?1)
                    AND status IN ('validating_files', 'queued', 'running')";
        if let Some(job) = transaction.query_row(user, [id], |row| row.get(0)).optional()? {
            return Err(StorageError::FileInUse { file: id.to_owned(), job });
        }
        let Some(file) = transaction.query_row(FILE, [id], read).optional()? else { return Ok(false) };
        transaction.execute("DELETE FROM files WHERE id = ?", [id])?;
        transaction.execute("UPDATE jobs SET result_file = NULL WHERE result_file = ?", [id])?;
        transaction.commit()?;
        drop(database);
        let path = self.file_path(id, file.purpose);
        swept_later(&path, fs::remove_file(&path));
        Ok(true)
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

/// Says that a file is there.
pub(super) fn insert(database: &Connection, file: &StoredFile) -> Result<(), StorageError> {
    database.execute(
        "INSERT INTO files (id, bytes, created, filename, purpose) VALUES (?, ?, ?, ?, ?)",
        params![file.id, file.bytes.cast_signed(), file.created, file.filename, file.purpose.name()],
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
    })
}
