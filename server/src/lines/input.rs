//! The lines of a file, or of standard input, numbered from 1. They are read twice: once to look at them all, then to work on
//! them. Memory holds one line at a time, and a bit for each.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    time::SystemTime,
};

use anyhow::{Context, Result, anyhow, ensure};

use super::{LineSet, compression::Compression};

/// The longest line that is read.
pub const MAX_LINE_BYTES: usize = 64 << 20;
/// What text files of some systems begin with.
const BYTE_ORDER_MARK: &str = "\u{feff}";

/// Lines to work on.
pub struct Input {
    file: Arc<File>,
    compression: Compression,
    shown: String,
    modified: Option<SystemTime>,
    most_bytes: u64,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Which one of the file, counted from 1.
    pub number: u64,
    /// Its text without the end of the line; or why it has none.
    pub text: Result<String, String>,
}

/// What a look at all lines tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scan {
    /// How many there are, but for blank ones.
    pub lines: u64,
    /// Those that are blank: there is nothing to do for them.
    pub blank: LineSet,
    /// How long they are, uncompressed.
    pub bytes: u64,
    /// Tells them from others.
    pub crc32: u32,
}

impl Scan {
    /// Whether there is a line of this number.
    pub fn holds(&self, number: u64) -> bool {
        (1..=self.lines + self.blank.len()).contains(&number)
    }
}

impl Input {
    /// Opens a path, or standard input if `place` is `-`; compressed or not. What can be read only once is first copied into a
    /// file without a name in `folder`.
    ///
    /// # Errors
    /// When it can't be read, or copied.
    pub fn open(place: &str, folder: &Path) -> Result<Self> {
        let shown = if place == "-" { "standard input".to_owned() } else { place.to_owned() };
        let failed = || format!("cannot read {shown}");
        let file = if place == "-" {
            spool(&mut io::stdin().lock(), folder)?
        } else {
            let mut file = File::open(place).with_context(failed)?;
            let found = file.metadata().with_context(failed)?;
            ensure!(!found.is_dir(), "{}: it is a folder", failed());
            if found.is_file() { file } else { spool(&mut file, folder)? }
        };
        let modified = file.metadata().and_then(|found| found.modified()).ok();
        let mut first = [0; 4];
        let read = file.read_at(&mut first, 0).with_context(failed)?;
        let compression = Compression::by_content(&first[..read]);
        Ok(Self { file: Arc::new(file), compression, shown, modified, most_bytes: u64::MAX })
    }

    /// The same; it can't be read beyond so many bytes, uncompressed.
    #[must_use]
    pub fn within(self, most_bytes: u64) -> Self {
        Self { most_bytes, ..self }
    }

    /// When it was written, as far as the system knows.
    pub fn modified(&self) -> Option<SystemTime> {
        self.modified
    }

    /// The lines from the first on, whatever they are.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn first_lines(&self) -> Result<Lines> {
        Ok(Lines {
            reader: BufReader::new(self.reader()?),
            expected: None,
            shown: self.shown.clone(),
            most_bytes: self.most_bytes,
            scan: Scan::default(),
            number: 0,
            crc32: crc32fast::Hasher::new(),
        })
    }

    /// The lines from the first on, as they were when `scan` was made: if they are others, that is the last line's error.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn lines(&self, scan: &Scan) -> Result<Lines> {
        Ok(Lines { expected: Some((scan.bytes, scan.crc32)), ..self.first_lines()? })
    }

    /// Whether it begins with so many bytes, uncompressed, that come to `crc32`.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn begins_with(&self, bytes: u64, crc32: u32) -> Result<bool> {
        let mut hasher = HashingWriter(crc32fast::Hasher::new());
        let copied = io::copy(&mut self.reader()?.take(bytes), &mut hasher);
        let copied = copied.with_context(|| format!("cannot read {}", self.shown))?;
        Ok(copied == bytes && hasher.0.finalize() == crc32)
    }

    fn reader(&self) -> io::Result<Box<dyn Read + Send>> {
        self.compression.decode(BufReader::new(ReadAt { file: self.file.clone(), offset: 0 }))
    }

    /// Shows every line to `see`.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn scan(&self, mut see: impl FnMut(&Line)) -> Result<Scan> {
        let mut lines = self.first_lines()?;
        for line in &mut lines {
            see(&line?);
        }
        Ok(Scan { crc32: lines.crc32.finalize(), ..lines.scan })
    }
}

/// Copies what can be read only once.
fn spool(from: &mut impl Read, folder: &Path) -> Result<File> {
    let copied = tempfile::tempfile_in(folder).and_then(|mut file| io::copy(from, &mut file).map(|_| file));
    copied.with_context(|| format!("cannot copy the input into {}, to read it twice", folder.display()))
}

/// A file from an offset on, whoever else reads it.
struct ReadAt {
    file: Arc<File>,
    offset: u64,
}

impl Read for ReadAt {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

/// The checksum of what is written.
struct HashingWriter(crc32fast::Hasher);

impl Write for HashingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Lines as they are read; blank ones are left out.
pub struct Lines {
    reader: BufReader<Box<dyn Read + Send>>,
    /// How many bytes there are to be, and their checksum.
    expected: Option<(u64, u32)>,
    shown: String,
    most_bytes: u64,
    /// What was seen so far.
    scan: Scan,
    number: u64,
    crc32: crc32fast::Hasher,
}

impl Lines {
    /// The next lines that are not in `done`, at most `count`, and few more bytes than `bytes`: none at the end.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn take_window(&mut self, done: &LineSet, count: usize, bytes: usize) -> Result<Vec<Line>> {
        let (mut window, mut taken) = (Vec::new(), 0);
        while window.len() < count && taken < bytes {
            let Some(line) = self.next().transpose()? else { break };
            if !done.contains(line.number) {
                taken += line.text.as_ref().map_or(0, String::len);
                window.push(line);
            }
        }
        Ok(window)
    }

    fn read(&mut self) -> io::Result<Option<Line>> {
        loop {
            let bytes = self.piece()?;
            if bytes.is_empty() {
                return Ok(None);
            }
            self.number += 1;
            let is_long = goes_on(&bytes);
            let mut rest = is_long;
            while rest {
                rest = goes_on(&self.piece()?);
            }
            let is_marked = self.number == 1 && bytes.starts_with(BYTE_ORDER_MARK.as_bytes());
            let visible = if is_marked { &bytes[BYTE_ORDER_MARK.len()..] } else { &bytes };
            if visible.trim_ascii().is_empty() && !is_long {
                self.scan.blank.insert(self.number);
                continue;
            }
            self.scan.lines += 1;
            let too_long = || Err(format!("the line is longer than {} MiB", MAX_LINE_BYTES >> 20));
            let text = if is_long { too_long() } else { text(bytes, self.number == 1) };
            return Ok(Some(Line { number: self.number, text }));
        }
    }

    /// Bytes up to the end of the line, or the most that a line may have: none at the end of the file.
    fn piece(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.scan.bytes += (&mut self.reader).take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut bytes)? as u64;
        self.crc32.update(&bytes);
        if self.scan.bytes > self.most_bytes {
            return Err(io::Error::other(format!("it has more than {} bytes, uncompressed", self.most_bytes)));
        }
        Ok(bytes)
    }
}

/// Whether a piece isn't the last one of its line.
fn goes_on(piece: &[u8]) -> bool {
    piece.len() == MAX_LINE_BYTES && !piece.ends_with(b"\n")
}

fn text(bytes: Vec<u8>, is_first: bool) -> Result<String, String> {
    let text = String::from_utf8(bytes).map_err(|error| format!("the line is not UTF-8: {}", error.utf8_error()))?;
    let text = text.trim_end();
    Ok(if is_first { text.trim_start_matches(BYTE_ORDER_MARK) } else { text }.to_owned())
}

impl Iterator for Lines {
    type Item = Result<Line>;

    fn next(&mut self) -> Option<Self::Item> {
        let read = self.read().with_context(|| format!("cannot read {}, line {}", self.shown, self.number + 1));
        if matches!(read, Ok(None))
            && let Some(expected) = self.expected.take()
            && (self.scan.bytes, self.crc32.clone().finalize()) != expected
        {
            return Some(Err(anyhow!(
                "{} has changed while it was worked on: begin anew, with another --output",
                self.shown
            )));
        }
        read.transpose()
    }
}
