//! A checkpoint's tensors as an architecture asks for them: by name and shape, checked before anything is allocated,
//! packed row range by row range straight from the file, each accounted for.

use std::{
    fmt::Display,
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use cadre_engine::{
    compute::Compute,
    nn::{ExpertPart, Experts, FfnLayout, Format, Layout, Matrix},
};

use crate::{Error, Result, tensors::TensorSet};

/// Bytes that one positioned read takes at most: large enough for a disk's full rate, small enough for a core's cache.
const READ_BYTES: usize = 1 << 20;

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of tensors read, or skipped because the model does without them.
    pub done_bytes: u64,
    /// Bytes of all tensors.
    pub total_bytes: u64,
}

/// What all views of one checkpoint's weights share.
pub(crate) struct Loader<'a> {
    tensors: &'a TensorSet,
    compute: &'a Compute,
    format: Format,
    used: Vec<AtomicBool>,
    done_bytes: AtomicU64,
    total_bytes: u64,
    on_bytes: &'a (dyn Fn(LoadProgress) + Sync),
}

impl<'a> Loader<'a> {
    /// A loader that packs matrices as `format` and tells `on_bytes`, from several threads, how far it has come.
    pub(crate) fn new(
        tensors: &'a TensorSet,
        compute: &'a Compute,
        format: Format,
        on_bytes: &'a (dyn Fn(LoadProgress) + Sync),
    ) -> Self {
        Self {
            tensors,
            compute,
            format,
            used: (0..tensors.len()).map(|_| AtomicBool::new(false)).collect(),
            done_bytes: AtomicU64::new(0),
            total_bytes: tensors.iter().map(crate::tensors::TensorInfo::bytes).sum(),
            on_bytes,
        }
    }

    /// All tensors, by their full names. Frequencies of the rotary embedding, which old checkpoints store, are computed
    /// from the configuration instead.
    pub(crate) fn root(&self) -> Weights<'_> {
        let root = Weights { loader: self, prefix: String::new() };
        root.ignore_all(|name| name.ends_with("rotary_emb.inv_freq"));
        root
    }

    /// Every tensor was used or ignored on purpose.
    pub(crate) fn finish(&self) -> Result<()> {
        let unused: Vec<_> = (0..self.used.len()).filter(|index| !self.used[*index].load(Ordering::Relaxed)).collect();
        let Some(first) = unused.first() else { return Ok(()) };
        let names: Vec<_> = unused.iter().take(5).map(|index| self.tensors.info(*index).name.as_str()).collect();
        Err(Error::ExtraTensors {
            file: self.tensors.label(*first).to_owned(),
            count: unused.len(),
            names: names.join(", "),
        })
    }

    fn mark(&self, index: usize) {
        self.used[index].store(true, Ordering::Relaxed);
    }

    fn progress(&self, bytes: u64) {
        let done_bytes = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.on_bytes)(LoadProgress { done_bytes: done_bytes.min(self.total_bytes), total_bytes: self.total_bytes });
    }

    /// Tensor number `index`, if it has the shape `expected`.
    fn check(&self, index: usize, expected: &[usize]) -> Result<()> {
        let found = &self.tensors.info(index).shape;
        if found == expected {
            return Ok(());
        }
        Err(Error::TensorShape {
            file: self.tensors.label(index).to_owned(),
            tensor: self.tensors.info(index).name.clone(),
            expected: expected.to_vec(),
            found: found.clone(),
        })
    }

    /// Fills `out` with the numbers of tensor `index` from number `start` on.
    fn read(&self, index: usize, start: usize, out: &mut [f32]) -> Result<()> {
        let dtype = self.tensors.info(index).dtype;
        let per_read = READ_BYTES / dtype.bytes();
        let mut bytes = vec![0; out.len().min(per_read) * dtype.bytes()];
        let mut offset = (start * dtype.bytes()) as u64;
        for values in out.chunks_mut(per_read) {
            let bytes = &mut bytes[..values.len() * dtype.bytes()];
            self.tensors.read(index, offset, bytes)?;
            dtype.widen(bytes, values);
            offset += bytes.len() as u64;
        }
        Ok(())
    }
}

/// What can stop packing: reading, or memory.
enum Failure {
    Read(Error),
    Engine(cadre_engine::Error),
}

impl<T> From<T> for Failure
where
    cadre_engine::Error: From<T>,
{
    fn from(error: T) -> Self {
        Self::Engine(error.into())
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Read(error) => error,
            Failure::Engine(error) => error.into(),
        }
    }
}

/// One tensor's rows within a matrix that several tensors make up.
struct Part {
    tensor: usize,
    rows: Range<usize>,
}

/// The tensors below one prefix.
pub(crate) struct Weights<'a> {
    loader: &'a Loader<'a>,
    prefix: String,
}

impl<'a> Weights<'a> {
    /// The tensors whose names go on with `part` and a dot; the same ones if `part` is empty.
    pub(crate) fn at(&self, part: impl Display) -> Weights<'a> {
        let prefix = format!("{}{part}", self.prefix);
        let dot = if prefix.is_empty() || prefix.ends_with('.') { "" } else { "." };
        Weights { loader: self.loader, prefix: prefix + dot }
    }

    /// What packs.
    pub(crate) fn compute(&self) -> &'a Compute {
        self.loader.compute
    }

    /// What matrices are packed as.
    pub(crate) fn format(&self) -> Format {
        self.loader.format
    }

    /// The tensors named, `[rows, k]` each, one below the other in one packed matrix.
    pub(crate) fn matrix(&self, parts: &[(&str, usize)], k: usize) -> Result<Matrix> {
        self.matrix_as(self.format(), parts, k)
    }

    /// The same in a format of the caller's choice.
    pub(crate) fn matrix_as(&self, format: Format, parts: &[(&str, usize)], k: usize) -> Result<Matrix> {
        let parts = self.parts(parts, k)?;
        let n = parts.last().map_or(0, |part| part.rows.end);
        let packed = Matrix::from_rows(self.compute(), Layout { format, n, k }, |rows, out| {
            self.read_rows(&parts, rows, k, out).map_err(Failure::Read)
        });
        packed.map_err(Error::from)
    }

    /// The tensor `name`, `[n]`.
    pub(crate) fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let index = self.take(name, &[n])?;
        let mut values = vec![0.0; n];
        self.loader.read(index, 0, &mut values)?;
        self.loader.progress(self.loader.tensors.info(index).bytes());
        Ok(values)
    }

    /// `count` gated feed-forwards: `gate_proj`, `up_proj` `[ff, hidden]` and `down_proj` `[hidden, ff]` below the
    /// prefix of each.
    pub(crate) fn experts(
        &self,
        count: usize,
        hidden: usize,
        ff: usize,
        prefix: impl Fn(usize) -> String,
    ) -> Result<Experts> {
        // All are looked up before the first byte is allocated; the list grows only as tensors are found.
        let mut tensors = Vec::new();
        for expert in 0..count {
            let below = self.at(prefix(expert));
            tensors.push([
                below.take("gate_proj.weight", &[ff, hidden])?,
                below.take("up_proj.weight", &[ff, hidden])?,
                below.take("down_proj.weight", &[hidden, ff])?,
            ]);
        }
        let layout = FfnLayout { format: self.format(), hidden, intermediate: ff };
        let packed = Experts::from_rows(self.compute(), layout, count, |expert, part, rows, out| {
            let [gate, up, down] = tensors[expert];
            let (tensor, k) = match part {
                ExpertPart::Gate => (gate, hidden),
                ExpertPart::Up => (up, hidden),
                ExpertPart::Down => (down, ff),
            };
            self.read_rows(&[Part { tensor, rows: 0..usize::MAX }], rows, k, out).map_err(Failure::Read)
        });
        packed.map_err(Error::from)
    }

    /// Says that the tensor `name`, if there is one, is not needed.
    pub(crate) fn ignore(&self, name: &str) {
        if let Some(index) = self.loader.tensors.find(&self.name(name)) {
            self.skip(index);
        }
    }

    /// Says that no tensor whose name begins with `prefix` is needed.
    pub(crate) fn ignore_prefix(&self, prefix: &str) {
        let prefix = self.name(prefix);
        self.ignore_all(|name| name.starts_with(&prefix));
    }

    fn ignore_all(&self, fits: impl Fn(&str) -> bool) {
        for (index, info) in self.loader.tensors.iter().enumerate() {
            if fits(&info.name) {
                self.skip(index);
            }
        }
    }

    fn skip(&self, index: usize) {
        if !self.loader.used[index].swap(true, Ordering::Relaxed) {
            self.loader.progress(self.loader.tensors.info(index).bytes());
        }
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The number of the tensor `name` of shape `expected`.
    fn find(&self, name: &str, expected: &[usize]) -> Result<usize> {
        let name = self.name(name);
        let Some(index) = self.loader.tensors.find(&name) else {
            let files = self.loader.tensors.describe();
            return Err(Error::MissingTensor { files, tensor: name, expected: expected.to_vec() });
        };
        self.loader.check(index, expected)?;
        Ok(index)
    }

    /// The same, and it counts as used.
    fn take(&self, name: &str, expected: &[usize]) -> Result<usize> {
        let index = self.find(name, expected)?;
        self.loader.mark(index);
        Ok(index)
    }

    fn parts(&self, parts: &[(&str, usize)], k: usize) -> Result<Vec<Part>> {
        let mut end = 0;
        let mut found = Vec::new();
        for (name, rows) in parts {
            let tensor = self.take(name, &[*rows, k])?;
            found.push(Part { tensor, rows: end..end + rows });
            end += rows;
        }
        Ok(found)
    }

    /// Fills `out` with `rows` of the matrix that `parts` make up.
    fn read_rows(&self, parts: &[Part], rows: Range<usize>, k: usize, out: &mut [f32]) -> Result<()> {
        for part in parts {
            let here = rows.start.max(part.rows.start)..rows.end.min(part.rows.end);
            if here.is_empty() {
                continue;
            }
            let out = &mut out[(here.start - rows.start) * k..(here.end - rows.start) * k];
            self.loader.read(part.tensor, (here.start - part.rows.start) * k, out)?;
            self.loader.progress((out.len() * self.loader.tensors.info(part.tensor).dtype.bytes()) as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use crate::{files::Files, testing::TensorFile};

    fn numbers(count: usize) -> Vec<f32> {
        (0..count).map(|index| (index % 251) as f32 - 100.0).collect()
    }

    /// What `use_weights` makes of the tensors of `file`, and the progress it was told of.
    fn with<T>(
        file: TensorFile,
        use_weights: impl FnOnce(&Loader<'_>, &Weights<'_>) -> Result<T>,
    ) -> (Result<T>, Vec<LoadProgress>) {
        let directory = tempfile::tempdir().unwrap();
        file.write(&directory.path().join("model.safetensors"));
        let tensors = TensorSet::open(&Files::Directory(directory.path().to_owned())).unwrap();
        let told = Mutex::new(Vec::new());
        let on_bytes = |progress| told.lock().unwrap().push(progress);
        let compute = Compute::new(3);
        let loader = Loader::new(&tensors, &compute, Format::F32, &on_bytes);
        let result = use_weights(&loader, &loader.root());
        (result, told.into_inner().unwrap())
    }

    fn rows(matrix: &Matrix) -> Vec<f32> {
        let Layout { n, k, .. } = matrix.layout();
        let mut values = vec![0.0; n * k];
        values.chunks_exact_mut(k).enumerate().for_each(|(row, out)| matrix.packed().unpack_row(row, out));
        values
    }

    fn refused(file: TensorFile, use_weights: impl FnOnce(&Loader<'_>, &Weights<'_>) -> Result<()>, words: &[&str]) {
        let error = with(file, use_weights).0.unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
    }

    #[test]
    fn tensors_of_several_types_make_one_matrix() {
        let file = TensorFile::default()
            .bf16("a.q.weight", &[5, 3], &numbers(15))
            .f32("a.k.weight", &[2, 3], &numbers(6))
            .f16("a.v.weight", &[1, 3], &numbers(3));
        let (values, told) = with(file, |loader, weights| {
            let parts = [("q.weight", 5), ("k.weight", 2), ("v.weight", 1)];
            let matrix = weights.at("a").matrix(&parts, 3)?;
            loader.finish()?;
            Ok(rows(&matrix))
        });
        assert_eq!(values.unwrap(), [numbers(15), numbers(6), numbers(3)].concat());
        let all = LoadProgress { done_bytes: 30 + 24 + 6, total_bytes: 30 + 24 + 6 };
        assert!(told.contains(&all) && told.iter().all(|progress| progress.done_bytes <= all.total_bytes));
    }

    #[test]
    fn a_matrix_larger_than_one_read_is_whole() {
        let (n, k) = (700, 1021);
        let file = TensorFile::default().f32("w", &[n, k], &numbers(n * k));
        let (values, told) = with(file, |_, weights| Ok(rows(&weights.matrix(&[("w", n)], k)?)));
        assert!(values.unwrap() == numbers(n * k));
        assert_eq!(told.iter().map(|progress| progress.done_bytes).max(), Some((n * k * 4) as u64));
    }

    #[test]
    fn experts_and_vectors_account_for_their_tensors() {
        let mut file = TensorFile::default().bf16("norm.weight", &[3], &[1.0, 2.0, 3.0]);
        for expert in 0..2 {
            file = file
                .bf16(&format!("mlp.experts.{expert}.gate_proj.weight"), &[2, 3], &numbers(6))
                .bf16(&format!("mlp.experts.{expert}.up_proj.weight"), &[2, 3], &numbers(6))
                .bf16(&format!("mlp.experts.{expert}.down_proj.weight"), &[3, 2], &numbers(6));
        }
        let (result, told) = with(file, |loader, weights| {
            assert_eq!(weights.at("norm").vector("weight", 3)?, [1.0, 2.0, 3.0]);
            let experts = weights.at("mlp").experts(2, 3, 2, |expert| format!("experts.{expert}"))?;
            assert_eq!(experts.count(), 2);
            loader.finish()
        });
        result.unwrap();
        assert_eq!(told.iter().map(|progress| progress.done_bytes).max(), Some(6 + 2 * 3 * 12));
    }

    #[test]
    fn a_missing_tensor_is_named() {
        let file = || TensorFile::default().f32("a.b.weight", &[2, 2], &numbers(4));
        let words = ["model.safetensors", "tensor a.c.weight is missing", "shape [7, 9]"];
        refused(file(), |_, weights| weights.at("a.c").matrix(&[("weight", 7)], 9).map(drop), &words);
        refused(file(), |_, weights| weights.at("a").vector("c.weight", 7).map(drop), &["a.c.weight", "[7]"]);
        let words = ["tensor a.0.gate_proj.weight is missing", "[4, 2]"];
        refused(file(), |_, weights| weights.experts(usize::MAX, 2, 4, |e| format!("a.{e}")).map(drop), &words);
    }

    #[test]
    fn a_misshapen_tensor_is_named() {
        let file = || TensorFile::default().f32("w", &[2, 3], &numbers(6));
        let words = ["model.safetensors: tensor w", "expected shape [3, 2]", "found [2, 3]"];
        refused(file(), |_, weights| weights.matrix(&[("w", 3)], 2).map(drop), &words);
        refused(file(), |_, weights| weights.vector("w", 6).map(drop), &["expected shape [6]", "found [2, 3]"]);
        // Sizes that overflow are refused before anything is computed from them.
        let huge = 1 << 62;
        refused(file(), |_, weights| weights.matrix(&[("w", huge)], huge).map(drop), &["4611686018427387904"]);
    }

    #[test]
    fn left_over_tensors_are_named() {
        let file = || {
            let file = TensorFile::default().f32("a.w", &[1], &[1.0]).f32("b.w", &[1], &[1.0]);
            file.f32("layers.2.x", &[1], &[1.0]).f32("layers.20.x", &[1], &[1.0])
        };
        let words = ["model.safetensors", "4 tensors", "a.w, b.w"];
        refused(file(), |loader, _| loader.finish(), &words);
        let (result, told) = with(file(), |loader, weights| {
            weights.at("a").ignore("w");
            weights.ignore("b.w");
            weights.ignore("not there");
            weights.ignore_prefix("layers.2.");
            loader.finish()
        });
        let error = result.unwrap_err().to_string();
        assert!(error.contains("1 tensors") && error.contains("layers.20.x"), "{error}");
        assert_eq!(told.last().unwrap().done_bytes, 12);
    }

    #[test]
    fn stored_frequencies_are_no_weights() {
        let file = TensorFile::default().f32("layers.0.self_attn.rotary_emb.inv_freq", &[1], &[1.0]);
        assert!(with(file, |loader, _| loader.finish()).0.is_ok());
    }

    #[test]
    fn a_file_that_shrinks_after_it_was_opened_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("model.safetensors");
        TensorFile::default().f32("w", &[4, 4], &numbers(16)).write(&path);
        let tensors = TensorSet::open(&Files::Directory(directory.path().to_owned())).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        let compute = Compute::new(1);
        let loader = Loader::new(&tensors, &compute, Format::F32, &|_| {});
        let error = loader.root().matrix(&[("w", 4)], 4).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains("cut off"), "{error}");
    }

    proptest! {
        #[test]
        fn every_range_of_rows_is_read(sizes in proptest::collection::vec(0_usize..6, 1..5), from: u8, to: u8) {
            let k = 3;
            let total: usize = sizes.iter().sum();
            let mut file = TensorFile::default();
            let mut values = Vec::new();
            for (index, rows) in sizes.iter().enumerate() {
                let part: Vec<f32> = numbers(rows * k).iter().map(|value| value + 7.0 * index as f32).collect();
                file = file.f32(&format!("{index}"), &[*rows, k], &part);
                values.extend(part);
            }
            let (from, to) = (usize::from(from) % (total + 1), usize::from(to) % (total + 1));
            let range = from.min(to)..from.max(to);
            let (read, _) = with(file, |_, weights| {
                let names: Vec<String> = (0..sizes.len()).map(|index| index.to_string()).collect();
                let parts: Vec<_> = names.iter().map(String::as_str).zip(sizes.iter().copied()).collect();
                let parts = weights.parts(&parts, k)?;
                let mut out = vec![0.0; range.len() * k];
                weights.read_rows(&parts, range.clone(), k, &mut out)?;
                Ok(out)
            });
            prop_assert_eq!(&read.unwrap(), &values[range.start * k..range.end * k]);
        }
    }
}
