//! A checkpoint's tensors as an architecture asks for them: by name and shape, checked before anything is allocated,
//! packed row range by row range straight from the file (or read as they are from a pack), each accounted for.
//!
//! `cadre pack` lets the architecture ask in the same way, but only notes down what it asks for: see [`PlannedTensor`].

use std::{
    fmt::Display,
    ops::Range,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use cadre_engine::{
    compute::Compute,
    nn::{ExpertModules, ExpertPart, Experts, FfnLayout, Format, Layout, Matrix, Module, PackingError, RoutedExperts},
};

use crate::{
    Error, Result,
    formats::Formats,
    stored_experts::{ExpertTensors, LeftOnDisk},
    tensors::{PackedLayout, Stored, TensorSet},
};

/// Bytes that one positioned read takes at most: large enough for a disk's full rate, small enough for a core's cache.
const READ_BYTES: usize = 1 << 20;

/// Between the names of a packed tensor's sources.
const JOIN: &str = "+";
/// What a module's name is followed by.
const WEIGHT: &str = ".weight";
/// A gated feed-forward's tensors.
const EXPERT_NAMES: [&str; 3] = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"];

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
    formats: Formats,
    /// What was asked for so far, where that is only noted down.
    plan: Option<Mutex<Vec<PlannedTensor>>>,
    /// Matrices and experts are zeros: nothing but their sizes is asked for.
    zeros: bool,
    /// The routed experts, where they stay on disk.
    left: Option<LeftOnDisk>,
    used: Vec<AtomicBool>,
    done_bytes: AtomicU64,
    total_bytes: u64,
    on_bytes: &'a (dyn Fn(LoadProgress) + Sync),
}

/// One tensor of a pack, and the checkpoint's tensors that it is made from.
pub(crate) struct PlannedTensor {
    /// The name of the first source and what the others' names end in, joined by `+`.
    pub name: String,
    /// What is made of them.
    pub content: PlannedContent,
}

/// What becomes of a checkpoint's tensors in a pack.
pub(crate) enum PlannedContent {
    /// Copied as it is.
    Vector(usize),
    /// Packed.
    Matrix(Layout, Vec<Part>),
    /// Packed: gate, up, down.
    Expert(FfnLayout, [usize; 3]),
}

impl PlannedContent {
    /// The layout of what is packed.
    pub(crate) fn layout(&self) -> Option<PackedLayout> {
        match self {
            Self::Vector(_) => None,
            Self::Matrix(layout, _) => Some(PackedLayout::Matrix(*layout)),
            Self::Expert(layout, _) => Some(PackedLayout::Expert(*layout)),
        }
    }
}

impl<'a> Loader<'a> {
    /// A loader that packs matrices as `formats` and tells `on_bytes`, from several threads, how far it has come.
    pub(crate) fn new(
        tensors: &'a TensorSet,
        compute: &'a Compute,
        formats: Formats,
        on_bytes: &'a (dyn Fn(LoadProgress) + Sync),
    ) -> Self {
        Self {
            tensors,
            compute,
            formats,
            plan: None,
            zeros: false,
            left: None,
            used: (0..tensors.len()).map(|_| AtomicBool::new(false)).collect(),
            done_bytes: AtomicU64::new(0),
            total_bytes: tensors.iter().map(|info| info.bytes).sum(),
            on_bytes,
        }
    }

    /// The same loader, which gives zeros for matrices and experts and notes down what was asked for.
    pub(crate) fn planning(self) -> Self {
        Self { plan: Some(Mutex::default()), ..self.outlining() }
    }

    /// The same loader, which gives zeros for matrices and experts.
    pub(crate) fn outlining(self) -> Self {
        Self { zeros: true, ..self }
    }

    /// The same loader, which leaves routed experts on disk.
    pub(crate) fn leaving_experts(self) -> Self {
        Self { left: Some(LeftOnDisk::default()), ..self }
    }

    /// The experts that were left there.
    pub(crate) fn take_left(self) -> Option<LeftOnDisk> {
        self.left
    }

    /// What was asked for, in that order.
    pub(crate) fn take_plan(&mut self) -> Vec<PlannedTensor> {
        self.plan.take().map_or(Vec::new(), |plan| plan.into_inner().unwrap_or_else(PoisonError::into_inner))
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

    /// Says that so many bytes more are done with.
    pub(crate) fn progress(&self, bytes: u64) {
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

    /// Fills `out` with the numbers of tensor `index` from number `start` on; returns the bytes that this took.
    fn read(&self, index: usize, start: usize, out: &mut [f32]) -> Result<u64> {
        let dtype = match self.tensors.info(index).stored {
            Stored::Plain(dtype) => dtype,
            found @ Stored::Packed(_) => return Err(self.stored_wrongly(index, "plain numbers", found)),
        };
        let per_read = READ_BYTES / dtype.bytes();
        let mut bytes = vec![0; out.len().min(per_read) * dtype.bytes()];
        let mut offset = (start * dtype.bytes()) as u64;
        for values in out.chunks_mut(per_read) {
            let bytes = &mut bytes[..values.len() * dtype.bytes()];
            self.tensors.read(index, offset, bytes)?;
            dtype.widen(bytes, values);
            offset += bytes.len() as u64;
        }
        Ok((out.len() * dtype.bytes()) as u64)
    }

    fn stored_wrongly(&self, index: usize, expected: impl ToString, found: Stored) -> Error {
        Error::TensorEntry {
            file: self.tensors.label(index).to_owned(),
            tensor: self.tensors.info(index).name.clone(),
            what: "format",
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    /// Fills `out` with `rows` of the matrix that `parts` make up; returns the bytes that this took.
    fn read_rows(&self, parts: &[Part], rows: Range<usize>, k: usize, out: &mut [f32]) -> Result<u64> {
        let mut bytes = 0;
        for part in parts {
            let here = rows.start.max(part.rows.start)..rows.end.min(part.rows.end);
            if here.is_empty() {
                continue;
            }
            let out = &mut out[(here.start - rows.start) * k..(here.end - rows.start) * k];
            bytes += self.read(part.tensor, (here.start - part.rows.start) * k, out)?;
        }
        Ok(bytes)
    }

    /// The matrix that `parts` make up, packed.
    pub(crate) fn pack_matrix(&self, layout: Layout, parts: &[Part]) -> Result<Matrix> {
        let packed = Matrix::from_rows(self.compute, layout, |rows, out| {
            self.read_rows(parts, rows, layout.k, out).map(|bytes| self.progress(bytes)).map_err(Failure::Read)
        });
        packed.map_err(Error::from)
    }

    /// How far `matrix` is from the `parts` that it was packed from.
    pub(crate) fn matrix_error(&self, matrix: &Matrix, parts: &[Part]) -> Result<PackingError> {
        matrix.packing_error(self.compute, |rows, out| self.read_rows(parts, rows, matrix.layout().k, out).map(drop))
    }

    /// The experts whose gate, up and down `tensors` are, packed.
    pub(crate) fn pack_experts(&self, layout: FfnLayout, tensors: &[[usize; 3]]) -> Result<Experts> {
        let packed = Experts::from_rows(self.compute, layout, tensors.len(), |expert, part, rows, out| {
            let read = self.read_expert(layout, &tensors[expert], part, rows, out);
            read.map(|bytes| self.progress(bytes)).map_err(Failure::Read)
        });
        packed.map_err(Error::from)
    }

    /// How far `experts` are from the `tensors` that they were packed from.
    pub(crate) fn experts_error(&self, experts: &Experts, tensors: &[[usize; 3]]) -> Result<PackingError> {
        let layout = experts.layout();
        experts.packing_error(self.compute, |expert, part, rows, out| {
            self.read_expert(layout, &tensors[expert], part, rows, out).map(drop)
        })
    }

    fn read_expert(
        &self,
        layout: FfnLayout,
        [gate, up, down]: &[usize; 3],
        part: ExpertPart,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<u64> {
        let (tensor, k) = match part {
            ExpertPart::Gate => (*gate, layout.hidden),
            ExpertPart::Up => (*up, layout.hidden),
            ExpertPart::Down => (*down, layout.intermediate),
        };
        self.read(tensor, rows.start * k, out)
    }

    /// Fills `out` with the packed bytes of tensor `index` from `offset` on.
    fn read_packed(&self, index: usize, offset: usize, out: &mut [u8]) -> Result<(), Failure> {
        self.tensors.read(index, offset as u64, out).map_err(Failure::Read)?;
        self.progress(out.len() as u64);
        Ok(())
    }

    /// Counts the padding of a packed tensor whose `layout` was read.
    fn skip_padding(&self, layout: PackedLayout) {
        self.progress(layout.bytes() - layout.data_bytes());
    }
}

fn zero_matrix(layout: Layout) -> Result<Matrix> {
    Ok(Matrix::zeroed(layout).map_err(cadre_engine::Error::from)?)
}

fn zero_experts(layout: FfnLayout, count: usize) -> Result<Experts> {
    Ok(Experts::zeroed(layout, count).map_err(cadre_engine::Error::from)?)
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
pub(crate) struct Part {
    /// The tensor's number.
    pub tensor: usize,
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

    /// The full name of the module whose tensors these are.
    pub(crate) fn module(&self) -> String {
        self.prefix.trim_end_matches('.').to_owned()
    }

    /// The full name of the module whose weight the tensor `name` is.
    fn module_of(&self, name: &str) -> String {
        let name = self.name(name);
        name.strip_suffix(WEIGHT).map_or(name.clone(), str::to_owned)
    }

    /// Those of `count` gated feed-forwards.
    fn expert_modules(&self, count: usize, prefix: &impl Fn(usize) -> String) -> Vec<ExpertModules> {
        let modules = |expert| {
            let [gate, up, down] = EXPERT_NAMES.map(|name| self.at(prefix(expert)).module_of(name));
            ExpertModules { gate, up, down }
        };
        (0..count).map(modules).collect()
    }

    /// What packs.
    pub(crate) fn compute(&self) -> &'a Compute {
        self.loader.compute
    }

    /// What matrices are packed as.
    pub(crate) fn formats(&self) -> Formats {
        self.loader.formats
    }

    /// The tensors named, `[rows, k]` each, one below the other in one packed matrix.
    pub(crate) fn matrix(&self, parts: &[(&str, usize)], k: usize) -> Result<Matrix> {
        self.matrix_as(self.formats().dense, parts, k)
    }

    /// The same in a format of the caller's choice.
    pub(crate) fn matrix_as(&self, format: Format, parts: &[(&str, usize)], k: usize) -> Result<Matrix> {
        let modules = parts.iter().map(|(name, rows)| Module { name: self.module_of(name), rows: *rows }).collect();
        Ok(self.unnamed_matrix(format, parts, k)?.of_modules(modules))
    }

    fn unnamed_matrix(&self, format: Format, parts: &[(&str, usize)], k: usize) -> Result<Matrix> {
        let names: Vec<_> = parts.iter().map(|(name, _)| *name).collect();
        let name = names.join(JOIN);
        if self.loader.tensors.pack().is_some() {
            let n = parts.iter().fold(0_usize, |n, (_, rows)| n.saturating_add(*rows));
            let index = self.take_packed(&name, &[n, k], format)?;
            let layout = Layout { format, n, k };
            if self.loader.zeros {
                return zero_matrix(layout);
            }
            let read = |offset, out: &mut [u8]| self.loader.read_packed(index, offset, out);
            let matrix = Matrix::from_packed(self.compute(), layout, read)?;
            self.loader.skip_padding(PackedLayout::Matrix(layout));
            return Ok(matrix);
        }
        let parts = self.parts(parts, k)?;
        let layout = Layout { format, n: parts.last().map_or(0, |part| part.rows.end), k };
        if let Some(plan) = &self.loader.plan {
            self.note(plan, &name, PlannedContent::Matrix(layout, parts));
            return zero_matrix(layout);
        }
        if self.loader.zeros { zero_matrix(layout) } else { self.loader.pack_matrix(layout, &parts) }
    }

    /// The tensor `name`, `[n]`.
    pub(crate) fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>> {
        let index = self.take(name, &[n])?;
        let mut values = vec![0.0; n];
        let bytes = self.loader.read(index, 0, &mut values)?;
        self.loader.progress(bytes);
        if let Some(plan) = &self.loader.plan {
            self.note(plan, name, PlannedContent::Vector(index));
        }
        Ok(values)
    }

    /// `count` gated feed-forwards: `gate_proj`, `up_proj` `[ff, hidden]` and `down_proj` `[hidden, ff]` below the
    /// prefix of each.
    pub(crate) fn experts(&self, count: usize, layout: FfnLayout, prefix: impl Fn(usize) -> String) -> Result<Experts> {
        let experts = self.unnamed_experts(count, layout, &prefix)?;
        Ok(experts.of_modules(self.expert_modules(count, &prefix)))
    }

    fn unnamed_experts(&self, count: usize, layout: FfnLayout, prefix: &impl Fn(usize) -> String) -> Result<Experts> {
        // All are looked up before the first byte is allocated; the lists grow only as tensors are found.
        if self.loader.tensors.pack().is_some() {
            let indices = self.packed_experts(count, layout, prefix)?;
            if self.loader.zeros {
                return zero_experts(layout, count);
            }
            let read = |expert: usize, offset, out: &mut [u8]| self.loader.read_packed(indices[expert], offset, out);
            let experts = Experts::from_packed(self.compute(), layout, count, read)?;
            indices.iter().for_each(|_| self.loader.skip_padding(PackedLayout::Expert(layout)));
            return Ok(experts);
        }
        let tensors = self.plain_experts(count, layout, prefix)?;
        if let Some(plan) = &self.loader.plan {
            for (expert, tensors) in tensors.iter().enumerate() {
                let content = PlannedContent::Expert(layout, *tensors);
                self.at(prefix(expert)).note(plan, &EXPERT_NAMES.join(JOIN), content);
            }
        }
        if self.loader.zeros {
            return zero_experts(layout, count);
        }
        self.loader.pack_experts(layout, &tensors)
    }

    /// [`Weights::experts`] of which each token uses a few: they may stay on disk.
    pub(crate) fn routed_experts(
        &self,
        count: usize,
        layout: FfnLayout,
        prefix: impl Fn(usize) -> String,
    ) -> Result<RoutedExperts> {
        let Some(left) = &self.loader.left else {
            return Ok(RoutedExperts::Resident(self.experts(count, layout, prefix)?));
        };
        let experts: Vec<ExpertTensors> = if self.loader.tensors.pack().is_some() {
            self.packed_experts(count, layout, &prefix)?.into_iter().map(ExpertTensors::Packed).collect()
        } else {
            self.plain_experts(count, layout, &prefix)?.into_iter().map(ExpertTensors::Plain).collect()
        };
        let tensors = experts.iter().flat_map(ExpertTensors::all);
        self.loader.progress(tensors.map(|index| self.loader.tensors.info(*index).bytes).sum());
        Ok(RoutedExperts::Stored(left.leave(experts, layout).of_modules(self.expert_modules(count, &prefix))))
    }

    /// The numbers of gate, up and down of `count` experts of a checkpoint that isn't packed.
    fn plain_experts(
        &self,
        count: usize,
        FfnLayout { hidden, intermediate, .. }: FfnLayout,
        prefix: &impl Fn(usize) -> String,
    ) -> Result<Vec<[usize; 3]>> {
        let [gate, up, down] = EXPERT_NAMES;
        let mut tensors = Vec::new();
        for expert in 0..count {
            let below = self.at(prefix(expert));
            tensors.push([
                below.take(gate, &[intermediate, hidden])?,
                below.take(up, &[intermediate, hidden])?,
                below.take(down, &[hidden, intermediate])?,
            ]);
        }
        Ok(tensors)
    }

    /// The numbers of a pack's `count` experts.
    fn packed_experts(
        &self,
        count: usize,
        FfnLayout { format, hidden, intermediate }: FfnLayout,
        prefix: &impl Fn(usize) -> String,
    ) -> Result<Vec<usize>> {
        let name = EXPERT_NAMES.join(JOIN);
        let mut indices = Vec::new();
        for expert in 0..count {
            indices.push(self.at(prefix(expert)).take_packed(&name, &[3, intermediate, hidden], format)?);
        }
        Ok(indices)
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
            self.loader.progress(self.loader.tensors.info(index).bytes);
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

    /// The same of a pack's tensor that is packed as `format`.
    fn take_packed(&self, name: &str, expected: &[usize], format: Format) -> Result<usize> {
        let index = self.take(name, expected)?;
        match self.loader.tensors.info(index).stored {
            Stored::Packed(found) if found == format => Ok(index),
            found => Err(self.loader.stored_wrongly(index, Stored::Packed(format), found)),
        }
    }

    fn note(&self, plan: &Mutex<Vec<PlannedTensor>>, name: &str, content: PlannedContent) {
        let planned = PlannedTensor { name: self.name(name), content };
        plan.lock().unwrap_or_else(PoisonError::into_inner).push(planned);
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use crate::{files::Files, testing::TensorFile};

    const F32: Formats = Formats { experts: Format::F32, dense: Format::F32, embedding: Format::F32 };

    fn layout(hidden: usize, intermediate: usize) -> FfnLayout {
        FfnLayout { format: Format::F32, hidden, intermediate }
    }

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
        let loader = Loader::new(&tensors, &compute, F32, &on_bytes);
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
            let experts = weights.at("mlp").experts(2, layout(3, 2), |expert| format!("experts.{expert}"))?;
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
        refused(file(), |_, weights| weights.experts(usize::MAX, layout(2, 4), |e| format!("a.{e}")).map(drop), &words);
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
        let loader = Loader::new(&tensors, &compute, F32, &|_| {});
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
                weights.loader.read_rows(&parts, range.clone(), k, &mut out)?;
                Ok(out)
            });
            prop_assert_eq!(&read.unwrap(), &values[range.start * k..range.end * k]);
        }
    }
}
