//! Packs of tiny checkpoints of every architecture: read back, gone on with, damaged.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::{Mutex, atomic::Ordering},
};

use cadre_engine::{model::Model, nn::Format};
use proptest::{prelude::*, sample::select};
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::{
    Placement, architectures, load,
    summary::Part,
    tensors::{PackedEntry, Stored, StoredType},
    testing::{TensorFile, index_json, tiny, write_checkpoint},
    tokenizer::tests::byte_level_json,
};

const AUTO: FormatOptions = FormatOptions { format: None, experts: None, dense: None };
const MIXED: FormatOptions = FormatOptions { format: Some(Format::Bf16), experts: Some(Format::F32), dense: None };

/// A whole checkpoint, and a place for its pack.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new(architecture: &str) -> Self {
        let place = Self { directory: tempfile::tempdir().unwrap() };
        fs::create_dir(place.source()).unwrap();
        let (config, tensors) = tiny(architecture);
        write_checkpoint(&place.source(), &config, &tensors);
        fs::write(place.source().join("tokenizer.json"), byte_level_json().to_string()).unwrap();
        fs::write(place.source().join("README.md"), "not copied").unwrap();
        place
    }

    fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    fn output(&self) -> PathBuf {
        self.directory.path().join("pack")
    }

    fn pack(&self, options: &FormatOptions) -> Result<Packed> {
        self.pack_on(options, 2)
    }

    fn pack_on(&self, options: &FormatOptions, threads: usize) -> Result<Packed> {
        let (compute, stop) = (Compute::new(threads), AtomicBool::new(false));
        pack(&open_directory(&self.source())?, options, &self.output(), &compute, &stop, &|_| {})
    }

    /// Every file of the pack.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.output()).unwrap().map(|entry| entry.unwrap());
        entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
    }

    fn load(&self, options: &FormatOptions) -> Result<crate::LoadedModel> {
        load(&open_directory(&self.output())?, options, Placement::Resident, &Compute::new(2), &|_| {})
    }

    /// Changes a text in the header of the shard `file`; the header keeps its size.
    fn change_header(&self, file: &str, from: &str, to: &str) {
        let path = self.output().join(file);
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let to = format!("{to:<width$}", width = from.len());
        assert_eq!(to.len(), from.len(), "`{from}` and `{to}`");
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(path, bytes).unwrap();
    }
}

#[track_caller]
fn refused<T>(result: Result<T>, words: &[&str]) {
    let error = result.err().unwrap().to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn every_architecture_packs_and_loads() {
    for architecture in architectures() {
        for options in [AUTO, MIXED, FormatOptions::all(Format::F32)] {
            let place = Place::new(architecture);
            let packed = place.pack(&options).unwrap();
            assert!(!packed.was_finished);
            assert_eq!(packed.pack.total_parameters, packed.source.total_parameters, "{architecture}");
            assert_eq!(packed.pack.active_parameters, packed.source.active_parameters, "{architecture}");
            let checkpoint = open_directory(&place.output()).unwrap();
            let told = Mutex::new(Vec::new());
            let loaded = load(&checkpoint, &AUTO, Placement::Resident, &Compute::new(2), &|progress| {
                told.lock().unwrap().push(progress)
            });
            let loaded = loaded.unwrap();
            let source = open_directory(&place.source()).unwrap();
            let direct = load(&source, &options, Placement::Resident, &Compute::new(1), &|_| {}).unwrap();
            assert_eq!(loaded.formats, direct.formats, "{architecture}");
            assert_eq!(loaded.decoder.info(), direct.decoder.info(), "{architecture}");
            let done = told.into_inner().unwrap().iter().map(|progress| progress.done_bytes).max();
            assert_eq!(done, Some(packed.pack.total_bytes), "{architecture}");
        }
    }
}

/// Other readers of safetensors can open it, and what is packed lies aligned.
#[test]
fn a_shard_is_a_safetensors_file() {
    let place = Place::new("bailing_moe_v2");
    place.pack(&MIXED).unwrap();
    let files = place.files();
    let shards: Vec<_> = files.iter().filter(|(name, _)| name.ends_with(".safetensors")).collect();
    assert_eq!(shards.len(), 3, "one for each of two layers, and one for the rest");
    for (name, bytes) in shards {
        let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
        assert!(!tensors.is_empty(), "{name}");
        for (tensor, view) in tensors.tensors() {
            let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
            let packed = view.dtype() == safetensors::Dtype::U8;
            assert!(
                !packed || start.is_multiple_of(4096) && view.data().len().is_multiple_of(4096),
                "{name}: {tensor} at {start}"
            );
        }
    }
    assert!(files.contains_key("config.json") && files.contains_key("tokenizer.json"));
    assert!(!files.contains_key("README.md"), "{:?}", files.keys());
}

#[test]
fn the_summary_tells_formats_and_errors() {
    let place = Place::new("qwen3_moe");
    // Weights that bf16 can't hold.
    let (_, tensors) = tiny("qwen3_moe");
    let file = tensors.iter().fold(TensorFile::default(), |file, (name, shape)| {
        let values: Vec<f32> = (0..shape.iter().product()).map(|index: usize| 1.0 / (index + 3) as f32).collect();
        file.f32(name, shape, &values)
    });
    file.write(&place.source().join("model.safetensors"));
    let options = FormatOptions { dense: Some(Format::F32), ..FormatOptions::all(Format::Bf16) };
    let packed = place.pack(&options).unwrap().pack;
    let of = |part| packed.parts.iter().find(|found| found.part == part).unwrap();
    let types = |part| of(part).types.iter().map(|(stored, _)| *stored).collect::<Vec<_>>();
    assert_eq!(types(Part::Experts), [Stored::Packed(Format::Bf16)]);
    assert_eq!(types(Part::Routers), [Stored::Packed(Format::F32)]);
    assert_eq!(types(Part::Norms), [Stored::Plain(StoredType::F32)]);
    assert_eq!(of(Part::Experts).tensors, 8);
    let error = |part| of(part).error.map(|error| error.relative());
    assert!((1e-4..4e-3).contains(&error(Part::Experts).unwrap()), "{:?}", error(Part::Experts));
    assert_eq!((error(Part::Head), error(Part::Norms)), (Some(0.0), None));
}

#[test]
fn the_same_pack_comes_of_any_number_of_threads_and_interruptions() {
    let place = Place::new("bailing_moe");
    place.pack_on(&AUTO, 1).unwrap();
    let whole = place.files();
    assert!(place.pack(&AUTO).unwrap().was_finished);
    assert!(place.files() == whole);

    // Ended before the index, in the middle of the second layer, and before anything.
    let shards: Vec<_> = whole.keys().filter(|name| name.ends_with(".safetensors")).cloned().collect();
    for kept in (0..shards.len()).rev() {
        fs::remove_file(place.output().join(INDEX_FILE)).unwrap();
        for shard in &shards[kept..] {
            fs::remove_file(place.output().join(shard)).unwrap();
            fs::write(place.output().join(format!("{shard}.unfinished")), "half").unwrap();
        }
        refused(place.load(&AUTO), &[INDEX_FILE, "unfinished pack", "cadre pack"]);
        if kept > 0 {
            let words = ["is in the way", "f32 experts, bf16 dense", "found a pack", "as bf16", "--output"];
            refused(place.pack(&MIXED), &words);
        }
        assert!(!place.pack_on(&AUTO, 3).unwrap().was_finished);
        assert!(place.files() == whole, "{kept} shards were kept");
    }
}

#[test]
fn what_else_lies_in_the_output_is_not_touched() {
    // A finished pack in other formats, or of other weights.
    let place = Place::new("olmoe");
    place.pack(&AUTO).unwrap();
    let whole = place.files();
    refused(place.pack(&MIXED), &["is in the way", "f32 experts"]);
    let (_, tensors) = tiny("olmoe");
    let file = tensors
        .iter()
        .fold(TensorFile::default(), |file, (name, shape)| file.bf16(name, shape, &vec![0.25; shape.iter().product()]));
    file.write(&place.source().join("model.safetensors"));
    refused(place.pack(&AUTO), &["is in the way", "expected a pack of checkpoint"]);
    assert!(place.files() == whole);

    // A checkpoint, even the very one; a pack as the source; a file.
    let place = Place::new("olmoe");
    let (compute, stop) = (Compute::new(1), AtomicBool::new(false));
    let onto =
        |source: &Path, output: &Path| pack(&open_directory(source).unwrap(), &AUTO, output, &compute, &stop, &|_| {});
    refused(onto(&place.source(), &place.source()), &["model.safetensors is in the way"]);
    onto(&place.source(), &place.output()).unwrap();
    refused(
        onto(&place.output(), &place.directory.path().join("x")),
        &["expected a checkpoint", "found a pack (bf16)"],
    );
    let words = ["cannot create directory", "config.json", "another --output"];
    refused(onto(&place.source(), &place.source().join("config.json")), &words);
}

#[test]
fn a_checkpoint_is_not_packed_onto_itself() {
    let place = Place::new("olmoe");
    // Sharded, under the names that a pack has.
    let name = "model-00001-of-00003.safetensors";
    fs::rename(place.source().join("model.safetensors"), place.source().join(name)).unwrap();
    let (_, tensors) = tiny("olmoe");
    let entries: Vec<_> = tensors.iter().map(|(tensor, _)| (tensor.as_str(), name)).collect();
    fs::write(place.source().join(INDEX_FILE), index_json(&entries)).unwrap();
    let (compute, stop) = (Compute::new(1), AtomicBool::new(false));
    let source = open_directory(&place.source()).unwrap();
    let onto_itself = pack(&source, &AUTO, &place.source(), &compute, &stop, &|_| {});
    refused(onto_itself, &[name, "is in the way", "found no pack"]);
    assert!(open_directory(&place.source()).unwrap().tensors().is_ok());
}

#[test]
fn the_small_files_of_something_else_are_not_overwritten() {
    for name in ["config.json", "tokenizer.json", INDEX_FILE] {
        let place = Place::new("olmoe");
        fs::create_dir(place.output()).unwrap();
        fs::write(place.output().join(name), "{}").unwrap();
        refused(place.pack(&AUTO), &[name, "is in the way", "another --output"]);
        assert_eq!(place.files(), BTreeMap::from([(name.to_owned(), b"{}".to_vec())]));
    }
}

#[test]
fn what_changed_beside_the_weights_is_written_again() {
    let place = Place::new("olmoe");
    place.pack(&AUTO).unwrap();
    let shard = place.output().join("model-00001-of-00003.safetensors");
    let written = fs::metadata(&shard).unwrap().modified().unwrap();
    fs::write(place.source().join("chat_template.jinja"), "{{ messages }}").unwrap();
    assert!(!place.pack(&AUTO).unwrap().was_finished);
    assert_eq!(place.files()["chat_template.jinja"], b"{{ messages }}");
    assert_eq!(fs::metadata(&shard).unwrap().modified().unwrap(), written, "the shards are as they were");
    assert!(place.pack(&AUTO).unwrap().was_finished);
}

#[test]
fn a_damaged_shard_is_written_again() {
    let place = Place::new("olmoe");
    place.pack(&AUTO).unwrap();
    let whole = place.files();
    let shard = "model-00002-of-00003.safetensors";
    for length in [0, 7, 1000, whole[shard].len() - 1] {
        fs::write(place.output().join(shard), &whole[shard][..length]).unwrap();
        assert!(!place.pack(&AUTO).unwrap().was_finished, "{length} bytes");
        assert!(place.files() == whole, "{length} bytes");
    }
    // One of another version is sound, and is not this pack's.
    place.change_header(shard, "\"cadre_pack\":\"2\"", "\"cadre_pack\":\"3\"");
    refused(place.pack(&AUTO), &[shard, "is in the way", "version of the pack \"3\""]);
}

/// A pack that lost a shard is an unfinished one until that is written again.
#[test]
fn an_index_means_that_all_is_there() {
    let place = Place::new("olmoe");
    place.pack(&AUTO).unwrap();
    fs::remove_file(place.output().join("model-00003-of-00003.safetensors")).unwrap();
    let (compute, stop) = (Compute::new(1), AtomicBool::new(true));
    let ended = pack(&open_directory(&place.source()).unwrap(), &AUTO, &place.output(), &compute, &stop, &|_| {});
    assert!(matches!(ended, Err(Error::Interrupted)), "{ended:?}");
    assert!(!place.files().contains_key(INDEX_FILE));
    assert!(!place.pack(&AUTO).unwrap().was_finished);
}

#[test]
fn two_packs_in_one_directory_do_not_mix() {
    let place = Place::new("olmoe");
    place.pack(&AUTO).unwrap();
    let (whole, shard) = (place.files(), "model-00002-of-00003.safetensors");
    fs::remove_file(place.output().join(shard)).unwrap();
    let path = place.output().join(format!("{shard}.unfinished"));
    fs::write(&path, "half").unwrap();
    let other = fs::File::open(&path).unwrap();
    other.lock().unwrap();
    refused(place.pack(&AUTO), &[&format!("{shard}.unfinished"), "another process", "another --output"]);
    assert_eq!(fs::read(&path).unwrap(), b"half", "the other's file is not touched");
    drop(other);
    place.pack(&AUTO).unwrap();
    assert!(place.files() == whole);
}

#[test]
fn it_ends_when_it_is_told_to_and_goes_on_later() {
    let place = Place::new("qwen3_moe");
    let compute = Compute::new(2);
    let stop = AtomicBool::new(false);
    let source = open_directory(&place.source()).unwrap();
    let total: u64 = source.summary().unwrap().total_bytes;
    let late = |progress: LoadProgress| stop.store(4 * progress.done_bytes > 3 * total, Ordering::Relaxed);
    let ended = pack(&source, &AUTO, &place.output(), &compute, &stop, &late);
    assert!(matches!(ended, Err(Error::Interrupted)), "{ended:?}");
    let files = place.files();
    assert!(!files.contains_key(INDEX_FILE) && files.keys().all(|name| name.ends_with(".safetensors")), "{files:?}");
    assert_eq!(files.len(), 2, "what was finished stays, and no half of a file");
    place.pack(&AUTO).unwrap();
    assert!(place.load(&AUTO).is_ok());
}

#[test]
fn another_format_than_a_packs_own_is_refused() {
    let place = Place::new("olmoe");
    place.pack(&AUTO).unwrap();
    for own in [
        FormatOptions::all(Format::Bf16),
        FormatOptions { experts: Some(Format::Bf16), ..AUTO },
        FormatOptions { dense: Some(Format::Bf16), ..FormatOptions::all(Format::Bf16) },
    ] {
        assert!(place.load(&own).is_ok(), "{own}");
    }
    refused(place.load(&FormatOptions::all(Format::F32)), &["is a pack", "found f32", "bf16", "pack the original"]);
    refused(place.load(&MIXED), &["found bf16, experts f32"]);
}

#[test]
fn a_damaged_pack_is_refused() {
    const REST: &str = "model-00001-of-00003.safetensors";
    const LAYER: &str = "model-00002-of-00003.safetensors";
    let expert = "model.layers.0.mlp.experts.2.gate_proj.weight+up_proj.weight+down_proj.weight";
    // Errors about headers show the beginning of a name.
    let short = "model.layers.0.mlp.experts.2.gate_proj.weight";
    let damaged = |damage: &dyn Fn(&Place), words: &[&str]| {
        let place = Place::new("qwen3_moe");
        place.pack(&AUTO).unwrap();
        damage(&place);
        refused(place.load(&AUTO), words);
    };
    let change =
        |file: &'static str, from: String, to: String| move |place: &Place| place.change_header(file, &from, &to);
    let cut = |file: &'static str, bytes: u64| {
        move |place: &Place| {
            let file = fs::OpenOptions::new().write(true).open(place.output().join(file)).unwrap();
            file.set_len(file.metadata().unwrap().len() - bytes).unwrap();
        }
    };
    damaged(&cut(LAYER, 1), &[LAYER, "cut off", "pack it again"]);
    damaged(&cut(LAYER, 20_000), &[LAYER, "expected", "found"]);
    damaged(&|place| fs::remove_file(place.output().join(LAYER)).unwrap(), &[INDEX_FILE, LAYER, "no such file"]);

    let version = change(LAYER, "\"cadre_pack\":\"2\"".into(), "\"cadre_pack\":\"3\"".into());
    damaged(&version, &[LAYER, "version of the pack", "expected \"2\"", "found \"3\""]);
    let format = change(REST, "\"dense_format\":\"bf16\"".into(), "\"dense_format\":\"int3\"".into());
    damaged(&format, &[REST, "dense_format", "int3"]);
    let other = change(LAYER, "\"dense_format\":\"bf16\"".into(), "\"dense_format\":\"f32\" ".into());
    damaged(&other, &[LAYER, "expected a pack of checkpoint", "as bf16 experts, f32 dense"]);
    // An expert of other sizes, of none, of another format, and one that is not there.
    let entry = |text: &str| format!("\"{expert}\":\"{text}");
    damaged(&change(LAYER, entry("bf16 3x6x8"), entry("bf16 3x8x6")), &[LAYER, expert, "[3, 6, 8]", "[3, 8, 6]"]);
    damaged(&change(LAYER, entry("bf16 3x6x8"), entry("bf16 3x0x8")), &[LAYER, short, "[3, 0, 8]"]);
    damaged(&change(LAYER, entry("bf16 3x6x8"), entry("bf16 9x6x8")), &[LAYER, short, "entry of the pack"]);
    damaged(&change(LAYER, entry("bf16 3x6x8 "), entry("f32 3x6x8  ")), &[LAYER, short, "expected"]);
    let renamed = change(LAYER, format!("\"{expert}\":{{"), format!("\"{}\":{{", expert.replace("2.gate", "7.gate")));
    damaged(&renamed, &["experts.7.gate_proj", "expected"]);
    // A configuration that another model has.
    let config = |field: &'static str, value: u64| {
        move |place: &Place| {
            let path = place.output().join("config.json");
            let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            config[field] = json!(value);
            fs::write(path, config.to_string()).unwrap();
        }
    };
    damaged(&config("moe_intermediate_size", 12), &[LAYER, "experts.0", "[3, 12, 8]", "[3, 6, 8]"]);
    damaged(&config("num_experts", 5), &["[5, 8]", "[4, 8]"]);
    damaged(&config("num_hidden_layers", 3), &["layers.2", "is missing"]);
    damaged(&config("num_hidden_layers", 1), &["layers.1", "does not use"]);
}

/// Sizes as they are, and such as can't be computed with.
fn sizes() -> impl Strategy<Value = u64> {
    prop_oneof![1_u64..70, Just(3), Just(1 << 62), Just(1 << 61), any::<u64>()]
}

proptest! {
    /// Whatever a file says of its tensors, sizes are checked before they are computed with.
    #[test]
    fn no_entry_of_a_pack_is_fatal(
        format in select(Format::ALL),
        axes in proptest::collection::vec(sizes(), 1..4),
        bytes in sizes(),
    ) {
        let axes: Vec<_> = axes.iter().map(ToString::to_string).collect();
        let text = format!("{format} {} 0 1 00000000", axes.join("x"));
        if let Ok(entry) = PackedEntry::read("file", "tensor", &text, bytes) {
            prop_assert_eq!(entry.layout.bytes(), bytes);
        }
    }
}
