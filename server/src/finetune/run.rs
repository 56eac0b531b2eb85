//! The steps of a run.

use std::{
    collections::HashSet,
    fs::{self, File, TryLockError},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use cadre_engine::{
    experts::ExpertStore,
    train::{
        Dropout, LogitMoments, RouterLossOptions, RoutingNoise, Trainer,
        guard::{Event, Guard, GuardOptions, KeptBatch, Observed, Verdict},
        optimizer::{AdamW, AdamWOptions},
        parameters::Parameters,
        schedule::Schedule,
        trained::Trained,
    },
};
use cadre_models::{
    Checkpoint, LoadedModel, Placement,
    adapter::{AdapterFiles, Lora, WEIGHTS_FILE},
    rewrite::{self, Rewriting},
};
use serde_json::Value;

use super::{
    checkpoint::{self, Position},
    data::{Data, StepSize, batches, expert_loads},
    prepare::{Prepared, Trainee, Weights, load},
    report::{ExpertLoad, Report},
    settings::{Method, ReportTo, Settings},
    step_log::{EvaluationLine, GuardLine, Line, RoutingLine, StepLine, StepLog},
    tensorboard::EventFile,
};
use crate::{host, memory::mebibytes, progress};

pub const LOG_FILE: &str = "train_log.jsonl";
const REPORT_FILE: &str = "report.html";
/// It is locked as long as a run goes on.
const LOCK_FILE: &str = ".lock";
/// Tokens in which the experts' load is counted before and after a run.
const LOAD_TOKENS: usize = 4096;
/// The directory of a checkpoint with trained weights, in the output directory.
const MODEL_DIRECTORY: &str = "model";

/// Who follows a run.
pub trait Watcher {
    /// It is about to make the steps from `step` on.
    fn begins(&mut self, step: u64, steps: u64);
    /// A step was made.
    fn step(&mut self, line: &StepLine);
    /// The spike guard has decided something.
    fn guard(&mut self, step: u64, decision: &str);
    /// The held-out examples were looked at.
    fn evaluated(&mut self, line: &EvaluationLine);
    /// A checkpoint is safe on disk.
    fn saved(&mut self, step: u64);
    /// Whether a run that is stopped is saved, to be gone on with.
    fn saves_what_is_stopped(&mut self) -> bool;
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// All steps are made.
    Finished {
        /// What there is now.
        made: String,
    },
    /// It was asked to stop, and can be gone on with if its watcher had it saved.
    Stopped {
        /// Steps made.
        step: u64,
    },
}

/// Trains what `prepared` says, from the start or from the latest checkpoint; `stop` ends it after the step that is running.
///
/// # Errors
/// When another run is in the output directory, the checkpoint is of another one, the system refuses, or the losses don't
/// recover from spikes.
pub fn run(
    settings: &Settings,
    prepared: Prepared,
    resume: bool,
    stop: &AtomicBool,
    watcher: &mut dyn Watcher,
) -> Result<Ended> {
    let output = &settings.output;
    fs::create_dir_all(output).with_context(|| format!("cannot make {}", output.display()))?;
    let _lock = lock(output)?;
    check_output(settings, resume)?;
    let mut run = Run::new(settings, prepared, watcher)?;
    if run.steps(stop)? {
        return Ok(Ended::Finished { made: run.finish(stop)? });
    }
    if run.watcher.saves_what_is_stopped() {
        run.save()?;
    }
    Ok(Ended::Stopped { step: run.position.step })
}

/// Keeps other runs out of `output` until the file is closed.
fn lock(output: &Path) -> Result<File> {
    let path = output.join(LOCK_FILE);
    let failed = || format!("cannot lock {}", path.display());
    // What somebody else keeps under this name stays as it is.
    let file = File::options().write(true).create(true).truncate(false).open(&path).with_context(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            bail!("another run is in {}: wait until it has ended, or give another --output", output.display())
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(failed),
    }
}

/// Whether a run was begun in `output`.
///
/// # Errors
/// When the system refuses to tell.
pub fn has_begun(output: &Path) -> Result<bool> {
    Ok(checkpoint::is_there(output)? || output.join(LOG_FILE).exists())
}

/// Whether the run can begin in its output directory, or go on there if it is to `resume`: from the latest checkpoint, or from
/// its start if it was ended before the first.
///
/// # Errors
/// When there is a run and it isn't to be gone on with, or none and it is; or when a run's result would be written over.
pub fn check_output(settings: &Settings, resume: bool) -> Result<()> {
    let (output, shown) = (&settings.output, settings.output.display());
    let result = if settings.method == Method::Lora { WEIGHTS_FILE } else { MODEL_DIRECTORY };
    ensure!(
        checkpoint::is_there(output)? || !output.join(result).exists(),
        "{shown} has {result}, and no checkpoint of the run that made it: give another --output"
    );
    let has_begun = has_begun(output)?;
    ensure!(resume || !has_begun, "{shown} has a run: go on with it by --resume, or give another --output");
    ensure!(!resume || has_begun, "--resume: {shown} has no checkpoint and no log of a run: start without it");
    Ok(())
}

struct Run<'a> {
    settings: &'a Settings,
    deciding: Value,
    data: Data,
    eval: Option<Data>,
    steps: u64,
    size: StepSize,
    trainer: Trainer,
    /// How the adapter is saved; `None`: weights are trained, and a checkpoint in the layout of this one is made.
    files: Option<AdapterFiles>,
    checkpoint: Checkpoint,
    store: Option<ExpertStore>,
    optimizer: AdamW,
    schedule: Schedule,
    guard: Guard,
    position: Position,
    log: StepLog,
    /// The steps since the last line of the log, as a line.
    unlogged: Option<StepLine>,
    events: Option<EventFile>,
    watcher: &'a mut dyn Watcher,
    planned_peak: u64,
    /// What the process may use; `None` beside a server, of which a run is only a part.
    budget: Option<u64>,
    /// How often each expert was chosen in the first examples, before training.
    load_before: Vec<Vec<u64>>,
    compute: cadre_engine::compute::Compute,
    title: String,
}

impl<'a> Run<'a> {
    fn new(settings: &'a Settings, prepared: Prepared, watcher: &'a mut dyn Watcher) -> Result<Self> {
        let Prepared { compute, checkpoint, data, eval, steps, size, trainee, memory, formats, served, .. } = prepared;
        let budget = served.is_none().then_some(memory.budget);
        let Weights { decoder, store } = match served {
            Some(served) => served,
            None => {
                let placement = if memory.slots.is_some() { Placement::Stored } else { Placement::Resident };
                let LoadedModel { decoder, experts, .. } = load(&checkpoint, &formats, placement, &compute)?;
                let store = experts.zip(memory.slots).map(|(experts, slots)| experts.open(slots)).transpose()?;
                Weights { decoder: Arc::new(decoder), store }
            }
        };
        let (trained, mut parameters, files) = match trainee {
            Trainee::Adapters(plan) => {
                let Lora { trained, parameters, files } = plan.build()?;
                (trained, parameters, Some(files))
            }
            Trainee::Weights { modules, chosen } => {
                if let Some(chosen) = chosen {
                    chosen.write(&settings.output)?;
                }
                let names: HashSet<&str> = modules.iter().map(|module| module.name.as_str()).collect();
                let mut parameters = Parameters::default();
                let trained = Trained::weights(&decoder, &mut parameters, |module| names.contains(module))?;
                (trained, parameters, None)
            }
        };
        let deciding = settings.deciding(&checkpoint.fingerprint()?, &data.dataset.fingerprint());
        let options = AdamWOptions { weight_decay: settings.weight_decay, ..AdamWOptions::default() };
        let guard_options =
            GuardOptions { threshold: settings.spike_threshold, seed: settings.seed, ..GuardOptions::default() };
        let saved = checkpoint::found(&settings.output)?.pop();
        let (position, optimizer, guard) = match &saved {
            Some((_, folder)) => {
                let (position, state) = checkpoint::read(folder, &mut parameters, &deciding)?;
                let guard = Guard::from_state(guard_options, position.guard.clone());
                (position, AdamW::from_state(options, &parameters, state)?, guard)
            }
            None => {
                let guard = Guard::new(guard_options);
                let position = Position { step: 0, drawn: 0, guard: guard.state().clone(), logits: Vec::new() };
                (position, AdamW::new(options, &parameters), guard)
            }
        };
        let router = RouterLossOptions { balance: settings.aux_loss_coef, z: settings.z_loss_coef };
        let mut trainer = Trainer::new(compute.clone(), decoder, trained, parameters, router)?;
        if saved.is_some() {
            trainer.write_back()?;
        }
        trainer.keep_from(memory.keep_from);
        trainer.limit_memory(memory.room());
        let schedule = Schedule {
            shape: settings.scheduler.into(),
            peak: settings.learning_rate,
            warmup_ratio: settings.warmup_ratio(steps),
            steps,
        };
        let log = StepLog::open(&settings.output.join(LOG_FILE), position.step)?;
        let events = match settings.report_to {
            ReportTo::Tensorboard => Some(EventFile::create(&settings.output, position.step, SystemTime::now())?),
            ReportTo::None => None,
        };
        watcher.begins(position.step, steps);
        let title = format!("{} on {}", checkpoint.name(), shown(&settings.data));
        Ok(Self {
            settings,
            deciding,
            data,
            eval,
            steps,
            size,
            trainer,
            files,
            checkpoint,
            store,
            optimizer,
            schedule,
            guard,
            position,
            log,
            unlogged: None,
            events,
            watcher,
            planned_peak: memory.peak(),
            budget,
            load_before: Vec::new(),
            compute,
            title,
        })
    }

    /// Whether all steps were made.
    fn steps(&mut self, stop: &AtomicBool) -> Result<bool> {
        self.load_before = self.load_before()?;
        while self.position.step < self.steps {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            self.step()?;
            let step = self.position.step;
            let is_last = step == self.steps;
            let is_due = |every: u64| every > 0 && step.is_multiple_of(every) && !is_last;
            if is_due(self.settings.eval_every) {
                self.evaluate()?;
            }
            if is_due(self.settings.save_every) {
                self.save()?;
            }
        }
        Ok(true)
    }

    fn step(&mut self) -> Result<()> {
        let start = Instant::now();
        let before = self.store.as_ref().map(ExpertStore::counters);
        let step = self.position.step;
        let retried = self.guard.due().map(<[u64]>::to_vec);
        let is_new = retried.is_none();
        let examples = retried.unwrap_or_else(|| self.data.draw(self.position.drawn));
        let batches = batches(self.data.examples(), &examples, self.settings.grad_accum)?;
        let (rate, seed) = (self.settings.dropout as f32, self.settings.seed);
        self.trainer.dropout = (rate > 0.0).then_some(Dropout { rate, seed, step });
        let warmup = self.settings.routing_warmup_steps;
        self.trainer.routing_noise = RoutingNoise::of_step(step, warmup, seed, &self.position.logits);
        let (losses, mut gradients) = self.trainer.gradients(&batches)?;
        let gradient_norm = gradients.clip(self.settings.clip);
        let total = losses.cross_entropy
            + f64::from(self.settings.aux_loss_coef) * losses.balance
            + f64::from(self.settings.z_loss_coef) * losses.z;
        let judgement = self.guard.judge(&examples, Observed { loss: total, gradient_norm });
        let learning_rate = match judgement.verdict {
            Verdict::Apply { learning_rate_factor } => self.schedule.at(step) * learning_rate_factor,
            Verdict::Skip | Verdict::Stop => 0.0,
        };
        if let Verdict::Apply { .. } = judgement.verdict {
            self.optimizer.update(&self.compute.pool, &mut self.trainer.parameters, &gradients, learning_rate)?;
            self.trainer.write_back()?;
            self.position.logits.resize(losses.logits.len(), LogitMoments::default());
            self.position.logits.iter_mut().zip(&losses.logits).for_each(|(sums, logits)| sums.add(*logits));
        }
        self.position.step += 1;
        self.position.drawn += u64::from(is_new);
        self.position.guard = self.guard.state().clone();
        for event in &judgement.events {
            self.tell(step, event)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let reads = self.store.as_ref().zip(before).map(|(store, before)| store.counters().since(&before));
        let read_seconds = reads.as_ref().map_or(0.0, |reads| reads.stalled.as_secs_f64());
        let line = StepLine {
            step,
            epoch: self.data.epoch_after(self.position.drawn),
            loss: losses.cross_entropy,
            accuracy: losses.correct as f64 / losses.targets.max(1) as f64,
            aux_loss: f64::from(self.settings.aux_loss_coef) * losses.balance,
            z_loss: f64::from(self.settings.z_loss_coef) * losses.z,
            grad_norm: gradient_norm,
            learning_rate,
            tokens: losses.tokens as u64,
            seconds,
            tokens_per_second: losses.tokens as f64 / seconds,
            compute_ms: (seconds - read_seconds) * 1e3,
            read_ms: read_seconds * 1e3,
            peak_memory_bytes: host::peak_rss_bytes().unwrap_or(0),
            expert_hits: reads.as_ref().map_or(0, |reads| reads.hits()),
            expert_misses: reads.as_ref().map_or(0, |reads| reads.misses()),
            expert_entropy: entropies(&losses.loads),
            busiest_expert: busiest(&losses.loads),
            idle_experts: idle(&losses.loads),
        };
        self.report_step(line)?;
        if judgement.verdict == Verdict::Stop {
            self.save()?;
            bail!(
                "the loss or the gradients have spiked for too many steps in a row: lower --learning-rate, or look at the data that the log names"
            );
        }
        Ok(())
    }

    fn report_step(&mut self, line: StepLine) -> Result<()> {
        self.watcher.step(&line);
        let step = line.step;
        let before = self.unlogged.take();
        self.unlogged = Some(before.map_or(line.clone(), |before| line.with(&before)));
        if step.is_multiple_of(self.settings.log_every) || step + 1 == self.steps { self.log_steps() } else { Ok(()) }
    }

    /// Logs the steps since the last line.
    fn log_steps(&mut self) -> Result<()> {
        let Some(line) = self.unlogged.take() else { return Ok(()) };
        if let Some(events) = &mut self.events {
            let scalars = [
                ("train/loss", line.loss),
                ("train/accuracy", line.accuracy),
                ("train/grad_norm", line.grad_norm),
                ("train/learning_rate", line.learning_rate),
                ("train/tokens_per_second", line.tokens_per_second),
                ("train/aux_loss", line.aux_loss),
                ("train/z_loss", line.z_loss),
                ("train/expert_entropy", mean(&line.expert_entropy)),
                ("train/busiest_expert", mean(&line.busiest_expert)),
                ("train/idle_experts", line.idle_experts.iter().sum::<u64>() as f64),
            ];
            events.write(line.step, SystemTime::now(), &scalars)?;
        }
        self.log.append(&Line::Step(line))
    }

    fn tell(&mut self, step: u64, event: &Event) -> Result<()> {
        let examples = match event {
            Event::Skipped { examples, .. } | Event::Recovered { examples } | Event::Dropped { examples, .. } => {
                examples.clone()
            }
            Event::LearningRateLowered { .. } | Event::LearningRateRestored => Vec::new(),
        };
        self.decided(step, event.to_string(), examples)
    }

    fn decided(&mut self, step: u64, decision: String, examples: Vec<u64>) -> Result<()> {
        self.watcher.guard(step, &decision);
        self.log.append(&Line::Guard(GuardLine { step, decision, examples }))
    }

    fn evaluate(&mut self) -> Result<()> {
        let Some(eval) = &self.eval else { return Ok(()) };
        let (mut loss, mut targets, mut correct) = (0.0, 0, 0);
        for batches in eval.steps_of_first(eval.examples().len(), self.size) {
            let found = self.trainer.losses(&batches?)?;
            loss += found.cross_entropy * found.targets as f64;
            (targets, correct) = (targets + found.targets, correct + found.correct);
        }
        let (loss, accuracy) = (loss / targets as f64, correct as f64 / targets as f64);
        let step = self.position.step;
        let line = EvaluationLine { step, loss, accuracy };
        self.watcher.evaluated(&line);
        if let Some(events) = &mut self.events {
            let scalars = [("eval/loss", loss), ("eval/accuracy", accuracy)];
            events.write(step, SystemTime::now(), &scalars)?;
        }
        self.log.append(&Line::Evaluation(line))
    }

    fn save(&mut self) -> Result<()> {
        // What a checkpoint's steps took is then in the log that a resumed run goes on with.
        self.log_steps()?;
        let (output, keep) = (&self.settings.output, self.settings.keep);
        let state = self.optimizer.state();
        let files = self.files.as_ref();
        checkpoint::save(output, &self.position, files, &self.trainer.parameters, state, &self.deciding, keep)?;
        self.watcher.saved(self.position.step);
        Ok(())
    }

    /// How often each expert was chosen in the first examples before the run's first step.
    fn load_before(&mut self) -> Result<Vec<Vec<u64>>> {
        let first =
            self.lines()?.into_iter().find_map(|line| if let Line::Routing(line) = line { Some(line) } else { None });
        first.map_or_else(|| self.log_expert_load(), |line| Ok(line.loads))
    }

    /// Logs how often each expert is chosen now in the first examples, and returns it.
    fn log_expert_load(&mut self) -> Result<Vec<Vec<u64>>> {
        let data = self.eval.as_ref().unwrap_or(&self.data);
        let loads = expert_loads(&self.trainer, data, LOAD_TOKENS, self.size)?;
        self.log.append(&Line::Routing(RoutingLine { step: self.position.step, loads: loads.clone() }))?;
        Ok(loads)
    }

    /// The lines of the log.
    fn lines(&self) -> Result<Vec<Line>> {
        StepLog::read(&self.settings.output.join(LOG_FILE))
    }

    /// Leaves what was made; of a run that had ended before, what is missing.
    fn finish(mut self, stop: &AtomicBool) -> Result<String> {
        let step = self.position.step;
        let (mut is_evaluated, mut after) = (false, None);
        for line in self.lines()? {
            match line {
                Line::Evaluation(line) if line.step == step => is_evaluated = true,
                Line::Routing(line) if line.step == step => after = Some(line.loads),
                _ => {}
            }
        }
        if !is_evaluated {
            self.evaluate()?;
        }
        self.save()?;
        let after = after.map_or_else(|| self.log_expert_load(), Ok)?;
        for KeptBatch { examples, .. } in self.position.guard.kept.clone() {
            let decision = format!("the run has ended: examples {examples:?} were skipped, and not tried again");
            self.decided(step, decision, examples)?;
        }
        let output = &self.settings.output;
        let parameters = &self.trainer.parameters;
        let what = match &self.files {
            Some(files) => {
                files.write(output, parameters)?;
                check_saved(output, files)?;
                format!("{} holds the adapter", output.display())
            }
            None => write_model(&self.checkpoint, parameters, &output.join(MODEL_DIRECTORY), stop)?,
        };
        self.write_report(after)?;
        let peak = host::peak_rss_bytes().unwrap_or(0);
        let beyond = match self.budget {
            Some(budget) if peak > budget => format!(", which is more than the {} allowed", mebibytes(budget)),
            _ => String::new(),
        };
        Ok(format!(
            "{what}; peak memory {}, planned {}{beyond}; {} tells the rest",
            mebibytes(peak),
            mebibytes(self.planned_peak),
            output.join(REPORT_FILE).display()
        ))
    }

    fn write_report(&self, after: Vec<Vec<u64>>) -> Result<()> {
        let output = &self.settings.output;
        let lines = self.lines()?;
        let settings = self.settings.table(self.checkpoint.name());
        let layers: Vec<usize> = (0..after.len()).filter(|&layer| !after[layer].is_empty()).collect();
        let of = |loads: &[Vec<u64>]| layers.iter().map(|&layer| loads[layer].clone()).collect();
        let expert_load = (!layers.is_empty() && self.load_before.len() == after.len()).then(|| ExpertLoad {
            before: of(&self.load_before),
            after: of(&after),
            layers: layers.clone(),
        });
        let price_per_hour = self.settings.price_per_hour;
        let report = Report { title: &self.title, settings: &settings, lines: &lines, expert_load, price_per_hour };
        let path = output.join(REPORT_FILE);
        fs::write(&path, report.to_string()).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Writes the checkpoint with its trained weights, and says what is there then.
fn write_model(checkpoint: &Checkpoint, parameters: &Parameters, output: &Path, stop: &AtomicBool) -> Result<String> {
    let written = progress::weights("writing the model", |on_bytes| {
        rewrite::write_checkpoint(checkpoint, parameters, &Rewriting { output, dtype: None, stop, on_bytes })
    })?;
    let (trained, unchanged) = (written.changes.len(), written.unchanged().count());
    ensure!(
        unchanged < trained,
        "the checkpoint in {} is the one from before: no step was applied, or all changes were lost in rounding",
        output.display()
    );
    Ok(format!(
        "{} holds the model, with {} of {trained} trained tensors changed",
        output.display(),
        trained - unchanged
    ))
}

/// Reads the adapter back: what was written must be what was trained.
fn check_saved(output: &Path, files: &AdapterFiles) -> Result<()> {
    let delta = files.delta_on_disk(output)?;
    ensure!(
        delta > 0.0,
        "the adapter in {} changes nothing: no step was applied, or the file was not written",
        output.display()
    );
    Ok(())
}

fn shown(files: &[std::path::PathBuf]) -> String {
    files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// The entropy of the experts' load as a part of the greatest possible, for each layer with a router.
fn entropies(loads: &[Vec<u64>]) -> Vec<f64> {
    let of_layer = |load: &Vec<u64>| {
        let total = load.iter().sum::<u64>() as f64;
        let shares = load.iter().filter(|count| **count > 0).map(|count| *count as f64 / total);
        -shares.map(|share| share * share.ln()).sum::<f64>() / (load.len() as f64).ln()
    };
    loads.iter().filter(|load| load.len() > 1).map(of_layer).collect()
}

/// The part of the choices that the most used expert got, for each layer with a router.
fn busiest(loads: &[Vec<u64>]) -> Vec<f64> {
    let of_layer = |load: &Vec<u64>| {
        let total = load.iter().sum::<u64>() as f64;
        load.iter().max().map_or(0.0, |most| *most as f64 / total)
    };
    loads.iter().filter(|load| load.len() > 1).map(of_layer).collect()
}

/// Experts without a token, for each layer with a router.
fn idle(loads: &[Vec<u64>]) -> Vec<u64> {
    let of_layer = |load: &Vec<u64>| load.iter().filter(|count| **count == 0).count() as u64;
    loads.iter().filter(|load| load.len() > 1).map(of_layer).collect()
}
