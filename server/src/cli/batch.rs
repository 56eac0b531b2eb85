//! `cadre batch`.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use super::{
    EngineArgs, PairArgs, adapter_source, at_least_one, deciding, price,
    terminal::{INTERRUPTED, stop_at_signal},
};
use crate::{
    adapters::AdapterSource,
    batch::{
        Answered, Answerer, duplicates,
        result::told,
        run::{self, Ended, Limits},
        totals::Totals,
    },
    engine::{self, Engine, EngineOptions},
    http::{App, HttpOptions},
    lines::{
        input::{Input, MAX_LINE_BYTES, Scan},
        manifest::Manifest,
        output::{Output, Resumed},
    },
    metrics,
    profile::KeptProfile,
};

/// Lines under way for each sequence of a step: the next ones are there before one ends.
const LINES_PER_SEQUENCE: usize = 2;
/// Lines of a window for each sequence of a step.
const WINDOW_PER_SEQUENCE: usize = 32;
/// The same where lines wait for each other: what waits is lost by a kill.
const ORDERED_WINDOW_PER_SEQUENCE: usize = 4;
/// Names in the manifest of what the first run decides for all.
const CREATED: &str = "created";
const MAX_MODEL_LEN: &str = "max_model_len";

/// Flags of `cadre batch`.
#[derive(Debug, Args)]
pub struct BatchArgs {
    /// Requests as OpenAI's batch API takes them, one a line: `custom_id`, `method`, `url`, `body`; `-` is standard input. May be
    /// compressed by gzip or zstd
    #[arg(short, long, alias = "input-file", value_name = "FILE")]
    input: String,

    /// The file that gets an answer for each, compressed if it ends in `.gz` or `.zst`; `-` is standard output. Run again, the
    /// same command goes on with it. What failed is also in `<FILE>.errors.jsonl`
    #[arg(short, long, alias = "output-file", value_name = "FILE")]
    output: String,

    /// Write the answers in the order of the requests, not as they finish
    #[arg(long)]
    ordered: bool,

    /// Go on with an output that another model, other flags or another input began
    #[arg(long)]
    force: bool,

    /// The draws of requests that give no seed themselves; the same seed gives the same answers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// What the machine costs an hour: the summary tells what a million tokens cost
    #[arg(long, value_name = "PRICE", value_parser = price)]
    price_per_hour: Option<f64>,

    /// The model's name in requests and answers; may be given several times [default: as --model, or its last part]
    #[arg(long = "served-model-name", value_name = "NAME")]
    served_model_name: Vec<String>,

    /// A LoRA adapter, as PEFT saves it, for the requests that name it as their model; may be given several times
    #[arg(long = "adapter", alias = "lora-modules", value_name = "NAME=DIR", num_args = 1.., value_parser = adapter_source)]
    adapters: Vec<AdapterSource>,

    /// Sequences that one step takes at most
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Engine", value_parser = at_least_one)]
    max_num_seqs: usize,

    #[command(flatten)]
    pairs: PairArgs,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Answers all requests that aren't answered yet.
///
/// # Errors
/// When the input can't be read or has two requests of one `custom_id`, the output is another run's or can't be written, or
/// the model can't be loaded.
pub fn run(args: &BatchArgs) -> Result<()> {
    ensure!(
        !Output::would_replace(&args.output, &args.input),
        "the output {} would be written over the input {}: give another --output",
        args.output,
        args.input
    );
    let input = Input::open(&args.input, &Output::folder(&args.output))?;
    let scan = duplicates::scan(&input, duplicates::MOST_HASHES).with_context(|| args.input.clone())?;
    let mut manifest = args.manifest(&scan)?;
    let mut output = Output::open(&args.output)?;
    let before = output.check(&input, &manifest, args.force)?;
    let errors = output.errors();
    let Resumed { done, lines, failed } = output.resume(&scan, told)?;
    if lines == scan.lines {
        eprintln!("{lines} lines are done, {failed} of them failed: there is nothing to do for {}", args.output);
        return Ok(());
    }
    if lines > 0 {
        eprintln!("{lines} of {} lines are done: going on", scan.lines);
    }

    let decided = |name: &str| before.as_ref().and_then(|before| before.get(name)).and_then(Value::as_u64);
    let mut options = args.options();
    options.max_model_len =
        options.max_model_len.or_else(|| decided(MAX_MODEL_LEN).and_then(|tokens| usize::try_from(tokens).ok()));
    let Engine { runtime, served, store, profile, .. } = engine::start(&options)?;
    let created = decided(CREATED).unwrap_or_else(|| seconds(input.modified()));
    manifest.set(CREATED, created.into());
    manifest.set(MAX_MODEL_LEN, served.max_model_len.into());
    let writer = output.begin(&manifest, &done, args.ordered)?;

    let http = HttpOptions { max_body_bytes: MAX_LINE_BYTES, ..HttpOptions::default() };
    let app = Arc::new(App::new(metrics::exporter()?.build_recorder().handle(), http, None));
    app.ready(served);
    let answerer = Answerer::new(app, args.seed, created);
    let stop = stop_at_signal()?;
    let mut progress = Progress::new(lines, scan.lines);
    let async_runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let lines = input.lines(&scan)?;
    let running = run::run(answerer, lines, done, writer, args.limits(), &stop, |answered| progress.add(answered));
    let ended = async_runtime.block_on(running);
    progress.bar.finish_and_clear();
    // Work of lines that nobody waits for any more may still be under way.
    async_runtime.shutdown_background();
    runtime.shutdown(Duration::ZERO);
    if let Some(store) = store {
        eprintln!("{}", store.counters());
    }
    profile.iter().for_each(KeptProfile::keep);
    let ended = ended?;
    eprintln!("{}", progress.totals.summary(progress.started.elapsed(), args.price_per_hour));
    if let Some(errors) = errors.filter(|_| progress.totals.failed > 0) {
        eprintln!("what failed is in {}", errors.display());
    }
    if ended == Ended::Stopped {
        eprintln!("stopped: the same command goes on");
        std::process::exit(INTERRUPTED);
    }
    Ok(())
}

impl BatchArgs {
    fn options(&self) -> EngineOptions {
        EngineOptions {
            served_names: self.served_model_name.clone(),
            adapters: self.adapters.clone(),
            large_kv: true,
            pairs: self.pairs.options(),
            ..self.engine.options(self.max_num_seqs)
        }
    }

    fn limits(&self) -> Limits {
        let per_sequence = if self.ordered { ORDERED_WINDOW_PER_SEQUENCE } else { WINDOW_PER_SEQUENCE };
        Limits {
            in_flight: self.max_num_seqs.saturating_mul(LINES_PER_SEQUENCE),
            window: self.max_num_seqs.saturating_mul(per_sequence),
        }
    }

    /// What decides the answers' bytes, as far as it is known before the model is loaded.
    fn manifest(&self, scan: &Scan) -> Result<Manifest> {
        let options = self.options();
        let model = engine::open(options.model.as_deref())?;
        let mut adapters = Map::new();
        for source in &self.adapters {
            let fingerprint = source.fingerprint();
            let fingerprint = fingerprint.with_context(|| format!("cannot read the adapter {}", source.name))?;
            adapters.insert(source.name.clone(), fingerprint.into());
        }
        let mut manifest = Manifest::new(scan, deciding(&options, &model)?);
        manifest.set("names", engine::served_names(&options, &model).into());
        manifest.set("adapters", adapters.into());
        manifest.set("score_labels", self.pairs.score_labels.clone().into());
        if let Some(path) = &self.pairs.score_template {
            manifest.set("score_template", model.template_of(path).context("--score-template")?.source().into());
        }
        manifest.set("ordered", self.ordered.into());
        manifest.set("seed", self.seed.into());
        if let Some(tokens) = options.max_model_len {
            manifest.set(MAX_MODEL_LEN, tokens.into());
        }
        Ok(manifest)
    }
}

/// Seconds since 1970, up to now if nobody knows.
fn seconds(time: Option<SystemTime>) -> u64 {
    let time = time.unwrap_or_else(SystemTime::now);
    time.duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs())
}

/// A run on standard error.
struct Progress {
    bar: ProgressBar,
    totals: Totals,
    started: Instant,
}

impl Progress {
    /// Of a run that has done `done` of `lines` before.
    fn new(done: u64, lines: u64) -> Self {
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} lines {msg} eta {eta}");
        let bar = ProgressBar::new(lines).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_position(done);
        bar.reset_eta();
        Self { bar, totals: Totals::default(), started: Instant::now() }
    }

    fn add(&mut self, answered: &Answered) {
        self.totals.add(answered);
        self.bar.inc(1);
        self.bar.set_message(self.totals.rates(self.started.elapsed()));
    }
}
