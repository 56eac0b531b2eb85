//! The command line: one subcommand, one file. What several share is here: the engine's flags, sizes, logging.

mod batch;
mod bench;
mod chat;
mod finetune;
mod generate;
mod inspect;
mod merge;
mod pack;
mod plan;
mod score;
mod serve;
mod terminal;

use std::{path::PathBuf, str::FromStr};

use anyhow::Result;
use cadre_engine::compute::Compute;
use cadre_engine::{kv::KvDtype, nn::Format};
use cadre_models::{Checkpoint, FormatOptions};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::{Map, Value};
use tracing_subscriber::EnvFilter;

use crate::{adapters::AdapterSource, engine::EngineOptions, finetune::FinetuneArgs, score::pairs::PairOptions};

/// Serves mixture-of-experts language models on small hardware.
#[derive(Debug, Parser)]
#[command(name = "cadre", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer OpenAI-compatible requests over HTTP
    Serve(serve::ServeArgs),
    /// Answer one prompt on standard output
    Generate(generate::GenerateArgs),
    /// Talk with the model in this terminal
    Chat(chat::ChatArgs),
    /// Tell how likely the texts of a file are: log-likelihoods, choices, labels
    Score(score::ScoreArgs),
    /// Show what a checkpoint is: architecture, parameters, bytes by part, chat template
    Inspect(inspect::InspectArgs),
    /// Write a checkpoint whose weights lie as they are computed with, quantised if asked for
    Pack(pack::PackArgs),
    /// Tell how a model would divide the memory, and how fast it would be on this machine
    Plan(plan::PlanArgs),
    /// Answer the requests of a file, as many at once as memory holds; run again, it goes on where it was
    Batch(batch::BatchArgs),
    /// Fine-tune the weights that are served: LoRA adapters of attention, experts and the rest
    Finetune(Box<FinetuneArgs>),
    /// Merge an adapter into a checkpoint's weights, or average the last checkpoints of a fine-tuning run
    Merge(merge::MergeArgs),
    /// Measure prefill and decode throughput and peak memory
    Bench(bench::BenchArgs),
}

/// Parses the command line and runs its subcommand.
///
/// # Errors
/// When the subcommand fails.
pub fn run() -> Result<()> {
    let cli = Cli::parse();
    log_to_stderr(matches!(cli.command, Command::Serve(_)));
    Compute::check_tier()?;
    match cli.command {
        Command::Serve(args) => serve::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Pack(args) => pack::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Batch(args) => batch::run(&args),
        Command::Finetune(args) => finetune::run(*args),
        Command::Merge(args) => merge::run(&args),
        Command::Bench(args) => bench::run(&args),
    }
}

/// What `RUST_LOG` asks for; without it a server tells what it does, and the rest only what goes wrong.
fn log_to_stderr(server: bool) {
    let default = if server { "warn,cadre=info,cadre_engine=info,cadre_models=info" } else { "warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
}

/// The flags of every subcommand that runs a model.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
struct EngineArgs {
    /// A checkpoint's directory or its id on the Hugging Face hub [default: the embedded model]
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,

    /// Worker threads [default: one a physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,

    #[command(flatten)]
    formats: FormatArgs,

    /// The KV cache's format
    #[arg(long, value_enum, default_value_t = KvDtypeArg::Auto)]
    kv_dtype: KvDtypeArg,

    /// Memory for the whole process, such as 8GiB: experts that don't fit are read from disk as they are needed
    /// [default: all weights in memory, or nine tenths of what is free if they don't fit]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    memory: Option<u64>,

    /// Memory for the KV cache, such as 512MiB [default: up to 512MiB, no more than the sequences can use, than a quarter
    /// of the free memory, and than an eighth of --memory; of batch and score up to half of the free memory, or a quarter of
    /// --memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    kv_memory: Option<u64>,

    /// The longest sequence, prompt and answer, in tokens [default: what the model was made for, if the KV cache
    /// holds it; of score at most 4096]
    #[arg(long, value_name = "TOKENS", value_parser = at_least_one)]
    max_model_len: Option<usize>,

    /// Tokens that one step takes at most; more prefill a little faster, or much if experts are read from a slow disk;
    /// fewer let others wait less
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = at_least_one)]
    max_num_batched_tokens: usize,

    /// While the disk has nothing else to do, read experts that the next layer's router would choose for the hidden
    /// states of this one, in place of those that are used in more than half of the steps
    #[arg(long)]
    predict_experts: bool,

    /// Write which experts each step used into this file, a JSON line a step, for the cache simulator in benches;
    /// a file that is there is replaced
    #[arg(long, value_name = "FILE")]
    trace_routing: Option<PathBuf>,
}

impl EngineArgs {
    fn options(&self, max_num_seqs: usize) -> EngineOptions {
        EngineOptions {
            model: self.model.clone(),
            served_names: Vec::new(),
            threads: self.threads.map(usize::from),
            memory: self.memory,
            kv_memory: self.kv_memory,
            large_kv: false,
            max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: self.max_model_len,
            formats: self.formats.options(),
            kv_dtype: self.kv_dtype.into(),
            prefix_caching: true,
            trace_routing: self.trace_routing.clone(),
            routing_profile: true,
            predict_experts: self.predict_experts,
            return_routed_experts: false,
            adapters: Vec::new(),
            adapter_folder: None,
            finetunes: false,
            adapter_memory: None,
            pairs: PairOptions::default(),
        }
    }
}

/// How pairs of texts are scored, by `/v1/score` and `/v1/rerank`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Scores of pairs")]
struct PairArgs {
    /// A Jinja file that makes a prompt of `messages` with the roles `query` and `document` [default: a question by the chat
    /// template]
    #[arg(long, value_name = "FILE")]
    score_template: Option<PathBuf>,

    /// Labels of a token each that may follow the prompt: a pair's score is the probability of the first one among them
    /// [default: yes,no]
    #[arg(long, value_name = "LABEL,...", value_delimiter = ',')]
    score_labels: Vec<String>,
}

impl PairArgs {
    fn options(&self) -> PairOptions {
        PairOptions { template: self.score_template.clone(), labels: self.score_labels.clone() }
    }
}

/// What of the engine's flags decides the bytes of a resumable run, by name.
fn deciding(options: &EngineOptions, model: &Checkpoint) -> Result<Map<String, Value>> {
    let formats = options.formats;
    let name = |value: Option<String>| value.map_or(Value::Null, Value::from);
    let deciding = [
        ("model", model.fingerprint()?.into()),
        ("format", name(formats.format.map(|format| format.to_string()))),
        ("experts_format", name(formats.experts.map(|format| format.to_string()))),
        ("dense_format", name(formats.dense.map(|format| format.to_string()))),
        ("kv_dtype", name(options.kv_dtype.map(|dtype| dtype.to_string()))),
        ("instructions", Compute::new(1).isa.to_string().into()),
    ];
    Ok(deciding.map(|(name, value)| (name.to_owned(), value)).into_iter().collect())
}

/// The flags that say what weights are packed as.
#[derive(Debug, Clone, Args)]
struct FormatArgs {
    /// The weights' format: auto (what loses nothing: bf16 stays bf16, f32 and f16 become f32), f32, bf16, q8_0, q4_0,
    /// q4_k, q6_k or mxfp4. Norms, routers and the embedding are never quantised
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    format: FormatArg,

    /// The routed experts' format, where it is another
    #[arg(long, value_name = "FORMAT")]
    experts_format: Option<Format>,

    /// The format of all other weights, where it is another
    #[arg(long, value_name = "FORMAT")]
    dense_format: Option<Format>,
}

impl FormatArgs {
    fn options(&self) -> FormatOptions {
        FormatOptions { format: self.format.0, experts: self.experts_format, dense: self.dense_format }
    }
}

/// A format's name; none is `auto`.
#[derive(Debug, Clone, Copy)]
struct FormatArg(Option<Format>);

impl FromStr for FormatArg {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if name == "auto" {
            return Ok(Self(None));
        }
        name.parse().map(|format| Self(Some(format))).map_err(|error| format!("{error}, or auto"))
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum KvDtypeArg {
    /// f32 where the weights are f32, bf16 elsewhere
    Auto,
    /// 32 bits
    F32,
    /// 16 bits
    Bf16,
    /// 8 bits, and a scale a token and head
    Int8,
}

impl From<KvDtypeArg> for Option<KvDtype> {
    fn from(arg: KvDtypeArg) -> Self {
        match arg {
            KvDtypeArg::Auto => None,
            KvDtypeArg::F32 => Some(KvDtype::F32),
            KvDtypeArg::Bf16 => Some(KvDtype::Bf16),
            KvDtypeArg::Int8 => Some(KvDtype::Int8),
        }
    }
}

/// `NAME=DIR`
fn adapter_source(text: &str) -> Result<AdapterSource, String> {
    match text.split_once('=') {
        Some((name, directory)) if !name.is_empty() && !directory.is_empty() => {
            Ok(AdapterSource { name: name.to_owned(), directory: directory.into() })
        }
        _ => Err(format!("expected NAME=DIR, found `{text}`")),
    }
}

/// A count that may not be 0.
fn at_least_one(text: &str) -> Result<usize, String> {
    let count = text.parse().map_err(|_| format!("expected a whole number, found `{text}`"))?;
    if count == 0 { Err("expected at least 1, found 0".to_owned()) } else { Ok(count) }
}

/// What an hour costs: as `cadre finetune` takes it.
fn price(text: &str) -> Result<f64, String> {
    let price = text.parse().map_err(|_| format!("expected a number, found `{text}`"))?;
    if (0.0..=1e9).contains(&price) { Ok(price) } else { Err(format!("expected 0 to 1000000000, found {text}")) }
}

/// A size: a number with a unit (`KiB`, `MiB`, `GiB`, `TiB`, `KB`, `MB`, `GB`, `TB`; `K`, `M`, `G`, `T` are the
/// binary ones), or bytes.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("`{unit}` is no unit of size: expected KiB, MiB, GiB, KB, MB or GB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("expected a size such as 512MiB, found `{text}`"))?;
    #[expect(clippy::cast_precision_loss, reason = "the factors are small powers")]
    let bytes = number * factor as f64;
    if !(1.0..1e18).contains(&bytes) {
        return Err(format!("expected a size between 1 byte and 10^18 bytes, found `{text}`"));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("512MiB", 512 << 20), ("1g", 1 << 30), ("1.5 GiB", 3 << 29), ("2GB", 2_000_000_000), ("77", 77)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        for text in ["", "MiB", "1 parsec", "-1", "0", "1e99", "1.2.3M"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn defaults_as_documented() {
        let cli = Cli::parse_from(["cadre", "serve"]);
        let Command::Serve(args) = cli.command else { panic!("not serve: {cli:?}") };
        assert_eq!((args.host.as_str(), args.port), ("127.0.0.1", 8000));
    }
}
