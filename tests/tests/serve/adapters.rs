//! LoRA adapters beside the base model: in one batch, by name, loaded and unloaded while the server runs.

use std::{fs, path::Path};

use cadre_tests::{
    adapter::{Adapts, write},
    binary::{output, run},
    client::Transcript,
    server::{MODEL, Server, chat_body, merge},
    wait_for,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::concurrency::QUESTIONS;

/// Two adapters, of different modules.
fn adapters() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("one"), Adapts::Attention, 1);
    write(&folder.path().join("two"), Adapts::Experts, 2);
    folder
}

fn flag(folder: &TempDir, name: &str) -> String {
    format!("{name}={}", folder.path().join(name).display())
}

/// Questions to the base model and both adapters in turn, with equal beginnings among them.
fn requests() -> Vec<Value> {
    let body = |index: usize| {
        let (model, index) = ([MODEL, "one", "two"][index % 3], index / 3);
        let draws = if index % 2 == 0 { json!({}) } else { json!({"temperature": 1.0, "seed": index}) };
        let more = json!({"model": model, "ignore_eos": true, "max_tokens": 12 + index % 5, "stream": true});
        chat_body(&QUESTIONS[index % QUESTIONS.len()].repeat(1 + index / 4), merge(more, draws))
    };
    (0..24).map(body).collect()
}

fn ask(server: &Server, body: &Value) -> Transcript {
    let transcript: Transcript = server.client().events("/v1/chat/completions", body).collect();
    assert!(transcript.done && transcript.error().is_none(), "{transcript:?}");
    assert!(transcript.chunks.iter().all(|chunk| chunk["model"] == body["model"]), "{transcript:?}");
    transcript
}

#[test]
fn two_adapters_and_none_share_steps_and_get_what_they_get_alone() {
    let folder = adapters();
    let flags = [flag(&folder, "one"), flag(&folder, "two")];
    let requests = requests();
    let slow = ["--threads", "1", "--no-prefix-caching", "--max-num-seqs", "1"];
    let plain = Server::start(&slow);
    let adapted = Server::start(&[&slow[..], &["--adapter", &flags[0], "--adapter", &flags[1]]].concat());
    let alone: Vec<_> = requests
        .iter()
        .map(|body| if body["model"] == MODEL { ask(&plain, body) } else { ask(&adapted, body) }.text())
        .collect();
    let differ = alone.chunks_exact(3).filter(|texts| texts[0] != texts[1] && texts[1] != texts[2]).count();
    assert!(differ >= 6, "adapters change what the model says: {alone:?}");
    for budget in ["7", "512"] {
        // vLLM's flag takes both at once.
        let modules = ["--lora-modules", &flags[0], &flags[1]];
        let server = Server::start(&[&["--threads", "2", "--max-num-batched-tokens", budget], &modules[..]].concat());
        for round in 0..2 {
            let together: Vec<_> = std::thread::scope(|scope| {
                let clients: Vec<_> = requests.iter().map(|body| scope.spawn(|| ask(&server, body).text())).collect();
                clients.into_iter().map(|client| client.join().unwrap()).collect()
            });
            assert_eq!(together, alone, "{budget} tokens a step, round {round}");
        }
        server.wait_until_idle();
        let metrics = server.metrics();
        assert!(metrics.value("vllm:prefix_cache_hits_total", &[]) > 0.0, "the second round finds the first one's");
        assert!(metrics.value("cadre_memory_bytes", &[("pool", "adapters")]) > 1e5, "{}", metrics.text());
    }
}

#[test]
fn adapters_are_listed_as_models() {
    let folder = adapters();
    let server = Server::start(&["--adapter", &flag(&folder, "one")]);
    let models = server.client().get("/v1/models").ok();
    let cards = models["data"].as_array().unwrap();
    let root = folder.path().join("one").display().to_string();
    assert_eq!((cards.len(), &cards[0]["id"], &cards[0]["parent"]), (2, &json!(MODEL), &Value::Null));
    assert_eq!((&cards[1]["id"], &cards[1]["root"], &cards[1]["parent"]), (&json!("one"), &json!(root), &json!(MODEL)));
    assert_eq!(server.client().get("/v1/models/one").ok(), cards[1]);
    let answer = server.complete("The garden", json!({"model": "one", "max_tokens": 3})).ok();
    assert_eq!(answer["model"], "one");
    assert_eq!(server.complete("The garden", json!({"model": "two"})).status, 404);
    // Without the flag for it there are no such routes.
    let body = json!({"lora_name": "two", "lora_path": "two"});
    for path in ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        let answer = server.client().post(path, &body);
        assert_eq!((answer.status, &answer.json()["error"]["code"]), (404, &json!("unknown_url")));
    }
}

/// The answer's status, and its text or its error's message.
fn told(server: &Server, path: &str, body: Value) -> (u16, String) {
    let answer = server.client().post(path, &body);
    let message = || answer.json()["error"]["message"].as_str().unwrap().to_owned();
    (answer.status, if answer.status == 200 { answer.text.clone() } else { message() })
}

pub(super) fn load(server: &Server, name: &str, path: &str) -> (u16, String) {
    told(server, "/v1/load_lora_adapter", json!({"lora_name": name, "lora_path": path}))
}

fn unload(server: &Server, name: &str) -> (u16, String) {
    told(server, "/v1/unload_lora_adapter", json!({"lora_name": name}))
}

#[test]
fn adapters_come_and_go_while_the_server_runs() {
    let folder = adapters();
    let server = Server::start(&["--allow-runtime-adapters", folder.path().to_str().unwrap()]);
    let say =
        |model: &str| server.complete("The garden", json!({"model": model, "max_tokens": 20, "ignore_eos": true}));
    let text = |model: &str| say(model).ok()["choices"][0]["text"].clone();
    assert_eq!(say("mine").status, 404);
    assert_eq!(load(&server, "mine", "one"), (200, "Success: LoRA adapter 'mine' added successfully.".to_owned()));
    let one = text("mine");
    assert_ne!(one, text(MODEL));
    let (status, message) = load(&server, "mine", "two");
    assert!(status == 400 && message.contains("`mine`"), "{message}");
    let in_place = json!({"lora_name": "mine", "lora_path": folder.path().join("two"), "load_inplace": true});
    assert_eq!(told(&server, "/v1/load_lora_adapter", in_place).0, 200);
    // Another adapter of the same name: nothing of the former one's keys and values is used.
    let two = text("mine");
    assert_ne!(one, two);
    assert_eq!(load(&server, "again", "./two").0, 200);
    assert_eq!(text("again"), two);

    // A request under way keeps its adapter.
    let long = json!({"model": "mine", "max_tokens": 900, "ignore_eos": true, "stream": true});
    let body = chat_body("Hello", long);
    let mut events = server.client().events("/v1/chat/completions", &body);
    let first = events.next().unwrap();
    let running = [("running_lora_adapters", "mine")];
    wait_for("the gauge", 20, || server.metrics().value("vllm:lora_requests_info", &running) > 1e9);
    assert_eq!(unload(&server, "mine"), (200, "Success: LoRA adapter 'mine' removed successfully.".to_owned()));
    assert_eq!(say("mine").status, 404);
    let cut: Transcript = std::iter::once(first).chain(events).collect();
    assert_eq!((cut.done, cut.finish_reason()), (true, Some("length")));
    let whole = json!({"model": "again", "max_tokens": 900, "ignore_eos": true, "stream": true});
    assert_eq!(cut.text(), ask(&server, &chat_body("Hello", whole)).text());
    let (status, message) = unload(&server, "mine");
    assert!(status == 404 && message.contains("'mine'"), "{message}");
}

#[test]
fn adapters_that_come_and_go_keep_within_their_memory() {
    const COUNT: u64 = 6;
    let folder = tempfile::tempdir().unwrap();
    for seed in 0..COUNT {
        write(&folder.path().join(seed.to_string()), Adapts::Experts, seed);
    }
    write(&folder.path().join("other"), Adapts::Attention, 9);
    let allowed = ["--allow-runtime-adapters", folder.path().to_str().unwrap()];
    let say = |server: &Server, model: &str| {
        let answer = server.complete("The garden", json!({"model": model, "max_tokens": 12, "ignore_eos": true}));
        answer.ok()["choices"][0]["text"].clone()
    };
    let bytes = |server: &Server| server.metrics().value("cadre_memory_bytes", &[("pool", "adapters")]);
    let unlimited = Server::start(&allowed);
    let names: Vec<String> = (0..COUNT).map(|seed| format!("adapter-{seed}")).collect();
    let load_all = |server: &Server| {
        names.iter().enumerate().for_each(|(seed, name)| assert_eq!(load(server, name, &seed.to_string()).0, 200));
    };
    load_all(&unlimited);
    let all = bytes(&unlimited);
    let room = (all / COUNT as f64 * 2.5) as u64;
    let server = Server::start(&[&allowed[..], &["--adapter-memory", &room.to_string()]].concat());
    load_all(&server);
    for round in 0..2 {
        for name in &names {
            assert_eq!(say(&server, name), say(&unlimited, name), "{name}, round {round}");
            server.wait_until_idle();
            assert!(bytes(&server) <= room as f64 && bytes(&server) > 0.0, "{} of {room}", bytes(&server));
        }
    }
    assert_eq!(server.client().get("/v1/models").ok()["data"].as_array().unwrap().len(), 1 + names.len());
    // One that all the memory doesn't hold is refused, and the others are none the worse for it.
    let small = Server::start(&[&allowed[..], &["--adapter-memory", &(room / 5).to_string()]].concat());
    assert_eq!(load(&small, "other", "other").0, 200);
    let (status, message) = load(&small, "large", "0");
    assert!(status == 400 && message.contains("--adapter-memory"), "{message}");
    assert_eq!(say(&small, "other"), {
        load(&unlimited, "other", "other");
        say(&unlimited, "other")
    });
}

#[test]
fn adapters_are_loaded_from_below_one_folder_only() {
    let folder = adapters();
    let (allowed, outside) = (folder.path().join("allowed"), folder.path().join("one"));
    write(&allowed.join("fine"), Adapts::Attention, 3);
    std::os::unix::fs::symlink(&outside, allowed.join("link")).unwrap();
    std::os::unix::fs::symlink("fine", allowed.join("within")).unwrap();
    let half = allowed.join("half");
    fs::create_dir(&half).unwrap();
    fs::copy(outside.join("adapter_config.json"), half.join("adapter_config.json")).unwrap();
    std::os::unix::fs::symlink(outside.join("adapter_model.safetensors"), half.join("adapter_model.safetensors"))
        .unwrap();
    fs::create_dir(allowed.join("empty")).unwrap();
    let server = Server::start(&["--allow-runtime-adapters", allowed.to_str().unwrap()]);
    let absent = folder.path().join("absent");
    for path in ["../one", "fine/../../one", outside.to_str().unwrap(), absent.to_str().unwrap(), "link", "half", "/"] {
        let (status, message) = load(&server, "mine", path);
        assert!(status == 400 && message.contains("is not below the folder"), "{path}: {status} {message}");
    }
    for path in ["absent", "empty", "."] {
        let (status, message) = load(&server, "mine", path);
        assert!(status == 404 && message.contains("adapter"), "{path}: {status} {message}");
    }
    for (body, field) in [(json!({"lora_name": "mine"}), "lora_path"), (json!({"lora_path": "fine"}), "lora_name")] {
        let (status, message) = told(&server, "/v1/load_lora_adapter", body);
        assert!(status == 400 && message.contains(field), "{message}");
    }
    for name in [MODEL, "", "a,b", "a/b", "a\nb"] {
        assert_eq!(load(&server, name, "fine").0, 400, "{name}");
    }
    fs::write(allowed.join("fine/adapter_config.json"), "{}").unwrap();
    let (status, message) = load(&server, "mine", "fine");
    assert!(status == 400 && message.contains("adapter_config.json"), "{message}");
    write(&allowed.join("fine"), Adapts::Attention, 3);
    assert_eq!(load(&server, "mine", "within").0, 200);
    assert_eq!(server.client().get("/v1/models").ok()["data"].as_array().unwrap().len(), 2);
}

/// What a server says that doesn't start.
#[track_caller]
fn refused(flags: &[&str]) -> String {
    let run = run(&[&["serve", "--port", "0"], flags].concat());
    assert_eq!(run.code, Some(1), "{flags:?}: {}", run.stderr);
    run.stderr
}

#[test]
fn what_cannot_be_served_is_said_at_the_start() {
    let folder = adapters();
    let one = flag(&folder, "one");
    let message = refused(&["--adapter", &one, "--adapter", &one]);
    assert!(message.contains("`one`") && message.contains("already"), "{message}");
    let message = refused(&["--served-model-name", "one", "--adapter", &one]);
    assert!(message.contains("base model's name"), "{message}");
    let message = refused(&["--adapter", "lost=/nowhere/at/all"]);
    assert!(message.contains("--adapter") && message.contains("/nowhere/at/all"), "{message}");
    let message = refused(&["--allow-runtime-adapters", "/nowhere/at/all"]);
    assert!(message.contains("--allow-runtime-adapters /nowhere/at/all"), "{message}");
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/finetune/adapters/olmoe-fused");
    let message = refused(&["--adapter", &format!("other={}", other.display())]);
    assert!(message.contains("adapter_model.safetensors"), "{message}");
    let malformed = run(&["serve", "--adapter", "one"]);
    assert!(malformed.stderr.contains("expected NAME=DIR"), "{}", malformed.stderr);
}

#[test]
fn generate_says_what_the_server_says_of_an_adapter() {
    let folder = adapters();
    let server = Server::start(&["--adapter", &flag(&folder, "two")]);
    let expected = server.complete("The garden is", json!({"model": "two", "max_tokens": 12})).ok();
    let directory = folder.path().join("two");
    let prompt = ["generate", "--raw", "--prompt", "The garden is", "--max-tokens", "12"];
    let said = output(&[&prompt[..], &["--adapter", directory.to_str().unwrap()]].concat());
    assert_eq!(said.strip_suffix('\n'), expected["choices"][0]["text"].as_str());
    assert_ne!(said, output(&prompt));
}
