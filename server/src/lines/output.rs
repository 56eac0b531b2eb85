//! One line for each line of the input, in a file that is whole whatever ends the process.
//!
//! The file itself tells what is done: each of its lines says which line of the input it is of, and there is no other record.
//! It is locked while it is written, appended to line by line, and synced in steps. A torn end, as a kill leaves it, is cut
//! off by the next run. Lines that tell of a failure are also in a second file beside it, which is made anew from the first.
//! What isn't a file, such as standard output, can only be written from the start.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::{self, BufRead, BufReader, Seek, Write},
    path::{Path, PathBuf},
    sync::mpsc::{self, RecvTimeoutError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    LineSet,
    compression::Compression,
    input::{Input, Scan},
    manifest::{self, Manifest, UNFINISHED, beside, folder},
};

/// How long a line may wait until it is safe on disk.
const SYNC_INTERVAL: Duration = Duration::from_secs(2);
/// How many bytes may.
const SYNC_BYTES: usize = 8 << 20;
/// What the name of the file with the failures is beside the output's.
const ERRORS_ENDING: &str = ".errors.jsonl";

/// What a line of the output is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// The input's line.
    pub number: u64,
    /// Whether it tells of a failure.
    pub failed: bool,
}

/// An output that isn't written yet.
pub struct Output {
    target: Target,
    /// How many bytes there are already.
    bytes: u64,
}

enum Target {
    Stream(Box<dyn Write + Send>),
    File { path: PathBuf, file: File, compression: Compression },
}

/// What an output holds before it is gone on with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resumed {
    /// The lines that are done, and those that are blank.
    pub done: LineSet,
    /// How many of them are in the output.
    pub lines: u64,
    /// How many of those tell of a failure.
    pub failed: u64,
}

impl Output {
    /// Opens a path, or standard output if `place` is `-`, and keeps other processes out of it. A path that ends in `.gz` or
    /// `.zst` is compressed.
    ///
    /// # Errors
    /// When it can't be written, or another process does.
    pub fn open(place: &str) -> Result<Self> {
        if place == "-" {
            return Ok(Self { target: Target::Stream(Box::new(io::stdout())), bytes: 0 });
        }
        let path = PathBuf::from(place);
        let failed = || format!("cannot write {place}");
        if fs::metadata(&path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
            let file = File::options().write(true).open(&path).with_context(failed)?;
            return Ok(Self { target: Target::Stream(Box::new(file)), bytes: 0 });
        }
        let file = File::options().read(true).append(true).create(true).open(&path).with_context(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("another process writes {place}: wait until it has ended, or give another --output")
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(failed),
        }
        let bytes = file.metadata().with_context(failed)?.len();
        let compression = Compression::by_name(&path);
        Ok(Self { target: Target::File { path, file, compression }, bytes })
    }

    /// Where what is copied for a while belongs: beside the output, if that is a file.
    pub fn folder(place: &str) -> PathBuf {
        let path = Path::new(place);
        let is_stream = place == "-" || fs::metadata(path).is_ok_and(|found| !found.is_file());
        if is_stream { std::env::temp_dir() } else { folder(path).to_owned() }
    }

    /// Whether an output at `place` would be written over `input`, itself or by a file beside it.
    pub fn would_replace(place: &str, input: &str) -> bool {
        let real = |path: &Path| fs::canonicalize(path).ok().filter(|path| path.is_file());
        let output = Path::new(place);
        let written = [output.to_owned(), beside(output, ERRORS_ENDING), manifest::path(output)];
        let mut written = written.iter().filter_map(|path| real(path));
        input != "-" && real(Path::new(input)).is_some_and(|input| written.any(|written| written == input))
    }

    /// The file with the failures, if they are to be in one.
    pub fn errors(&self) -> Option<PathBuf> {
        match &self.target {
            Target::Stream(_) => None,
            Target::File { path, .. } => Some(beside(path, ERRORS_ENDING)),
        }
    }

    /// Whether it can be gone on with; and the manifest that it was begun with, if it was begun. `force` goes on whatever that
    /// one says, if only `input` still begins with the lines that were done.
    ///
    /// # Errors
    /// When it was begun with something else, or nothing tells with what.
    pub fn check(&self, input: &Input, now: &Manifest, force: bool) -> Result<Option<Manifest>> {
        let Target::File { path, .. } = &self.target else { return Ok(None) };
        let shown = path.display();
        let before = Manifest::read(path)?;
        if self.bytes == 0 {
            let errors = beside(path, ERRORS_ENDING);
            ensure!(
                before.is_some() || !errors.exists(),
                "{} is there, but no manifest that tells what it is of: give another --output, or remove it",
                errors.display()
            );
            return Ok(None);
        }
        let Some(before) = before else {
            ensure!(
                force,
                "{shown} is there, but no manifest that tells what it is of: give another --output, or --force"
            );
            return Ok(None);
        };
        let differences = before.differences(now);
        ensure!(
            force || differences.is_empty(),
            "{shown} was begun by another run: {}. Give another --output, or --force to go on nevertheless",
            differences.join("; ")
        );
        if let Some((bytes, crc32)) = before.input() {
            ensure!(
                !force || input.begins_with(bytes, crc32)?,
                "{shown} is of other lines than the input has, which doesn't begin with them: give another --output"
            );
        }
        Ok(Some(before))
    }

    /// Looks at what is there: `read` tells what a line is of. A torn end is cut off, and the failures' file made anew. If the
    /// input has no lines, the output is whole.
    ///
    /// # Errors
    /// When there is something that this run can't have written.
    pub fn resume(&mut self, input: &Scan, mut read: impl FnMut(&[u8]) -> Option<Told>) -> Result<Resumed> {
        let mut resumed = Resumed { done: input.blank.clone(), lines: 0, failed: 0 };
        let Target::File { path, file, compression } = &mut self.target else { return Ok(resumed) };
        let shown = path.display();
        let failed = || format!("cannot read {shown}");
        let mut errors = Errors::anew(path)?;
        let mut reader = BufReader::new(&*file);
        reader.rewind().with_context(failed)?;
        let (mut whole, mut told) = (0, 0);
        let damaged = |whole: u64| format!("{shown} is damaged after its first {whole} bytes");
        while let Some(part) = next_part(*compression, &mut reader).with_context(|| damaged(whole))? {
            for line in part.split_inclusive(|byte| *byte == b'\n') {
                told += 1;
                let Told { number, failed } = read(line)
                    .with_context(|| format!("{shown}, line {told} is no result: this is no output of such a run"))?;
                ensure!(
                    input.holds(number) && resumed.done.insert(number),
                    "{shown}, line {told} is a second result of the input's line {number}, or of one that isn't there"
                );
                resumed.lines += 1;
                if failed {
                    resumed.failed += 1;
                    errors.write(line)?;
                }
            }
            whole = reader.stream_position().with_context(failed)?;
        }
        if whole < self.bytes {
            ensure!(
                resumed.lines > 0 || Manifest::read(path)?.is_some(),
                "{shown} holds no result: this is no output of such a run"
            );
            tracing::warn!(
                "{shown}: its last {} bytes were torn by the end of a run and are cut off",
                self.bytes - whole
            );
            file.set_len(whole).with_context(|| format!("cannot write {shown}"))?;
        }
        errors.finish(path)?;
        if whole == 0 && input.lines == 0 {
            file.write_all(&compression.encode(&[])?).with_context(|| format!("cannot write {shown}"))?;
        }
        Ok(resumed)
    }

    /// Begins to write, or goes on. `done` are lines that never come; if `ordered`, a line waits for all others before it.
    ///
    /// # Errors
    /// When the manifest can't be written.
    pub fn begin(self, manifest: &Manifest, done: &LineSet, ordered: bool) -> Result<Writer> {
        let sink = match self.target {
            Target::Stream(stream) => Sink::Stream(stream),
            Target::File { path, file, compression } => {
                manifest.write(&path)?;
                let errors = Errors { path: beside(&path, ERRORS_ENDING), file: None };
                Sink::File { shown: path.display().to_string(), file, compression, part: Vec::new(), errors }
            }
        };
        let order = ordered.then(|| Order { next: 1, held: BTreeMap::new(), done: done.clone() });
        Ok(Writer { sink, order, unsynced_bytes: 0, synced: Instant::now() })
    }
}

/// The next line of a file, or the next part of a compressed one: none at the end, or if that is torn.
fn next_part(compression: Compression, reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    if reader.fill_buf()?.is_empty() {
        return Ok(None);
    }
    if compression == Compression::Plain {
        let mut line = Vec::new();
        reader.read_until(b'\n', &mut line)?;
        return Ok(line.ends_with(b"\n").then_some(line));
    }
    match compression.decode_part(reader) {
        Ok(part) => Ok(Some(part)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

/// A line for the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// What it is of.
    pub told: Told,
    /// Its text, without an end of line.
    pub text: String,
}

/// An output that is written.
pub struct Writer {
    sink: Sink,
    order: Option<Order>,
    unsynced_bytes: usize,
    synced: Instant,
}

enum Sink {
    Stream(Box<dyn Write + Send>),
    File {
        shown: String,
        file: File,
        compression: Compression,
        /// Lines that are not compressed yet.
        part: Vec<u8>,
        errors: Errors,
    },
}

/// Lines that wait for others.
struct Order {
    /// The line that comes next.
    next: u64,
    held: BTreeMap<u64, Finished>,
    /// Those that never come.
    done: LineSet,
}

impl Writer {
    /// Writes all that comes through `lines`, and syncs it once no more does; `written` is told of each that isn't held back any
    /// more.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write_all(mut self, lines: &mpsc::Receiver<Finished>, mut written: impl FnMut()) -> Result<()> {
        loop {
            match lines.recv_timeout(SYNC_INTERVAL) {
                Ok(line) => (0..self.write(line)?).for_each(|_| written()),
                Err(RecvTimeoutError::Timeout) => self.sync()?,
                Err(RecvTimeoutError::Disconnected) => return self.sync(),
            }
        }
    }

    /// Writes a line, or holds it back; how many it has written, then, with those that were held back for it.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write(&mut self, line: Finished) -> Result<usize> {
        let Some(order) = &mut self.order else { return self.put(line).map(|()| 1) };
        order.held.insert(line.told.number, line);
        let mut written = 0;
        while let Some(line) = self.order.as_mut().and_then(Order::next) {
            self.put(line)?;
            written += 1;
        }
        Ok(written)
    }

    fn put(&mut self, Finished { told, text }: Finished) -> Result<()> {
        let mut line = text.into_bytes();
        line.push(b'\n');
        match &mut self.sink {
            Sink::Stream(stream) => {
                return stream.write_all(&line).and_then(|()| stream.flush()).context("cannot write the output");
            }
            Sink::File { shown, file, compression, part, errors } => {
                if *compression == Compression::Plain {
                    file.write_all(&line).with_context(|| format!("cannot write {shown}"))?;
                } else {
                    part.extend_from_slice(&line);
                }
                if told.failed {
                    errors.write(&line)?;
                }
            }
        }
        self.unsynced_bytes += line.len();
        if self.unsynced_bytes >= SYNC_BYTES || self.synced.elapsed() >= SYNC_INTERVAL { self.sync() } else { Ok(()) }
    }

    /// Has all lines on disk that were written, but for those that are held back.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn sync(&mut self) -> Result<()> {
        self.synced = Instant::now();
        if let (Sink::File { shown, file, compression, part, errors }, true) = (&mut self.sink, self.unsynced_bytes > 0)
        {
            let failed = || format!("cannot write {shown}");
            if !part.is_empty() {
                file.write_all(&compression.encode(part)?).with_context(failed)?;
                part.clear();
            }
            file.sync_data().with_context(failed)?;
            errors.sync()?;
            self.unsynced_bytes = 0;
        }
        Ok(())
    }
}

impl Order {
    /// The next line, if it is there.
    fn next(&mut self) -> Option<Finished> {
        while self.done.contains(self.next) {
            self.next += 1;
        }
        let line = self.held.remove(&self.next)?;
        self.next += 1;
        Some(line)
    }
}

/// The file with the failures; it is there only if there is one.
struct Errors {
    path: PathBuf,
    file: Option<File>,
}

impl Errors {
    /// What an output holds of them, in a file of its own until all are found.
    fn anew(output: &Path) -> Result<Self> {
        let path = beside(&beside(output, ERRORS_ENDING), UNFINISHED);
        remove(&path)?;
        Ok(Self { path, file: None })
    }

    /// All are found: they take the place of those that an earlier run wrote.
    fn finish(self, output: &Path) -> Result<()> {
        let path = beside(output, ERRORS_ENDING);
        if self.file.is_none() {
            return remove(&path);
        }
        self.sync()?;
        fs::rename(&self.path, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    fn write(&mut self, line: &[u8]) -> Result<()> {
        let failed = || format!("cannot write {}", self.path.display());
        if self.file.is_none() {
            let file = File::options().append(true).create(true).open(&self.path).with_context(failed)?;
            self.file = Some(file);
        }
        self.file.as_mut().map_or(Ok(()), |file| file.write_all(line)).with_context(failed)
    }

    fn sync(&self) -> Result<()> {
        let synced = self.file.as_ref().map_or(Ok(()), File::sync_data);
        synced.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// Removes a file if it is there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
