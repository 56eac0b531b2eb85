//! TensorBoard event files: the scalars of each step.
//!
//! An event is a record of TensorFlow's framing (length, its checksum, the bytes, their checksum) around a protobuf
//! message `Event`. Only the few fields below are written, so they are encoded here: the crates that can write such
//! files are no longer kept, or bring a protobuf compiler and an image library along.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};

/// The fields of `Event` (tensorflow/core/util/event.proto) …
mod event {
    pub const WALL_TIME: u64 = 1;
    pub const STEP: u64 = 2;
    pub const FILE_VERSION: u64 = 3;
    pub const SUMMARY: u64 = 5;
    pub const SESSION_LOG: u64 = 7;
}

/// … of `Summary` and its `Value` (summary.proto), and of `SessionLog`.
mod summary {
    pub const VALUE: u64 = 1;
    pub const TAG: u64 = 1;
    pub const SIMPLE_VALUE: u64 = 2;
}
const SESSION_STATUS: u64 = 1;
const SESSION_START: u64 = 1;

/// What the first event of a file says.
const VERSION: &str = "brain.Event:2";

/// A file of events that grows by one a step.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `directory`, which is made if it isn't there. TensorBoard reads all files of a directory as one run
    /// and drops what earlier ones have from `first_step` on: what a run did after the checkpoint that it is resumed from.
    ///
    /// # Errors
    /// When the directory or file can't be made or written.
    pub fn create(directory: &Path, first_step: u64, now: SystemTime) -> Result<Self> {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("the directory {} can't be made", directory.display()))?;
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        // Sorted by name they are in the order of time, in which TensorBoard reads them.
        let name = format!("events.out.tfevents.{:010}.cadre.{:09}", since.as_secs(), since.subsec_nanos());
        let path = directory.join(name);
        let file = File::create_new(&path).with_context(|| format!("{} can't be created", path.display()))?;
        let mut events = Self { path, file };
        events.append(Message::event(now, 0).bytes(event::FILE_VERSION, VERSION.as_bytes()))?;
        let start = Message::default().varint(SESSION_STATUS, SESSION_START);
        events.append(Message::event(now, first_step).message(event::SESSION_LOG, &start))?;
        Ok(events)
    }

    /// Writes the scalars of a step. They are in the file when this returns.
    ///
    /// # Errors
    /// When they can't be written.
    pub fn write(&mut self, step: u64, now: SystemTime, scalars: &[(&str, f64)]) -> Result<()> {
        let values = scalars.iter().fold(Message::default(), |values, (tag, value)| {
            let value = Message::default()
                .bytes(summary::TAG, tag.as_bytes())
                .fixed32(summary::SIMPLE_VALUE, (*value as f32).to_bits());
            values.message(summary::VALUE, &value)
        });
        self.append(Message::event(now, step).message(event::SUMMARY, &values))
    }

    /// One write a record: a process that is killed leaves whole ones, or a last one that TensorBoard waits for.
    fn append(&mut self, event: Message) -> Result<()> {
        let written: io::Result<()> = self.file.write_all(&record(&event.0)).and_then(|()| self.file.flush());
        written.with_context(|| format!("{} can't be written", self.path.display()))
    }
}

/// A protobuf message that grows field by field.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn event(now: SystemTime, step: u64) -> Self {
        let wall_time = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Self::default().fixed64(event::WALL_TIME, wall_time.to_bits()).varint(event::STEP, step)
    }

    /// A 0 is left out: it is what a reader takes a missing number for.
    fn varint(self, field: u64, value: u64) -> Self {
        if value == 0 { self } else { self.raw_varint(field << 3).raw_varint(value) }
    }

    fn fixed64(self, field: u64, value: u64) -> Self {
        self.raw_varint(field << 3 | 1).raw(&value.to_le_bytes())
    }

    fn bytes(self, field: u64, value: &[u8]) -> Self {
        self.raw_varint(field << 3 | 2).raw_varint(value.len() as u64).raw(value)
    }

    fn fixed32(self, field: u64, value: u32) -> Self {
        self.raw_varint(field << 3 | 5).raw(&value.to_le_bytes())
    }

    fn message(self, field: u64, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }

    /// Seven bits a byte, the lowest first; all but the last have the high bit.
    fn raw_varint(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

/// TensorFlow's record around `data`.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), data, &masked_crc(data)].concat()
}

/// The checksum, turned and moved so that checksums of data that hold checksums stay good.
fn masked_crc(data: &[u8]) -> [u8; 4] {
    crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8).to_le_bytes()
}

/// CRC-32 with Castagnoli's polynomial. A step has a few hundred bytes: a table of 256 is fast enough.
fn crc32c(data: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let (mut crc, mut bit) = (byte as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    !data.iter().fold(!0, |crc, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The check values of RFC 3720, B.4.
    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46DD_794E);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn a_number_is_a_varint() {
        for (value, bytes) in [(0, &[0][..]), (127, &[127]), (128, &[0x80, 1]), (300, &[0xAC, 2])] {
            assert_eq!(Message::default().raw_varint(value).0, bytes);
        }
        assert_eq!(Message::default().raw_varint(u64::MAX).0.len(), 10);
    }

    fn at(seconds: f64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs_f64(seconds)
    }

    fn only_file(directory: &Path) -> PathBuf {
        std::fs::read_dir(directory).unwrap().next().unwrap().unwrap().path()
    }

    /// Made with tensorboard 2.21.0:
    ///
    /// ```python
    /// out = io.BytesIO()
    /// writer = RecordWriter(out)
    /// start = SessionLog(status=SessionLog.START)
    /// values = [Summary.Value(tag="train/loss", simple_value=2.5),
    ///           Summary.Value(tag="train/learning_rate", simple_value=1e-4)]
    /// for event in [Event(wall_time=1700000000.5, file_version="brain.Event:2"),
    ///               Event(wall_time=1700000000.5, step=300, session_log=start),
    ///               Event(wall_time=1700000002.25, step=300, summary=Summary(value=values))]:
    ///     writer.write(event.SerializeToString())
    /// print(out.getvalue().hex())
    /// ```
    #[test]
    fn the_bytes_are_tensorboards_own() {
        let expected = [
            "1800000000000000a37f4b220900002040fc54d9411a0d627261696e2e4576656e743a322b353110",
            "100000000000000095fbfe180900002040fc54d94110ac023a020801b94512a3",
            concat!(
                "3d000000000000006049f1ec0900009040fc54d94110ac022a2f0a110a0a747261696e2f6c6f737315000020",
                "400a1a0a13747261696e2f6c6561726e696e675f726174651517b7d138a0c56677",
            ),
        ];
        let directory = tempfile::tempdir().unwrap();
        let runs = directory.path().join("runs");
        let mut events = EventFile::create(&runs, 300, at(1_700_000_000.5)).unwrap();
        events.write(300, at(1_700_000_002.25), &[("train/loss", 2.5), ("train/learning_rate", 1e-4)]).unwrap();
        let path = only_file(&runs);
        let hex: String = std::fs::read(&path).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected.concat());
        assert_eq!(path.file_name().unwrap(), "events.out.tfevents.1700000000.cadre.500000000");
    }

    #[test]
    fn each_start_of_a_run_has_its_own_file() {
        let directory = tempfile::tempdir().unwrap();
        let runs = directory.path();
        EventFile::create(runs, 0, at(1.0)).unwrap();
        EventFile::create(runs, 5, at(1.25)).unwrap();
        assert_eq!(std::fs::read_dir(runs).unwrap().count(), 2);
        let error = format!("{:#}", EventFile::create(runs, 9, at(1.25)).unwrap_err());
        assert!(error.contains("events.out.tfevents.0000000001.cadre.250000000 can't be created"), "{error}");
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let error = EventFile::create(Path::new("/dev/null/runs"), 0, at(1.0)).unwrap_err();
        assert!(format!("{error:#}").contains("/dev/null/runs"), "{error:#}");
    }
}
