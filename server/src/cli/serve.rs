//! `cadre serve`.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, anyhow};
use cadre_engine::runtime::Runtime;
use clap::Args;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    time::{interval, timeout},
};

use super::{EngineArgs, adapter_source, at_least_one, parse_bytes};
use crate::{
    adapters::AdapterSource,
    engine::{self, EngineOptions},
    finetune::{
        Weights,
        jobs::{Base, Jobs, Runner},
    },
    http::{self, App, HttpOptions},
    metrics,
    profile::KeptProfile,
    storage::Storage,
};

/// How long requests under way may go on once the server was told to end. With the moments for telling clients
/// and joining the engine, the process ends within five seconds, if it trains nothing.
const DRAIN: Duration = Duration::from_millis(3500);
/// How long the engine may take to end its step.
const JOIN: Duration = Duration::from_millis(400);
/// How long a fine-tuning job may take to end its step and save.
const SAVE: Duration = Duration::from_secs(5);
/// How often the exporter tidies its samples.
const UPKEEP: Duration = Duration::from_secs(5);

/// Flags of `cadre serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,

    /// The port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    pub port: u16,

    /// The model's name in requests and answers; may be given several times [default: as --model, or its last part]
    #[arg(long = "served-model-name", value_name = "NAME")]
    served_model_name: Vec<String>,

    /// Sequences that one step takes at most
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Engine", value_parser = at_least_one)]
    max_num_seqs: usize,

    /// Compute equal prefixes anew for each request
    #[arg(long, help_heading = "Engine")]
    no_prefix_caching: bool,

    /// Answers that aren't streamed say which experts each token was routed to, as vLLM's do (`routed_experts`)
    #[arg(long)]
    enable_return_routed_experts: bool,

    /// Refuse requests with fields that nobody knows, in place of ignoring them
    #[arg(long)]
    strict_params: bool,

    /// Serve a LoRA adapter, as PEFT saves it, beside the model: NAME is its model name in requests; may be given several
    /// times
    #[arg(long = "adapter", alias = "lora-modules", value_name = "NAME=DIR", num_args = 1.., value_parser = adapter_source)]
    adapters: Vec<AdapterSource>,

    /// Let requests load adapters from below this folder, and unload them, as vLLM does with
    /// `VLLM_ALLOW_RUNTIME_LORA_UPDATING`: `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`
    #[arg(long, value_name = "DIR")]
    allow_runtime_adapters: Option<PathBuf>,

    /// Memory for adapters that requests load and jobs make, such as 1GiB; a part of --memory if that is given: those longest
    /// unused leave, and are read again when a request names them [default: an eighth of --memory, or of what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    adapter_memory: Option<u64>,

    /// Keep uploaded files and fine-tuning jobs in this folder: turns on `/v1/files` and `/v1/fine_tuning/jobs`
    #[arg(long, value_name = "DIR", help_heading = "Fine-tuning jobs")]
    storage: Option<PathBuf>,

    /// Memory for a fine-tuning job beside the weights, such as 4GiB; a part of --memory if that is given [default: nine tenths
    /// of what is free when it starts]
    #[arg(long, value_name = "SIZE", requires = "storage", value_parser = parse_bytes, help_heading = "Fine-tuning jobs")]
    finetune_memory: Option<u64>,

    #[command(flatten)]
    engine: EngineArgs,
}

impl ServeArgs {
    fn engine_options(&self) -> Result<EngineOptions> {
        let mut options = self.engine.options(self.max_num_seqs);
        if let (Some(memory), true) = (&mut options.memory, self.storage.is_some()) {
            let jobs = self.finetune_memory.context(
                "--storage beside --memory: say how much of it fine-tuning jobs may have, by --finetune-memory",
            )?;
            *memory = memory
                .checked_sub(jobs)
                .context("--finetune-memory is greater than --memory, of which it is a part")?;
        }
        Ok(EngineOptions {
            served_names: self.served_model_name.clone(),
            prefix_caching: !self.no_prefix_caching,
            return_routed_experts: self.enable_return_routed_experts,
            adapters: self.adapters.clone(),
            adapter_folder: self.allow_runtime_adapters.clone(),
            finetunes: self.storage.is_some(),
            adapter_memory: self.adapter_memory,
            ..options
        })
    }
}

/// Serves until it is interrupted.
///
/// # Errors
/// When the address is taken, or the model can't be loaded.
pub fn run(args: &ServeArgs) -> Result<()> {
    let metrics = metrics::install()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(serve(args, metrics));
    // Whatever still runs is cut off: those who wait for it have been told.
    runtime.shutdown_background();
    result
}

async fn serve(args: &ServeArgs, metrics: PrometheusHandle) -> Result<()> {
    let mut interrupts = Interrupts::new()?;
    let engine_options = args.engine_options()?;
    let storage = args.storage.as_deref().map(Storage::open).transpose()?.map(Arc::new);
    let listener = TcpListener::bind((args.host.as_str(), args.port))
        .await
        .with_context(|| format!("cannot listen on {}:{}", args.host, args.port))?;
    println!("cadre listens on http://{}", listener.local_addr()?);
    tokio::spawn(upkeep(metrics.clone()));
    let options = HttpOptions {
        strict_params: args.strict_params,
        runtime_adapters: args.allow_runtime_adapters.is_some(),
        ..HttpOptions::default()
    };
    let app = Arc::new(App::new(metrics, options, storage.clone()));
    let loaded = load(engine_options, storage.map(|storage| (storage, args.finetune_memory)), app.clone());

    let mut outcome = Ok(None);
    let until_told = async {
        let first = tokio::select! {
            () = interrupts.next() => return exit_at_the_next(interrupts),
            loaded = loaded => loaded.unwrap_or_else(|_| Err(anyhow!("the thread that loads the model has failed"))),
        };
        outcome = first.map(Some);
        if outcome.is_ok() {
            interrupts.next().await;
            exit_at_the_next(interrupts);
        }
    };
    http::serve(listener, app, until_told, DRAIN).await?;
    if let Some(Loaded { runtime, profile, runner }) = outcome? {
        let end = tokio::task::spawn_blocking(move || runner.map(Runner::end));
        let join = tokio::task::spawn_blocking(move || runtime.shutdown(Duration::ZERO));
        let keep = tokio::task::spawn_blocking(move || profile.iter().for_each(KeptProfile::keep));
        let (joined, kept, ended) = tokio::join!(timeout(JOIN, join), timeout(JOIN, keep), timeout(SAVE, end));
        if joined.is_err() {
            tracing::warn!("the engine is still in its last step");
        }
        if ended.is_err() {
            tracing::warn!("the fine-tuning job is still in its step: it goes on from its latest checkpoint");
        }
        if kept.is_err() {
            tracing::warn!("the disk is slow: the routing profile isn't kept");
        }
    }
    Ok(())
}

/// What is left to end when the server has ended.
struct Loaded {
    runtime: Runtime,
    profile: Option<KeptProfile>,
    runner: Option<Runner>,
}

/// Loads the model on a thread of its own; it comes through the channel, or why there is none.
fn load(
    options: EngineOptions,
    storage: Option<(Arc<Storage>, Option<u64>)>,
    app: Arc<App>,
) -> oneshot::Receiver<Result<Loaded>> {
    let (sender, receiver) = oneshot::channel();
    std::thread::spawn(move || {
        let started = engine::start(&options).and_then(|engine| {
            let served = engine.served;
            let jobs = storage.map(|(storage, memory)| {
                let base = Base {
                    model: options.model.clone(),
                    fingerprint: engine.checkpoint.fingerprint()?,
                    names: served.names.clone(),
                    weights: Weights { decoder: engine.decoder, store: engine.store },
                    adapters: served.adapters.clone(),
                    threads: engine.threads,
                    memory,
                };
                Jobs::start(storage, base)
            });
            let (jobs, runner) = jobs.transpose()?.unzip();
            tracing::info!(model = served.name(), "ready");
            app.ready(served);
            jobs.into_iter().for_each(|jobs| app.jobs_ready(jobs));
            Ok(Loaded { runtime: engine.runtime, profile: engine.profile, runner })
        });
        // Nobody listens any more if the server ends while it loads.
        let _ = sender.send(started);
    });
    receiver
}

async fn upkeep(metrics: PrometheusHandle) {
    let mut ticks = interval(UPKEEP);
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
    }
}

/// Ctrl-C, and what init systems send.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    fn new() -> Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// One who presses Ctrl-C again is in a hurry. A second SIGTERM changes nothing: the drain is bounded anyway.
fn exit_at_the_next(mut interrupts: Interrupts) {
    tokio::spawn(async move {
        interrupts.interrupt.recv().await;
        std::process::exit(130);
    });
}
