//! Reads by io_uring: one thread that keeps several in flight.

use std::{
    io::{self, PipeReader, PipeWriter, Read as _, Write as _},
    os::fd::AsRawFd,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    time::Duration,
};

use cadre_engine::experts::Fetch;
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};

use crate::{files::OpenFile, tensors::ALIGNMENT};

/// Reads in flight. One of an expert's size keeps the disk measured busy (docs/performance.md); small experts need more.
pub(super) const DEPTH: usize = 4;

/// Bytes of one read at most. The kernel takes fewer than 2 GiB.
const READ_BYTES: usize = 1 << 30;

/// What tells that a read was given from the end of one.
const WAKE: u64 = u64::MAX;

/// How long to wait when the kernel is out of memory for a call.
const PAUSE: Duration = Duration::from_millis(1);

/// What the kernel may refuse.
pub(super) struct SetUp(IoUring);

/// Sets a ring up.
///
/// # Errors
/// When the kernel has none, an old one, or forbids it.
pub(super) fn set_up() -> io::Result<SetUp> {
    // And one more, for what wakes the thread.
    let ring = IoUring::new(DEPTH as u32 + 1)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if probe.is_supported(opcode::Read::CODE) && probe.is_supported(opcode::PollAdd::CODE) {
        return Ok(SetUp(ring));
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's is too old"))
}

/// One read.
pub(super) struct Read {
    /// Where to.
    pub(super) fetch: Fetch,
    /// From which file.
    pub(super) file: Arc<OpenFile>,
    /// From where on.
    pub(super) offset: u64,
    /// How many bytes.
    pub(super) bytes: usize,
}

/// Takes reads to the thread, which ends after this is dropped, when it has done what it was given.
pub(super) struct Ring {
    given: Sender<Read>,
    /// A byte in it wakes the thread, its end tells that no more comes.
    wake: PipeWriter,
}

impl Ring {
    /// Starts the thread; `done` is told there of each read how it went.
    pub(super) fn start<D>(SetUp(ring): SetUp, done: D) -> io::Result<Self>
    where
        D: Fn(Fetch, io::Result<()>) + Send + 'static,
    {
        let (given, reads) = mpsc::channel();
        let (woken, wake) = io::pipe()?;
        let reading = (0..DEPTH).map(|_| None).collect();
        let thread = Thread { ring, given: reads, woken, waking: false, closed: false, reading, done };
        std::thread::Builder::new().name("cadre-reader".to_owned()).spawn(move || thread.run())?;
        Ok(Self { given, wake })
    }

    /// Begins to read.
    pub(super) fn read(&self, read: Read) {
        // Where the thread is gone, the read is dropped, and so has failed.
        if self.given.send(read).is_ok() {
            let _ = (&self.wake).write(&[0]);
        }
    }
}

/// The thread's own.
struct Thread<D> {
    ring: IoUring,
    given: Receiver<Read>,
    woken: PipeReader,
    /// Whether the ring watches `woken`.
    waking: bool,
    /// Whether no more is given.
    closed: bool,
    /// Those in flight. The kernel writes into their buffers: none may be dropped before the ring says that it has ended.
    reading: Vec<Option<Reading>>,
    done: D,
}

/// A read in flight.
struct Reading {
    read: Read,
    /// Bytes that have come.
    filled: usize,
    /// Whether the page cache is gone past; what fails there is tried through it, which decides.
    direct: bool,
}

impl<D: Fn(Fetch, io::Result<()>)> Thread<D> {
    fn run(mut self) {
        loop {
            self.take();
            if self.closed && self.is_idle() {
                return;
            }
            self.watch();
            for (tag, result) in self.wait() {
                match usize::try_from(tag).ok().filter(|index| *index < DEPTH) {
                    Some(index) => self.ended(index, result),
                    None => self.clear(result),
                }
            }
        }
    }

    /// Begins with what was given, as long as there is a place.
    fn take(&mut self) {
        while let Some(index) = self.reading.iter().position(Option::is_none) {
            let Ok(read) = self.given.try_recv() else { return };
            let direct = read.file.direct.is_some();
            self.submit(index, Reading { read, filled: 0, direct });
        }
    }

    /// Has the kernel read what is missing.
    fn submit(&mut self, index: usize, mut reading: Reading) {
        let Reading { read: Read { fetch, file, offset, bytes }, filled, direct } = &mut reading;
        let room = fetch.buffer().len();
        let Some(rest) = fetch.buffer().get_mut(*filled..*bytes) else {
            let what = format!("{bytes} bytes don't fit a slot of {room}");
            return self.tell(reading.read, Err(io::Error::new(io::ErrorKind::InvalidInput, what)));
        };
        let file = file.direct.as_ref().filter(|_| *direct).unwrap_or(&file.plain);
        let (start, len) = (rest.as_mut_ptr(), rest.len().min(READ_BYTES) as u32);
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), start, len).offset(*offset + *filled as u64);
        self.reading[index] = Some(reading);
        self.push(&entry.build().user_data(index as u64));
    }

    fn tell(&self, read: Read, result: io::Result<()>) {
        // A panic is one failed fetch, for it drops that; the others are still in flight.
        let _ = catch_unwind(AssertUnwindSafe(|| (self.done)(read.fetch, result)));
    }

    /// Read `index` came back with so many bytes, or with an error's number below zero.
    fn ended(&mut self, index: usize, result: i32) {
        let Some(mut reading) = self.reading[index].take() else { return };
        match result {
            1.. => {
                reading.filled += result as usize;
                if reading.filled >= reading.read.bytes {
                    return self.tell(reading.read, Ok(()));
                }
                // The rest of a part goes past the page cache only from a place that may.
                reading.direct &= reading.filled.is_multiple_of(ALIGNMENT);
            }
            _ if result == -libc::EINTR || result == -libc::EAGAIN => {}
            _ if reading.direct => reading.direct = false,
            0 => return self.tell(reading.read, Err(io::ErrorKind::UnexpectedEof.into())),
            _ => return self.tell(reading.read, Err(io::Error::from_raw_os_error(-result))),
        }
        self.submit(index, reading);
    }

    /// Has the ring say when something is given.
    fn watch(&mut self) {
        if !self.waking && !self.closed {
            self.waking = true;
            let entry = opcode::PollAdd::new(types::Fd(self.woken.as_raw_fd()), libc::POLLIN as u32);
            self.push(&entry.build().user_data(WAKE));
        }
    }

    /// Something was given, or no more will be; or it can't be watched for that, and has to be asked again.
    fn clear(&mut self, result: i32) {
        self.waking = false;
        if result < 0 {
            std::thread::sleep(PAUSE);
            return;
        }
        let mut wakes = [0; 64];
        // There is something to be read, or the end: this doesn't wait.
        self.closed = matches!(self.woken.read(&mut wakes), Ok(0));
    }
}

impl<D> Thread<D> {
    fn is_idle(&self) -> bool {
        self.reading.iter().all(Option::is_none)
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: an entry is a poll, which touches no memory, or a read into a part of a fetch's buffer, which belongs
        // to the fetch and stays where it is. The fetch lies in `reading` until the ring says that the read has ended;
        // so do the files. `drop` keeps it there in any case.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // There is a place for each read and the poll; but the kernel may not have taken the last ones yet.
            self.enter(0);
        }
    }

    /// What has ended, once something has: tags and results.
    fn wait(&mut self) -> Vec<(u64, i32)> {
        self.enter(1);
        self.ring.completion().map(|entry: cqueue::Entry| (entry.user_data(), entry.result())).collect()
    }

    /// Gives the kernel what was pushed, and waits until so many have ended.
    fn enter(&self, wanted: usize) {
        match self.ring.submit_and_wait(wanted) {
            Err(error) if error.raw_os_error() != Some(libc::EINTR) => {
                tracing::debug!(%error, "io_uring has to be asked again");
                std::thread::sleep(PAUSE);
            }
            _ => {}
        }
    }
}

impl<D> Drop for Thread<D> {
    /// Nothing is in flight any more unless the thread panicked.
    fn drop(&mut self) {
        while !self.is_idle() {
            for (tag, _) in self.wait() {
                if let Some(reading) = usize::try_from(tag).ok().and_then(|index| self.reading.get_mut(index)) {
                    *reading = None;
                }
            }
        }
    }
}
