//! Where a checkpoint's files lie: a directory, or the binary itself. Small files are read whole; weights are read
//! by positioned reads, never mapped (a mapped file that shrinks kills the process, and page faults are slow reads).

pub(crate) mod write;

use std::{
    borrow::Cow,
    fs::{DirEntry, File},
    io,
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::Arc,
};

use crate::{Error, Result};

/// The largest text file (configuration, tokenizer, index) that is read: about eight times the largest real one.
const TEXT_LIMIT_BYTES: u64 = 256 << 20;

/// A checkpoint's files by name.
#[derive(Debug, Clone)]
pub(crate) enum Files {
    /// A directory, from the user or from the hub's cache.
    Directory(PathBuf),
    /// Files inside of this binary.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

impl Files {
    /// How `name` is called in messages.
    pub(crate) fn label(&self, name: &str) -> String {
        match self {
            Self::Directory(directory) => directory.join(name).display().to_string(),
            Self::Embedded(_) => format!("embedded {name}"),
        }
    }

    /// How the whole is called in messages.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Directory(directory) => directory.display().to_string(),
            Self::Embedded(_) => "the embedded checkpoint".to_owned(),
        }
    }

    /// The names of all files, in order.
    pub(crate) fn names(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = match self {
            Self::Embedded(files) => files.iter().map(|(name, _)| (*name).to_owned()).collect(),
            Self::Directory(directory) => {
                let failed = |reason| Error::Read { file: directory.display().to_string(), reason };
                let entries = std::fs::read_dir(directory).map_err(failed)?;
                let name = |entry: io::Result<DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
                entries.map(name).collect::<io::Result<_>>().map_err(failed)?
            }
        };
        names.sort_unstable();
        Ok(names)
    }

    /// The whole text file `name`; `None` if there is none.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        let Some(source) = self.open(name)? else { return Ok(None) };
        if source.len > TEXT_LIMIT_BYTES {
            return Err(Error::FileTooLarge {
                file: source.label,
                found_bytes: source.len,
                limit_bytes: TEXT_LIMIT_BYTES,
            });
        }
        match source.bytes {
            Bytes::Static(bytes) => Ok(Some(Cow::Borrowed(bytes))),
            Bytes::File(_) => {
                let mut bytes = vec![0; usize::try_from(source.len).unwrap_or(0)];
                source.read_exact_at(0, &mut bytes)?;
                Ok(Some(Cow::Owned(bytes)))
            }
        }
    }

    /// The text file `name`, which every checkpoint needs.
    pub(crate) fn require(&self, name: &str, hint: &'static str) -> Result<Cow<'static, [u8]>> {
        self.read(name)?.ok_or_else(|| Error::MissingFile { checkpoint: self.describe(), file: name.to_owned(), hint })
    }

    /// The file `name` for positioned reads; `None` if there is none.
    pub(crate) fn open(&self, name: &str) -> Result<Option<Source>> {
        let label = self.label(name);
        match self {
            Self::Directory(directory) => Source::open(label, &directory.join(name)),
            Self::Embedded(files) => Ok(files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| Source {
                label,
                len: bytes.len() as u64,
                bytes: Bytes::Static(bytes),
            })),
        }
    }
}

/// One open file for positioned reads from several threads.
#[derive(Debug)]
pub(crate) struct Source {
    label: String,
    len: u64,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    File(Arc<OpenFile>),
    Static(&'static [u8]),
}

/// A file on disk.
#[derive(Debug)]
pub(crate) struct OpenFile {
    /// Read through the page cache.
    pub(crate) plain: File,
    /// The same file again, read past it; `None` where that is not asked for or not possible.
    pub(crate) direct: Option<File>,
}

impl Source {
    /// The file at `path`; `None` if there is none.
    pub(crate) fn open(label: String, path: &std::path::Path) -> Result<Option<Self>> {
        let failed = |reason| Error::Read { file: label.clone(), reason };
        // Asked before it is opened: opening a named pipe would wait for its writer.
        let metadata = match std::fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        if !metadata.is_file() {
            return Err(failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "expected a file, found a directory or device",
            )));
        }
        let plain = File::open(path).map_err(failed)?;
        let len = plain.metadata().map_err(failed)?.len();
        Ok(Some(Self { label, len, bytes: Bytes::File(Arc::new(OpenFile { plain, direct: None })) }))
    }

    /// How the file is called in messages.
    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    /// Its size in bytes when it was opened.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Has [`Source::read_direct`] go past the page cache, where the file system allows it.
    #[cfg(target_os = "linux")]
    pub(crate) fn bypass_page_cache(&mut self) {
        use std::os::{fd::AsRawFd, unix::fs::OpenOptionsExt};
        if let Bytes::File(file) = &mut self.bytes
            && let Some(file) = Arc::get_mut(file)
        {
            // Not by its name, which may be another file's by now.
            let same = format!("/proc/self/fd/{}", file.plain.as_raw_fd());
            file.direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(same).ok();
        }
    }

    /// Elsewhere there is one way to read.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn bypass_page_cache(&mut self) {}

    /// The file, for those who read it by other ways; `None` if it is inside of this binary.
    pub(crate) fn file(&self) -> Option<&Arc<OpenFile>> {
        match &self.bytes {
            Bytes::File(file) => Some(file),
            Bytes::Static(_) => None,
        }
    }

    /// Fills `out` from the bytes that begin at `offset`, past the page cache if it can; `offset`, the length of `out` and
    /// its place in memory should be multiples of 4 KiB.
    pub(crate) fn read_direct(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.read_direct_padded(offset, out.len(), out)
    }

    /// The same, but only the first `needed` bytes are wanted: those that make whole 4 KiB of them may lie past the
    /// file's end.
    pub(crate) fn read_direct_padded(&self, offset: u64, needed: usize, out: &mut [u8]) -> Result<()> {
        if let Some(direct) = self.file().and_then(|file| file.direct.as_ref()) {
            match direct.read_at(out, offset) {
                Ok(count) if count >= needed => return Ok(()),
                // A part, or a file system that has more to ask: the plain way decides, and says what is wrong.
                _ => {}
            }
        }
        self.read_exact_at(offset, &mut out[..needed])
    }

    /// Fills `out` from the bytes that begin at `offset`.
    pub(crate) fn read_exact_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let result = match &self.bytes {
            Bytes::File(file) => file.plain.read_exact_at(out, offset),
            Bytes::Static(bytes) => copy_at(bytes, offset, out),
        };
        result.map_err(|source| self.read_error(offset, out.len(), source))
    }

    /// What it means that `bytes` bytes at `offset` could not be read.
    pub(crate) fn read_error(&self, offset: u64, bytes: usize, reason: io::Error) -> Error {
        Error::Read {
            file: self.label.clone(),
            reason: match reason.kind() {
                io::ErrorKind::UnexpectedEof => io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    format!("expected {bytes} bytes at offset {offset}, but the file ends before: it was cut off"),
                ),
                _ => reason,
            },
        }
    }
}

fn copy_at(bytes: &[u8], offset: u64, out: &mut [u8]) -> io::Result<()> {
    let start = usize::try_from(offset).ok();
    let part = start.and_then(|start| bytes.get(start..start.checked_add(out.len())?));
    match part {
        Some(part) => {
            out.copy_from_slice(part);
            Ok(())
        }
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static FILES: &[(&str, &[u8])] = &[("a.txt", b"hello")];

    #[test]
    fn a_directory_and_the_binary_read_alike() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.txt"), "hello").unwrap();
        for files in [Files::Directory(directory.path().to_owned()), Files::Embedded(FILES)] {
            assert_eq!(files.read("a.txt").unwrap().unwrap().as_ref(), b"hello");
            assert!(files.read("b.txt").unwrap().is_none());
            let source = files.open("a.txt").unwrap().unwrap();
            let mut out = [0; 3];
            source.read_exact_at(2, &mut out).unwrap();
            assert_eq!((&out, source.len()), (b"llo", 5));
            let error = source.read_exact_at(3, &mut out).unwrap_err();
            assert!(std::error::Error::source(&error).is_none(), "a chain of causes would say it twice");
            let error = error.to_string();
            assert!(error.contains("a.txt") && error.contains("expected 3 bytes at offset 3"), "{error}");
            assert!(source.read_exact_at(u64::MAX - 1, &mut out).is_err());
        }
    }

    #[test]
    fn a_directory_in_a_files_place_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("config.json")).unwrap();
        let error = Files::Directory(directory.path().to_owned()).read("config.json").unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("expected a file"), "{error}");
    }
}
