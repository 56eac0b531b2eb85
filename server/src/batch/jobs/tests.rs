use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread::sleep,
};

use serde_json::{Value, json};

use super::*;
use crate::{
    http::HttpOptions,
    lines::compression::Compression,
    metrics::exporter,
    testing::{Fake, say, served},
};

const CHAT: &str = "/v1/chat/completions";

struct Rig {
    _folder: tempfile::TempDir,
    storage: Arc<Storage>,
    jobs: Arc<BatchJobs>,
    runner: Option<BatchRunner>,
}

impl Rig {
    /// A server's batches, whose lines `fake` answers.
    fn new(fake: &Arc<Fake>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let storage = Arc::new(Storage::open(folder.path()).unwrap());
        let (jobs, runner) = start(&storage, fake, "these weights");
        Self { _folder: folder, storage, jobs, runner: Some(runner) }
    }

    fn create(&self, lines: usize, window_seconds: i64) -> Batch {
        self.create_for(lines, window_seconds, 3600)
    }

    /// One whose files stay so long.
    fn create_for(&self, lines: usize, window_seconds: i64, output_seconds: i64) -> Batch {
        self.create_of(lines_of(lines).as_bytes(), window_seconds, output_seconds)
    }

    fn create_of(&self, input: &[u8], window_seconds: i64, output_seconds: i64) -> Batch {
        let upload = self.storage.new_upload();
        fs::write(&upload.path, input).unwrap();
        let file = self.storage.add_file(upload, "in.jsonl", Purpose::Batch, None).unwrap();
        let asked = NewBatch {
            input_file: file.id,
            endpoint: CHAT.to_owned(),
            completion_window: "24h".to_owned(),
            window_seconds,
            metadata: None,
            output_seconds: Some(output_seconds),
        };
        self.jobs.create(asked).unwrap()
    }

    fn wait(&self, id: &str, status: BatchStatus) -> Batch {
        for _ in 0..2000 {
            let batch = self.storage.batch(id).unwrap().unwrap();
            if batch.status == status {
                return batch;
            }
            sleep(Duration::from_millis(5));
        }
        panic!("it doesn't become {}: {:?}", status.name(), self.storage.batch(id));
    }

    fn lines(&self, file: Option<&String>) -> Vec<Value> {
        let text = file.map(|file| fs::read_to_string(self.storage.file_path(file, Purpose::BatchOutput)).unwrap());
        text.unwrap_or_default().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn end(&mut self) {
        self.runner.take().into_iter().for_each(BatchRunner::end);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.end();
    }
}

fn start(storage: &Arc<Storage>, fake: &Arc<Fake>, base: &str) -> (Arc<BatchJobs>, BatchRunner) {
    let metrics = exporter().unwrap().build_recorder().handle();
    let app = App::new(metrics, HttpOptions::default(), None);
    app.ready(served(fake.clone()));
    BatchJobs::start(storage.clone(), base.to_owned(), Arc::new(app), 4).unwrap()
}

fn lines_of(count: usize) -> String {
    let body = json!({"messages": [{"role": "user", "content": "hi"}]});
    let line = |index| json!({"custom_id": format!("line {index}"), "method": "POST", "url": CHAT, "body": body});
    (0..count).map(|index| format!("{}\n", line(index))).collect()
}

/// Answers the first `answered` requests, and leaves the others without an answer.
fn answering(answered: usize) -> Arc<Fake> {
    let count = AtomicUsize::new(0);
    Fake::new(
        move |request| {
            if count.fetch_add(1, Ordering::Relaxed) < answered { say(request, "hello") } else { Vec::new() }
        },
    )
}

#[test]
fn what_is_not_answered_in_time_is_an_error_of_its_own() {
    let rig = Rig::new(&answering(3));
    let batch = rig.create(9, 1);
    let expired = rig.wait(&batch.id, BatchStatus::Expired);
    let (answers, errors) = (rig.lines(expired.output_file.as_ref()), rig.lines(expired.error_file.as_ref()));
    assert_eq!((answers.len(), errors.len()), (3, 6));
    assert_eq!((expired.total, expired.progress.completed, expired.progress.failed), (9, 3, 6));
    for error in &errors {
        assert_eq!((&error["error"]["code"], &error["response"]), (&json!("batch_expired"), &Value::Null));
        assert!(error["custom_id"].as_str().unwrap().starts_with("line "), "{error}");
        assert!(!answers.iter().any(|answer| answer["custom_id"] == error["custom_id"]));
    }
}

#[test]
fn a_batch_whose_input_can_not_be_read_fails_and_holds_up_no_other() {
    let mut rig = Rig::new(&answering(1));
    let torn = Compression::Gzip.encode(lines_of(3).as_bytes()).unwrap();
    let torn = rig.create_of(&torn[..torn.len() - 9], 3600, 3600);
    let failed = rig.wait(&torn.id, BatchStatus::Failed);
    assert_eq!((failed.errors.len(), failed.errors[0].code.as_str()), (1, "unreadable_file"));

    let [vanishing, good] = [3600; 2].map(|seconds| rig.create(2, seconds));
    rig.wait(&good.id, BatchStatus::InProgress);
    rig.end();
    fs::remove_file(rig.storage.file_path(&vanishing.input_file, Purpose::Batch)).unwrap();
    let (_, runner) = start(&rig.storage, &Fake::saying("hello"), "these weights");
    let failed = rig.wait(&vanishing.id, BatchStatus::Failed);
    assert_eq!(failed.errors[0].code, "unreadable_file");
    rig.wait(&good.id, BatchStatus::Completed);
    runner.end();
}

#[test]
fn a_batch_of_other_weights_waits_for_them_and_may_expire_or_be_cancelled() {
    let mut rig = Rig::new(&answering(1));
    let [waiting, cancelled] = [3600; 2].map(|seconds| rig.create(2, seconds).id);
    let Batch { id: expiring, input_file, .. } = rig.create(2, 2);
    rig.wait(&expiring, BatchStatus::InProgress);
    rig.end();
    // A batch ends at its time whatever has become of its input.
    fs::remove_file(rig.storage.file_path(&input_file, Purpose::Batch)).unwrap();
    let (jobs, runner) = start(&rig.storage, &Fake::saying("hello"), "other weights");
    jobs.cancel(&cancelled).unwrap();
    rig.wait(&cancelled, BatchStatus::Cancelled);
    rig.wait(&expiring, BatchStatus::Expired);
    assert_eq!(rig.storage.batch(&waiting).unwrap().unwrap().status, BatchStatus::InProgress);
    runner.end();
    let (_, runner) = start(&rig.storage, &Fake::saying("hello"), "these weights");
    let done = rig.wait(&waiting, BatchStatus::Completed);
    assert_eq!((done.progress.completed, rig.lines(done.output_file.as_ref()).len()), (2, 2));
    runner.end();
}

#[test]
fn a_server_that_ends_writes_no_line_that_is_none() {
    let mut rig = Rig::new(&answering(3));
    let batch = rig.create(9, 3600).id;
    for _ in 0..2000 {
        if rig.storage.batch(&batch).unwrap().unwrap().progress.completed == 3 {
            break;
        }
        sleep(Duration::from_millis(5));
    }
    rig.end();
    let (_, runner) = start(&rig.storage, &Fake::saying("hello"), "these weights");
    let done = rig.wait(&batch, BatchStatus::Completed);
    assert_eq!((done.progress.completed, done.progress.failed), (9, 0));
    let answers = rig.lines(done.output_file.as_ref());
    assert!(answers.iter().all(|line| line["response"]["body"]["choices"][0]["message"]["content"] == "hello"));
    assert_eq!(done.progress.usage.completion_tokens, 9 * 6, "also of those before the end");
    runner.end();
}

#[test]
fn files_go_when_their_time_is_over() {
    let rig = Rig::new(&Fake::saying("hello"));
    let batch = rig.create_for(2, 3600, 0).id;
    for _ in 0..2000 {
        let found = rig.storage.batch(&batch).unwrap().unwrap();
        if found.status == BatchStatus::Completed && found.output_file.is_none() {
            let files = rig.storage.files(&crate::storage::FileQuery { limit: 9, ..Default::default() }).unwrap();
            assert!(files.data.iter().all(|file| file.purpose == Purpose::Batch), "only what was uploaded stays");
            return;
        }
        sleep(Duration::from_millis(5));
    }
    panic!("the file stays: {:?}", rig.storage.batch(&batch));
}
