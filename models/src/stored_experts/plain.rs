//! Experts of a checkpoint that isn't packed: read in as few reads as their tensors' places allow, and packed on arrival
//! by the thread that read them.

use std::{
    array,
    sync::{Mutex, MutexGuard, PoisonError, TryLockError},
};

use cadre_engine::{
    experts::{BlockingTier, Buffer, ExpertId, FetchError},
    nn::{Format, expert_bytes, pack_expert},
};

use super::{ExpertTensors, Layer, THREADS};
use crate::{
    Result,
    tensors::{ALIGNMENT, Stored, TensorSet},
};

/// A gap between two tensors that is read over: a read of its own costs a solid-state disk some 0.1 ms, in which it
/// reads twice as much.
const GAP_BYTES: u64 = 128 << 10;
/// Bytes of all stages: with larger experts they are fewer.
const STAGES_BYTES: usize = 128 << 20;

/// A checkpoint's experts on disk.
pub(super) struct Plain {
    name: String,
    tensors: TensorSet,
    layers: Vec<Layer>,
    /// Where experts lie as they are read, until they are packed.
    stages: Vec<Mutex<Buffer>>,
}

impl Plain {
    /// # Errors
    /// When the memory for its stages can't be had.
    pub(super) fn new(name: String, tensors: TensorSet, layers: Vec<Layer>) -> Result<Self> {
        let bytes = read_bytes(&tensors, &layers);
        let stages: Result<_, _> = (0..stages(bytes)).map(|_| Buffer::zeroed(bytes).map(Mutex::new)).collect();
        let stages = stages.map_err(cadre_engine::Error::from)?;
        Ok(Self { name, tensors, layers, stages })
    }

    /// A stage that nobody uses, or else will be free soon.
    fn stage(&self, id: ExpertId) -> MutexGuard<'_, Buffer> {
        let free = self.stages.iter().find_map(|stage| match stage.try_lock() {
            Ok(stage) => Some(stage),
            Err(TryLockError::Poisoned(stage)) => Some(stage.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        });
        let any = &self.stages[id.expert as usize % self.stages.len()];
        free.unwrap_or_else(|| any.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl BlockingTier for Plain {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, id: ExpertId, out: &mut [u8]) -> Result<usize, FetchError> {
        let failed = |reason: String| FetchError { id, tier: self.name.clone(), reason };
        let layer = self.layers.get(id.layer as usize).ok_or_else(|| failed("there is no such expert".to_owned()))?;
        let Some(ExpertTensors::Plain(parts)) = layer.experts.get(id.expert as usize) else {
            return Err(failed("there is no such expert".to_owned()));
        };
        let (bytes, room) = (expert_bytes(&layer.layout), out.len());
        let out = out.get_mut(..bytes).ok_or_else(|| failed(format!("it has {bytes} bytes, its slot {room}")))?;
        let types = parts.map(|part| match self.tensors.info(part).stored {
            Stored::Plain(dtype) => Some(dtype),
            Stored::Packed(_) => None,
        });
        let [Some(gate), Some(up), Some(down)] = types else {
            return Err(failed("expected plain numbers, found packed ones".to_owned()));
        };
        let Reads { reads, starts } = Reads::of(&self.tensors, *parts);
        let mut stage = self.stage(id);
        for read in &reads {
            let out = &mut stage[read.at..read.at + read.bytes()];
            let read = self.tensors.read_extent(read.file, read.start, read.needed(), out);
            read.map_err(|error| failed(error.to_string()))?;
        }
        pack_expert(layer.layout, out, |part, rows, values| {
            let (dtype, k) = ([gate, up, down][part as usize], values.len() / rows.len());
            dtype.widen(&stage[starts[part as usize] + rows.start * k * dtype.bytes()..], values);
        });
        Ok(reads.iter().map(Read::bytes).sum())
    }
}

/// The bytes that the largest expert takes to read.
pub(super) fn read_bytes(tensors: &TensorSet, layers: &[Layer]) -> usize {
    let experts = layers.iter().flat_map(|layer| &layer.experts);
    let bytes = experts.filter_map(|expert| match expert {
        ExpertTensors::Plain(parts) => Some(Reads::of(tensors, *parts).reads.iter().map(Read::bytes).sum()),
        ExpertTensors::Packed(_) => None,
    });
    bytes.max().unwrap_or(0)
}

/// What experts take between disk and slot: their stages, and the 16 rows in f32 that a thread packs at a time.
pub(super) fn staging_bytes(tensors: &TensorSet, layers: &[Layer]) -> usize {
    let rows = |layer: &Layer| Format::F32.panel_bytes(layer.layout.hidden.max(layer.layout.intermediate));
    let bytes = read_bytes(tensors, layers);
    stages(bytes) * (bytes + layers.iter().map(rows).max().unwrap_or(0))
}

/// How many stages of `bytes` there are: one a thread that reads, if they fit.
fn stages(bytes: usize) -> usize {
    (STAGES_BYTES / bytes.max(1)).clamp(1, THREADS)
}

/// How one expert comes into memory.
#[derive(Debug)]
struct Reads {
    /// One, if its tensors are neighbours.
    reads: Vec<Read>,
    /// Where gate, up and down begin in the stage.
    starts: [usize; 3],
}

/// A stretch of a file, and its place in the stage.
#[derive(Debug, PartialEq, Eq)]
struct Read {
    file: usize,
    /// A multiple of 4 KiB.
    start: u64,
    /// Where the last tensor ends.
    end: u64,
    at: usize,
}

impl Read {
    /// Bytes from the first one to the end of the last tensor.
    fn needed(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Bytes read: whole 4 KiB.
    fn bytes(&self) -> usize {
        self.needed().next_multiple_of(ALIGNMENT)
    }
}

impl Reads {
    /// Those of the expert whose gate, up and down are `parts`.
    fn of(tensors: &TensorSet, parts: [usize; 3]) -> Self {
        let extents = parts.map(|part| tensors.extent(part));
        let mut order: [usize; 3] = array::from_fn(|part| part);
        order.sort_by_key(|part| (extents[*part].0, extents[*part].1.start));
        let (mut reads, mut starts) = (Vec::<Read>::new(), [0; 3]);
        for part in order {
            let (file, range) = extents[part].clone();
            let at = reads.last().map_or(0, |read| read.at + read.bytes());
            match reads.last_mut().filter(|read| read.file == file && range.start - read.end <= GAP_BYTES) {
                Some(read) => read.end = range.end,
                None => {
                    reads.push(Read { file, start: range.start - range.start % ALIGNMENT as u64, end: range.end, at })
                }
            }
            if let Some(read) = reads.last() {
                starts[part] = read.at + (range.start - read.start) as usize;
            }
        }
        Self { reads, starts }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::FileExt,
        path::Path,
    };

    use cadre_engine::nn::{ExpertPart, FfnLayout};
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::{
        files::Files,
        testing::{TensorFile, index_json},
    };

    const LAYOUT: FfnLayout = FfnLayout { format: Format::Q4K, hidden: 48, intermediate: 37 };
    const NAMES: [&str; 3] = ["gate", "up", "down"];
    const SHAPES: [[usize; 2]; 3] = [[37, 48], [37, 48], [48, 37]];

    /// What bf16 and f16 hold exactly, another sequence for each part.
    fn values(part: usize) -> Vec<f32> {
        (0..37 * 48).map(|index| ((index * (part + 3)) % 251) as f32 / 16.0 - 7.0).collect()
    }

    fn add(file: TensorFile, part: usize, dtype: usize) -> TensorFile {
        match dtype {
            0 => file.f32(NAMES[part], &SHAPES[part], &values(part)),
            1 => file.bf16(NAMES[part], &SHAPES[part], &values(part)),
            _ => file.f16(NAMES[part], &SHAPES[part], &values(part)),
        }
    }

    fn gap(file: TensorFile, name: &str, bytes: usize) -> TensorFile {
        file.bf16(name, &[bytes / 2], &vec![1.0; bytes / 2])
    }

    fn open(directory: &Path) -> (TensorSet, [usize; 3]) {
        let tensors = TensorSet::open(&Files::Directory(directory.to_owned())).unwrap();
        let parts = NAMES.map(|name| tensors.find(name).unwrap());
        (tensors, parts)
    }

    fn tier((tensors, parts): (TensorSet, [usize; 3])) -> Plain {
        let mut tensors = tensors;
        tensors.bypass_page_cache();
        Plain::new(
            tensors.describe(),
            tensors,
            vec![Layer { experts: vec![ExpertTensors::Plain(parts)], layout: LAYOUT }],
        )
        .unwrap()
    }

    const FIRST: ExpertId = ExpertId { layer: 0, expert: 0 };

    fn fetch(tier: &Plain) -> Result<Vec<u8>, FetchError> {
        let mut out = vec![0; expert_bytes(&LAYOUT)];
        tier.fetch(FIRST, &mut out).map(|_| out)
    }

    fn expected() -> Vec<u8> {
        let mut out = vec![0; expert_bytes(&LAYOUT)];
        pack_expert(LAYOUT, &mut out, |part: ExpertPart, rows, out| {
            let k = SHAPES[part as usize][1];
            out.copy_from_slice(&values(part as usize)[rows.start * k..rows.end * k]);
        });
        out
    }

    /// A file with the parts in this order, and so many bytes before each.
    fn written(order: [usize; 3], gaps: [usize; 3], dtype: usize) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        let parts = order.into_iter().zip(gaps).enumerate();
        let file = parts.fold(TensorFile::default(), |file, (index, (part, bytes))| {
            add(gap(file, &format!("gap.{index}"), bytes), part, dtype)
        });
        file.write(&directory.path().join("model.safetensors"));
        directory
    }

    #[test]
    fn neighbours_are_one_read_and_what_lies_far_is_another() {
        const FAR: usize = GAP_BYTES as usize + 2;
        for (gaps, reads) in [
            ([0, 0, 0], 1),
            ([10_000, 30_000, 30_002], 1),
            ([0, GAP_BYTES as usize, 0], 1),
            ([0, FAR, 0], 2),
            ([FAR, 0, FAR], 2),
            ([FAR, FAR, FAR], 3),
        ] {
            let directory = written([1, 2, 0], gaps, 1);
            let (tensors, parts) = open(directory.path());
            assert_eq!(Reads::of(&tensors, parts).reads.len(), reads, "{gaps:?}");
            assert!(fetch(&tier((tensors, parts))).unwrap() == expected(), "{gaps:?}");
        }
    }

    #[test]
    fn parts_in_several_files_are_several_reads() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        add(add(TensorFile::default(), 1, 0), 0, 1).write(&path("a.safetensors"));
        add(TensorFile::default(), 2, 2).write(&path("b.safetensors"));
        let index = index_json(&[("up", "a.safetensors"), ("gate", "a.safetensors"), ("down", "b.safetensors")]);
        fs::write(path("model.safetensors.index.json"), index).unwrap();
        let (tensors, parts) = open(directory.path());
        let reads = Reads::of(&tensors, parts);
        assert_eq!(reads.reads.iter().map(|read| read.file).collect::<Vec<_>>(), [0, 1]);
        assert!(fetch(&tier((tensors, parts))).unwrap() == expected());
    }

    #[test]
    fn a_file_that_is_cut_off_fails_until_it_is_whole_again() {
        let directory = written([0, 1, 2], [0; 3], 0);
        let path = directory.path().join("model.safetensors");
        let whole = fs::read(&path).unwrap();
        let tier = tier(open(directory.path()));
        let file = File::options().write(true).open(&path).unwrap();
        for len in [whole.len() - 1, 4096, 0] {
            file.set_len(len as u64).unwrap();
            let error = fetch(&tier).unwrap_err().to_string();
            for word in ["expert 0 of layer 0", "model.safetensors", "expected", "cut off"] {
                assert!(error.contains(word), "`{word}` is not in: {error}");
            }
        }
        file.write_all_at(&whole, 0).unwrap();
        assert!(fetch(&tier).unwrap() == expected());
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let tier = tier(open(written([0, 1, 2], [0; 3], 1).path()));
        let mut out = vec![0; expert_bytes(&LAYOUT)];
        for id in [ExpertId { layer: 1, expert: 0 }, ExpertId { layer: 0, expert: 1 }] {
            assert!(tier.fetch(id, &mut out).is_err());
        }
        out.pop();
        assert!(tier.fetch(FIRST, &mut out).unwrap_err().to_string().contains("its slot"));
    }

    #[test]
    fn large_experts_have_fewer_stages() {
        assert_eq!([0, 1 << 20, 40 << 20, 100 << 20, 1 << 30].map(stages), [4, 4, 3, 1, 1]);
    }

    proptest! {
        #[test]
        fn an_expert_is_whole_wherever_its_parts_lie(
            order in Just([0, 1, 2]).prop_shuffle(),
            gaps in [0_usize..70_000, 0..200_000, 0..200_000],
            dtype in 0_usize..3,
        ) {
            let directory = written(order, gaps, dtype);
            let (tensors, parts) = open(directory.path());
            let Reads { reads, starts } = Reads::of(&tensors, parts);
            let mut at = 0;
            for read in &reads {
                prop_assert!(read.at == at && read.start % ALIGNMENT as u64 == 0 && read.needed() <= read.bytes());
                at += read.bytes();
            }
            for (part, start) in parts.iter().zip(starts) {
                let range = tensors.extent(*part).1;
                let holds = |read: &Read| {
                    read.start <= range.start && range.end <= read.end
                        && start == read.at + (range.start - read.start) as usize
                };
                prop_assert_eq!(reads.iter().filter(|read| holds(read)).count(), 1);
            }
            prop_assert!(fetch(&tier((tensors, parts))).unwrap() == expected());
        }
    }
}
