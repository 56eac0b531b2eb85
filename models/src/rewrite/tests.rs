//! Tiny checkpoints, in one file and sharded, written again: whole, in two goes, over something else.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
};

use cadre_engine::{compute::Compute, train::parameters::Parameter};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{
    FormatOptions,
    checkpoint::open_directory,
    pack::pack,
    summary::Part,
    tensors::{SINGLE_FILE, Stored},
    testing::{TensorFile, index_json, tiny, write_checkpoint as write_tiny},
    tokenizer::tests::byte_level_json,
};

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// A checkpoint, and a place to write it again.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self { directory: tempfile::tempdir().unwrap() };
        fs::create_dir(place.source()).unwrap();
        let (config, tensors) = tiny("qwen3_moe");
        write_tiny(&place.source(), &config, &tensors);
        for (name, text) in [("tokenizer.json", byte_level_json().to_string()), ("modeling_x.py", "pass".to_owned())] {
            fs::write(place.source().join(name), text).unwrap();
        }
        fs::write(place.source().join("README.md"), "of the model from before").unwrap();
        place
    }

    /// The same in two shards, with values that differ from number to number; one tensor is f32.
    fn sharded() -> Self {
        let place = Self::new();
        let (_, tensors) = tiny("qwen3_moe");
        fs::remove_file(place.source().join(SINGLE_FILE)).unwrap();
        let mut index = Vec::new();
        let middle = tensors.len() / 2;
        for (shard, tensors) in SHARDS.into_iter().zip([&tensors[..middle], &tensors[middle..]]) {
            let mut file = TensorFile::default();
            for (name, shape) in tensors {
                let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| (i + 1) as f32 / 64.0).collect();
                let wide = name.ends_with("mlp.gate.weight");
                file = if wide { file.f32(name, shape, &values) } else { file.bf16(name, shape, &values) };
                index.push((name.as_str(), shard));
            }
            file.write(&place.source().join(shard));
        }
        let text = index_json(&index).replace(r#""metadata":{}"#, r#""metadata":{"total_size":1}"#);
        fs::write(place.source().join(INDEX_FILE), text).unwrap();
        place
    }

    fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }

    fn output(&self) -> PathBuf {
        self.directory.path().join("output")
    }

    fn write(&self, replaced: &Parameters, dtype: Option<StoredType>) -> Result<Rewritten> {
        self.write_until(replaced, dtype, u64::MAX)
    }

    /// Is interrupted once so many bytes are done.
    fn write_until(&self, replaced: &Parameters, dtype: Option<StoredType>, bytes: u64) -> Result<Rewritten> {
        let stop = AtomicBool::new(false);
        let on_bytes = |progress: LoadProgress| stop.store(progress.done_bytes >= bytes, Ordering::Relaxed);
        let rewriting = Rewriting { output: &self.output(), dtype, stop: &stop, on_bytes: &on_bytes };
        write_checkpoint(&open_directory(&self.source())?, replaced, &rewriting)
    }

    fn tensors(&self) -> Result<TensorSet> {
        open_directory(&self.output())?.tensors()
    }
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

/// Names, types, shapes and bytes.
fn content(tensors: &TensorSet) -> Vec<(String, StoredType, Vec<usize>, Vec<u8>)> {
    let one = |(index, info): (usize, &crate::tensors::TensorInfo)| {
        let mut bytes = vec![0; info.bytes as usize];
        tensors.read(index, 0, &mut bytes).unwrap();
        let Stored::Plain(dtype) = info.stored else { panic!("{} is packed", info.name) };
        (info.name.clone(), dtype, info.shape.clone(), bytes)
    };
    tensors.iter().enumerate().map(one).collect()
}

fn parameters(all: &[(&str, &[usize], Vec<f32>)]) -> Parameters {
    let mut parameters = Parameters::default();
    for (name, shape, values) in all {
        let parameter = Parameter { name: (*name).to_owned(), shape: shape.to_vec(), values: values.clone() };
        parameters.push(parameter).unwrap();
    }
    parameters
}

/// Trained: a norm, and a matrix of the second shard.
fn trained() -> Parameters {
    let matrix = (0..48).map(|i| i as f32 / 8.0).collect();
    parameters(&[
        ("model.norm.weight", &[8], vec![2.0; 8]),
        ("model.layers.1.mlp.experts.2.down_proj.weight", &[8, 6], matrix),
    ])
}

#[track_caller]
fn refused<T>(result: Result<T>, words: &[&str]) {
    let error = result.err().unwrap().to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn nothing_changed_is_the_same_checkpoint() {
    for place in [Place::new(), Place::sharded()] {
        let written = place.write(&Parameters::default(), None).unwrap();
        let source = open_directory(&place.source()).unwrap().tensors().unwrap();
        assert_eq!(content(&place.tensors().unwrap()), content(&source));
        assert_eq!((written.was_finished, written.copied, written.changes.len()), (false, source.len(), 0));
        let (before, after) = (files(&place.source()), files(&place.output()));
        let names: Vec<&String> = before.keys().filter(|name| *name != "README.md").collect();
        assert_eq!(after.keys().collect::<Vec<_>>(), names);
        for name in names.iter().filter(|name| !name.ends_with(".safetensors")) {
            assert_eq!(before[*name], after[*name], "{name}");
        }
    }
}

#[test]
fn what_was_trained_is_replaced_and_the_rest_is_kept() {
    let place = Place::sharded();
    let written = place.write(&trained(), None).unwrap();
    let source = open_directory(&place.source()).unwrap().tensors().unwrap();
    let tensors = place.tensors().unwrap();
    for parameter in trained().iter() {
        let found = tensors.values(tensors.find(&parameter.name).unwrap()).unwrap();
        assert_eq!(found, parameter.values, "{}", parameter.name);
    }
    let others = |tensors: &TensorSet| {
        let of =
            |(name, ..): &(String, StoredType, Vec<usize>, Vec<u8>)| !trained().iter().any(|one| one.name == *name);
        content(tensors).into_iter().filter(of).collect::<Vec<_>>()
    };
    assert_eq!(others(&tensors), others(&source));
    assert_eq!((written.copied, written.changes.len()), (source.len() - 2, 2));

    let [norm, expert] = [Part::Norms, Part::Experts].map(|part| {
        let parts = written.parts();
        parts.into_iter().find(|found| found.part == part).unwrap()
    });
    assert_eq!((norm.tensors, norm.changed_tensors, norm.numbers, norm.changed), (1, 1, 8, 8));
    // Number i was (i + 1) / 64 and is i / 8: none is the same.
    assert_eq!((expert.tensors, expert.changed_tensors, expert.numbers, expert.changed), (1, 1, 48, 48));
    let squares = |value: &dyn Fn(f64) -> f64| (0..48).map(|i| value(f64::from(i)).powi(2)).sum::<f64>().sqrt();
    let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-12, "{found}, {expected}");
    close(expert.norms.weight(), squares(&|i| (i + 1.0) / 64.0));
    close(expert.norms.change(), squares(&|i| i / 8.0 - (i + 1.0) / 64.0));
    assert_eq!((expert.norms.rounding(), written.unchanged().count()), (0.0, 0));
}

#[test]
fn what_rounds_to_what_it_was_is_told() {
    let place = Place::new();
    let name = "lm_head.weight";
    let values = vec![0.5 + 0.5 / 1024.0; 88];
    let written = place.write(&parameters(&[(name, &[11, 8], values.clone())]), None).unwrap();
    assert_eq!(written.unchanged().collect::<Vec<_>>(), [name]);
    let norms = written.changes[0].norms;
    assert_eq!((written.changes[0].changed, norms.rounding()), (0, norms.change()));
    fs::remove_dir_all(place.output()).unwrap();
    let written = place.write(&parameters(&[(name, &[11, 8], values)]), Some(StoredType::F32)).unwrap();
    assert_eq!((written.unchanged().count(), written.changes[0].changed), (0, 88));
}

#[test]
fn another_type_is_for_all_tensors_and_said_in_config_and_index() {
    let place = Place::sharded();
    place.write(&trained(), Some(StoredType::F32)).unwrap();
    let (tensors, source) = (place.tensors().unwrap(), open_directory(&place.source()).unwrap().tensors().unwrap());
    let mut total = 0;
    for (index, info) in tensors.iter().enumerate() {
        assert_eq!(info.stored, Stored::Plain(StoredType::F32), "{}", info.name);
        total += info.bytes;
        if !trained().iter().any(|one| one.name == info.name) {
            assert_eq!(tensors.values(index).unwrap(), source.values(index).unwrap(), "{}", info.name);
        }
    }
    let text = |name: &str| serde_json::from_slice::<Value>(&files(&place.output())[name]).unwrap();
    assert_eq!(text(INDEX_FILE)["metadata"]["total_size"], json!(total));
    assert_eq!(text("config.json")["torch_dtype"], "float32");
    assert_eq!(text("config.json")["hidden_size"], 8);
}

#[test]
fn several_tensors_go_by_one_name() {
    let place = Place::new();
    let path = "model.layers.0.self_attn";
    let name = format!("{path}.q_norm+{path}.k_norm.weight");
    let values: Vec<f32> = (0..8).map(|i| i as f32).collect();
    place.write(&parameters(&[(&name, &[8], values.clone())]), None).unwrap();
    let tensors = place.tensors().unwrap();
    let found = ["q_norm", "k_norm"].map(|norm| {
        let index = tensors.find(&format!("{path}.{norm}.weight")).unwrap();
        tensors.values(index).unwrap()
    });
    assert_eq!(found.concat(), values);
}

#[test]
fn names_what_the_checkpoint_has_no_place_for() {
    let place = Place::new();
    let write = |name: &str, shape: &[usize]| {
        place.write(&parameters(&[(name, shape, vec![0.0; shape.iter().product()])]), None)
    };
    refused(write("model.layers.7.mlp.gate.weight", &[4, 8]), &["model.layers.7.mlp.gate.weight", "missing"]);
    refused(write("model.norm.weight", &[4]), &["model.norm.weight", "[4]", "[8]"]);
    refused(write("model.norm.weight", &[9]), &["model.norm.weight", "[9]", "[8]"]);
    let infinite = parameters(&[("model.norm.weight", &[8], vec![1e6; 8])]);
    refused(place.write(&infinite, Some(StoredType::F16)), &["model.norm.weight", "f16", "1000000"]);
    assert!(place.tensors().is_err(), "nothing looks whole");
}

#[test]
fn a_pack_is_refused() {
    let place = Place::new();
    let packed = place.directory.path().join("pack");
    let options = FormatOptions { format: None, experts: None, dense: None };
    let stop = AtomicBool::new(false);
    pack(&open_directory(&place.source()).unwrap(), &options, &packed, &Compute::new(1), &stop, &|_| {}).unwrap();
    fs::remove_dir_all(place.source()).unwrap();
    fs::rename(packed, place.source()).unwrap();
    refused(place.write(&trained(), None), &["found a pack", "give the one that it was made from"]);
    assert!(!place.output().exists());
}

/// Interrupted after any tensor it isn't taken for whole, nothing is left over, and the same call completes it.
#[test]
fn an_interrupted_one_is_gone_on_with() {
    for place in [Place::new(), Place::sharded()] {
        place.write(&trained(), None).unwrap();
        let whole = files(&place.output());
        let ends: Vec<u64> = open_directory(&place.source())
            .unwrap()
            .tensors()
            .unwrap()
            .iter()
            .scan(0, |end, info| {
                *end += info.bytes;
                Some(*end)
            })
            .collect();
        let (_, all_but_last) = ends.split_last().unwrap();
        for end in all_but_last {
            fs::remove_dir_all(place.output()).unwrap();
            assert!(matches!(place.write_until(&trained(), None, *end), Err(Error::Interrupted)), "{end}");
            assert!(place.tensors().is_err(), "{end}: half of it is taken for whole");
            assert!(!files(&place.output()).keys().any(|name| name.ends_with(UNFINISHED)), "{end}");
            // Killed, it would have left this.
            fs::write(place.output().join(format!("{SINGLE_FILE}{UNFINISHED}")), "half").unwrap();
            let left = format!("{}{UNFINISHED}", SHARDS[1]);
            fs::write(place.output().join(&left), "half").unwrap();
            let own = if place.source().join(SINGLE_FILE).exists() { &left } else { "model.safetensors.unfinished" };
            fs::remove_file(place.output().join(own)).unwrap();
            let written = place.write(&trained(), None).unwrap();
            assert!(!written.was_finished && written.changes.len() == 2, "the report is of the whole");
            assert!(files(&place.output()) == whole, "{end}");
        }
        let again = place.write(&trained(), None).unwrap();
        assert!(again.was_finished && again.changes.len() == 2);
        assert!(files(&place.output()) == whole);
    }
}

#[test]
fn nothing_is_written_over() {
    let place = Place::sharded();
    place.write(&trained(), None).unwrap();
    let whole = files(&place.output());
    let restored = || {
        fs::remove_dir_all(place.output()).unwrap();
        fs::create_dir(place.output()).unwrap();
        whole.iter().for_each(|(name, bytes)| fs::write(place.output().join(name), bytes).unwrap());
    };
    let in_the_way = |file: &str, parameters: &Parameters, words: &[&str]| {
        let before = files(&place.output());
        refused(place.write(parameters, None), &[&[file, "in the way", "give another --output"], words].concat());
        assert!(files(&place.output()) == before, "{file}");
    };
    // Other numbers in the second shard, which is found out before anything is written.
    let mut others = trained();
    others.iter_mut().last().unwrap().values[5] += 1.0;
    in_the_way(SHARDS[1], &others, &["other numbers"]);
    // A shard that is cut off.
    let cut = &whole[SHARDS[0]][..whole[SHARDS[0]].len() - 1];
    fs::write(place.output().join(SHARDS[0]), cut).unwrap();
    in_the_way(SHARDS[0], &trained(), &["a part of it"]);
    for (name, text) in [("config.json", "{}"), ("adapter_config.json", "{}"), ("model.safetensors", "")] {
        restored();
        fs::write(place.output().join(name), text).unwrap();
        in_the_way(name, &trained(), &[]);
    }
    // Over itself.
    fs::remove_dir_all(place.output()).unwrap();
    fs::remove_file(place.source().join("README.md")).unwrap();
    fs::rename(place.source(), place.output()).unwrap();
    std::os::unix::fs::symlink(place.output(), place.source()).unwrap();
    in_the_way(".safetensors", &trained(), &[]);
}

/// The first shard is of the checkpoint as it was.
#[test]
fn a_source_that_changed_between_two_runs_is_noticed() {
    let place = Place::sharded();
    let first: u64 = {
        let tensors = open_directory(&place.source()).unwrap().tensors().unwrap();
        let of_first = (0..tensors.len()).filter(|index| tensors.extent(*index).0 == 0);
        of_first.map(|index| tensors.info(index).bytes).sum()
    };
    assert!(matches!(place.write_until(&trained(), None, first + 1), Err(Error::Interrupted)));
    assert!(place.output().join(SHARDS[0]).exists() && !place.output().join(SHARDS[1]).exists());
    let path = place.source().join(SHARDS[0]);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    refused(place.write(&trained(), None), &[SHARDS[0], "in the way", "other numbers"]);
    assert!(place.tensors().is_err());
}

#[test]
fn a_source_that_is_cut_off_is_refused() {
    let place = Place::new();
    let path = place.source().join(SINGLE_FILE);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    refused(place.write(&trained(), None), &[SINGLE_FILE, "cut off"]);
}

#[test]
fn progress_ends_at_all_bytes() {
    let place = Place::sharded();
    let (stop, told) = (AtomicBool::new(false), AtomicU64::new(0));
    let on_bytes = |progress: LoadProgress| {
        assert!(progress.done_bytes <= progress.total_bytes);
        told.store(progress.done_bytes, Ordering::Relaxed);
    };
    let rewriting = Rewriting { output: &place.output(), dtype: None, stop: &stop, on_bytes: &on_bytes };
    write_checkpoint(&open_directory(&place.source()).unwrap(), &trained(), &rewriting).unwrap();
    let tensors = place.tensors().unwrap();
    assert_eq!(told.into_inner(), tensors.iter().map(|info| info.bytes).sum::<u64>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What is stored is the nearest number of the type, and read back it is that.
    #[test]
    fn trained_weights_come_back_rounded_once(
        values in prop::collection::vec(-4.0_f32..4.0, 88),
        dtype in prop::sample::select(vec![None, Some(StoredType::F32), Some(StoredType::F16), Some(StoredType::Bf16)]),
    ) {
        let place = Place::new();
        place.write(&parameters(&[("lm_head.weight", &[11, 8], values.clone())]), dtype).unwrap();
        let tensors = place.tensors().unwrap();
        let found = tensors.values(tensors.find("lm_head.weight").unwrap()).unwrap();
        for (value, found) in values.iter().zip(found) {
            let expected = match dtype {
                Some(StoredType::F32) => *value,
                Some(StoredType::F16) => half::f16::from_f32(*value).to_f32(),
                None | Some(StoredType::Bf16) => half::bf16::from_f32(*value).to_f32(),
            };
            prop_assert_eq!(found, expected);
        }
    }
}

#[test]
fn a_tied_head_that_is_stored_all_the_same_follows_the_embedding() {
    for is_tied in [true, false] {
        let place = Place::new();
        let (mut config, tensors) = tiny("qwen3_moe");
        config["tie_word_embeddings"] = json!(is_tied);
        write_tiny(&place.source(), &config, &tensors);
        place.write(&parameters(&[("model.embed_tokens.weight", &[11, 8], vec![2.0; 88])]), None).unwrap();
        let written = place.tensors().unwrap();
        let values = |name: &str| written.values(written.find(name).unwrap()).unwrap();
        assert_eq!(values("model.embed_tokens.weight"), [2.0; 88]);
        assert_eq!(values("lm_head.weight") == [2.0; 88], is_tied);
    }
}
