//! Files that are there whole or not at all.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write as _},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{Error, Result};

/// What a file's name ends in while it is written.
pub(crate) const UNFINISHED: &str = ".unfinished";

/// What can end the writing of a file.
pub(crate) enum Stopped {
    /// Writing itself.
    Io(io::Error),
    /// Anything else.
    Other(Error),
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// Has `write` fill the file `name`, which gets its name when all of it is on disk.
pub(crate) fn write_safely(
    directory: &Path,
    name: &str,
    write: &mut dyn FnMut(&mut File) -> Result<(), Stopped>,
) -> Result<()> {
    let (path, unfinished) = (directory.join(name), directory.join(format!("{name}{UNFINISHED}")));
    let mut file = create_locked(&unfinished)?;
    let written = (|| {
        file.set_len(0)?;
        write(&mut file)?;
        file.sync_all()?;
        fs::rename(&unfinished, &path)?;
        File::open(directory)?.sync_all()?;
        Ok(())
    })();
    written.map_err(|stopped| {
        // What is there of it is of no use and may fill the disk; that it can't be removed is no further error.
        let _ = fs::remove_file(&unfinished);
        match stopped {
            Stopped::Io(source) => Error::Write { file: unfinished.display().to_string(), source },
            Stopped::Other(error) => error,
        }
    })
}

/// Opens `path` to be written, by this process only: what another one writes is not touched.
fn create_locked(path: &Path) -> Result<File> {
    let label = || path.display().to_string();
    let failed = |source| Error::Write { file: label(), source };
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(Error::BeingWritten { file: label() }),
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    // Another process may have finished or removed this very file after it was opened here.
    let (locked, there) = (file.metadata().map_err(failed)?, fs::metadata(path));
    if there.is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino())) {
        Ok(file)
    } else {
        Err(Error::BeingWritten { file: label() })
    }
}

/// Writes the file `name`, which is there whole or not at all.
pub(crate) fn write_whole(directory: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    write_safely(directory, name, &mut |file| file.write_all(bytes).map_err(Into::into))
}

/// Ends the work once `stop` is set.
pub(crate) fn go_on(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}

/// Makes the directory `output`, if it isn't there.
pub(crate) fn create_directory(output: &Path) -> Result<()> {
    fs::create_dir_all(output).map_err(|source| Error::CreateDirectory { path: output.display().to_string(), source })
}
