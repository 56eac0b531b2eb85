//! What becomes of jobs when something about them goes wrong: on the embedded model, without threads.

use std::sync::atomic::Ordering;

use tempfile::TempDir;

use super::*;
use crate::{
    engine::{self, EngineOptions},
    testing::engine_options,
};

fn jobs() -> (TempDir, Jobs) {
    let folder = tempfile::tempdir().unwrap();
    let storage = Arc::new(Storage::open(folder.path()).unwrap());
    let engine = engine::start(&EngineOptions { finetunes: true, ..engine_options() }).unwrap();
    let base = Base {
        model: None,
        fingerprint: "weights".to_owned(),
        names: engine.served.names.clone(),
        weights: Weights { decoder: engine.decoder, store: engine.store },
        adapters: engine.served.adapters.clone(),
        threads: 1,
        memory: None,
    };
    (folder, Jobs { storage, base, turns: Turns::default() })
}

fn job(jobs: &Jobs) -> Job {
    let upload = jobs.storage.new_upload();
    fs::write(&upload.path, "{\"text\": \"some words\"}\n").unwrap();
    let file = jobs.storage.add_file(upload, "a.jsonl", Purpose::FineTune, None).unwrap();
    let mut hyperparameters = Map::new();
    hyperparameters::complete(&mut hyperparameters).unwrap();
    let asked = NewJob {
        model: "base".to_owned(),
        training_file: file.id,
        validation_file: None,
        suffix: None,
        seed: 1,
        metadata: Map::new(),
        hyperparameters,
    };
    jobs.create(asked).unwrap()
}

fn found(jobs: &Jobs, job: &Job) -> Job {
    jobs.storage.job(&job.id).unwrap().unwrap()
}

#[test]
fn a_job_that_panics_fails_and_leaves_its_turn_and_nothing_else() {
    let (_folder, jobs) = jobs();
    let (job, next) = (job(&jobs), job(&jobs));
    jobs.validate(&job).unwrap();
    fs::create_dir(jobs.storage.job_folder(&job.id)).unwrap();
    jobs.storage.add_checkpoint(&job.id, 5, "ft:5", &json!({})).unwrap();
    jobs.serve("ft:5", &jobs.storage.job_folder(&job.id));
    let panics = |jobs: &Jobs, job: &Job| {
        let _turn = jobs.begin(&job.id)?.unwrap();
        panic!("index {} out of range", job.asked.seed);
    };
    jobs.guarded(&job, panics).unwrap();
    let failed = found(&jobs, &job);
    let error = failed.error.unwrap();
    assert_eq!((failed.status, error.code.as_str()), (JobStatus::Failed, "server_error"));
    assert!(error.message.contains("index 1 out of range"), "{}", error.message);
    assert!(jobs.base.adapters.list().is_empty() && !jobs.storage.job_folder(&job.id).exists());
    // The next one has its turn.
    jobs.validate(&next).unwrap();
    assert_eq!(jobs.storage.next_to_train("weights").unwrap().unwrap().id, next.id);
    assert!(jobs.begin(&next.id).unwrap().is_some() && jobs.turns.state().current().is_none());
}

#[test]
fn a_job_is_stopped_in_its_turn_and_has_none_while_it_is_paused() {
    let (_folder, jobs) = jobs();
    let job = job(&jobs);
    jobs.validate(&job).unwrap();
    jobs.pause(&job.id).unwrap();
    assert!(jobs.begin(&job.id).unwrap().is_none());
    jobs.resume(&job.id).unwrap();
    let turn = jobs.begin(&job.id).unwrap().unwrap();
    assert!(!turn.stop.load(Ordering::Relaxed));
    jobs.pause(&job.id).unwrap();
    assert!(turn.stop.load(Ordering::Relaxed));
    drop(turn);
    jobs.cancel(&job.id).unwrap();
    assert!(jobs.begin(&job.id).unwrap().is_none());
    // What comes too late changes nothing.
    jobs.fail(&job.id, "late", "too late", None).unwrap();
    assert_eq!((found(&jobs, &job).status, found(&jobs, &job).error), (JobStatus::Cancelled, None));
}

#[test]
fn jobs_of_another_model_wait_for_it_and_nothing_of_them_is_served() {
    let (folder, jobs) = jobs();
    let [waiting, done] = [(); 2].map(|()| job(&jobs));
    jobs.validate(&waiting).unwrap();
    // As a kill leaves it.
    assert!(jobs.storage.begin_job(&waiting.id, "begins").unwrap());
    jobs.storage.set_status(&done.id, &[JobStatus::ValidatingFiles], JobStatus::Running, None).unwrap();
    let results = jobs.storage.new_results(&done.id);
    fs::write(&results.path, "").unwrap();
    jobs.storage.finish_job(&done.id, "ft:done", results).unwrap();
    let made = jobs.storage.job_folder(&done.id);
    fs::create_dir(&made).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::write(made.join(file), "").unwrap();
    }
    let base = jobs.base.clone();
    drop(jobs);
    for (fingerprint, served) in [("others", 0), ("others", 0), ("weights", 1)] {
        let storage = Arc::new(Storage::open(folder.path()).unwrap());
        let is_other = fingerprint == "others";
        // On its own weights it would go on.
        storage.set_paused(&waiting.id, !is_other, "changes").unwrap();
        let base = Base { fingerprint: fingerprint.to_owned(), ..base.clone() };
        let (jobs, runner) = Jobs::start(storage, base).unwrap();
        assert_eq!(jobs.base.adapters.list().len(), served, "{fingerprint}");
        assert_eq!(found(&jobs, &waiting).status, JobStatus::Queued);
        let told = jobs.storage.events(&waiting.id, None, 99).unwrap().data;
        assert_eq!(told.iter().filter(|event| event.message.contains("another model")).count(), 1, "{fingerprint}");
        runner.end();
        // The thread that looks at data has the storage a moment longer.
        while Arc::strong_count(&jobs) > 1 {
            thread::yield_now();
        }
    }
}

#[test]
fn a_job_that_is_stopped_is_saved_unless_it_was_cancelled() {
    let (_folder, jobs) = jobs();
    let [paused, cancelled] = [(); 2].map(|()| job(&jobs));
    for job in [&paused, &cancelled] {
        jobs.validate(job).unwrap();
    }
    jobs.cancel(&cancelled.id).unwrap();
    for (job, saved) in [(&paused, 1), (&cancelled, 0)] {
        assert_eq!(jobs.make_steps(job, &AtomicBool::new(true)).unwrap(), Ended::Stopped { step: 0 });
        assert_eq!(checkpoint::found(&jobs.storage.job_folder(&job.id)).unwrap().len(), saved);
    }
}

#[test]
fn a_checkpoint_whose_row_was_lost_to_a_kill_is_listed_when_the_job_goes_on() {
    let (_folder, jobs) = jobs();
    let job = job(&jobs);
    jobs.validate(&job).unwrap();
    let make_steps = || jobs.make_steps(&job, &AtomicBool::new(false)).unwrap();
    make_steps();
    let listed = || jobs.storage.checkpoints(&job.id, None, 9).unwrap().data;
    let told = |one: &crate::storage::Checkpoint| (one.step, one.model.clone(), one.metrics.clone());
    let before: Vec<_> = listed().iter().map(told).collect();
    assert!(before.len() == 3 && before.iter().all(|(_, _, metrics)| metrics["train_loss"].is_number()), "{before:?}");
    jobs.storage.remove_checkpoint(&job.id, 2).unwrap();
    jobs.base.adapters.unload(&before[1].1);
    make_steps();
    assert_eq!(listed().iter().map(told).collect::<Vec<_>>(), before);
    assert!(jobs.base.adapters.find(&before[1].1).is_some());
}

#[test]
fn a_client_is_not_told_of_the_server_s_files() {
    let below = cadre_models::Error::Write { file: "/srv/a".to_owned(), source: io::ErrorKind::NotFound.into() };
    assert!(is_servers(&anyhow::Error::from(below).context("cannot save")));
    assert!(is_servers(&anyhow::Error::from(io::Error::from(io::ErrorKind::NotFound)).context("cannot read /srv/b")));
    assert!(!is_servers(&anyhow::anyhow!("the loss has spiked").context("lower --learning-rate")));
}

#[test]
fn a_lack_of_space_is_found_below_what_was_tried() {
    let full = || io::Error::from(io::ErrorKind::StorageFull);
    let below = cadre_models::Error::Write { file: "a".to_owned(), source: full() };
    assert!(lacks_space(&anyhow::Error::from(below).context("cannot save")));
    assert!(lacks_space(&anyhow::Error::from(full())));
    assert!(!lacks_space(&anyhow::Error::from(io::Error::from(io::ErrorKind::NotFound)).context("cannot save")));
}

#[test]
fn checkpoints_are_whole_epochs_apart_but_neither_many_nor_rare() {
    for (epoch, steps, apart) in [
        (3, 12, 3),
        (1, 3, 1),
        (1, 100, 5),
        (1, 10_000, 100),
        (5, 40, 5),
        (30, 100_000, 90),
        (70, 100_000, 70),
        (1_000, 3_000, 100),
        (0, 1, 1),
    ] {
        assert_eq!(steps_between_checkpoints(epoch, steps), apart, "{epoch} {steps}");
    }
}
