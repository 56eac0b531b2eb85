//! All tensors of a checkpoint: one safetensors file, or the shards that an index names.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};

use serde_json::Value;

use super::{PackInfo, Stored, StoredType, TensorInfo, read_header};
use crate::{
    Error, Result,
    files::{Files, Source},
    fnv::Fnv,
    json,
};

/// The file of a checkpoint that is not sharded.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The index of a sharded one.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// A checkpoint's tensors by name, their files open.
#[derive(Debug)]
pub(crate) struct TensorSet {
    files: Vec<Source>,
    tensors: Vec<Located>,
    by_name: HashMap<String, usize>,
    pack: Option<PackInfo>,
}

#[derive(Debug)]
struct Located {
    info: TensorInfo,
    file: usize,
}

impl TensorSet {
    /// Reads the headers of all files and checks them against the index, if there is one.
    pub(crate) fn open(files: &Files) -> Result<Self> {
        let mut set = Self { files: Vec::new(), tensors: Vec::new(), by_name: HashMap::new(), pack: None };
        if let Some(source) = files.open(SINGLE_FILE)? {
            set.add(source)?;
            return Ok(set);
        }
        let index = files.require(
            INDEX_FILE,
            "expected that index or model.safetensors; an unfinished pack or merge has none: run `cadre pack` or `cadre merge` again; other \
             formats must be converted to safetensors first",
        )?;
        let index = Index::parse(files.label(INDEX_FILE), &index)?;
        for shard in index.shards() {
            let source = files.open(shard)?.ok_or_else(|| index.error(shard, "the shard beside it", "no such file"))?;
            set.add(source)?;
        }
        index.check(&set)?;
        Ok(set)
    }

    /// The tensors of one file.
    pub(crate) fn of_file(source: Source) -> Result<Self> {
        let mut set = Self { files: Vec::new(), tensors: Vec::new(), by_name: HashMap::new(), pack: None };
        set.add(source)?;
        Ok(set)
    }

    /// All numbers of tensor `index`, which isn't packed.
    pub(crate) fn values(&self, index: usize) -> Result<Vec<f32>> {
        let info = self.info(index);
        let Stored::Plain(dtype) = info.stored else {
            return Err(Error::TensorEntry {
                file: self.label(index).to_owned(),
                tensor: info.name.clone(),
                what: "format",
                expected: "plain numbers".to_owned(),
                found: info.stored.to_string(),
            });
        };
        let mut bytes = vec![0; usize::try_from(info.bytes).unwrap_or(0)];
        self.read(index, 0, &mut bytes)?;
        let mut values = vec![0.0; bytes.len() / dtype.bytes()];
        dtype.widen(&bytes, &mut values);
        Ok(values)
    }

    fn add(&mut self, source: Source) -> Result<()> {
        let file = self.files.len();
        let header = read_header(&source)?;
        if file > 0 && header.pack != self.pack {
            let told = |pack: &Option<PackInfo>| pack.as_ref().map_or("no pack".to_owned(), ToString::to_string);
            let (expected, found) = (told(&self.pack), told(&header.pack));
            return Err(Error::Pack { file: source.label().to_owned(), what: "pack", expected, found });
        }
        self.pack = header.pack;
        for info in header.tensors {
            let index = self.tensors.len();
            if let Some(first) = self.by_name.insert(info.name.clone(), index) {
                return Err(Error::TensorEntry {
                    file: source.label().to_owned(),
                    tensor: info.name,
                    what: "shard",
                    expected: "one that holds it".to_owned(),
                    found: format!("it also in {}", self.label(first)),
                });
            }
            self.tensors.push(Located { info, file });
        }
        self.files.push(source);
        Ok(())
    }

    /// What the pack says of itself, if this is one.
    pub(crate) fn pack(&self) -> Option<&PackInfo> {
        self.pack.as_ref()
    }

    /// Its files.
    pub(crate) fn files(&self) -> &[Source] {
        &self.files
    }

    /// How many tensors there are; they are numbered from 0.
    pub(crate) fn len(&self) -> usize {
        self.tensors.len()
    }

    /// The number of the tensor `name`.
    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Tensor number `index`.
    pub(crate) fn info(&self, index: usize) -> &TensorInfo {
        &self.tensors[index].info
    }

    /// All tensors in the order of their numbers.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.iter().map(|tensor| &tensor.info)
    }

    /// How the file of tensor number `index` is called.
    pub(crate) fn label(&self, index: usize) -> &str {
        self.files.get(self.tensors[index].file).map_or("this file", Source::label)
    }

    /// How the files are called together.
    pub(crate) fn describe(&self) -> String {
        match self.files.as_slice() {
            [] => "the checkpoint".to_owned(),
            [one] => one.label().to_owned(),
            [first, rest @ ..] => format!("{} and {} further shards", first.label(), rest.len()),
        }
    }

    /// Reads from tensor number `index`, beginning at its byte `offset`.
    pub(crate) fn read(&self, index: usize, offset: u64, out: &mut [u8]) -> Result<()> {
        let Located { info, file } = &self.tensors[index];
        self.files[*file].read_exact_at(info.offset + offset, out)
    }

    /// Has [`Source::read_direct`] go past the page cache, where the file system allows it.
    pub(crate) fn bypass_page_cache(&mut self) {
        self.files.iter_mut().for_each(Source::bypass_page_cache);
    }

    /// Where tensor number `index` lies: its file, and the offset there.
    pub(crate) fn place(&self, index: usize) -> (&Source, u64) {
        let Located { info, file } = &self.tensors[index];
        (&self.files[*file], info.offset)
    }

    /// Where tensor number `index` lies: the number of its file, and its bytes there.
    pub(crate) fn extent(&self, index: usize) -> (usize, Range<u64>) {
        let Located { info, file } = &self.tensors[index];
        (*file, info.offset..info.offset + info.bytes)
    }

    /// Fills the first `needed` bytes of `out` from file number `file`, beginning at its byte `offset`, past the page
    /// cache if it can: with `offset`, the length of `out` and its place in memory multiples of 4 KiB.
    pub(crate) fn read_extent(&self, file: usize, offset: u64, needed: usize, out: &mut [u8]) -> Result<()> {
        self.files[file].read_direct_padded(offset, needed, out)
    }

    /// A number that tells this checkpoint from others: of the tensors' names, types and shapes, and of samples
    /// from the beginning, the middle and the end of each.
    pub(crate) fn fingerprint(&self) -> Result<String> {
        const SAMPLE_BYTES: u64 = 256;
        let mut hash = Fnv::default();
        for (index, info) in self.iter().enumerate() {
            hash.add(format!("{} {} {:?} ", info.name, info.stored, info.shape).as_bytes());
            let mut sample = vec![0; usize::try_from(info.bytes.min(SAMPLE_BYTES)).unwrap_or(0)];
            let last = info.bytes.saturating_sub(SAMPLE_BYTES);
            for offset in [0, last / 2, last] {
                self.read(index, offset, &mut sample)?;
                hash.add(&sample);
            }
        }
        Ok(hash.to_string())
    }

    /// A number that tells this checkpoint from those with other tensors, types, shapes or checksums: of the headers alone.
    pub(crate) fn header_fingerprint(&self) -> String {
        let mut hash = Fnv::default();
        for info in self.iter() {
            hash.add(format!("{} {} {:?} {:?} ", info.name, info.stored, info.shape, info.checksum).as_bytes());
        }
        hash.to_string()
    }

    /// The type that most of the unpacked bytes are stored in.
    pub(crate) fn main_type(&self) -> StoredType {
        let mut bytes: BTreeMap<StoredType, u64> = BTreeMap::new();
        for info in self.iter() {
            if let Stored::Plain(dtype) = info.stored {
                *bytes.entry(dtype).or_default() += info.bytes;
            }
        }
        bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or(StoredType::F32, |(dtype, _)| dtype)
    }
}

/// The shards that the index in `bytes` names, each once; only plain file names pass.
pub(crate) fn shards_of(file: &str, bytes: &[u8]) -> Result<Vec<String>> {
    Ok(Index::parse(file.to_owned(), bytes)?.shards().into_iter().map(str::to_owned).collect())
}

/// Which shard holds which tensor.
struct Index {
    file: String,
    shard_of: BTreeMap<String, String>,
}

impl Index {
    fn parse(file: String, bytes: &[u8]) -> Result<Self> {
        let fields = json::object(&file, bytes)?;
        let Some(Value::Object(map)) = fields.get("weight_map") else {
            return Err(Error::field(&file, "weight_map", "an object from tensor to shard", "none"));
        };
        let mut shard_of = BTreeMap::new();
        for (tensor, shard) in map {
            let name = shard.as_str().filter(|name| is_plain_name(name) && name.ends_with(".safetensors"));
            let name = name.ok_or_else(|| {
                let found = json::excerpt(&shard.to_string());
                Error::field(&file, &format!("weight_map.{tensor}"), "the name of a .safetensors file beside it", found)
            })?;
            shard_of.insert(tensor.clone(), name.to_owned());
        }
        if shard_of.is_empty() {
            return Err(Error::field(&file, "weight_map", "at least one tensor", "none"));
        }
        Ok(Self { file, shard_of })
    }

    fn shards(&self) -> Vec<&str> {
        let mut shards: Vec<_> = self.shard_of.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        shards
    }

    /// Every tensor of the index is in its shard, and no shard holds one that the index doesn't know.
    fn check(&self, set: &TensorSet) -> Result<()> {
        for (tensor, shard) in &self.shard_of {
            let found = match set.find(tensor) {
                Some(index) if ends_with_name(set.label(index), shard) => continue,
                Some(index) => format!("it in {}", set.label(index)),
                None => "it in none".to_owned(),
            };
            return Err(self.error(&format!("tensor {tensor}"), format!("it in {shard}"), found));
        }
        for (index, info) in set.iter().enumerate() {
            if !self.shard_of.contains_key(&info.name) {
                let subject = format!("tensor {} of {}", info.name, set.label(index));
                return Err(self.error(&subject, "it in weight_map", "no entry"));
            }
        }
        Ok(())
    }

    fn error(&self, subject: &str, expected: impl ToString, found: impl ToString) -> Error {
        Error::Index {
            file: self.file.clone(),
            subject: subject.to_owned(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}

/// Whether `name` names a file in the same directory and nothing else.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\\', '\0'])
}

/// Whether the label, a path or "embedded NAME", is of the file `name`.
fn ends_with_name(label: &str, name: &str) -> bool {
    label.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with(['/', ' ']))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TensorFile, index_json};

    fn shard(names: &[&str]) -> TensorFile {
        names.iter().fold(TensorFile::default(), |file, name| file.f32(name, &[2], &[1.0, 2.0]))
    }

    /// A checkpoint of two shards, changed by `change` before it is opened.
    fn open_changed(change: impl FnOnce(&std::path::Path)) -> Result<TensorSet> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        shard(&["a", "b"]).write(&path.join("model-1.safetensors"));
        shard(&["c"]).write(&path.join("model-2.safetensors"));
        let index =
            index_json(&[("a", "model-1.safetensors"), ("b", "model-1.safetensors"), ("c", "model-2.safetensors")]);
        std::fs::write(path.join(INDEX_FILE), index).unwrap();
        change(path);
        TensorSet::open(&Files::Directory(path.to_owned()))
    }

    fn refused(change: impl FnOnce(&std::path::Path), words: &[&str]) {
        let error = open_changed(change).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
    }

    #[test]
    fn opens_shards() {
        let set = open_changed(|_| {}).unwrap();
        assert_eq!(set.len(), 3);
        let mut bytes = [0; 4];
        set.read(set.find("c").unwrap(), 4, &mut bytes).unwrap();
        assert_eq!(f32::from_le_bytes(bytes), 2.0);
        assert_eq!(set.main_type(), StoredType::F32);
    }

    #[test]
    fn the_fingerprint_tells_checkpoints_apart() {
        let fingerprint = |changed: Option<usize>| {
            let directory = tempfile::tempdir().unwrap();
            let mut values = [1.0; 1000];
            changed.into_iter().for_each(|index| values[index] = 2.0);
            TensorFile::default().f32("a", &[1000], &values).write(&directory.path().join(SINGLE_FILE));
            TensorSet::open(&Files::Directory(directory.path().to_owned())).unwrap().fingerprint().unwrap()
        };
        assert_eq!(fingerprint(None), fingerprint(None));
        for changed in [0, 500, 999] {
            assert_ne!(fingerprint(None), fingerprint(Some(changed)), "value {changed} is another");
        }
    }

    #[test]
    fn names_a_missing_shard() {
        refused(
            |path| std::fs::remove_file(path.join("model-2.safetensors")).unwrap(),
            &[INDEX_FILE, "model-2.safetensors", "no such file"],
        );
    }

    #[test]
    fn names_a_truncated_shard() {
        refused(
            |path| {
                let file = std::fs::OpenOptions::new().write(true).open(path.join("model-1.safetensors")).unwrap();
                file.set_len(file.metadata().unwrap().len() - 3).unwrap();
            },
            &["model-1.safetensors", "tensor data", "expected 16 bytes", "13 bytes: the file is cut off"],
        );
    }

    #[test]
    fn names_a_tensor_that_its_shard_lacks() {
        refused(
            |path| shard(&["a"]).write(&path.join("model-1.safetensors")),
            &[INDEX_FILE, "tensor b", "it in model-1.safetensors", "it in none"],
        );
        refused(
            |path| {
                shard(&["a"]).write(&path.join("model-1.safetensors"));
                shard(&["b", "c"]).write(&path.join("model-2.safetensors"));
            },
            &[INDEX_FILE, "tensor b", "it in model-1.safetensors", "model-2.safetensors"],
        );
    }

    #[test]
    fn names_a_tensor_that_the_index_lacks() {
        refused(
            |path| shard(&["c", "d"]).write(&path.join("model-2.safetensors")),
            &[INDEX_FILE, "tensor d", "model-2.safetensors", "no entry"],
        );
    }

    #[test]
    fn names_a_tensor_in_two_shards() {
        refused(
            |path| shard(&["c", "a"]).write(&path.join("model-2.safetensors")),
            &["tensor a", "model-1.safetensors", "model-2.safetensors"],
        );
    }

    #[test]
    fn refuses_a_bad_index() {
        let write =
            |text: &'static str| move |path: &std::path::Path| std::fs::write(path.join(INDEX_FILE), text).unwrap();
        refused(write("{"), &[INDEX_FILE, "not valid JSON"]);
        refused(write("{}"), &[INDEX_FILE, "weight_map"]);
        refused(write(r#"{"weight_map": {}}"#), &[INDEX_FILE, "at least one tensor"]);
        refused(write(r#"{"weight_map": {"a": 1}}"#), &[INDEX_FILE, "weight_map.a"]);
        for outside in ["../x.safetensors", "/x.safetensors", "x/y.safetensors", "x.bin", ".safetensors"] {
            let text = index_json(&[("a", outside)]);
            refused(|path| std::fs::write(path.join(INDEX_FILE), text).unwrap(), &["weight_map.a", outside]);
        }
    }

    #[test]
    fn says_what_it_needs_when_there_are_no_weights() {
        refused(|path| std::fs::remove_file(path.join(INDEX_FILE)).unwrap(), &[INDEX_FILE, "model.safetensors"]);
    }
}
