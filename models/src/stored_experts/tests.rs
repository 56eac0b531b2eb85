use std::{fs, os::unix::fs::FileExt, path::PathBuf, sync::atomic::AtomicBool};

use cadre_engine::{
    compute::Compute,
    experts::{FetchError, Lane},
};
use tempfile::TempDir;

use super::*;
use crate::{
    FormatOptions, Placement, load, open,
    pack::pack,
    testing::{tiny, write_checkpoint},
};

/// The layers of the tiny model and the experts of each.
const LAYERS: usize = 2;
const EXPERTS: usize = 4;

/// The pack of a tiny model, in a directory.
struct Rig {
    directory: TempDir,
}

impl Rig {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (config, tensors) = tiny("qwen3_moe");
        write_checkpoint(directory.path(), &config, &tensors);
        let checkpoint = open(Some(directory.path().to_str().unwrap()), &|_| {}).unwrap();
        let (options, output) = (FormatOptions::default(), directory.path().join("pack"));
        pack(&checkpoint, &options, &output, &Compute::new(1), &AtomicBool::new(false), &|_| {}).unwrap();
        Self { directory }
    }

    fn shards(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.directory.path().join("pack")).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")).collect()
    }

    fn unopened(&self) -> UnopenedExperts {
        let path = self.directory.path().join("pack");
        let checkpoint = open(Some(path.to_str().unwrap()), &|_| {}).unwrap();
        let options = FormatOptions::default();
        load(&checkpoint, &options, Placement::Stored, &Compute::new(1), &|_| {}).unwrap().experts.unwrap()
    }

    /// A store of the pack that reads in this way; `None` if the system doesn't have it.
    fn store(&self, io: Io, slots: usize) -> Option<ExpertStore> {
        match (UnopenedExperts { io: Some(io), ..self.unopened() }).open(slots) {
            Err(crate::Error::IoUring { reason }) => {
                eprintln!("io_uring isn't tested: {reason}");
                None
            }
            store => Some(store.unwrap()),
        }
    }
}

/// What expert `expert` of `layer` holds, or why it can't be read.
fn read(store: &ExpertStore, layer: usize, expert: usize) -> std::result::Result<Vec<u8>, String> {
    let wanted = [expert];
    let mut visit = store.visit(layer, &wanted, Lane::Decode);
    let landed = visit.landed().map_err(|error| error.to_string())?;
    assert_eq!(landed, [0]);
    Ok(visit.bytes(0).to_vec())
}

/// The bytes of all experts as the files have them.
fn expected(unopened: &UnopenedExperts) -> Vec<Vec<Vec<u8>>> {
    let UnopenedExperts { tensors, layers, .. } = &unopened;
    let bytes = |tensor: &usize| {
        let mut bytes = vec![0; tensors.info(*tensor).bytes as usize];
        tensors.read(*tensor, 0, &mut bytes).unwrap();
        bytes
    };
    layers.iter().map(|layer| layer.experts.iter().flat_map(ExpertTensors::all).map(bytes).collect()).collect()
}

const WAYS: [Io; 2] = [Io::Pread, Io::IoUring];

#[test]
fn both_ways_read_what_the_files_have() {
    let rig = Rig::new();
    let expected = expected(&rig.unopened());
    for (io, slots) in WAYS.into_iter().flat_map(|io| [(io, 1), (io, LAYERS * EXPERTS)]) {
        let Some(store) = rig.store(io, slots) else { continue };
        for (layer, expert) in (0..20).map(|index| (index * 7 % LAYERS, index * 11 % EXPERTS)) {
            let (read, expected) = (read(&store, layer, expert).unwrap(), &expected[layer][expert]);
            assert!(read[..expected.len()] == **expected, "{io:?}: expert {expert} of layer {layer}");
        }
        // All at once.
        let mut visit = store.visit(1, &[0, 1, 2, 3], Lane::Decode);
        let (mut there, mut index) = ([false; 4], 0);
        loop {
            let landed = visit.landed().unwrap();
            if landed.is_empty() {
                break;
            }
            for expert in landed {
                there[expert] = true;
                assert!(visit.bytes(expert)[..expected[1][expert].len()] == *expected[1][expert], "{io:?}");
            }
            // Those that come later wait for the room of those before.
            while index < 4 && there[index] {
                visit.release(index..index + 1);
                index += 1;
            }
        }
        assert_eq!(index, 4);
    }
}

#[test]
fn a_file_that_was_cut_off_is_named_until_it_is_whole_again() {
    for io in WAYS {
        let rig = Rig::new();
        let Some(store) = rig.store(io, 1) else { continue };
        let whole: Vec<_> = rig.shards().into_iter().map(|path| (fs::read(&path).unwrap(), path)).collect();
        let file = |path: &PathBuf| fs::File::options().write(true).open(path).unwrap();
        // Before the expert, and within its first page, so that a part of it can be read.
        for len in [0, 4096, 4096 + 100] {
            whole.iter().for_each(|(_, path)| file(path).set_len(len).unwrap());
            let error = read(&store, 1, 3).unwrap_err();
            for word in ["expert 3 of layer 1", "safetensors", "cut off"] {
                assert!(error.contains(word), "{io:?}, {len}: `{word}` is not in: {error}");
            }
        }
        // In place: the store has these files open.
        whole.iter().for_each(|(bytes, path)| file(path).write_all_at(bytes, 0).unwrap());
        read(&store, 1, 3).unwrap();
    }
}

#[test]
fn a_damaged_expert_is_told_from_a_sound_one() {
    for io in WAYS {
        let rig = Rig::new();
        let Some(store) = rig.store(io, 2) else { continue };
        let unopened = rig.unopened();
        let (place, offset) = unopened.tensors.place(unopened.layers[0].experts[2].all()[0]);
        let file = fs::File::options().read(true).write(true).open(place.label()).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset + 17).unwrap();
        file.write_all_at(&[byte[0] ^ 4], offset + 17).unwrap();
        let error = read(&store, 0, 2).unwrap_err();
        assert!(error.contains("expert 2 of layer 0") && error.contains("checksum"), "{io:?}: {error}");
        read(&store, 0, 1).unwrap();
        file.write_all_at(&byte, offset + 17).unwrap();
        read(&store, 0, 2).unwrap();
    }
}

#[cfg(target_os = "linux")]
mod ring {
    use std::{
        io,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use cadre_engine::experts::{Fetch, Tier};

    use super::{
        super::uring::{DEPTH, Read, Ring, set_up},
        *,
    };
    use crate::files::{OpenFile, Source};

    const BYTES: usize = 2 * 4096;
    const COUNT: usize = 3 * DEPTH;

    /// Experts of `BYTES` bytes one after the other in a file, more of them given at once than are read at once.
    struct Through {
        ring: Ring,
        file: Arc<OpenFile>,
    }

    impl Tier for Through {
        fn name(&self) -> &str {
            "a test"
        }

        fn depth(&self) -> usize {
            COUNT
        }

        fn fetch(&self, fetch: Fetch) {
            let offset = u64::from(fetch.id().expert) * BYTES as u64;
            self.ring.read(Read { fetch, file: Arc::clone(&self.file), offset, bytes: BYTES });
        }
    }

    /// A store of a file of `len` bytes, whose page `index` is full of `index`, and the directory that the file is in.
    fn store(
        len: usize,
        direct: bool,
        done: impl Fn(Fetch, io::Result<()>) + Send + 'static,
    ) -> Option<(ExpertStore, TempDir)> {
        let ring = set_up().inspect_err(|error| eprintln!("io_uring isn't tested: {error}")).ok()?;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("experts");
        fs::write(&path, (0..len).map(|index| (index / 4096) as u8).collect::<Vec<_>>()).unwrap();
        let mut source = Source::open("experts".to_owned(), &path).unwrap().unwrap();
        if direct {
            source.bypass_page_cache();
        }
        let file = Arc::clone(source.file().unwrap());
        let tier = Through { ring: Ring::start(ring, done).unwrap(), file };
        Some((ExpertStore::new(Box::new(tier), COUNT, BYTES, &[COUNT]).unwrap(), directory))
    }

    fn finish(fetch: Fetch, result: io::Result<()>) {
        let error = |error: io::Error| FetchError { id: fetch.id(), tier: String::new(), reason: error.to_string() };
        let result = result.map(|()| BYTES).map_err(error);
        fetch.finish(result);
    }

    fn is_right(store: &ExpertStore, expert: usize) -> bool {
        let bytes = read(store, 0, expert).unwrap();
        bytes.chunks(4096).zip(2 * expert..).all(|(page, index)| page.iter().all(|byte| *byte == index as u8))
    }

    #[test]
    fn more_reads_than_places_all_come() {
        for direct in [true, false] {
            let Some((store, _directory)) = store(COUNT * BYTES, direct, finish) else { return };
            let experts: Vec<usize> = (0..COUNT).collect();
            let mut visit = store.visit(0, &experts, Lane::Decode);
            while !visit.landed().unwrap().is_empty() {}
            drop(visit);
            assert_eq!(store.counters().fetched_bytes, (COUNT * BYTES) as u64);
            assert!(experts.into_iter().all(|expert| is_right(&store, expert)));
        }
    }

    #[test]
    fn what_ends_in_the_middle_of_an_expert_is_an_error_for_that_one() {
        for (direct, missing) in [true, false].into_iter().flat_map(|direct| [1, 4096, 4097, 8191].map(|m| (direct, m)))
        {
            let Some((store, _directory)) = store(COUNT * BYTES - missing, direct, finish) else { return };
            let error = read(&store, 0, COUNT - 1).unwrap_err();
            assert!(error.contains("end of file"), "{error}");
            assert!(is_right(&store, COUNT - 2));
        }
    }

    #[test]
    fn a_panic_is_one_failed_read() {
        let done = AtomicUsize::new(0);
        let done = move |fetch: Fetch, result| {
            assert!(done.fetch_add(1, Ordering::Relaxed) % 2 == 1, "as asked for");
            finish(fetch, result);
        };
        let Some((store, _directory)) = store(COUNT * BYTES, true, done) else { return };
        for expert in 0..COUNT {
            assert!(read(&store, 0, expert).unwrap_err().contains("given up"));
            assert!(is_right(&store, expert));
        }
    }
}
