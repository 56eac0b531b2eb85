//! Files and jobs, written, listed page by page, and found again.

use proptest::prelude::*;
use serde_json::{Map, json};
use tempfile::TempDir;

use super::*;

fn opened() -> (TempDir, Storage) {
    let folder = tempfile::tempdir().unwrap();
    let storage = Storage::open(&folder.path().join("storage")).unwrap();
    (folder, storage)
}

fn add(storage: &Storage, text: &str, purpose: Purpose) -> StoredFile {
    let upload = storage.new_upload();
    fs::write(&upload.path, text).unwrap();
    storage.add_file(upload, "a.jsonl", purpose, None).unwrap()
}

/// The weights that jobs begin from.
const BASE: &str = "weights";

/// A job of a file of its own.
fn job(storage: &Storage, team: &str) -> Job {
    job_of(storage, &add(storage, "line\n", Purpose::FineTune).id, team).unwrap()
}

fn job_of(storage: &Storage, file: &str, team: &str) -> Result<Job, StorageError> {
    let asked = NewJob {
        model: "base".to_owned(),
        training_file: file.to_owned(),
        validation_file: None,
        suffix: Some("ü".to_owned()),
        seed: 7,
        metadata: Map::from_iter([("team".to_owned(), json!(team))]),
        hyperparameters: Map::from_iter([("n_epochs".to_owned(), json!(3))]),
    };
    storage.add_job(asked, BASE)
}

/// The results of a job, written.
fn results(storage: &Storage, job: &str) -> Upload {
    let results = storage.new_results(job);
    fs::write(&results.path, "step\n").unwrap();
    results
}

fn told(storage: &Storage, job: &str) -> Vec<String> {
    storage.events(job, None, 99).unwrap().data.into_iter().map(|event| event.message).collect()
}

#[test]
fn what_was_kept_is_there_at_the_next_start_and_nothing_else() {
    let (folder, storage) = opened();
    let file = add(&storage, "line\n", Purpose::FineTune);
    let added = job_of(&storage, &file.id, "a").unwrap();
    storage.add_event(&added.id, Level::Info, "hello", EventKind::Message).unwrap();
    storage.add_checkpoint(&added.id, 5, "ft:5", &json!({"step": 5})).unwrap();
    let error = JobError { code: "c".into(), message: "m".into(), param: Some("p".into()) };
    let failed = job(&storage, "b");
    storage.add_checkpoint(&failed.id, 5, "ft:b:5", &json!({})).unwrap();
    assert_eq!(storage.fail_job(&failed.id, &error).unwrap(), Some(vec!["ft:b:5".to_owned()]));
    assert_eq!(storage.fail_job(&failed.id, &error).unwrap(), None, "it is done");
    let unfinished = storage.new_upload();
    fs::write(&unfinished.path, "half").unwrap();
    // As a kill would leave it.
    let left = unfinished.path.clone();
    std::mem::forget(unfinished);
    drop(storage);

    let storage = Storage::open(&folder.path().join("storage")).unwrap();
    assert!(!left.exists());
    assert_eq!(storage.file(&file.id).unwrap(), Some(file.clone()));
    assert_eq!(fs::read_to_string(storage.file_path(&file.id, file.purpose)).unwrap(), "line\n");
    assert_eq!(storage.job(&added.id).unwrap(), Some(added.clone()));
    let failed = storage.job(&failed.id).unwrap().unwrap();
    assert_eq!((failed.status, failed.error), (JobStatus::Failed, Some(error)));
    assert!(failed.finished.is_some());
    assert_eq!(storage.events(&added.id, None, 9).unwrap().data[0].message, "hello");
    assert_eq!(storage.checkpoints(&added.id, None, 9).unwrap().data[0].model, "ft:5");
}

#[test]
fn what_has_a_name_of_its_own_is_not_swept_away() {
    let (folder, storage) = opened();
    let path = folder.path().join("storage");
    let needed = job(&storage, "a").id;
    let done = job(&storage, "b").id;
    storage.fail_job(&done, &JobError { code: "c".into(), message: "m".into(), param: None }).unwrap();
    drop(storage);
    let digits = "0123456789abcdef01234567";
    let run = |name: &str| path.join("jobs").join(name);
    let file = |name: &str| path.join("files").join(name);
    let stay = [
        file("notes.txt"),
        file("file-1.jsonl"),
        file(&format!("file-{digits}.md")),
        file(&format!("file-{digits}")),
        run("a.txt"),
    ];
    let go = ["upload", "jsonl", "csv"].map(|ending| file(&format!("file-{digits}.{ending}")));
    stay.iter().chain(&go).for_each(|path| fs::write(path, "mine").unwrap());
    // A folder is never one of ours, whatever its name.
    let folders =
        [file("more"), file(&format!("file-{}.csv", "0".repeat(24))), run("backup"), run("ftjob-1"), run(&needed)];
    let gone = [run(&format!("ftjob-{digits}")), run(&done)];
    for path in folders.iter().chain(&gone) {
        fs::create_dir(path).unwrap();
        fs::write(path.join("kept.txt"), "mine").unwrap();
    }
    drop(Storage::open(&path).unwrap());
    for path in stay.iter().chain(&folders) {
        assert!(path.exists(), "{}", path.display());
    }
    for path in go.iter().chain(&gone) {
        assert!(!path.exists(), "{}", path.display());
    }
}

#[test]
fn a_job_that_was_about_to_pause_waits_at_the_next_start() {
    let (folder, storage) = opened();
    let id = job(&storage, "a").id;
    storage.set_status(&id, &[JobStatus::ValidatingFiles], JobStatus::Running, None).unwrap();
    storage.set_paused(&id, true, "changes").unwrap();
    drop(storage);
    let storage = Storage::open(&folder.path().join("storage")).unwrap();
    let found = storage.job(&id).unwrap().unwrap();
    assert_eq!((found.status, found.is_paused), (JobStatus::Queued, true));
}

#[test]
fn a_change_of_a_job_comes_with_the_event_that_tells_it() {
    let (_folder, storage) = opened();
    let id = job(&storage, "a").id;
    let told = || {
        let mut events = storage.events(&id, None, 9).unwrap().data;
        assert!(events.pop().unwrap().message.starts_with("Created"));
        events.into_iter().map(|event| (event.level, event.message)).collect::<Vec<_>>()
    };
    storage.interrupt_job(&id, "it isn't running").unwrap();
    assert!(!storage.begin_job(&id, "it isn't validated").unwrap());
    assert_eq!(told(), []);
    storage.set_status(&id, &[JobStatus::ValidatingFiles], JobStatus::Queued, Some("fits")).unwrap();
    storage.begin_job(&id, "begins").unwrap();
    storage.interrupt_job(&id, "no room").unwrap();
    let found = storage.job(&id).unwrap().unwrap();
    assert_eq!((found.status, found.is_paused), (JobStatus::Queued, true));
    let all = [("warn", "no room"), ("info", "begins"), ("info", "fits")];
    assert_eq!(told(), all.map(|(level, message)| (level.to_owned(), message.to_owned())));
    // What can't be told does not happen.
    storage.database().execute_batch("DROP TABLE events").unwrap();
    storage.set_paused(&id, false, "resumed").unwrap_err();
    assert!(storage.job(&id).unwrap().unwrap().is_paused);
}

#[test]
fn a_folder_is_opened_by_one_process_of_the_same_layout() {
    let (folder, storage) = opened();
    let path = folder.path().join("storage");
    let error = Storage::open(&path).unwrap_err().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    storage.database().execute_batch("PRAGMA user_version = 9").unwrap();
    drop(storage);
    let error = Storage::open(&path).unwrap_err().to_string();
    assert!(error.contains("layout 3") && error.contains("layout 9"), "{error}");
}

#[test]
fn a_folder_from_before_there_were_batches_is_taken_over() {
    let (folder, storage) = opened();
    let id = job(&storage, "a").id;
    let before = "DROP TABLE batches; ALTER TABLE files DROP COLUMN expires; PRAGMA user_version = 2";
    storage.database().execute_batch(before).unwrap();
    drop(storage);
    let storage = Storage::open(&folder.path().join("storage")).unwrap();
    let file = storage.job(&id).unwrap().unwrap().asked.training_file;
    assert_eq!(storage.file(&file).unwrap().unwrap().expires, None);
    assert!(storage.batches(None, 9).unwrap().data.is_empty());
}

#[test]
fn an_error_says_why_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let of_system = Storage::open(&file).unwrap_err();
    fs::write(folder.path().join("cadre.db"), "x".repeat(4096)).unwrap();
    let of_database = Storage::open(folder.path()).unwrap_err();
    for (error, word) in [(of_system, "os error"), (of_database, "not a database")] {
        let text = format!("{:#}", anyhow::Error::from(error));
        assert_eq!(text.matches(word).count(), 1, "{text}");
    }
}

#[test]
fn a_file_that_a_job_needs_stays() {
    let (_folder, storage) = opened();
    let file = add(&storage, "line\n", Purpose::FineTune);
    let added = job_of(&storage, &file.id, "a").unwrap();
    assert!(matches!(storage.delete_file(&file.id), Err(StorageError::FileInUse { .. })));
    assert!(storage.set_status(&added.id, &[JobStatus::ValidatingFiles], JobStatus::Cancelled, None).unwrap());
    assert!(storage.delete_file(&file.id).unwrap());
    assert!(!storage.file_path(&file.id, file.purpose).exists() && !storage.delete_file(&file.id).unwrap());
    let missing = job_of(&storage, &file.id, "b").unwrap_err();
    assert!(matches!(missing, StorageError::NoFile { role: "training_file", .. }), "{missing}");
    // Bytes that are gone by themselves don't keep a row.
    let lost = add(&storage, "line\n", Purpose::FineTune);
    fs::remove_file(storage.file_path(&lost.id, lost.purpose)).unwrap();
    assert!(storage.delete_file(&lost.id).unwrap());
}

#[test]
fn one_job_after_the_other_and_an_interrupted_one_first() {
    let (_folder, storage) = opened();
    let [first, second, third] = ["a", "b", "c"].map(|file| job(&storage, file).id);
    assert_eq!(storage.next_to_train(BASE).unwrap(), None, "they aren't validated");
    for id in [&first, &second, &third] {
        assert_eq!(storage.next_to_validate(BASE).unwrap().map(|job| job.id).as_ref(), Some(id));
        assert!(storage.set_status(id, &[JobStatus::ValidatingFiles], JobStatus::Queued, None).unwrap());
    }
    let next = || storage.next_to_train(BASE).unwrap().map(|job| job.id);
    assert_eq!(next().as_ref(), Some(&first));
    storage.set_paused(&first, true, "changes").unwrap();
    assert_eq!(next().as_ref(), Some(&second));
    assert_eq!(storage.next_to_train("others").unwrap(), None, "they are of other weights");
    assert_eq!((storage.jobs_of_others("others").unwrap().len(), storage.jobs_of_others(BASE).unwrap().len()), (3, 0));
    assert!(!storage.begin_job(&first, "begins").unwrap(), "it is paused");
    assert!(storage.begin_job(&third, "begins").unwrap());
    assert_eq!(next().as_ref(), Some(&third));
    assert!(storage.begin_job(&third, "begins").unwrap(), "it was interrupted");
    assert!(!storage.finish_job(&second, "ft", results(&storage, &second)).unwrap(), "it doesn't run");
    assert!(storage.finish_job(&third, "ft:third", results(&storage, &third)).unwrap());
    assert!(!storage.set_status(&third, &[JobStatus::Running], JobStatus::Cancelled, None).unwrap());
    let all = storage.jobs(None, 9, &[]).unwrap().data;
    assert_eq!(all.iter().map(|job| &job.id).collect::<Vec<_>>(), [&third, &second, &first]);
    let of_b = storage.jobs(None, 9, &[("team".to_owned(), "b".to_owned())]).unwrap().data;
    assert_eq!(of_b.len(), 1);
}

#[test]
fn a_run_stays_as_long_as_one_of_its_models() {
    let (_folder, storage) = opened();
    let id = job(&storage, "a").id;
    let folder = storage.job_folder(&id);
    fs::create_dir(&folder).unwrap();
    storage.add_checkpoint(&id, 5, "ft:a:5", &json!({"loss": 1.0})).unwrap();
    storage.add_checkpoint(&id, 6, "ft:a:6", &json!({})).unwrap();
    // A kill before the next step: the checkpoint is saved again.
    let before = storage.checkpoints(&id, None, 9).unwrap();
    storage.add_checkpoint(&id, 5, "ft:a:5", &json!({})).unwrap();
    assert_eq!(storage.checkpoints(&id, None, 9).unwrap(), before);
    storage.remove_run_of_no_model(&id).unwrap();
    assert!(folder.exists(), "it isn't done");
    storage.set_status(&id, &[JobStatus::ValidatingFiles], JobStatus::Running, None).unwrap();
    storage.finish_job(&id, "ft:a", results(&storage, &id)).unwrap();
    let made_by = |model: &str| storage.maker_of(model).unwrap().map(|(job, step)| (job.id, step));
    assert_eq!(made_by("ft:a"), Some((id.clone(), None)));
    assert_eq!(made_by("ft:a:5"), Some((id.clone(), Some(5))));
    storage.remove_checkpoint(&id, 5).unwrap();
    assert_eq!(made_by("ft:a:5"), None);
    storage.remove_run_of_no_model(&id).unwrap();
    assert!(folder.exists(), "it has models");
    assert_eq!(storage.jobs_with_models(BASE).unwrap().len(), 1);
    assert_eq!(
        (storage.jobs_with_models("others").unwrap().len(), storage.jobs_of_others("others").unwrap().len()),
        (0, 1)
    );
    assert_eq!(storage.forget_models(&id).unwrap(), ["ft:a:6"]);
    assert_eq!(made_by("ft:a"), None);
    assert_eq!(storage.jobs_with_models(BASE).unwrap(), []);
    storage.remove_run_of_no_model(&id).unwrap();
    assert!(!folder.exists());
}

#[test]
fn the_results_of_a_job_are_one_file_and_leave_it_with_its_id() {
    let (folder, storage) = opened();
    let id = job(&storage, "a").id;
    storage.set_status(&id, &[JobStatus::ValidatingFiles], JobStatus::Running, None).unwrap();
    // As a kill leaves it that comes between the bytes and the row.
    storage.settle(results(&storage, &id), "", Purpose::FineTuneResults).unwrap();
    drop(storage);
    let storage = Storage::open(&folder.path().join("storage")).unwrap();
    let of_results = |storage: &Storage| {
        let purpose = Some("fine-tune-results".to_owned());
        storage.files(&FileQuery { purpose, limit: 9, ..FileQuery::default() }).unwrap().data
    };
    assert_eq!(of_results(&storage), []);
    assert!(storage.finish_job(&id, "ft:a", results(&storage, &id)).unwrap());
    let file = of_results(&storage).remove(0);
    assert_eq!(storage.job(&id).unwrap().unwrap().result_file.as_ref(), Some(&file.id));
    assert_eq!(told(&storage, &id)[..2], ["The job has successfully completed", "New fine-tuned model created: ft:a"]);
    // One that was cancelled in time leaves none.
    let cancelled = job(&storage, "b").id;
    assert!(!storage.finish_job(&cancelled, "ft:b", results(&storage, &cancelled)).unwrap());
    assert_eq!(of_results(&storage).len(), 1);
    assert_eq!(fs::read_dir(folder.path().join("storage/files")).unwrap().count(), 3);
    assert!(storage.delete_file(&file.id).unwrap());
    assert_eq!(storage.job(&id).unwrap().unwrap().result_file, None);
}

#[test]
fn a_page_comes_after_what_is_in_the_list_only() {
    let (_folder, storage) = opened();
    let [one, other] = ["a", "b"].map(|team| job(&storage, team).id);
    let event = storage.events(&other, None, 9).unwrap().data.remove(0).id;
    let nothing = |error: StorageError| matches!(error, StorageError::NothingToComeAfter(_));
    assert!(nothing(storage.jobs(Some("ftjob-none"), 9, &[]).unwrap_err()));
    assert!(nothing(storage.events(&one, Some(&event), 9).unwrap_err()));
    assert!(nothing(storage.checkpoints(&one, Some("ftckpt_none"), 9).unwrap_err()));
    let after = Some("file-none".to_owned());
    assert!(nothing(storage.files(&FileQuery { after, limit: 9, ..FileQuery::default() }).unwrap_err()));
}

#[test]
fn how_far_a_job_was_told_is_known_by_number() {
    let (_folder, storage) = opened();
    let id = job(&storage, "a").id;
    assert_eq!(storage.last_step_with(&id, "train_loss").unwrap(), 0);
    for (step, number) in [(1, "train_loss"), (2, "train_loss"), (2, "full_valid_loss"), (3, "train_loss")] {
        let data = Map::from_iter([("step".to_owned(), json!(step)), (number.to_owned(), json!(0.5))]);
        storage.add_event(&id, Level::Info, "a step", EventKind::Metrics(data)).unwrap();
    }
    storage.add_event(&id, Level::Info, "paused", EventKind::Message).unwrap();
    assert_eq!(storage.last_step_with(&id, "train_loss").unwrap(), 3);
    assert_eq!(storage.last_step_with(&id, "full_valid_loss").unwrap(), 2);
    assert_eq!(storage.last_step_with("ftjob-other", "train_loss").unwrap(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    /// In both orders, whatever a page's size.
    #[test]
    fn pages_hold_each_file_once(count in 0_usize..8, limit in 1_usize..5, ascending: bool) {
        let (_folder, storage) = opened();
        let mut expected: Vec<String> = (0..count).map(|_| add(&storage, "", Purpose::FineTune).id).collect();
        add(&storage, "", Purpose::FineTuneResults);
        if !ascending {
            expected.reverse();
        }
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let purpose = Some("fine-tune".to_owned());
            let page = storage.files(&FileQuery { purpose, after, limit, ascending }).unwrap();
            found.extend(page.data.iter().map(|file| file.id.clone()));
            prop_assert!(page.data.len() == limit || !page.has_more);
            after = found.last().cloned();
            if !page.has_more {
                break;
            }
        }
        prop_assert_eq!(found, expected);
    }
}
