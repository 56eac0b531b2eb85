//! From flags to a running engine: checkpoint, weights, KV cache, runtime. Every subcommand starts here.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use cadre_engine::{
    adapter::LoadedAdapter,
    compute::Compute,
    experts::ExpertStore,
    kv::{KvCache, KvDtype, blocks::BLOCK_SIZE},
    model::{Model, ModelInfo},
    nn::{Decoder, Format},
    request::SamplingParams,
    runtime::{Runtime, RuntimeConfig, RuntimeHandle, StepReport},
    train::places::places,
};
use cadre_models::{
    ChatTemplate, Checkpoint, FormatOptions, Formats, GenerationConfig, LoadedModel, Outline, Summary, Tokenizer,
    UnopenedExperts,
};

use crate::{
    adapters::{self, AdapterError, AdapterSource, Adapters, ServedAdapter},
    generation::{Backend, Machine, RoutedShape},
    host,
    memory::{self, Budget, ExpertMemory},
    metrics::{self, AdapterMeters, ExpertMeters, Meters},
    profile::KeptProfile,
    progress,
    routing_trace::RoutingTrace,
};

/// The KV cache's size when no flag gives one.
const DEFAULT_KV_BYTES: u64 = 512 << 20;
/// The part of a budget that a large KV cache takes at most: the more sequences a step has, the more tokens use each expert that is read.
const LARGE_KV_SHARE: u64 = 4;
/// The part of the memory that adapters which are added while it runs may take when no flag says how much.
const ADAPTER_SHARE: u64 = 8;

/// What to run, and within which limits.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// A directory or hub id; the embedded model if absent.
    pub model: Option<String>,
    /// The names that requests may use; the checkpoint's own if empty.
    pub served_names: Vec<String>,
    /// Worker threads; one a physical core if absent.
    pub threads: Option<usize>,
    /// Bytes for the whole process; what is free if absent.
    pub memory: Option<u64>,
    /// Bytes for the KV cache.
    pub kv_memory: Option<u64>,
    /// If none are given, as many as there may be: throughput counts, and whatever else the machine could do with them doesn't.
    pub large_kv: bool,
    /// Sequences in one step.
    pub max_num_seqs: usize,
    /// Tokens in one step.
    pub max_num_batched_tokens: usize,
    /// The longest sequence.
    pub max_model_len: Option<usize>,
    /// The weights' formats.
    pub formats: FormatOptions,
    /// The KV cache's format; that of the weights if absent.
    pub kv_dtype: Option<KvDtype>,
    /// Reuse the KV blocks of equal prefixes.
    pub prefix_caching: bool,
    /// The file that gets each step's routing, if it is wanted.
    pub trace_routing: Option<PathBuf>,
    /// Begin with the routing profile beside the model, and keep this run's.
    pub routing_profile: bool,
    /// Read experts that the next layer's router is predicted to choose.
    pub predict_experts: bool,
    /// Let requests ask for the experts that their tokens were routed to.
    pub return_routed_experts: bool,
    /// LoRA adapters to serve beside the model.
    pub adapters: Vec<AdapterSource>,
    /// The folder from below which others may be loaded while it runs, if they may.
    pub adapter_folder: Option<PathBuf>,
    /// Fine-tuning jobs may add others.
    pub finetunes: bool,
    /// Bytes for those that are added while it runs.
    pub adapter_memory: Option<u64>,
}

impl EngineOptions {
    /// Whether adapters may be added while it runs.
    fn adds_adapters(&self) -> bool {
        self.adapter_folder.is_some() || self.finetunes
    }

    /// Bytes for the adapters that are added while it runs, within a budget for the whole process, or what is free.
    fn adapter_room(&self, budget: Option<u64>) -> u64 {
        let default = || budget.or_else(host::free_memory_bytes).unwrap_or(u64::MAX) / ADAPTER_SHARE;
        if self.adds_adapters() { self.adapter_memory.unwrap_or_else(default) } else { 0 }
    }
}

/// A running engine.
pub struct Engine {
    /// The thread that steps.
    pub runtime: Runtime,
    /// What answers need.
    pub served: Arc<Served>,
    /// The formats that the weights have.
    pub formats: Formats,
    /// The workers and their instruction tier.
    pub compute: Compute,
    /// How many workers.
    pub threads: usize,
    /// What keys and values are kept as.
    pub kv_dtype: KvDtype,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
    /// Tokens in one of them.
    pub kv_block_tokens: usize,
    /// The weights.
    pub decoder: Arc<Decoder>,
    /// The experts that don't fit the memory.
    pub store: Option<ExpertStore>,
    /// What is kept of their routing for the next run.
    pub profile: Option<KeptProfile>,
    /// The model's files.
    pub checkpoint: Checkpoint,
}

/// A model that answers: what HTTP routes and the terminal need of it.
#[derive(Clone)]
pub struct Served {
    /// Its names, the first being the one that answers carry.
    pub names: Vec<String>,
    /// Where it came from.
    pub root: String,
    /// When it was ready, in seconds since 1970.
    pub created: u64,
    /// Takes requests.
    pub backend: Arc<dyn Backend>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text.
    pub template: Option<ChatTemplate>,
    /// How tokens are chosen when a request doesn't say.
    pub sampling: SamplingParams,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Width of the logits.
    pub vocab_size: usize,
    /// The longest sequence.
    pub max_model_len: usize,
    /// Counts and times.
    pub meters: Arc<Meters>,
    /// How the experts of tokens are told, if requests may ask for them.
    pub routed: Option<RoutedShape>,
    /// The adapters that are served beside it.
    pub adapters: Arc<Adapters>,
    /// That which makes this model of the base model, if it isn't the base model itself.
    pub adapter: Option<Arc<LoadedAdapter>>,
}

impl Served {
    /// The base model with the adapter of this name, which is read if it isn't in memory; `None` if there is none.
    ///
    /// # Errors
    /// When it can't be read, or there is no memory for it.
    pub fn adapted(&self, name: &str) -> Result<Option<Self>, AdapterError> {
        let with = |(ServedAdapter { name, root, created }, adapter)| Self {
            names: vec![name],
            root,
            created,
            adapter: Some(adapter),
            ..self.clone()
        };
        Ok(self.adapters.get(name)?.map(with))
    }

    /// The name that answers carry.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// What a generation needs.
    pub fn machine(&self) -> Machine {
        Machine {
            backend: self.backend.clone(),
            tokenizer: self.tokenizer.clone(),
            meters: self.meters.clone(),
            routed: self.routed,
        }
    }

    fn new(
        options: &EngineOptions,
        checkpoint: &Checkpoint,
        handle: RuntimeHandle,
        meters: Arc<Meters>,
        adapters: Arc<Adapters>,
    ) -> Result<Self> {
        let defaults = checkpoint.generation_config();
        let routed = options.return_routed_experts.then(|| RoutedShape::of(handle.info()));
        Ok(Self {
            routed: routed.transpose().context("--enable-return-routed-experts")?,
            names: served_names(options, checkpoint),
            root: options.model.clone().unwrap_or_else(|| checkpoint.name().to_owned()),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
            tokenizer: checkpoint.tokenizer()?,
            template: checkpoint.chat_template()?,
            sampling: default_sampling(defaults),
            eos_token_ids: defaults.eos_token_ids.clone(),
            vocab_size: handle.info().vocab_size,
            max_model_len: handle.config().max_model_len,
            backend: Arc::new(handle),
            meters,
            adapters,
            adapter: None,
        })
    }
}

/// What is there before weights are loaded.
pub struct Opened {
    /// How many workers.
    pub threads: usize,
    /// The workers and their instruction tier.
    pub compute: Compute,
    /// The model's files.
    pub checkpoint: Checkpoint,
    /// How much memory the process may use.
    pub budget: Budget,
}

impl Opened {
    /// Opens the model and everything of it that is small.
    ///
    /// # Errors
    /// When the checkpoint can't be read.
    pub fn new(options: &EngineOptions) -> Result<Self> {
        ensure!(options.max_num_seqs > 0, "--max-num-seqs must be at least 1");
        ensure!(options.max_num_batched_tokens > 0, "--max-num-batched-tokens must be at least 1");
        let threads = options.threads.unwrap_or_else(host::physical_cores).max(1);
        let compute = Compute::new(threads);
        let checkpoint = open(options.model.as_deref())?;
        // Small and quick to fail: read before the weights.
        checkpoint.tokenizer()?;
        checkpoint.chat_template()?;
        let summary = checkpoint.summary()?;
        let budget = Budget::new(options.memory, other_bytes(options, &summary), &summary, &options.formats);
        Ok(Self { threads, compute, checkpoint, budget })
    }
}

/// Opens and loads the model, and starts its runtime. Takes as long as the download and the load do.
///
/// # Errors
/// When the checkpoint can't be read, or doesn't fit the limits.
pub fn start(options: &EngineOptions) -> Result<Engine> {
    let Opened { threads, compute, checkpoint, budget } = Opened::new(options)?;
    let trace = options.trace_routing.as_deref().map(RoutingTrace::create).transpose()?;
    adapters::check(&served_names(options, &checkpoint), &options.adapters).context("--adapter")?;
    let LoadedModel { decoder, formats, experts } = progress::weights("loading weights", |report| {
        cadre_models::load(&checkpoint, &options.formats, budget.placement(), &compute, report)
    })?;
    let adapters = Arc::new(load_adapters(options, budget, &checkpoint, &decoder)?);
    let info = decoder.info();
    ensure!(trace.is_none() || !info.moe_layers.is_empty(), "--trace-routing: this model has no routed experts");
    let split = MemorySplit::new(options, budget, info, formats, Loaded::all(info, experts.as_ref()))?;
    let plan = split.kv;
    let store = experts.map(|experts| open_experts(experts, info, options, &split)).transpose()?;
    let profiled = store.as_ref().filter(|_| options.routing_profile);
    let profile = profiled.and_then(|store| KeptProfile::open(store, &checkpoint));
    tracing::info!(
        model = checkpoint.name(), architecture = checkpoint.architecture(), %formats, isa = %compute.isa, threads,
        max_model_len = plan.max_model_len, kv_blocks = plan.blocks, "the model is loaded"
    );
    let name = served_names(options, &checkpoint).swap_remove(0);
    let routed = info.routed_bytes();
    let experts = store.as_ref().map_or(routed, |store| store.slots() as u64 * split.stored.slot);
    let parts = [("weights", info.weight_bytes - routed), ("experts", experts), ("kv", plan.bytes())];
    metrics::describe_model(&name, plan.blocks, options.prefix_caching, &parts);
    let meters = Arc::new(Meters::new(&name));
    let expert_meters = |store| (store, ExpertMeters::new(info.moe_layers.len()));
    let has_adapters = !options.adapters.is_empty() || options.adds_adapters();
    let adapter_meters = has_adapters.then(|| AdapterMeters::new(options.max_num_seqs));
    let experts = store.clone().map(expert_meters);
    let observer = Observer { meters: meters.clone(), experts, adapters: adapter_meters, trace };
    let decoder = Arc::new(decoder);
    let runtime = start_runtime(options, Box::new(decoder.clone()), &plan, compute.clone(), observer)?;
    let served = Arc::new(Served::new(options, &checkpoint, runtime.handle(), meters, adapters)?);
    Ok(Engine {
        runtime,
        served,
        formats,
        compute,
        threads,
        kv_dtype: plan.dtype,
        kv_blocks: plan.blocks,
        kv_block_tokens: BLOCK_SIZE,
        decoder,
        store,
        profile,
        checkpoint,
    })
}

/// What a process will hold besides weights, as far as that is known before they are loaded.
fn other_bytes(options: &EngineOptions, model: &Summary) -> u64 {
    let kv = options.kv_memory.unwrap_or_else(|| default_kv_bytes(options.memory));
    let [hidden_size, vocab_size] =
        [model.hidden_size, model.vocab_size].map(|size| size.and_then(|size| usize::try_from(size).ok()).unwrap_or(0));
    let step = memory::step_bytes(hidden_size, vocab_size, options.max_num_batched_tokens, options.max_num_seqs);
    let adapters = adapters::expected_bytes(&options.adapters).saturating_add(options.adapter_room(options.memory));
    kv.saturating_add(step).saturating_add(adapters).saturating_add(host::rss_bytes().unwrap_or(0))
}

/// The adapters that the flags name.
fn load_adapters(
    options: &EngineOptions,
    budget: Budget,
    checkpoint: &Checkpoint,
    decoder: &Decoder,
) -> Result<Adapters> {
    let folder = options.adapter_folder.as_deref();
    let room = options.adapter_room(budget.bytes());
    let adapters = Adapters::new(served_names(options, checkpoint), places(decoder), folder, room)
        .with_context(|| format!("--allow-runtime-adapters {}", folder.unwrap_or(Path::new("")).display()))?;
    for source in &options.adapters {
        adapters.load(source.clone()).with_context(|| format!("cannot load the adapter {}", source.name))?;
    }
    Ok(adapters)
}

/// The KV cache's size within a budget, when no flag gives it: no more than an eighth.
fn default_kv_bytes(budget: Option<u64>) -> u64 {
    DEFAULT_KV_BYTES.min(budget.map_or(u64::MAX, |bytes| bytes / 8))
}

/// How far a process is with its weights, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Loaded {
    /// The process with all weights that it loads.
    pub weights: u64,
    /// Those of them that it hasn't loaded yet.
    pub ahead: u64,
    /// What the store's experts take, if those are not among the weights.
    pub experts: Option<StoredBytes>,
}

/// What experts in the store take, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct StoredBytes {
    /// A slot for one.
    pub slot: u64,
    /// Those that are converted when they are read, between disk and slot; 0 for a pack.
    pub staging: u64,
}

impl StoredBytes {
    fn of(experts: &UnopenedExperts) -> Self {
        let staging = experts.conversion().map_or(0, |conversion| conversion.staging_bytes as u64);
        Self { slot: experts.slot_bytes() as u64, staging }
    }
}

impl Loaded {
    /// All weights of a model, but for `experts`.
    pub fn all(info: &ModelInfo, experts: Option<&UnopenedExperts>) -> Self {
        let stored = experts.map_or(0, |_| info.routed_bytes());
        let weights = host::rss_bytes().unwrap_or(info.weight_bytes - stored);
        Self { weights, ahead: 0, experts: experts.map(StoredBytes::of) }
    }

    /// None yet of a model that is only outlined.
    pub fn none(outline: &Outline) -> Self {
        let info = outline.decoder.info();
        let experts = outline.experts.as_ref().map(StoredBytes::of);
        let ahead = info.weight_bytes - experts.map_or(0, |_| info.routed_bytes());
        Self { weights: host::rss_bytes().unwrap_or(0) + ahead, ahead, experts }
    }
}

/// How a process divides its memory, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct MemorySplit {
    /// What it may use, if that is limited.
    pub budget: Option<u64>,
    /// The process with its weights, but for experts in the store.
    pub weights: u64,
    /// What a step takes.
    pub step: u64,
    /// Keys and values.
    pub kv: KvPlan,
    /// What an expert in the store takes.
    pub stored: StoredBytes,
    /// How many slots; none if all experts are among the weights.
    pub slots: Option<usize>,
    /// How many experts there are.
    pub experts: u64,
}

impl MemorySplit {
    /// The split of a model of which `loaded` is or will be in memory.
    ///
    /// # Errors
    /// When the budget is too small, or a limit that was asked for can't be kept.
    pub fn new(
        options: &EngineOptions,
        budget: Budget,
        info: &ModelInfo,
        formats: Formats,
        loaded: Loaded,
    ) -> Result<Self> {
        let (tokens, sequences) = (options.max_num_batched_tokens, options.max_num_seqs);
        let step = memory::step_bytes(info.hidden_size, info.vocab_size, tokens, sequences);
        // A token's experts of one layer.
        let least = info.moe_layers.iter().map(|layer| layer.top_k as u64).max().unwrap_or(1);
        let experts = info.moe_layers.iter().map(|layer| layer.experts as u64).sum();
        let stored = loaded.experts.unwrap_or_default();
        let adapters = options.adapter_room(budget.bytes());
        let held = loaded.weights.saturating_add(step).saturating_add(adapters);
        let memory = ExpertMemory { slot_bytes: stored.slot, count: experts, least, staging_bytes: stored.staging };
        let room = budget.bytes().map(|bytes| {
            let most = if options.large_kv { bytes / LARGE_KV_SHARE } else { default_kv_bytes(Some(bytes)) };
            // Half of it: experts are worth more than a long context.
            most.min(bytes.saturating_sub(held.saturating_add(memory.least_bytes())) / 2)
        });
        let free = host::free_memory_bytes().map(|free| free.saturating_sub(loaded.ahead));
        let kv = KvPlan::new(options, room, free, info, formats)?;
        let taken = held.saturating_add(kv.bytes());
        let slots = match budget {
            Budget::Stored { bytes } => Some(memory.slots(bytes, taken)?),
            Budget::Resident { bytes } => {
                bytes.map_or(Ok(()), |bytes| memory::check(bytes, taken))?;
                None
            }
        };
        Ok(Self { budget: budget.bytes(), weights: loaded.weights, step, kv, stored, slots, experts })
    }
}

/// Opens the store of experts that didn't fit, with the slots that the budget leaves beside all else.
fn open_experts(
    experts: UnopenedExperts,
    info: &ModelInfo,
    options: &EngineOptions,
    split: &MemorySplit,
) -> Result<ExpertStore> {
    let budget_mib = split.budget.unwrap_or(0) >> 20;
    let slots = split.slots.context("experts stay on disk only within a budget")?;
    if options.memory.is_none() {
        tracing::warn!(budget_mib, "the model doesn't fit the free memory: a budget was chosen");
    }
    tracing::info!(
        budget_mib,
        weights_mib = split.weights >> 20,
        kv_mib = split.kv.bytes() >> 20,
        step_mib = split.step >> 20,
        staging_mib = split.stored.staging >> 20,
        expert_slots = slots,
        experts = split.experts,
        "experts are read as they are needed"
    );
    let cycle: usize = info.moe_layers.iter().map(|layer| layer.top_k).sum();
    if slots < cycle {
        tracing::warn!(
            "a token uses {cycle} experts, more than there are slots: some are read from disk for every token; {} MiB more \
             would hold one token's",
            ((cycle - slots) as u64 * split.stored.slot).div_ceil(1 << 20)
        );
    }
    if let Some(conversion) = experts.conversion() {
        tracing::warn!(
            "this checkpoint isn't packed: each expert that is needed takes {} KiB to read and is then converted; of a \
             pack it would be {} KiB and ready: run `{}` and use its output as --model",
            conversion.read_bytes.div_ceil(1 << 10),
            split.stored.slot.div_ceil(1 << 10),
            pack_command(options),
        );
    }
    Ok(experts.predicting(options.predict_experts).open(slots)?)
}

/// What makes the pack that would compute the same.
fn pack_command(options: &EngineOptions) -> String {
    let FormatOptions { format, experts, dense } = options.formats;
    let model = options.model.as_deref();
    let output = model.and_then(|model| model.trim_end_matches('/').rsplit('/').next()).unwrap_or("embedded");
    let flags = [
        ("--model", model.map(str::to_owned)),
        ("--format", format.map(|format| format.to_string())),
        ("--experts-format", experts.map(|format| format.to_string())),
        ("--dense-format", dense.map(|format| format.to_string())),
        ("--output", Some(format!("{output}-pack"))),
    ];
    let flags = flags.into_iter().filter_map(|(flag, value)| Some(format!(" {flag} {}", value?)));
    format!("cadre pack{}", flags.collect::<String>())
}

fn start_runtime(
    options: &EngineOptions,
    model: Box<dyn Model>,
    plan: &KvPlan,
    compute: Compute,
    mut observer: Observer,
) -> Result<Runtime> {
    let info = model.info();
    let kv = KvCache::new(info.num_layers, info.num_kv_heads, info.head_dim, plan.blocks, plan.dtype)?;
    let config = RuntimeConfig {
        max_num_seqs: options.max_num_seqs,
        max_num_batched_tokens: options.max_num_batched_tokens,
        max_model_len: plan.max_model_len,
        enable_prefix_caching: options.prefix_caching,
        report_routes: observer.trace.is_some(),
    };
    Ok(Runtime::start(model, kv, compute, config, move |report| observer.see(report))?)
}

/// Who wants to know about each step.
struct Observer {
    meters: Arc<Meters>,
    experts: Option<(ExpertStore, ExpertMeters)>,
    adapters: Option<AdapterMeters>,
    trace: Option<RoutingTrace>,
}

impl Observer {
    fn see(&mut self, report: &StepReport) {
        self.meters.step(report);
        if let Some((store, meters)) = &mut self.experts {
            meters.show(store.counters());
        }
        if let Some(meters) = &mut self.adapters {
            meters.show(&report.running_adapters, &report.waiting_adapters);
        }
        if let Some(trace) = &mut self.trace {
            trace.note(report);
        }
    }
}

/// Opens a checkpoint, downloading it if need be.
///
/// # Errors
/// When there is none, or it can't be read.
pub fn open(model: Option<&str>) -> Result<Checkpoint> {
    let shown = model.unwrap_or("the embedded model");
    progress::download(|report| cadre_models::open(model, report)).with_context(|| format!("cannot open {shown}"))
}

/// The names asked for; else the checkpoint's own, and what it was opened by.
pub fn served_names(options: &EngineOptions, checkpoint: &Checkpoint) -> Vec<String> {
    if !options.served_names.is_empty() {
        return options.served_names.clone();
    }
    let own = checkpoint.name().to_owned();
    let asked = options.model.clone().filter(|asked| *asked != own);
    std::iter::once(own).chain(asked).collect()
}

/// The checkpoint's own sampling; it is greedy if the checkpoint says that it doesn't sample.
fn default_sampling(config: &GenerationConfig) -> SamplingParams {
    let default = SamplingParams::default();
    let greedy = config.do_sample == Some(false);
    SamplingParams {
        temperature: if greedy { 0.0 } else { config.temperature.unwrap_or(default.temperature) },
        top_p: config.top_p.unwrap_or(default.top_p),
        top_k: config.top_k.unwrap_or(default.top_k),
        min_p: config.min_p.unwrap_or(default.min_p),
        repetition_penalty: config.repetition_penalty.unwrap_or(default.repetition_penalty),
        ..default
    }
}

/// How large the KV cache is, and how long a sequence may become in it.
#[derive(Debug, Clone, Copy)]
pub struct KvPlan {
    /// What keys and values are kept as.
    pub dtype: KvDtype,
    blocks: usize,
    block_bytes: usize,
    /// The longest sequence, in tokens.
    pub max_model_len: usize,
}

impl KvPlan {
    /// `room`: the most that it takes by default, where a budget limits that; `free_bytes`: what is free beside the weights.
    fn new(
        options: &EngineOptions,
        room: Option<u64>,
        free_bytes: Option<u64>,
        info: &ModelInfo,
        formats: Formats,
    ) -> Result<Self> {
        let of_weights = if formats.dense == Format::F32 { KvDtype::F32 } else { KvDtype::Bf16 };
        let dtype = options.kv_dtype.unwrap_or(of_weights);
        let block_bytes = KvCache::block_bytes(info.num_layers, info.num_kv_heads, info.head_dim, dtype).max(1);
        let sizes = KvSizes {
            block_bytes,
            max_num_seqs: options.max_num_seqs,
            large: options.large_kv,
            asked_bytes: options.kv_memory,
            asked_len: options.max_model_len,
            trained_len: info.max_position_embeddings,
            free_bytes,
            room_bytes: room,
        };
        let (blocks, max_model_len) = sizes.fit()?;
        Ok(Self { dtype, blocks, block_bytes, max_model_len })
    }

    /// Bytes of the whole cache.
    pub fn bytes(&self) -> u64 {
        self.blocks as u64 * self.block_bytes as u64
    }
}

/// What decides about the KV cache.
#[derive(Debug, Clone, Copy)]
struct KvSizes {
    block_bytes: usize,
    max_num_seqs: usize,
    large: bool,
    asked_bytes: Option<u64>,
    asked_len: Option<usize>,
    trained_len: usize,
    free_bytes: Option<u64>,
    room_bytes: Option<u64>,
}

impl KvSizes {
    /// Blocks, and the longest sequence. What was asked for is kept or refused; what wasn't is chosen to fit.
    fn fit(self) -> Result<(usize, usize)> {
        if let Some(len) = self.asked_len {
            ensure!(len > 0, "--max-model-len must be at least 1");
            ensure!(
                len <= self.trained_len,
                "--max-model-len is {len}, but the model's positions end at {}",
                self.trained_len
            );
        }
        let wanted_len = self.asked_len.unwrap_or(self.trained_len);
        let blocks = match self.asked_bytes {
            Some(bytes) => self.blocks_in(bytes),
            None => self.default_blocks(wanted_len),
        };
        if blocks == 0 {
            bail!("the KV cache holds no block: one takes {} bytes; give a larger --kv-memory", self.block_bytes);
        }
        let room = blocks * BLOCK_SIZE;
        if self.asked_len.is_some() && wanted_len > room {
            bail!(
                "--max-model-len is {wanted_len}, but the KV cache ({} bytes) holds {room} tokens: \
                 give --kv-memory {} or more, or a smaller --max-model-len",
                blocks as u64 * self.block_bytes as u64,
                wanted_len.div_ceil(BLOCK_SIZE) as u64 * self.block_bytes as u64,
            );
        }
        Ok((blocks, wanted_len.min(room)))
    }

    /// As much as all sequences could use, but no more than the default, a quarter of the free memory and what a budget
    /// leaves; one sequence of the length asked for may exceed the default. A large one is bounded by half of the free memory in
    /// place of the default.
    fn default_blocks(self, wanted_len: usize) -> usize {
        let one_sequence = wanted_len.div_ceil(BLOCK_SIZE);
        let useful = one_sequence.saturating_mul(self.max_num_seqs);
        let share = if self.large { 2 } else { 4 };
        let of_free = self.free_bytes.map_or(usize::MAX, |bytes| self.blocks_in(bytes / share));
        let mut default =
            if self.large && self.free_bytes.is_some() { of_free } else { self.blocks_in(DEFAULT_KV_BYTES) };
        if self.asked_len.is_some() {
            default = default.max(one_sequence);
        }
        // A budget with no room for a block is refused by those who know what it would need.
        let room = self.room_bytes.map_or(usize::MAX, |bytes| self.blocks_in(bytes).max(1));
        useful.min(default).min(of_free).min(room)
    }

    fn blocks_in(self, bytes: u64) -> usize {
        usize::try_from(bytes / self.block_bytes as u64).unwrap_or(usize::MAX).min(u32::MAX as usize)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cadre_engine::request::{Request, StopParams};

    use super::*;
    use crate::{
        generation::{Generation, OutputOptions},
        testing::engine_options,
    };

    const SIZES: KvSizes = KvSizes {
        block_bytes: 1 << 20,
        max_num_seqs: 4,
        large: false,
        asked_bytes: None,
        asked_len: None,
        trained_len: 1024,
        free_bytes: Some(16 << 30),
        room_bytes: None,
    };

    #[test]
    fn a_small_model_gets_what_its_sequences_can_use() {
        assert_eq!(SIZES.fit().unwrap(), (4 * 64, 1024));
    }

    #[test]
    fn a_large_model_gets_the_default_and_a_shorter_context() {
        let sizes = KvSizes { trained_len: 1 << 20, ..SIZES };
        assert_eq!(sizes.fit().unwrap(), (512, 512 * BLOCK_SIZE));
    }

    #[test]
    fn never_more_than_a_quarter_of_the_free_memory() {
        let sizes = KvSizes { free_bytes: Some(400 << 20), ..SIZES };
        assert_eq!(sizes.fit().unwrap(), (100, 1024));
    }

    #[test]
    fn never_more_than_a_budget_leaves() {
        let sizes = KvSizes { room_bytes: Some(50 << 20), ..SIZES };
        assert_eq!(sizes.fit().unwrap().0, 50);
        assert_eq!(KvSizes { room_bytes: Some(0), ..SIZES }.fit().unwrap().0, 1);
    }

    #[test]
    fn a_large_one_takes_half_of_the_free_memory_if_its_sequences_can_use_it() {
        let sizes = KvSizes { large: true, trained_len: 1 << 20, ..SIZES };
        assert_eq!(sizes.fit().unwrap().0, 8 << 10);
        assert_eq!(KvSizes { room_bytes: Some(50 << 20), ..sizes }.fit().unwrap().0, 50);
        assert_eq!(KvSizes { large: true, ..SIZES }.fit().unwrap().0, 4 * 64);
    }

    #[test]
    fn a_length_asked_for_is_kept_or_refused() {
        let long = KvSizes { trained_len: 1 << 20, asked_len: Some(1000 * BLOCK_SIZE), ..SIZES };
        assert_eq!(long.fit().unwrap(), (1000, 1000 * BLOCK_SIZE));
        let tight = KvSizes { asked_bytes: Some(10 << 20), ..long };
        let message = tight.fit().unwrap_err().to_string();
        assert!(message.contains("16000") && message.contains("160 tokens"), "{message}");
        let beyond = KvSizes { asked_len: Some(2000), ..SIZES };
        assert!(beyond.fit().is_err());
    }

    #[test]
    fn a_budget_below_one_block_is_refused() {
        assert!(KvSizes { asked_bytes: Some(1000), ..SIZES }.fit().is_err());
    }

    #[tokio::test]
    async fn the_embedded_model_starts_and_answers() {
        let options = EngineOptions {
            served_names: vec!["small".to_owned()],
            max_num_batched_tokens: 64,
            max_model_len: Some(128),
            ..engine_options()
        };
        let engine = start(&options).unwrap();
        let served = &engine.served;
        assert_eq!((served.name(), served.max_model_len, engine.kv_blocks), ("small", 128, 16));
        assert!(served.template.is_some() && !served.eos_token_ids.is_empty());
        let request = Request {
            prompt: served.tokenizer.encode("hello", true).unwrap(),
            n: 2,
            sampling: served.sampling.clone(),
            stop: StopParams {
                max_tokens: 5,
                min_tokens: 0,
                eos_token_ids: served.eos_token_ids.clone(),
                ignore_eos: true,
                stop_token_ids: Vec::new(),
            },
            logprobs: Some(1),
            scoring: None,
            routed_experts_from: None,
            adapter: None,
        };
        let mut generation = Generation::start(&served.machine(), vec![request], OutputOptions::default()).unwrap();
        let completed = generation.collect().await.unwrap();
        assert_eq!(completed.choices.len(), 2);
        assert!(completed.choices.iter().all(|choice| choice.tokens.len() == 5));
        engine.runtime.shutdown(Duration::ZERO);
    }

    #[test]
    fn checkpoints_that_do_not_sample_are_greedy() {
        let config = GenerationConfig { do_sample: Some(false), temperature: Some(0.7), ..GenerationConfig::default() };
        assert_eq!(default_sampling(&config).temperature, 0.0);
        let config = GenerationConfig { temperature: Some(0.7), top_k: Some(20), ..GenerationConfig::default() };
        assert_eq!(default_sampling(&config).temperature, 0.7);
        assert_eq!(default_sampling(&config).top_k, 20);
    }
}
