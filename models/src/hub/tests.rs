//! Downloads against a small server that speaks the hub's paths.

mod server;

use std::{cell::RefCell, path::Path};

use super::*;
use crate::testing::{TensorFile, index_json};
use server::{Answer, Server};

const MODEL: &str = "some-org/Small_Model-1.0";

fn settings(endpoint: &str, home: &Path) -> HubSettings {
    HubSettings { endpoint: endpoint.to_owned(), cache: home.join("hub"), token: None, offline: false }
}

fn weights(value: f32) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let values = vec![value; 40_000];
    TensorFile::default().f32("w", &[values.len()], &values).write(file.path());
    fs::read(file.path()).unwrap()
}

/// A repository with what a checkpoint needs, and more.
fn repository() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("README.md", b"# A model".to_vec()),
        ("config.json", br#"{"model_type": "qwen3_moe"}"#.to_vec()),
        ("generation_config.json", b"{}".to_vec()),
        ("model.safetensors", weights(1.0)),
        ("pytorch_model.bin", b"pickle".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("tokenizer.model", b"proto".to_vec()),
        ("tokenizer_config.json", b"{}".to_vec()),
        ("onnx/model.safetensors", b"other".to_vec()),
        ("chat_template.jinja", b"{{ messages }}".to_vec()),
    ]
}

fn fetch_with(settings: &HubSettings) -> Result<PathBuf> {
    fetch(settings, MODEL, &|_| Ok(()), &|_| {})
}

#[test]
fn ids_have_a_shape() {
    for id in ["inclusionAI/Ling-lite", "Qwen/Qwen3-30B-A3B", "a/b.c_d-e"] {
        assert!(is_hub_id(id), "{id}");
    }
    for id in ["gpt2", "a/b/c", "/a", "a/", "../a", "a/..", "./a", "a b/c", "a/b?c", "~/a", "a/b..c", "http://x/y", ""]
    {
        assert!(!is_hub_id(id), "{id}");
    }
}

#[test]
fn downloads_what_a_checkpoint_needs_once() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(MODEL, "c0ffee", repository());
    let settings = settings(server.address(), home.path());
    let told = RefCell::new(Vec::new());
    let on_download = |progress: DownloadProgress<'_>| {
        told.borrow_mut().push((progress.file.to_owned(), progress.done_bytes, progress.total_bytes));
    };
    let directory = fetch(&settings, MODEL, &|_| Ok(()), &on_download).unwrap();

    let mut names: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let expected = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    assert_eq!(fs::read(directory.join("model.safetensors")).unwrap(), weights(1.0));
    let size = weights(1.0).len() as u64;
    assert!(told.borrow().contains(&("model.safetensors".to_owned(), size, size)));
    assert!(told.borrow().iter().all(|(_, done, total)| done <= total));

    // The second time, only the listing is asked for; without the hub, nothing.
    server.requests();
    assert_eq!(fetch_with(&settings).unwrap(), directory);
    assert_eq!(server.requests(), [format!("/api/models/{MODEL}/revision/main")]);
    server.stop();
    assert_eq!(fetch_with(&settings).unwrap(), directory);
    assert_eq!(fetch_with(&HubSettings { offline: true, ..settings }).unwrap(), directory);
}

#[test]
fn downloads_the_shards_that_the_index_names() {
    let home = tempfile::tempdir().unwrap();
    let mut files = repository();
    files.retain(|(name, _)| *name != "model.safetensors");
    let index = index_json(&[("a", "model-1.safetensors"), ("b", "model-2.safetensors")]);
    files.push(("model.safetensors.index.json", index.into_bytes()));
    files.push(("model-1.safetensors", weights(1.0)));
    files.push(("model-2.safetensors", weights(2.0)));
    files.push(("model-3.safetensors", weights(3.0)));
    let server = Server::start(MODEL, "c0ffee", files);
    let directory = fetch_with(&settings(server.address(), home.path())).unwrap();
    assert_eq!(fs::read(directory.join("model-2.safetensors")).unwrap(), weights(2.0));
    assert!(!directory.join("model-3.safetensors").exists());
}

#[test]
fn a_private_model_needs_the_token() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(MODEL, "c0ffee", repository());
    server
        .answer(|request| (request.authorization.as_deref() != Some("Bearer hf_good")).then_some(Answer::Status(401)));
    let without = settings(server.address(), home.path());
    let error = fetch_with(&without).unwrap_err().to_string();
    assert!(error.contains("401") && error.contains("HF_TOKEN") && error.contains(MODEL), "{error}");
    let wrong = HubSettings { token: Some("hf_bad".to_owned()), ..without.clone() };
    assert!(matches!(fetch_with(&wrong), Err(Error::HubRefused { status: 401, .. })));
    fetch_with(&HubSettings { token: Some("hf_good".to_owned()), ..without.clone() }).unwrap();
    // A token saved by `hf auth login` serves as well.
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("token"), "hf_good\n").unwrap();
    fetch_with(&settings(server.address(), home.path())).unwrap();
}

#[test]
fn a_model_that_is_not_there_is_named() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start("other-org/other", "c0ffee", repository());
    let error = fetch_with(&settings(server.address(), home.path())).unwrap_err().to_string();
    assert!(error.contains("404") && error.contains(MODEL) && error.contains(server.address()), "{error}");
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let home = tempfile::tempdir().unwrap();
    let files = repository().into_iter().filter(|(name, _)| *name != "model.safetensors").collect();
    let server = Server::start(MODEL, "c0ffee", files);
    let error = fetch_with(&settings(server.address(), home.path())).unwrap_err().to_string();
    assert!(error.contains("404") && error.contains("model.safetensors.index.json"), "{error}");
}

#[test]
fn no_network_and_no_copy_is_said() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(MODEL, "c0ffee", repository());
    let settings = settings(server.address(), home.path());
    server.stop();
    let error = fetch_with(&settings).unwrap_err().to_string();
    assert!(error.contains("cannot be reached") && error.contains("check the network"), "{error}");
    let offline = HubSettings { offline: true, ..settings };
    let error = fetch_with(&offline).unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE is set") && error.contains(MODEL), "{error}");
}

#[test]
fn a_hub_in_trouble_does_not_hinder_a_cached_model() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(MODEL, "c0ffee", repository());
    let settings = settings(server.address(), home.path());
    let directory = fetch_with(&settings).unwrap();
    for status in [429, 500, 503] {
        server.answer(move |_| Some(Answer::Status(status)));
        assert_eq!(fetch_with(&settings).unwrap(), directory);
    }
}

#[test]
fn a_refused_configuration_costs_no_download() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(MODEL, "c0ffee", repository());
    let settings = settings(server.address(), home.path());
    let accept = |_: &Files| Err(Error::UnknownModel { model: "no".to_owned() });
    assert!(matches!(fetch(&settings, MODEL, &accept, &|_| {}), Err(Error::UnknownModel { .. })));
    assert!(!server.requests().iter().any(|path| path.ends_with("safetensors")));
}

#[test]
fn a_broken_transfer_is_resumed() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(MODEL, "c0ffee", repository());
    let cut = std::sync::atomic::AtomicBool::new(false);
    server.answer(move |request| {
        let first = request.range == Some((0, None))
            && request.path.starts_with("/cdn/")
            && !cut.swap(true, std::sync::atomic::Ordering::Relaxed);
        first.then_some(Answer::CutAfter(70_000))
    });
    let directory = fetch_with(&settings(server.address(), home.path())).unwrap();
    assert_eq!(fs::read(directory.join("model.safetensors")).unwrap(), weights(1.0));
    assert!(server.ranges().iter().any(|(_, (start, _))| *start > 0), "it began again instead");
}

#[test]
fn what_an_interrupted_download_left_is_used_or_removed() {
    let server = Server::start(MODEL, "c0ffee", repository());
    for (left, expected_ranges) in
        [(weights(1.0), 0), ([weights(1.0), vec![0]].concat(), 1), (weights(1.0)[..9].to_vec(), 1)]
    {
        let home = tempfile::tempdir().unwrap();
        let settings = settings(server.address(), home.path());
        let blobs = Hub::new(&settings, MODEL).unwrap().branch.blob_path("x").parent().unwrap().to_owned();
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(server.etag("model.safetensors")).with_extension("part"), left).unwrap();
        let before = server.ranges().len();
        let directory = fetch_with(&settings).unwrap();
        assert_eq!(fs::read(directory.join("model.safetensors")).unwrap(), weights(1.0));
        let large = |(path, (_, end)): &(String, (usize, Option<usize>))| path.starts_with("/cdn") && end.is_none();
        assert_eq!(server.ranges()[before..].iter().filter(|range| large(range)).count(), expected_ranges);
    }
}

#[test]
fn a_half_downloaded_model_is_not_taken_for_whole() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(MODEL, "c0ffee", repository());
    let settings = settings(server.address(), home.path());
    server.answer(|request| request.path.ends_with("model.safetensors").then_some(Answer::Status(404)));
    assert!(matches!(fetch_with(&settings), Err(Error::HubNotFound { .. })));
    server.stop();
    assert!(matches!(fetch_with(&settings), Err(Error::HubUnreachable { .. })));
}

#[test]
fn a_new_commit_fetches_only_what_changed() {
    let home = tempfile::tempdir().unwrap();
    let first = Server::start(MODEL, "c0ffee", repository());
    let old = fetch_with(&settings(first.address(), home.path())).unwrap();
    let mut files = repository();
    files[2].1 = br#"{"temperature": 0.5}"#.to_vec();
    let second = Server::start(MODEL, "deadbeef", files);
    let new = fetch_with(&settings(second.address(), home.path())).unwrap();
    assert_ne!(old, new);
    assert_eq!(fs::read(new.join("generation_config.json")).unwrap(), br#"{"temperature": 0.5}"#);
    assert_eq!(fs::read(new.join("model.safetensors")).unwrap(), weights(1.0));
    let whole: Vec<_> = second.ranges().into_iter().filter(|(_, (_, end))| end.is_none()).collect();
    assert!(matches!(&whole[..], [(path, _)] if path.ends_with("generation_config.json")), "{whole:?}");
}

#[test]
fn names_that_lead_out_of_the_cache_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let server = Server::start(MODEL, "../../x", repository());
    let error = fetch_with(&settings(server.address(), home.path())).unwrap_err().to_string();
    assert!(error.contains("names the commit"), "{error}");
    let server = Server::start(MODEL, "c0ffee", repository());
    server.etags("../../../x");
    let error = fetch_with(&settings(server.address(), home.path())).unwrap_err().to_string();
    assert!(error.contains("names the content"), "{error}");
}
