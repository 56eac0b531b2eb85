//! Batches that outlive the server: what `/v1/batches` asks for, one after the other, beside requests and after them.
//!
//! Two threads share the work. One *settles*: it looks at new files ([`check`]), and makes the files of batches that are at
//! their end ([`answers`]): answered, cancelled, or out of time. The other *answers*: the oldest batch that isn't done, line by
//! line, into a file in the batch's folder, which alone says what is done. So a server that is killed goes on where it was.

mod answers;
mod check;

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde_json::Map;

use super::{
    Answered, Answerer, result,
    run::{self, Ended, Limits},
};
use crate::{
    http::App,
    lines::{
        input::Input,
        manifest::Manifest,
        output::{Output, Resumed},
    },
    metrics,
    storage::{
        Batch, BatchError, BatchStatus, MAX_FILE_BYTES, NewBatch, Progress, Purpose, Storage, StorageError, now,
    },
    turns::{State, Turns, unless_panics},
};

/// How often a look is taken at whether a batch's time is over.
const TICK: Duration = Duration::from_secs(1);
/// How often it is while there is no batch, for files whose time is over.
const IDLE_TICK: Duration = Duration::from_secs(60);
/// How often progress is kept.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Lines under way for each sequence of a step, and lines of a window.
const LINES_PER_SEQUENCE: [usize; 2] = [2, 32];
/// Within a batch's folder, what is answered.
const ANSWERS: &str = "answers.jsonl";

/// Why something can't be done with a batch.
#[derive(Debug, thiserror::Error)]
pub enum BatchJobsError {
    /// There is no such batch.
    #[error("no batch has the id `{0}`")]
    NotFound(String),
    /// It is too late.
    #[error("the batch `{id}` is {status}: it can't be cancelled")]
    Done {
        /// The batch.
        id: String,
        /// What it is.
        status: &'static str,
    },
    /// The storage.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// The batches of a server.
pub struct BatchJobs {
    storage: Arc<Storage>,
    /// Tells the weights that answer from others.
    base: String,
    app: Arc<App>,
    limits: Limits,
    turns: Turns,
}

/// The threads that batches are worked on by.
pub struct BatchRunner {
    jobs: Arc<BatchJobs>,
    threads: [JoinHandle<()>; 2],
}

impl BatchRunner {
    /// Lets go of what is under way, which is asked again when the server starts again; nothing new begins.
    pub fn stop(&self) {
        self.jobs.turns.end();
    }

    /// Waits until that is on disk.
    pub fn end(self) {
        self.stop();
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a thread of batches has panicked");
            }
        }
    }
}

impl BatchJobs {
    /// Goes on with the batches that aren't done. `app` answers their lines, `max_num_seqs` at a time; `base` is the fingerprint
    /// of its weights.
    ///
    /// # Errors
    /// When the storage can't be read, or a thread not be started.
    pub fn start(
        storage: Arc<Storage>,
        base: String,
        app: Arc<App>,
        max_num_seqs: usize,
    ) -> Result<(Arc<Self>, BatchRunner)> {
        let [in_flight, window] = LINES_PER_SEQUENCE.map(|lines| max_num_seqs.saturating_mul(lines));
        let limits = Limits { in_flight, window };
        let jobs = Arc::new(Self { storage, base, app, limits, turns: Turns::default() });
        for batch in jobs.storage.batches_of_others(&jobs.base)? {
            tracing::warn!(batch = batch.id, "a batch of another model waits for a server with its own");
        }
        jobs.show_counts();
        let [settler, answerer] = [(); 2].map(|()| jobs.clone());
        let settle = thread::Builder::new().name("batch-settle".into()).spawn(move || settler.settle_all())?;
        let answer = thread::Builder::new().name("batch-answer".into()).spawn(move || answerer.answer_all())?;
        Ok((jobs.clone(), BatchRunner { jobs, threads: [settle, answer] }))
    }

    /// Adds a batch, whose file is looked at meanwhile.
    ///
    /// # Errors
    /// When the file isn't there, or the storage fails.
    pub fn create(&self, asked: NewBatch) -> Result<Batch, StorageError> {
        let batch = self.storage.add_batch(asked, &self.base)?;
        self.turns.wake();
        self.show_counts();
        Ok(batch)
    }

    /// Cancels a batch that isn't done; requests under way are let go of.
    ///
    /// # Errors
    /// When it is done, or there is no such batch.
    pub fn cancel(&self, id: &str) -> Result<Batch, BatchJobsError> {
        let open = [BatchStatus::Validating, BatchStatus::InProgress];
        let state = self.turns.state();
        let is_cancelled = self.storage.set_batch_status(id, &open, BatchStatus::Cancelling)?;
        state.stop(id);
        drop(state);
        let batch = self.storage.batch(id)?.ok_or_else(|| BatchJobsError::NotFound(id.to_owned()))?;
        if !is_cancelled && batch.status != BatchStatus::Cancelling {
            return Err(BatchJobsError::Done { id: batch.id, status: batch.status.name() });
        }
        self.turns.wake();
        self.show_counts();
        Ok(batch)
    }

    fn show_counts(&self) {
        for status in BatchStatus::ALL {
            if let Ok(count) = self.storage.count_batches(status) {
                metrics::batches(status.name(), count);
            }
        }
    }

    fn settle_all(&self) {
        let next = |state: &mut State| {
            let current = state.current();
            if let Some(batch) = current.map(|id| self.storage.batch(id)).transpose()?.flatten()
                && batch.expires <= now()
            {
                state.stop(&batch.id);
            }
            self.storage.remove_expired_files()?;
            Ok(self.storage.next_to_settle(current)?)
        };
        self.work(next, |batch| self.guarded(&batch, || self.settle(&batch)));
    }

    fn answer_all(&self) {
        let next = |state: &mut State| {
            let next = self.storage.next_to_answer(&self.base)?;
            Ok(next.map(|batch| (self.turns.begin(state, &batch.id), batch)))
        };
        self.work(next, |(turn, batch)| {
            let answered = self.guarded(&batch, || self.answer(&batch, &turn.stop));
            drop(turn);
            self.turns.wake();
            answered
        });
    }

    /// Does a `part` of one batch after the other until the server ends; `next` says of which.
    fn work<T>(&self, next: impl Fn(&mut State) -> Result<Option<T>>, part: impl Fn(T) -> Result<()>) {
        let tick = || {
            let is_open = self.storage.count_batches(BatchStatus::InProgress).is_ok_and(|count| count > 0);
            Some(if is_open { TICK } else { IDLE_TICK })
        };
        let part = |batch| {
            let done = part(batch);
            self.show_counts();
            done
        };
        self.turns.work("batches wait", next, tick, part);
    }

    /// Does a `part` of a batch, which fails if that panics.
    fn guarded(&self, batch: &Batch, part: impl FnOnce() -> Result<()>) -> Result<()> {
        unless_panics(part).unwrap_or_else(|said| {
            let message = format!("The server failed while it worked on the batch: {said}");
            let error = BatchError { code: "server_error".to_owned(), message, param: None, line: None };
            Ok(self.storage.fail_batch(&batch.id, &[error])?)
        })
    }

    /// Brings a batch to what follows: a new one to its turn or its failure, others to their end.
    fn settle(&self, batch: &Batch) -> Result<()> {
        let to = match batch.status {
            BatchStatus::Validating => return self.check(batch),
            BatchStatus::Cancelling => BatchStatus::Cancelled,
            BatchStatus::InProgress => BatchStatus::Expired,
            _ => BatchStatus::Completed,
        };
        self.finish(batch, to)
    }

    fn finish(&self, batch: &Batch, to: BatchStatus) -> Result<()> {
        // A batch ends whatever has become of its input.
        let lines = (to == BatchStatus::Expired).then(|| self.input(batch).and_then(|input| input.first_lines()).ok());
        let made = answers::files(&self.storage, lines.flatten(), &self.answers(batch), batch)?;
        Ok(self.storage.finish_batch(batch, to, made)?)
    }

    /// Looks at a new batch's file.
    fn check(&self, batch: &Batch) -> Result<()> {
        let checked = self.input(batch).and_then(|input| check::check(&input, &batch.endpoint));
        let errors = match checked {
            Ok(Ok(check::Checked { lines, model })) => {
                self.storage.begin_batch(&batch.id, lines, model.as_deref())?;
                self.turns.wake();
                return Ok(());
            }
            Ok(Err(errors)) => errors,
            Err(error) => vec![unreadable(batch, &error)],
        };
        Ok(self.storage.fail_batch(&batch.id, &errors)?)
    }

    /// Answers a batch's lines until all are answered or `stop` is set.
    fn answer(&self, batch: &Batch, stop: &AtomicBool) -> Result<()> {
        fs::create_dir_all(self.storage.batch_folder(&batch.id)).context("cannot make the batch's folder")?;
        let read = self.input(batch).and_then(|input| Ok((input.scan(|_| ())?, input)));
        let (scan, input) = match read {
            Ok(read) => read,
            Err(error) => {
                // It was readable when the batch was new. What is answered stays.
                self.storage.fail_batch(&batch.id, &[unreadable(batch, &error)])?;
                return self.finish(batch, BatchStatus::Failed);
            }
        };
        let place = self.answers(batch);
        let mut output = Output::open(&place.to_string_lossy())?;
        let mut progress = answers::none(batch);
        let Resumed { done, .. } = output.resume(&scan, |line| {
            let told = result::told(line)?;
            progress.add(told.failed, answers::usage(line));
            Some(told)
        })?;
        let writer = output.begin(&Manifest::new(&scan, Map::new()), &done, false)?;
        let mut kept = Instant::now();
        let see = |answered: &Answered| {
            metrics::batch_line(answered.line.told.failed);
            progress.add(answered.line.told.failed, answered.usage);
            if kept.elapsed() >= PROGRESS_INTERVAL {
                self.keep(batch, &progress);
                kept = Instant::now();
            }
        };
        let answerer = Answerer::new(self.app.clone(), seed(&batch.id), batch.created.cast_unsigned());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let ended = runtime.block_on(run::run(answerer, input.lines(&scan)?, done, writer, self.limits, stop, see));
        // Work of lines that nobody waits for any more may still be under way.
        runtime.shutdown_background();
        self.keep(batch, &progress);
        if ended? == Ended::Finished {
            self.storage.set_batch_status(&batch.id, &[BatchStatus::InProgress], BatchStatus::Finalizing)?;
        }
        Ok(())
    }

    /// Keeps how much of a batch is done: for those who ask; the answers alone decide.
    fn keep(&self, batch: &Batch, progress: &Progress) {
        if let Err(error) = self.storage.set_batch_progress(&batch.id, progress) {
            tracing::warn!(%error, batch = batch.id, "the batch's progress isn't kept");
        }
    }

    fn input(&self, batch: &Batch) -> Result<Input> {
        let path = self.storage.file_path(&batch.input_file, Purpose::Batch);
        Ok(Input::open(&path.to_string_lossy(), &self.storage.batch_folder(&batch.id))?.within(MAX_FILE_BYTES))
    }

    fn answers(&self, batch: &Batch) -> PathBuf {
        self.storage.batch_folder(&batch.id).join(ANSWERS)
    }
}

/// Tells that a batch's input can't be read.
fn unreadable(batch: &Batch, error: &anyhow::Error) -> BatchError {
    tracing::error!(batch = batch.id, "{error:#}");
    let message = format!("The input file can't be read: {}", error.root_cause());
    BatchError { code: "unreadable_file".to_owned(), message, param: Some("input_file_id".to_owned()), line: None }
}

/// Stands for the draws of a batch's requests that have no seed: the same after a restart.
fn seed(id: &str) -> u64 {
    let digits = id.rsplit('_').next().and_then(|digits| digits.get(..16));
    digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
