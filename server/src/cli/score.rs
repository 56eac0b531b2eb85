//! `cadre score`.

use std::{
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use cadre_models::Checkpoint;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    EngineArgs, at_least_one, deciding, price,
    terminal::{INTERRUPTED, stop_at_signal},
};
use crate::{
    engine::{self, EngineOptions},
    lines::{
        input::{Input, Scan},
        manifest::Manifest,
        output::{Output, Resumed},
    },
    score::{
        item::Reader,
        lane::{Lane, LaneKind},
        result::Teller,
        run::{self, Scorer, Status, Totals},
    },
};

/// Tokens that are looked at together when no flag says how many, if the model was made for so many.
const MAX_MODEL_LEN: usize = 4096;

/// Flags of `cadre score`.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// Items, one a line: `text`; or `prompt` with `completion`, `choices` or `labels`; and an `id` if you like. `-` is standard
    /// input. May be compressed by gzip or zstd
    #[arg(short, long, alias = "input-file", value_name = "FILE")]
    input: String,

    /// The file that gets the scores of each, compressed if it ends in `.gz` or `.zst`; `-` is standard output. Run again, the
    /// same command goes on with it. What failed is also in `<FILE>.errors.jsonl`
    #[arg(short, long, alias = "output-file", value_name = "FILE")]
    output: String,

    /// Also tell the log-probability of each token
    #[arg(long)]
    token_logprobs: bool,

    /// How far a window lies behind the one before it, where a text is longer than --max-model-len: each token is scored once,
    /// after at least --max-model-len less --stride others [default: half of --max-model-len]
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    stride: Option<usize>,

    /// Go on with an output that another model, other flags or another input began
    #[arg(long)]
    force: bool,

    /// The way that texts go through the model; all give the same scores
    #[arg(long, value_enum, default_value_t = LaneArg::Auto, help_heading = "Engine")]
    lane: LaneArg,

    /// Tokens that go through the model together, layer by layer: each of its weights is read once for them
    #[arg(long, value_name = "TOKENS", default_value_t = 32768, value_parser = at_least_one, help_heading = "Engine")]
    super_batch: usize,

    /// What the machine costs an hour: the summary tells what a million tokens cost
    #[arg(long, value_name = "PRICE", value_parser = price)]
    price_per_hour: Option<f64>,

    /// Sequences that one step takes at most
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Engine", value_parser = at_least_one)]
    max_num_seqs: usize,

    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LaneArg {
    /// Layer by layer if memory doesn't hold the model, else by steps
    Auto,
    /// As the server computes requests, a few at a time through all layers
    Steps,
    /// A super-batch through one layer after the other
    Layers,
}

/// Scores all items that aren't scored yet.
///
/// # Errors
/// When the input can't be read, the output is another run's or can't be written, or the model can't be loaded or read.
pub fn run(args: &ScoreArgs) -> Result<()> {
    ensure!(
        !Output::would_replace(&args.output, &args.input),
        "the output {} would be written over the input {}: give another --output",
        args.output,
        args.input
    );
    let folder = Output::folder(&args.output);
    let input = Input::open(&args.input, &folder)?;
    let scan = input.scan(|_| ())?;
    let options = args.engine.options(args.max_num_seqs);
    let model = engine::open(options.model.as_deref())?;
    let (options, stride) = args.lengths(options, &model)?;
    let max_model_len = options.max_model_len.unwrap_or(MAX_MODEL_LEN);
    let manifest = args.manifest(&scan, &options, stride, &model)?;
    let mut output = Output::open(&args.output)?;
    output.check(&input, &manifest, args.force)?;
    let errors = output.errors();
    let Resumed { done, lines, failed } = output.resume(&scan, run::told)?;
    if lines == scan.lines {
        eprintln!("{lines} lines are done, {failed} of them failed: there is nothing to do for {}", args.output);
        return Ok(());
    }
    if lines > 0 {
        eprintln!("{lines} of {} lines are done: going on", scan.lines);
    }

    let tokenizer = model.tokenizer()?;
    let vocab_size = model.summary()?.vocab_size.and_then(|size| usize::try_from(size).ok());
    let vocab_size = vocab_size.unwrap_or_else(|| tokenizer.vocab_size());
    let reader = Reader { tokenizer: tokenizer.clone(), vocab_size, window: max_model_len, stride };
    let teller = Teller { tokenizer, token_logprobs: args.token_logprobs };
    let lane = Lane::start(&options, args.lane.kind(), args.super_batch, max_model_len, folder)?;
    let mut scorer = Scorer { lane, reader, teller, rows: args.super_batch };
    let mut writer = output.begin(&manifest, &done, true)?;
    let stop: &AtomicBool = &*stop_at_signal()?;
    let mut progress = Progress::new(lines, scan.lines);
    let mut lines = input.lines(&scan)?;
    let ended = scorer.run(&mut lines, &done, &mut writer, stop, |status| progress.show(status));
    progress.bar.finish_and_clear();
    if let Some(read) = scorer.lane.end() {
        eprintln!("{read}");
    }
    let finished = ended?;
    eprintln!("{}", progress.summary(args.price_per_hour));
    if let Some(errors) = errors.filter(|_| progress.totals.failed > 0) {
        eprintln!("what failed is in {}", errors.display());
    }
    if !finished {
        eprintln!("stopped: the same command goes on");
        std::process::exit(INTERRUPTED);
    }
    Ok(())
}

impl ScoreArgs {
    /// The options with the length that is looked at together, and the stride.
    fn lengths(&self, options: EngineOptions, model: &Checkpoint) -> Result<(EngineOptions, usize)> {
        let trained = model.summary()?.max_position_embeddings.and_then(|length| usize::try_from(length).ok());
        let default = trained.map_or(MAX_MODEL_LEN, |trained| trained.min(MAX_MODEL_LEN));
        let length = options.max_model_len.unwrap_or(default);
        if let Some(trained) = trained {
            ensure!(length <= trained, "--max-model-len is {length}, but the model's positions end at {trained}");
        }
        ensure!(length >= 2, "--max-model-len is {length}: a token is scored after another one, at least 2 are needed");
        let stride = self.stride.unwrap_or((length / 2).max(1));
        ensure!(stride < length, "--stride is {stride}: expected less than --max-model-len, which is {length}");
        Ok((EngineOptions { max_model_len: Some(length), large_kv: true, ..options }, stride))
    }

    /// What decides the scores' bytes.
    fn manifest(&self, scan: &Scan, options: &EngineOptions, stride: usize, model: &Checkpoint) -> Result<Manifest> {
        let mut manifest = Manifest::new(scan, deciding(options, model)?);
        manifest.set("max_model_len", options.max_model_len.into());
        manifest.set("stride", stride.into());
        manifest.set("token_logprobs", self.token_logprobs.into());
        Ok(manifest)
    }
}

impl LaneArg {
    fn kind(self) -> Option<LaneKind> {
        match self {
            Self::Auto => None,
            Self::Steps => Some(LaneKind::Steps),
            Self::Layers => Some(LaneKind::Layers),
        }
    }
}

/// A run on standard error.
struct Progress {
    bar: ProgressBar,
    before: u64,
    totals: Totals,
    started: Instant,
}

impl Progress {
    /// Of a run that has done `before` of `lines` before.
    fn new(before: u64, lines: u64) -> Self {
        let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} lines {msg} eta {eta}");
        let bar = ProgressBar::new(lines).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_position(before);
        bar.reset_eta();
        Self { bar, before, totals: Totals::default(), started: Instant::now() }
    }

    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "for show"
    )]
    fn show(&mut self, Status { totals, lines, part }: Status) {
        self.totals = totals;
        self.bar.set_position(self.before + totals.lines + (lines as f64 * part) as u64);
        if totals.batches > 0 {
            let rate = totals.tokens as f64 / self.started.elapsed().as_secs_f64();
            self.bar.set_message(format!("{rate:.0} tokens/s"));
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
    fn summary(&self, price_per_hour: Option<f64>) -> String {
        let Totals { lines, failed, tokens, rows, batches } = self.totals;
        let elapsed: Duration = self.started.elapsed();
        let seconds = elapsed.as_secs_f64();
        let mut text = format!(
            "{lines} lines in {seconds:.1} s, {failed} of them failed\n{tokens} tokens, {:.0} tokens/s; at most {rows} of them were \
             computed, in {batches} super-batches",
            tokens as f64 / seconds
        );
        if let Some(price) = price_per_hour.filter(|_| tokens > 0) {
            let cost = price * seconds / 3600.0 / tokens as f64 * 1e6;
            text += &format!("\na million tokens cost {cost:.4} ({price} an hour × {seconds:.1} s ÷ {tokens} tokens)");
        }
        text
    }
}
