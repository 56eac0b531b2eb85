//! Gzip and zstd. Both are rows of parts that are whole in themselves, gzip's members and zstd's frames: what is written in
//! steps is a part a step, and a torn end is a part that isn't whole.

use std::{
    io::{self, BufRead, Read, Write},
    path::Path,
};

use flate2::{
    bufread::{GzDecoder, MultiGzDecoder},
    write::GzEncoder,
};

/// What a file's lines lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Nothing.
    Plain,
    /// Gzip's members.
    Gzip,
    /// Zstd's frames.
    Zstd,
}

impl Compression {
    /// What a file is to be written in, by the end of its name: `.gz` or `.zst`.
    pub fn by_name(path: &Path) -> Self {
        match path.extension().and_then(|ending| ending.to_str()) {
            Some("gz") => Self::Gzip,
            Some("zst") => Self::Zstd,
            _ => Self::Plain,
        }
    }

    /// What a file lies in, by its first bytes: no text begins so.
    pub fn by_content(first: &[u8]) -> Self {
        match first {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }

    /// All parts of `reader`, as what they hold.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn decode<R: BufRead + Send + 'static>(self, reader: R) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::Plain => Box::new(reader),
            Self::Gzip => Box::new(MultiGzDecoder::new(reader)),
            Self::Zstd => Box::new(zstd::Decoder::with_buffer(reader)?),
        })
    }

    /// What the next part of `reader` holds; of what isn't compressed, all of it. `reader` is left where the part ends.
    ///
    /// # Errors
    /// Of the kind [`io::ErrorKind::UnexpectedEof`] when the part isn't whole.
    pub fn decode_part(self, reader: &mut impl BufRead) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match self {
            Self::Plain => reader.read_to_end(&mut bytes)?,
            Self::Gzip => GzDecoder::new(reader).read_to_end(&mut bytes)?,
            Self::Zstd => zstd::Decoder::with_buffer(reader)?.single_frame().read_to_end(&mut bytes)?,
        };
        Ok(bytes)
    }

    /// One part that holds `bytes`.
    ///
    /// # Errors
    /// When zstd has no memory.
    pub fn encode(self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(bytes.to_vec()),
            Self::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(bytes)?;
                encoder.finish()
            }
            Self::Zstd => zstd::encode_all(bytes, zstd::DEFAULT_COMPRESSION_LEVEL),
        }
    }
}
