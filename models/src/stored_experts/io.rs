//! The ways of reading experts, and the choice between them.

use std::io;

use crate::{Error, Result};

/// A way of reading experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Io {
    /// Threads that wait for one read each.
    Pread,
    /// One thread that keeps several reads in flight; Linux only.
    IoUring,
}

impl Io {
    /// The one that the environment variable `CADRE_IO` names; `None` if it is not set.
    pub(crate) fn asked() -> Result<Option<Self>> {
        std::env::var_os("CADRE_IO").map(|name| Self::named(&name.to_string_lossy())).transpose()
    }

    fn named(name: &str) -> Result<Self> {
        match name {
            "pread" => Ok(Self::Pread),
            "io_uring" => Ok(Self::IoUring),
            _ => Err(Error::NoSuchIo { name: name.to_owned() }),
        }
    }
}

/// The ring that `set_up` makes, unless the other way is `asked` for, or nothing is and the system refuses it.
pub(super) fn choose<T>(asked: Option<Io>, set_up: impl FnOnce() -> io::Result<T>) -> Result<Option<T>> {
    if asked == Some(Io::Pread) {
        return Ok(None);
    }
    match set_up() {
        Ok(ring) => Ok(Some(ring)),
        Err(reason) if asked.is_some() => Err(Error::IoUring { reason }),
        Err(error) => {
            tracing::info!(%error, "the system refuses io_uring: experts are read by threads");
            Ok(None)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_done_or_refused() {
        let works = || Ok(1);
        let refused = || Err::<i32, _>(io::Error::from(io::ErrorKind::PermissionDenied));
        assert_eq!(choose(None, works).unwrap(), Some(1));
        assert_eq!(choose(Some(Io::IoUring), works).unwrap(), Some(1));
        assert_eq!(choose(Some(Io::Pread), works).unwrap(), None);
        // Containers often forbid it: threads do, unless it is asked for.
        assert_eq!(choose(None, refused).unwrap(), None);
        let message = choose(Some(Io::IoUring), refused).unwrap_err().to_string();
        assert!(message.contains("CADRE_IO") && message.contains("permission denied"), "{message}");
    }

    #[test]
    fn names_are_known_or_refused() {
        assert_eq!(Io::named("pread").unwrap(), Io::Pread);
        assert_eq!(Io::named("io_uring").unwrap(), Io::IoUring);
        for name in ["", "mmap", "PREAD"] {
            let message = Io::named(name).unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")) && message.contains("`io_uring`"), "{message}");
        }
    }
}
