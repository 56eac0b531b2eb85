//! Memory for weights and caches: anonymous, 64-byte aligned, in huge pages where the system gives them.

use std::{
    io,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

/// The system did not give the memory asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot allocate {bytes} bytes: {reason}; use a smaller model or budget, or free memory")]
pub struct AllocError {
    /// The size asked for.
    pub bytes: usize,
    /// What the system said.
    pub reason: String,
}

/// A plain value of which all-zero bytes are one.
pub trait Plain: Copy + Send + Sync + sealed::Sealed {}

mod sealed {
    /// Keeps [`super::Plain`] to types that are known to be plain.
    pub trait Sealed {}
}

macro_rules! plain {
    ($($value:ty),*) => {
        $(impl sealed::Sealed for $value {}
        impl Plain for $value {})*
    };
}
plain!(u8, f32, half::bf16);

/// Zeroed values, page-aligned. Pages that were never written take no memory.
#[derive(Debug)]
pub struct Buffer<T: Plain = u8> {
    start: NonNull<T>,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone and plain values have no thread affinity.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: shared references only read.
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// When the system refuses the mapping.
    pub fn zeroed(len: usize) -> Result<Self, AllocError> {
        if len == 0 {
            return Ok(Self::default());
        }
        let refused = |reason: String| AllocError { bytes: len.saturating_mul(size_of::<T>()), reason };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| refused("more than the address space".into()))?;
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(refused(std::io::Error::last_os_error().to_string()));
        }
        // Reading weights through 4 KiB pages costs a third of the bandwidth (30 against 45 GB/s on Zen 4).
        // Best effort: a refusal only costs speed.
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping just made.
        unsafe {
            libc::madvise(start, bytes, libc::MADV_HUGEPAGE);
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| refused("a mapping at address zero".into()))?;
        Ok(Self { start, len })
    }

    /// Keeps pages out of the swap space from when they are first written.
    pub(crate) fn lock(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        if self.len > 0 {
            let bytes = self.len * size_of::<T>();
            // SAFETY: the range is the mapping of `zeroed`, and locking changes no byte.
            if unsafe { libc::mlock2(self.start.as_ptr().cast(), bytes, libc::MLOCK_ONFAULT) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

impl<T: Plain> Default for Buffer<T> {
    /// No values.
    fn default() -> Self {
        Self { start: NonNull::dangling(), len: 0 }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the mapping was made with this address and length, and nothing borrows it any more.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.len * size_of::<T>()) };
        }
    }
}

impl<T: Plain> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `start..start + len` is mapped, initialised (zero pages are values of T) and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
