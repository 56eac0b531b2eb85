//! Fine-tuning jobs: on the weights that are served, beside requests, through kills and restarts.

use std::{fs, path::Path, time::Duration};

use cadre_tests::{
    binary::{output, run},
    checkpoint::Qwen3Moe,
    client::{Answer, Client},
    server::{MODEL, Server},
    wait_for,
};
use serde_json::{Value, json};

/// A server that keeps jobs in `storage`.
fn start(storage: &Path) -> Server {
    Server::start(&["--storage", storage.to_str().unwrap()])
}

/// Uploads chats that ask to write words backwards; the file's id.
fn upload(client: &Client, examples: usize) -> String {
    let words = ["stone", "river", "cloud", "maple", "tiger", "ocean", "candle", "silver", "garden", "pepper"];
    let line = |index: usize| {
        let word = format!("{}{}", words[index % 10], words[index / 10 % 10]);
        let back: String = word.chars().rev().collect();
        let (question, answer) =
            (json!({"role": "user", "content": word}), json!({"role": "assistant", "content": back}));
        json!({"messages": [question, answer]}).to_string() + "\n"
    };
    upload_text(client, &(0..examples).map(line).collect::<String>())
}

fn upload_text(client: &Client, text: &str) -> String {
    post_file(client, "fine-tune", text, &[]).ok()["id"].as_str().unwrap().to_owned()
}

/// Uploads a file, with further fields of the form.
pub fn post_file(client: &Client, purpose: &str, text: &str, more: &[(&str, &str)]) -> Answer {
    let field = |name: &str, value: &str| {
        format!("--edge\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
    };
    let more: String = more.iter().map(|(name, value)| field(name, value)).collect();
    let body = field("purpose", purpose) + &more + &field("file\"; filename=\"train.jsonl", text) + "--edge--\r\n";
    client.post_bytes("/v1/files", "multipart/form-data; boundary=edge", body.as_bytes())
}

fn create(client: &Client, file: &str, hyperparameters: Value) -> String {
    let method = json!({"type": "supervised", "supervised": {"hyperparameters": hyperparameters}});
    let body = json!({"model": MODEL, "training_file": file, "seed": 1, "method": method});
    client.post("/v1/fine_tuning/jobs", &body).ok()["id"].as_str().unwrap().to_owned()
}

fn job(client: &Client, id: &str) -> Value {
    client.get(&format!("/v1/fine_tuning/jobs/{id}")).ok()
}

/// Waits until a job is what it should become, and fails if it ends otherwise.
#[track_caller]
fn wait_until(client: &Client, id: &str, status: &str) -> Value {
    wait_for(status, 120, || {
        let found = job(client, id);
        let ended = ["succeeded", "failed", "cancelled"].contains(&found["status"].as_str().unwrap());
        assert!(!ended || found["status"] == status, "{found}");
        found["status"] == status
    });
    job(client, id)
}

/// All rows of a list, page by page.
fn all(client: &Client, path: &str) -> Vec<Value> {
    let (mut rows, mut after): (Vec<Value>, _) = (Vec::new(), String::new());
    loop {
        let page = client.get(&format!("{path}?limit=3{after}")).ok();
        rows.extend(page["data"].as_array().unwrap().clone());
        if page["has_more"] == false {
            return rows;
        }
        after = format!("&after={}", page["last_id"].as_str().unwrap());
    }
}

fn models(client: &Client) -> Vec<String> {
    let list = client.get("/v1/models").ok();
    list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
}

/// The steps that events tell of, the first one first.
fn told_steps(client: &Client, id: &str) -> Vec<u64> {
    let events = all(client, &format!("/v1/fine_tuning/jobs/{id}/events"));
    let steps = events.iter().rev().filter(|event| event["data"].get("train_loss").is_some());
    steps.map(|event| event["data"]["step"].as_u64().unwrap()).collect()
}

const TEN_STEPS: fn() -> Value = || json!({"max_steps": 10, "batch_size": 4, "rank": 2, "learning_rate": 1e-3});

#[test]
fn a_job_s_model_is_served_at_once_and_after_a_restart_until_it_is_deleted() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let file = upload(client, 12);
    let body = json!({"model": MODEL, "training_file": file, "validation_file": file, "suffix": "back", "hyperparameters":
        {"n_epochs": 4, "learning_rate_multiplier": 40}, "metadata": {"team": "a"}});
    let id = client.post("/v1/fine_tuning/jobs", &body).ok()["id"].as_str().unwrap().to_owned();
    let done = wait_until(client, &id, "succeeded");
    let model = done["fine_tuned_model"].as_str().unwrap().to_owned();
    assert_eq!(model, format!("ft:{MODEL}:cadre:back:{}", id.trim_start_matches("ftjob-")));
    assert!(done["trained_tokens"].as_u64().unwrap() > 100 && done["finished_at"].is_u64());
    assert_eq!(told_steps(client, &id), (1..=12).collect::<Vec<_>>());
    let checkpoints = all(client, &format!("/v1/fine_tuning/jobs/{id}/checkpoints"));
    let steps: Vec<&Value> = checkpoints.iter().map(|one| &one["step_number"]).collect();
    assert_eq!(steps, [12, 9, 6], "one an epoch, the latest three");
    assert!(
        checkpoints[0]["metrics"]["full_valid_loss"].as_f64() < checkpoints[2]["metrics"]["full_valid_loss"].as_f64()
    );
    let results = done["result_files"][0].as_str().unwrap();
    let csv = client.get(&format!("/v1/files/{results}/content")).text;
    assert!(csv.starts_with("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n1,"), "{csv}");

    let ask = |server: &Server, model: &str| {
        let answer = server.chat("stonestone", json!({"model": model, "temperature": 0, "max_tokens": 16})).ok();
        answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let (base, tuned) = (ask(&server, MODEL), ask(&server, &model));
    assert_ne!(base, tuned);
    let checkpoint = checkpoints[0]["fine_tuned_model_checkpoint"].as_str().unwrap();
    assert_eq!(ask(&server, checkpoint), tuned, "the last checkpoint is the model");
    assert_eq!(models(client).len(), 1 + 3 + 1);
    wait_for("the count of jobs, which follows them", 20, || {
        server.metrics().value("cadre_finetune_jobs", &[("status", "succeeded")]) == 1.0
    });
    drop(server);

    let server = start(storage.path());
    assert_eq!(ask(&server, &model), tuned);
    let client = server.client();
    assert_eq!(client.delete(&format!("/v1/models/{model}")).ok()["deleted"], true);
    assert_eq!(models(client), [MODEL]);
    assert_eq!(client.delete(&format!("/v1/models/{model}")).status, 404);
    assert_eq!(client.delete(&format!("/v1/files/{file}")).ok()["deleted"], true);
}

#[test]
fn a_job_of_a_killed_server_ends_with_the_same_adapter() {
    let adapter =
        |storage: &Path, id: &str| fs::read(storage.join("jobs").join(id).join("adapter_model.safetensors")).unwrap();
    let settings = || json!({"max_steps": 40, "batch_size": 4, "rank": 2, "learning_rate": 1e-3});
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = start(whole.path());
    let unbroken = create(server.client(), &upload(server.client(), 20), settings());
    wait_until(server.client(), &unbroken, "succeeded");

    let mut server = start(broken.path());
    let id = create(server.client(), &upload(server.client(), 20), settings());
    for steps in [7, 18, 29] {
        wait_for("some steps", 120, || told_steps(server.client(), &id).len() >= steps);
        // It is killed.
        drop(server);
        server = start(broken.path());
    }
    let done = wait_until(server.client(), &id, "succeeded");
    assert!(adapter(whole.path(), &unbroken) == adapter(broken.path(), &id));
    assert_eq!(told_steps(server.client(), &id), (1..=40).collect::<Vec<_>>());
    assert_eq!(done["trained_tokens"], job_tokens(whole.path(), &unbroken));
}

/// The tokens of a job, by its log.
fn job_tokens(storage: &Path, id: &str) -> u64 {
    let log = fs::read_to_string(storage.join("jobs").join(id).join("train_log.jsonl")).unwrap();
    let line = |line: &str| serde_json::from_str::<Value>(line).unwrap()["tokens"].as_u64().unwrap_or(0);
    log.lines().map(line).sum()
}

#[test]
fn a_server_that_is_told_to_end_saves_its_job() {
    let storage = tempfile::tempdir().unwrap();
    let mut server = start(storage.path());
    let id = create(server.client(), &upload(server.client(), 8), json!({"max_steps": 100_000, "batch_size": 2}));
    wait_for("some steps", 120, || told_steps(server.client(), &id).len() >= 3);
    server.terminate();
    assert!(server.wait_for_exit(Duration::from_secs(15)).success());
    let made = fs::read_dir(storage.path().join("jobs").join(&id)).unwrap();
    let names: Vec<String> = made.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().any(|name| name.starts_with("checkpoint-") && !name.ends_with("unfinished")), "{names:?}");
    let server = start(storage.path());
    wait_until(server.client(), &id, "running");
}

#[test]
fn jobs_take_turns_and_can_be_paused_and_cancelled() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let file = upload(client, 8);
    let endless = create(client, &file, json!({"max_steps": 100_000, "batch_size": 2, "rank": 2}));
    let short = create(client, &file, TEN_STEPS());
    wait_until(client, &endless, "running");
    wait_until(client, &short, "queued");
    // Requests are answered meanwhile.
    server.chat("hello", json!({"max_tokens": 8})).ok();
    let change = |id: &str, verb: &str| client.post(&format!("/v1/fine_tuning/jobs/{id}/{verb}"), &json!({}));
    assert_eq!(client.delete(&format!("/v1/files/{file}")).status, 409);
    assert_eq!(change(&endless, "resume").status, 409, "it isn't paused");
    assert_eq!(change(&endless, "pause").ok()["paused"], true);
    wait_until(client, &short, "succeeded");
    let waiting = job(client, &endless);
    assert!(waiting["status"] == "queued" && waiting["paused"] == true, "{waiting}");
    assert_eq!(change(&endless, "pause").status, 409);
    let made = told_steps(client, &endless).len();
    assert_eq!(change(&endless, "resume").ok()["paused"], false);
    wait_for("further steps", 120, || told_steps(client, &endless).len() > made);
    assert_eq!(change(&endless, "cancel").ok()["status"], "cancelled");
    assert_eq!(change(&endless, "cancel").status, 409);
    let third = create(client, &file, TEN_STEPS());
    wait_until(client, &third, "succeeded");
    let listed = all(client, "/v1/fine_tuning/jobs");
    let listed: Vec<&str> = listed.iter().map(|job| job["id"].as_str().unwrap()).collect();
    assert_eq!(listed, [&third, &short, &endless]);
    for (verb, status) in [("cancel", 404), ("pause", 404), ("resume", 404)] {
        assert_eq!(change("ftjob-none", verb).status, status);
    }
}

#[test]
fn what_is_wrong_is_told_at_once_or_in_the_job() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let file = upload(client, 4);
    let refused = |body: Value, status: u16, param: &str, word: &str| {
        let answer = client.post("/v1/fine_tuning/jobs", &body);
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (status, &json!(param)), "{error}");
        assert!(error["message"].as_str().unwrap().contains(word), "{error}");
    };
    let with = |more: Value| {
        let mut body = json!({"model": MODEL, "training_file": file});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let tuned = |parameters: Value| {
        with(json!({"method": {"type": "supervised", "supervised": {"hyperparameters": parameters}}}))
    };
    let path = |name: &str| format!("method.supervised.hyperparameters.{name}");
    refused(json!({"model": MODEL}), 400, "training_file", "training_file");
    refused(json!({"training_file": file}), 400, "model", "model");
    refused(json!({"model": "gpt-4o", "training_file": file}), 404, "model", MODEL);
    refused(with(json!({"training_file": "file-none"})), 404, "training_file", "file-none");
    refused(with(json!({"validation_file": 3})), 400, "validation_file", "string");
    refused(with(json!({"suffix": "x".repeat(65)})), 400, "suffix", "64");
    refused(with(json!({"metadata": {"a": 1}})), 400, "metadata.a", "string");
    refused(with(json!({"method": {"type": "dpo"}})), 400, "method.type", "supervised");
    refused(with(json!({"method": {"dpo": {"hyperparameters": {}}}})), 400, "method.dpo", "supervised");
    refused(with(json!({"method": {"supervised": {"beta": 1}}})), 400, "method.supervised.beta", "hyperparameters");
    let twice = json!({"hyperparameters": {"n_epochs": 1}, "method": {"type": "supervised"}});
    refused(with(twice), 400, "hyperparameters", "method.supervised");
    refused(with(json!({"integrations": [{"type": "wandb"}]})), 400, "integrations", "leave it out");
    for suffix in ["a\nb", "a,b", "a/b"] {
        refused(with(json!({"suffix": suffix})), 400, "suffix", "comma");
    }
    for (parameters, name) in [
        (json!({"rank": 0}), "rank"),
        (json!({"rank": "x"}), "rank"),
        (json!({"n_epochs": "many"}), "n_epochs"),
        (json!({"learning_rate_multiplier": -1}), "learning_rate_multiplier"),
        (json!({"output": "/etc"}), "output"),
    ] {
        refused(tuned(parameters), 400, &path(name), name);
    }
    refused(with(json!({"hyperparameters": {"rank": 0}})), 400, "hyperparameters.rank", "rank");
    let ignored = client.post("/v1/fine_tuning/jobs", &with(json!({"temperature": 1, "hyperparameters": TEN_STEPS()})));
    assert_eq!((ignored.status, ignored.headers["x-cadre-ignored"].as_str()), (200, "temperature"));
    for list in ["/v1/files", "/v1/fine_tuning/jobs"] {
        for (query, param) in [("limit=-1", "limit"), ("limit=0", "limit"), ("after=none", "after")] {
            let answer = client.get(&format!("{list}?{query}"));
            assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!(param)), "{}", answer.text);
        }
    }

    let failed = |text: &str, hyperparameters: Value, words: &[&str]| {
        let id = create(client, &upload_text(client, text), hyperparameters);
        let error = wait_until(client, &id, "failed")["error"]["message"].as_str().unwrap().to_owned();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        let events = all(client, &format!("/v1/fine_tuning/jobs/{id}/events"));
        assert!(events[0]["level"] == "error" && events[0]["message"].as_str().unwrap().contains(&error));
    };
    failed("{\"text\": \"some words\"}\nnot json\n{\"messages\": []}\n", json!({}), &["2 lines", ":2:", ":3:"]);
    failed("\n", json!({}), &["is empty"]);
    failed("{\"text\": \"some words\"}\n", json!({"targets": ["q_proj"]}), &["q_proj", "query_key_value"]);
    failed("{\"text\": \"some words\"}\n", json!({"max_length": 100_000}), &["max_length"]);
    // The next one is none the worse for it.
    let id = create(client, &file, TEN_STEPS());
    wait_until(client, &id, "succeeded");
}

#[test]
fn files_are_kept_found_and_removed() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let [first, second] = ["one\n", "two\n"].map(|text| upload_text(client, text));
    let listed = |query: &str| {
        let list = client.get(&format!("/v1/files{query}")).ok();
        list["data"].as_array().unwrap().iter().map(|file| file["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(listed(""), [second.clone(), first.clone()]);
    assert_eq!(listed("?order=asc&limit=1"), std::slice::from_ref(&first));
    assert_eq!(listed("?purpose=batch"), Vec::<String>::new());
    assert_eq!(client.get("/v1/files?limit=0").status, 400);
    assert_eq!(client.get("/v1/files?order=up").status, 400);
    let found = client.get(&format!("/v1/files/{first}")).ok();
    assert!(found["bytes"] == 4 && found["filename"] == "train.jsonl" && found["purpose"] == "fine-tune", "{found}");
    assert_eq!(client.get(&format!("/v1/files/{first}/content")).text, "one\n");
    assert_eq!(client.delete(&format!("/v1/files/{first}")).ok()["deleted"], true);
    for answer in [client.get(&format!("/v1/files/{first}")), client.get(&format!("/v1/files/{first}/content"))] {
        assert_eq!(answer.status, 404);
    }
    assert_eq!(client.delete(&format!("/v1/files/{first}")).status, 404);
    for (body, word) in [
        ("--edge--\r\n", "file"),
        ("--edge\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--edge--\r\n", "file"),
        ("--edge\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\nx\r\n--edge--\r\n", "purpose"),
        ("--edge\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\ncut o", "form"),
    ] {
        let answer = client.post_bytes("/v1/files", "multipart/form-data; boundary=edge", body.as_bytes());
        assert_eq!(answer.status, 400, "{}", answer.text);
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(word), "{}", answer.text);
    }
    let answer = client.post("/v1/files", &json!({"purpose": "fine-tune"}));
    assert!(
        answer.status == 400 && answer.json()["error"]["message"].as_str().unwrap().contains("form"),
        "{}",
        answer.text
    );
    let empty = post_file(client, "fine-tune", "", &[]);
    assert_eq!((empty.status, &empty.json()["error"]["param"]), (400, &json!("file")), "{}", empty.text);
    // What was refused leaves nothing behind.
    assert_eq!(fs::read_dir(storage.path().join("files")).unwrap().count(), 1);
    let expiring = |seconds| [("expires_after[anchor]", "created_at"), ("expires_after[seconds]", seconds)];
    let kept = post_file(client, "fine-tune", "three\n", &expiring("3600")).ok();
    assert_eq!(kept["expires_at"].as_i64(), kept["created_at"].as_i64().map(|created| created + 3600));
    for (fields, param) in [
        (&expiring("60")[..], "expires_after.seconds"),
        (&expiring("soon"), "expires_after.seconds"),
        (&expiring("3600")[1..], "expires_after.anchor"),
    ] {
        let refused = post_file(client, "fine-tune", "four\n", fields);
        assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!(param)), "{}", refused.text);
    }
    let unknown = [("shape", "round")];
    let kept = post_file(client, "fine-tune", "five\n", &unknown);
    assert_eq!((kept.status, kept.headers["x-cadre-ignored"].as_str()), (200, "shape"));
    drop(server);
    let strict = Server::start(&["--storage", storage.path().to_str().unwrap(), "--strict-params"]);
    let refused = post_file(strict.client(), "fine-tune", "six\n", &unknown);
    assert_eq!((refused.status, &refused.json()["error"]["param"]), (400, &json!("shape")));
    // Without a place for them there are no such routes.
    assert_eq!(Server::start(&[]).client().get("/v1/files").status, 404);
}

/// What is asked of a job that is done, or under way.
fn change(client: &Client, id: &str, verb: &str) -> Answer {
    client.post(&format!("/v1/fine_tuning/jobs/{id}/{verb}"), &json!({}))
}

/// A job that has made some steps, and has saved a checkpoint because it was paused; and the checkpoint's model.
fn paused_job(client: &Client, file: &str) -> (String, String) {
    let id = create(client, file, json!({"max_steps": 100_000, "batch_size": 2, "rank": 2}));
    wait_for("some steps", 120, || !told_steps(client, &id).is_empty());
    change(client, &id, "pause").ok();
    wait_until(client, &id, "queued");
    let checkpoints = all(client, &format!("/v1/fine_tuning/jobs/{id}/checkpoints"));
    (id, checkpoints[0]["fine_tuned_model_checkpoint"].as_str().unwrap().to_owned())
}

#[test]
fn a_cancelled_job_leaves_its_checkpoints_until_they_are_deleted_and_a_failed_one_nothing() {
    let storage = tempfile::tempdir().unwrap();
    let run = |id: &str| storage.path().join("jobs").join(id);
    let server = start(storage.path());
    let client = server.client();
    let file = upload(client, 8);
    let (cancelled, kept) = paused_job(client, &file);
    let delete = |client: &Client, model: &str| client.delete(&format!("/v1/models/{model}"));
    assert_eq!(delete(client, &kept).status, 409, "the job goes on from it");
    change(client, &cancelled, "cancel").ok();
    let again = change(client, &cancelled, "cancel");
    assert!(again.text.contains("is cancelled"), "{}", again.text);
    // One that is cancelled while it trains gets no checkpoint for that.
    let training = create(client, &file, json!({"max_steps": 100_000, "batch_size": 2, "rank": 2}));
    wait_for("some steps", 120, || !told_steps(client, &training).is_empty());
    change(client, &training, "cancel").ok();
    wait_for("its run to go", 20, || !run(&training).exists());
    assert_eq!(models(client), [MODEL, &kept]);
    // Of one that fails its data are gone.
    let lost = upload(client, 8);
    let (failed, gone) = paused_job(client, &lost);
    assert_eq!(models(client), [MODEL, &kept, &gone]);
    fs::remove_file(storage.path().join("files").join(format!("{lost}.jsonl"))).unwrap();
    change(client, &failed, "resume").ok();
    wait_until(client, &failed, "failed");
    wait_for("its run to go", 20, || !run(&failed).exists());
    assert_eq!(models(client), [MODEL, &kept]);
    assert_eq!(delete(client, &gone).status, 404);
    drop(server);
    let server = start(storage.path());
    let client = server.client();
    server.chat("stone", json!({"model": kept, "max_tokens": 4})).ok();
    assert_eq!(delete(client, &kept).ok()["deleted"], true);
    assert_eq!(delete(client, &kept).status, 404);
    assert_eq!(models(client), [MODEL]);
    assert!(!run(&cancelled).exists());
}

/// The report, which is the last that a run writes, has no room: all before it is done twice.
#[test]
fn a_job_without_room_on_the_disk_waits_and_ends_once() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let file = upload(client, 8);
    let before = create(client, &file, json!({"max_steps": 100_000, "batch_size": 2, "rank": 2}));
    let body = json!({"model": MODEL, "training_file": file, "validation_file": file, "hyperparameters": TEN_STEPS()});
    let id = client.post("/v1/fine_tuning/jobs", &body).ok()["id"].as_str().unwrap().to_owned();
    wait_until(client, &id, "queued");
    let run = storage.path().join("jobs").join(&id);
    fs::create_dir(&run).unwrap();
    std::os::unix::fs::symlink("/dev/full", run.join("report.html")).unwrap();
    change(client, &before, "cancel").ok();
    wait_for("a pause", 120, || job(client, &id)["paused"] == true && job(client, &id)["status"] == "queued");
    let rows = |what: &str| all(client, &format!("/v1/fine_tuning/jobs/{id}/{what}"));
    assert!(rows("events")[0]["message"].as_str().unwrap().contains("no space left"), "{}", rows("events")[0]);
    let saved = rows("checkpoints");
    fs::remove_file(run.join("report.html")).unwrap();
    change(client, &id, "resume").ok();
    let done = wait_until(client, &id, "succeeded");
    assert_eq!(rows("checkpoints"), saved);
    let metrics = |name: &str| {
        let told = rows("events");
        let steps = told.iter().filter(|event| event["data"].get(name).is_some());
        steps.map(|event| event["data"]["step"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(metrics("full_valid_loss"), [10, 8, 6, 4, 2]);
    assert_eq!(metrics("train_loss"), (1..=10).rev().collect::<Vec<_>>());
    let results = client.get("/v1/files?purpose=fine-tune-results").ok();
    assert_eq!(results["data"].as_array().unwrap().len(), 1);
    let csv = client.get(&format!("/v1/files/{}/content", done["result_files"][0].as_str().unwrap())).text;
    assert_eq!(csv.lines().count(), 1 + 10 + 5, "{csv}");
    assert_eq!(client.delete(&format!("/v1/files/{}", done["result_files"][0].as_str().unwrap())).status, 200);
    assert_eq!(job(client, &id)["result_files"], json!([]));
}

#[test]
fn the_data_of_one_job_are_looked_at_at_a_time() {
    let storage = tempfile::tempdir().unwrap();
    let server = start(storage.path());
    let client = server.client();
    let file = upload(client, 20_000);
    let ids: Vec<String> = (0..4).map(|_| create(client, &file, TEN_STEPS())).collect();
    wait_for("all to be looked at", 120, || {
        // The latest first: when one of them is looked at, those before it are done.
        let is_looked_at = |id: &&String| {
            let has_begun = all(client, &format!("/v1/fine_tuning/jobs/{id}/events")).len() > 1;
            has_begun && job(client, id)["status"] == "validating_files"
        };
        let count = ids.iter().rev().filter(is_looked_at).count();
        assert!(count <= 1, "{count} at a time");
        job(client, &ids[3])["status"] != "validating_files"
    });
}

#[test]
fn a_job_keeps_within_the_memory_that_is_meant_for_it() {
    let storage = tempfile::tempdir().unwrap();
    let folder = storage.path().to_str().unwrap();
    // A part of a budget has to be named.
    let refused = run(&["serve", "--port", "0", "--storage", folder, "--memory", "1GiB"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("--finetune-memory"), "{}", refused.stderr);
    let server = Server::start(&["--storage", folder, "--memory", "1GiB", "--finetune-memory", "4MiB"]);
    let client = server.client();
    let file = upload(client, 8);
    let id = create(client, &file, json!({"rank": 64}));
    let error = wait_until(client, &id, "failed")["error"]["message"].as_str().unwrap().to_owned();
    assert!(error.contains("--finetune-memory") && error.contains("needs at least"), "{error}");
    drop(server);
    let server = Server::start(&["--storage", folder, "--memory", "1GiB", "--finetune-memory", "256MiB"]);
    let id = create(server.client(), &file, TEN_STEPS());
    wait_until(server.client(), &id, "succeeded");
}

/// The job trains on the weights that are served, and reads the experts that don't fit through the same store.
#[test]
fn a_job_makes_the_adapter_that_the_command_makes() {
    let directory = tempfile::tempdir().unwrap();
    let [model, lines, made, storage] =
        ["model", "train.jsonl", "made", "storage"].map(|name| directory.path().join(name));
    fs::create_dir(&model).unwrap();
    Qwen3Moe { layers: 4, hidden: 256, heads: 4, experts: 64, expert_width: 160, positions: 256 }.write(&model);
    let texts = ["The river is wide.", "A stone lies in it.", "Nobody has moved it yet.", "It rains."];
    let text: String = texts.iter().map(|text| json!({"text": text}).to_string() + "\n").collect();
    fs::write(&lines, &text).unwrap();
    let [model, lines, made_path, kept] = [&model, &lines, &made, &storage].map(|path| path.to_str().unwrap());
    let command = ["finetune", "--model", model, "--data", lines, "--output", made_path, "--seed", "1"];
    output(&[&command[..], &["--max-steps", "3", "--batch-size", "2", "--rank", "2"]].concat());
    let adapter = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
    for memory in ["1GiB", "150MiB"] {
        let budget = ["--memory", memory, "--finetune-memory", "64MiB", "--max-model-len", "128"];
        let server = Server::start(&[&["--model", model, "--storage", kept][..], &budget].concat());
        let client = server.client();
        let alone = server.chat("Hello", json!({"max_tokens": 12, "temperature": 0})).ok();
        let id = create(client, &upload_text(client, &text), json!({"max_steps": 3, "batch_size": 2, "rank": 2}));
        let beside = server.chat("Hello", json!({"max_tokens": 12, "temperature": 0})).ok();
        assert_eq!(alone["choices"], beside["choices"]);
        wait_until(client, &id, "succeeded");
        assert!(adapter(&made) == adapter(&storage.join("jobs").join(&id)), "within {memory}");
        let missed = server.metrics().has("cadre_expert_misses_total");
        assert_eq!(missed, memory != "1GiB", "experts are read only where they don't fit");
    }
}
