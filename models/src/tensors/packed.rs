//! What makes a safetensors file a part of a pack: entries of `__metadata__` that say which version it is, which
//! formats it was made in and from what, and of each packed tensor its layout, how far it is from its source and a
//! checksum.
//!
//! A packed tensor is a `U8` tensor to other readers. It begins at a multiple of 4 KiB of the file and is padded with
//! zeros to the next one, so that it can be read without the page cache.

use std::fmt;

use cadre_engine::nn::{FfnLayout, Format, Layout, PackingError, expert_bytes};
use serde_json::{Map, Value};

use super::header::entry_error;
use crate::{Error, Result, formats::Formats};

/// What packed tensors begin at and end at a multiple of, in bytes.
pub(crate) const ALIGNMENT: usize = 4096;
/// The entry that makes a file a pack's, with the version as its value.
const VERSION_KEY: &str = "cadre_pack";
const VERSION: &str = "2";
/// More bytes than any packed tensor has.
const LIMIT_BYTES: u64 = 1 << 50;

/// What every file of a pack says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackInfo {
    /// The formats of its matrices.
    pub formats: Formats,
    /// A fingerprint of the checkpoint that it was made from.
    pub source: String,
}

impl PackInfo {
    /// What `metadata` says; `None` if the file is no pack's.
    pub(super) fn read(file: &str, metadata: &Value) -> Result<Option<Self>> {
        let Some(version) = metadata.get(VERSION_KEY) else { return Ok(None) };
        let wrong = |what, expected: &str, found: Option<&Value>| Error::Pack {
            file: file.to_owned(),
            what,
            expected: expected.to_owned(),
            found: found.map_or_else(|| "none".to_owned(), |value| crate::json::excerpt(&value.to_string())),
        };
        if version.as_str() != Some(VERSION) {
            return Err(wrong("version of the pack", &format!("\"{VERSION}\""), Some(version)));
        }
        let format = |key| {
            let found = metadata.get(key);
            let format = found.and_then(Value::as_str).and_then(|name| name.parse().ok());
            format.ok_or_else(|| wrong(key, "the name of a format", found))
        };
        let source = metadata.get("source");
        Ok(Some(Self {
            formats: Formats {
                experts: format("experts_format")?,
                dense: format("dense_format")?,
                embedding: format("embedding_format")?,
            },
            source: source.and_then(Value::as_str).ok_or_else(|| wrong("source", "a fingerprint", source))?.to_owned(),
        }))
    }

    /// The entries that say it.
    pub(crate) fn metadata(&self) -> Map<String, Value> {
        let Formats { experts, dense, embedding } = self.formats;
        let entries = [
            (VERSION_KEY, VERSION.to_owned()),
            ("source", self.source.clone()),
            ("experts_format", experts.to_string()),
            ("dense_format", dense.to_string()),
            ("embedding_format", embedding.to_string()),
        ];
        entries.into_iter().map(|(key, value)| (key.to_owned(), Value::String(value))).collect()
    }
}

impl fmt::Display for PackInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a pack of checkpoint {} as {}", self.source, self.formats)
    }
}

/// What a packed tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PackedLayout {
    /// One matrix.
    Matrix(Layout),
    /// One expert: gate|up, then down.
    Expert(FfnLayout),
}

impl PackedLayout {
    pub(crate) fn format(&self) -> Format {
        match self {
            Self::Matrix(layout) => layout.format,
            Self::Expert(layout) => layout.format,
        }
    }

    /// `[n, k]`, or `[3, intermediate, hidden]`.
    pub(crate) fn shape(&self) -> Vec<usize> {
        match self {
            Self::Matrix(Layout { n, k, .. }) => vec![*n, *k],
            Self::Expert(FfnLayout { hidden, intermediate, .. }) => vec![3, *intermediate, *hidden],
        }
    }

    /// The layout of that shape.
    fn of_shape(format: Format, shape: &[usize]) -> Option<Self> {
        match *shape {
            [n, k] => Some(Self::Matrix(Layout { format, n, k })),
            [3, intermediate, hidden] => Some(Self::Expert(FfnLayout { format, hidden, intermediate })),
            _ => None,
        }
    }

    pub(crate) fn parameters(&self) -> u64 {
        self.shape().iter().map(|axis| *axis as u64).product()
    }

    /// Bytes without the padding.
    pub(crate) fn data_bytes(&self) -> u64 {
        match self {
            Self::Matrix(layout) => layout.bytes() as u64,
            Self::Expert(layout) => expert_bytes(layout) as u64,
        }
    }

    /// Bytes in the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.data_bytes().next_multiple_of(ALIGNMENT as u64)
    }
}

/// What a pack says of one of its tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct PackedEntry {
    /// What it holds.
    pub layout: PackedLayout,
    /// How far it is from its source.
    pub error: PackingError,
    /// CRC-32 of its data, without the padding.
    pub checksum: u32,
}

impl PackedEntry {
    /// What `text` says of the tensor `name`, which has `bytes` bytes.
    pub(crate) fn read(file: &str, name: &str, text: &str, bytes: u64) -> Result<Self> {
        let wrong = |what, expected: String, found: String| entry_error(file, name, what, expected, found);
        let entry = Self::parse(text).ok_or_else(|| {
            let expected = "a format, a shape like 4096x2048, two sums of squares and a checksum";
            wrong("entry of the pack", expected.to_owned(), text.to_owned())
        })?;
        let layout = entry.layout;
        // No format has less than two bits a weight, and no file 2^50 bytes: sizes that pass can be computed with.
        let parameters = layout.shape().iter().try_fold(1_u64, |product, axis| product.checked_mul(*axis as u64));
        if !parameters.is_some_and(|parameters| (1..=4 * bytes.min(LIMIT_BYTES)).contains(&parameters)) {
            let expected = format!("one with weights for {bytes} bytes");
            return Err(wrong("shape of the pack", expected, format!("{:?}", layout.shape())));
        }
        if layout.bytes() != bytes {
            let expected = format!("{} for {} {:?}", layout.bytes(), layout.format(), layout.shape());
            return Err(wrong("bytes in data_offsets", expected, bytes.to_string()));
        }
        Ok(entry)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_ascii_whitespace();
        let format = words.next()?.parse().ok()?;
        let shape: Vec<usize> = words.next()?.split('x').map(|axis| axis.parse().ok()).collect::<Option<_>>()?;
        let error =
            PackingError { squared_error: words.next()?.parse().ok()?, squared_weights: words.next()?.parse().ok()? };
        let checksum = u32::from_str_radix(words.next()?, 16).ok()?;
        Some(Self { layout: PackedLayout::of_shape(format, &shape)?, error, checksum })
    }
}

/// Of one length whatever the sums are: the header is written when they are known, before data that lies already.
impl fmt::Display for PackedEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape: Vec<String> = self.layout.shape().iter().map(ToString::to_string).collect();
        let PackingError { squared_error, squared_weights } = self.error;
        let (format, shape, checksum) = (self.layout.format(), shape.join("x"), self.checksum);
        write!(f, "{format} {shape} {squared_error:>13.6e} {squared_weights:>13.6e} {checksum:08x}")
    }
}
