//! The header of a safetensors file: 8 bytes of length, then JSON, then the tensors' bytes without holes.
//!
//! The crate `safetensors` wants the whole file in memory and its errors don't say which tensor is at fault, so the
//! header is read here; the tests hold the two against each other.

use std::{collections::HashSet, fmt};

use cadre_engine::nn::PackingError;
use serde::{
    Deserialize, Deserializer,
    de::{Error as _, MapAccess, Visitor},
};
use serde_json::{Map, Value};

use super::{PackInfo, PackedEntry, Stored, StoredType};
use crate::{Error, Result, files::Source};

/// The longest header that is read, as in the reference implementation.
const HEADER_LIMIT_BYTES: u64 = 100_000_000;
/// Bytes of the length in front of the header.
const LENGTH_BYTES: u64 = 8;

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorInfo {
    /// Its name.
    pub name: String,
    /// How its numbers are stored.
    pub stored: Stored,
    /// Its shape, outermost axis first; a packed expert's is `[3, intermediate, hidden]`.
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// How many numbers it has.
    pub elements: u64,
    /// Its size in the file.
    pub bytes: u64,
    /// How far packing took it from its source.
    pub error: PackingError,
    /// CRC-32 of a packed one's data.
    pub checksum: Option<u32>,
}

/// What one file holds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Header {
    /// What the pack says of itself, if the file is one's.
    pub pack: Option<PackInfo>,
    /// The tensors in the order in which they lie.
    pub tensors: Vec<TensorInfo>,
}

/// The header of `source`.
pub(crate) fn read_header(source: &Source) -> Result<Header> {
    let json = read_header_json(source)?;
    parse_header(source.label(), &json, source.len() - LENGTH_BYTES - json.len() as u64)
}

/// The text of the header of `source`, which may be anything.
pub(crate) fn read_header_json(source: &Source) -> Result<Vec<u8>> {
    let damaged = |what, expected: String, found: String| Error::TensorFile {
        file: source.label().to_owned(),
        what,
        expected,
        found,
    };
    if source.len() < LENGTH_BYTES {
        return Err(damaged("size", format!("at least {LENGTH_BYTES} bytes"), format!("{} bytes", source.len())));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    source.read_exact_at(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    let most = (source.len() - LENGTH_BYTES).min(HEADER_LIMIT_BYTES);
    if length > most {
        return Err(damaged("length of the header", format!("at most {most} bytes"), format!("{length} bytes")));
    }
    let mut json = vec![0; usize::try_from(length).unwrap_or(0)];
    source.read_exact_at(LENGTH_BYTES, &mut json)?;
    Ok(json)
}

/// Length and header, with spaces up to a multiple of `alignment` (of a file's bytes) and of 8, where the data begins.
pub(crate) fn encode_header(entries: Map<String, Value>, alignment: usize) -> Vec<u8> {
    let mut json = Value::Object(entries).to_string().into_bytes();
    let length_bytes = LENGTH_BYTES as usize;
    let size = (length_bytes + json.len()).next_multiple_of(alignment.max(length_bytes));
    json.resize(size - length_bytes, b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}

/// What the header `json` says, for a file with `data_bytes` bytes after its header.
fn parse_header(file: &str, json: &[u8], data_bytes: u64) -> Result<Header> {
    let header: Entries = serde_json::from_slice(json).map_err(|error| Error::TensorFile {
        file: file.to_owned(),
        what: "header",
        expected: "a JSON object of tensors".to_owned(),
        found: error.to_string(),
    })?;
    let data_start = LENGTH_BYTES + json.len() as u64;
    let (metadata, mut entries) = (header.metadata, header.entries);
    let pack = PackInfo::read(file, &metadata)?;
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut names = HashSet::new();
    let mut end = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in &entries {
        if !names.insert(name.as_str()) {
            return Err(entry_error(file, name, "entries in the header", 1, "more"));
        }
        let packed = pack.as_ref().and_then(|_| metadata.get(name)).and_then(Value::as_str);
        tensors.push(entry.check(file, name, packed, end, data_start)?);
        end = entry.data_offsets.1;
    }
    if end != data_bytes {
        return Err(Error::TensorFile {
            file: file.to_owned(),
            what: "tensor data",
            expected: format!("{end} bytes as the header has it"),
            found: format!("{data_bytes} bytes{}", if data_bytes < end { ": the file is cut off" } else { "" }),
        });
    }
    Ok(Header { pack, tensors })
}

/// The header's entries in their order, doubles and all.
struct Entries {
    metadata: Value,
    entries: Vec<(String, Entry)>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl Entry {
    /// The entry as a tensor, if it begins where the one before ended and has the bytes that its shape needs; `packed`
    /// is what a pack says of it.
    fn check(&self, file: &str, name: &str, packed: Option<&str>, begin: u64, data_start: u64) -> Result<TensorInfo> {
        let (from, to) = self.data_offsets;
        if from != begin || to < from {
            let found = format!("[{from}, {to}]");
            return Err(entry_error(file, name, "data_offsets", format!("[{begin}, …] without gap or overlap"), found));
        }
        let offset = data_start.checked_add(from);
        let offset = offset.ok_or_else(|| entry_error(file, name, "data_offsets", "a place in the file", from))?;
        let bytes = to - from;
        if let Some(packed) = packed {
            let PackedEntry { layout, error, checksum } = PackedEntry::read(file, name, packed, bytes)?;
            let (stored, shape, elements) = (Stored::Packed(layout.format()), layout.shape(), layout.parameters());
            let (name, checksum) = (name.to_owned(), Some(checksum));
            return Ok(TensorInfo { name, stored, shape, offset, elements, bytes, error, checksum });
        }
        let dtype = StoredType::from_name(&self.dtype)
            .ok_or_else(|| entry_error(file, name, "dtype", "F32, F16 or BF16", &self.dtype))?;
        let elements = self.shape.iter().try_fold(1_u64, |product, axis| product.checked_mul(*axis));
        let needed = elements.and_then(|elements| elements.checked_mul(dtype.bytes() as u64));
        let (Some(elements), Some(needed)) = (elements, needed) else {
            return Err(entry_error(file, name, "shape", "a size below 2^64 bytes", format!("{:?}", self.shape)));
        };
        if bytes != needed {
            let expected = format!("{needed} for {} {:?}", self.dtype, self.shape);
            return Err(entry_error(file, name, "bytes in data_offsets", expected, bytes));
        }
        let shape = self.shape.iter().map(|axis| usize::try_from(*axis)).collect::<Result<_, _>>();
        let shape = shape.map_err(|_| entry_error(file, name, "shape", "axes of this machine's word size", "more"))?;
        let (stored, error) = (Stored::Plain(dtype), PackingError::default());
        Ok(TensorInfo { name: name.to_owned(), stored, shape, offset, elements, bytes, error, checksum: None })
    }
}

pub(super) fn entry_error(
    file: &str,
    tensor: &str,
    what: &'static str,
    expected: impl ToString,
    found: impl ToString,
) -> Error {
    Error::TensorEntry {
        file: file.to_owned(),
        tensor: crate::json::excerpt(tensor),
        what,
        expected: expected.to_string(),
        found: crate::json::excerpt(&found.to_string()),
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;
        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let (mut metadata, mut entries) = (Value::Null, Vec::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        metadata = map.next_value()?;
                        continue;
                    }
                    let entry =
                        map.next_value().map_err(|error| A::Error::custom(format!("tensor {name}: {error}")))?;
                    entries.push((name, entry));
                }
                Ok(Entries { metadata, entries })
            }
        }
        deserializer.deserialize_map(EntriesVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    use crate::files::Files;

    /// A file of `header` and as many data bytes.
    fn file(header: &str, data_bytes: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data_bytes, 0);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<TensorInfo>> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("x.safetensors"), bytes).unwrap();
        let source = Files::Directory(directory.path().to_owned()).open("x.safetensors").unwrap().unwrap();
        read_header(&source).map(|header| header.tensors)
    }

    fn refused(bytes: &[u8], words: &[&str]) {
        let error = read(bytes).unwrap_err().to_string();
        for word in words.iter().chain(&["x.safetensors", "expected", "found"]) {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
    }

    #[test]
    fn reads_what_the_reference_reads() {
        let header = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},
            "a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},
            "empty":{"dtype":"F16","shape":[0,7],"data_offsets":[16,16]}}   "#;
        let bytes = file(header, 16);
        let tensors = read(&bytes).unwrap();
        let reference = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(tensors.iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>(), ["a", "b", "empty"]);
        for tensor in &tensors {
            let view = reference.tensor(&tensor.name).unwrap();
            assert_eq!(view.shape(), tensor.shape);
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            assert_eq!((start as u64, view.data().len() as u64), (tensor.offset, tensor.bytes));
        }
    }

    #[test]
    fn refuses_a_damaged_file() {
        let good = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        refused(b"", &["at least 8 bytes", "0 bytes"]);
        refused(b"\x05\0\0\0\0\0\0\0{}", &["length of the header", "at most 2 bytes", "5 bytes"]);
        refused(&[0xff; 64], &["length of the header", "at most 56"]);
        refused(&file("not json", 0), &["header"]);
        refused(&file("[1]", 0), &["header"]);
        refused(&file(good, 7), &["tensor data", "8 bytes", "7 bytes: the file is cut off"]);
        refused(&file(good, 9), &["tensor data", "8 bytes", "9 bytes"]);
    }

    #[test]
    fn refuses_a_damaged_entry() {
        for (entry, words) in [
            (r#"{"dtype":"F32","shape":[2]}"#, &["tensor a", "data_offsets"][..]),
            (r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#, &["tensor a", "-2"]),
            (r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#, &["tensor a", "8 for F32 [2]", "found 4"]),
            (r#"{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#, &["tensor a", "[0, …]", "[4, 12]"]),
            (r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#, &["tensor a", "[8, 0]"]),
            (r#"{"dtype":"I64","shape":[1],"data_offsets":[0,8]}"#, &["tensor a", "F32, F16 or BF16", "I64"]),
            (r#"{"dtype":"F32","shape":[9000000000,9000000000],"data_offsets":[0,8]}"#, &["tensor a", "2^64"]),
            (r#"{"dtype":"F32","shape":[9000000000000000000],"data_offsets":[0,8]}"#, &["tensor a", "2^64"]),
        ] {
            refused(&file(&format!(r#"{{"a":{entry}}}"#), 8), words);
        }
        let overlap = r#"{"a":{"dtype":"F16","shape":[4],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[2],"data_offsets":[4,8]}}"#;
        refused(&file(overlap, 8), &["tensor b", "[8, …]", "[4, 8]"]);
        let double = r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"a":{"dtype":"F16","shape":[2],"data_offsets":[4,8]}}"#;
        refused(&file(double, 8), &["tensor a", "entries in the header"]);
    }

    /// Headers that are nearly right, so that the checks behind the JSON are reached.
    fn near_headers() -> impl Strategy<Value = String> {
        let number = prop_oneof![0_u64..20, Just(u64::MAX), Just(1 << 62), any::<u64>()];
        let dtype = prop_oneof![Just("F32"), Just("F16"), Just("BF16"), Just("I8"), Just("")];
        let entry = ("[a-c]", dtype, proptest::collection::vec(number.clone(), 0..4), number.clone(), number).prop_map(
            |(name, dtype, shape, from, to)| {
                format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{from},{to}]}}"#)
            },
        );
        proptest::collection::vec(entry, 0..4).prop_map(|entries| format!("{{{}}}", entries.join(",")))
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0_u64..300) {
            let _ = read(&bytes);
            let mut with_length = length.to_le_bytes().to_vec();
            with_length.extend(bytes);
            let _ = read(&with_length);
        }

        #[test]
        fn near_headers_never_panic_and_what_is_read_the_reference_reads_too(
            header in near_headers(),
            data_bytes in 0_usize..40,
        ) {
            let bytes = file(&header, data_bytes);
            if let Ok(tensors) = read(&bytes) {
                let reference = SafeTensors::deserialize(&bytes).unwrap();
                prop_assert_eq!(reference.len(), tensors.len());
            }
        }

        #[test]
        fn sound_files_are_read(sizes in proptest::collection::vec((0_usize..5, 0_usize..5), 0..6)) {
            let mut at = 0;
            let entries: Vec<_> = sizes.iter().enumerate().map(|(index, (rows, columns))| {
                let from = at;
                at += rows * columns * 2;
                format!(r#""t{index}":{{"dtype":"BF16","shape":[{rows},{columns}],"data_offsets":[{from},{at}]}}"#)
            }).collect();
            let tensors = read(&file(&format!("{{{}}}", entries.join(",")), at)).unwrap();
            prop_assert_eq!(tensors.len(), sizes.len());
        }
    }
}
