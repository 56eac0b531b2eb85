//! What is there before the first step: the model's sizes, the data, what is trained, and how the memory is divided.

use std::{collections::BTreeSet, fmt::Write as _, path::PathBuf, sync::Arc};

use anyhow::{Context, Result, bail, ensure};
use cadre_engine::{
    compute::Compute,
    experts::ExpertStore,
    model::{Model, ModelInfo},
    nn::{Decoder, Format},
    train::{
        RouterLossOptions, TrainableModule, Trainer, memory::StepMemory, parameters::Parameters, places::Place,
        trainable_modules, trained::Trained,
    },
};
use cadre_models::{
    Checkpoint, FormatOptions, LoadedModel, Outline, Placement, Tokenizer,
    adapter::{AdapterLayout, LoraOptions, LoraPlan},
    dataset::BadLine,
    rewrite, targets,
};

use super::{
    affinity::ChosenExperts,
    checkpoint::is_there,
    data::{Data, StepSize},
    settings::{Method, Settings},
};
use crate::{
    engine, host,
    memory::{BASE_BYTES, ExpertMemory, SHARE_OF_FREE, mebibytes},
    progress,
};

/// Tokens that an example keeps when no flag says: more than most chats have.
const MAX_LENGTH: usize = 2048;

/// What names the held-out data, also in errors.
pub const EVAL_FLAG: &str = "--eval";

/// The model's weights, and what reads the experts that aren't in memory.
#[derive(Clone)]
pub struct Weights {
    pub decoder: Arc<Decoder>,
    pub store: Option<ExpertStore>,
}

/// What is there before the first step.
pub struct Prepared {
    pub compute: Compute,
    pub checkpoint: Checkpoint,
    pub tokenizer: Tokenizer,
    pub data: Data,
    pub eval: Option<Data>,
    pub steps: u64,
    pub size: StepSize,
    pub trainee: Trainee,
    pub memory: MemoryPlan,
    pub formats: FormatOptions,
    /// Weights that are served meanwhile, if there are some: a run beside them loads no others.
    pub served: Option<Weights>,
}

/// What is trained.
pub enum Trainee {
    /// Adapters of frozen weights.
    Adapters(Box<LoraPlan>),
    /// The weights of these modules.
    Weights {
        modules: Vec<TrainableModule>,
        /// If the experts among them were chosen by the data.
        chosen: Option<ChosenExperts>,
    },
}

impl Trainee {
    /// How many numbers.
    pub fn numbers(&self) -> u64 {
        match self {
            Self::Adapters(plan) => plan.numbers(),
            Self::Weights { modules, .. } => modules.iter().map(|module| module.numbers as u64).sum(),
        }
    }

    /// The matrices of which something is trained; `None` for what is no matrix.
    fn places(&self) -> Vec<Option<Place>> {
        match self {
            Self::Adapters(plan) => plan.places().into_iter().map(Some).collect(),
            Self::Weights { modules, .. } => modules.iter().map(|module| module.place).collect(),
        }
    }

    /// Whether routers change.
    fn changes_routers(&self) -> bool {
        self.places().iter().any(|place| matches!(place, Some(Place::Router { .. })))
    }

    /// Whether the weights of routed experts change.
    fn changes_experts(&self) -> bool {
        let is_expert =
            |module: &TrainableModule| matches!(module.place, Some(Place::GateUp { .. } | Place::Down { .. }));
        matches!(self, Self::Weights { modules, .. } if modules.iter().any(is_expert))
    }
}

/// How the memory is divided, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryPlan {
    /// What the process may use.
    pub budget: u64,
    /// The weights that are always in memory.
    pub weights: u64,
    /// The experts that are: all, or the slots of the expert store and what it reads through.
    pub experts: u64,
    /// Slots of the expert store; `None`: all experts are in memory.
    pub slots: Option<usize>,
    /// What a step holds.
    pub step: StepMemory,
    /// The first layer that keeps what its backward pass needs; those before are computed again.
    pub keep_from: usize,
    /// What the process has before it loads weights.
    pub base: u64,
}

impl MemoryPlan {
    /// The division of `budget` bytes; experts go into the store only if they don't fit beside a step.
    fn new(budget: u64, info: &ModelInfo, experts: Option<ExpertMemory>, step: StepMemory) -> Result<Self> {
        let base = host::rss_bytes().unwrap_or(0) + BASE_BYTES;
        let routed = info.routed_bytes();
        let weights = info.weight_bytes - routed;
        let taken = (base + weights).saturating_add(step.least());
        let least = taken.saturating_add(experts.map_or(routed, ExpertMemory::least_bytes));
        ensure!(
            least <= budget,
            "the memory that may be used (--memory) is {}, but this run needs at least {}: allow more, or use a smaller \
             --dtype, --max-length or --rank, or a greater --grad-accum and smaller --batch-size",
            mebibytes(budget),
            mebibytes(least)
        );
        let slots = experts.map(|memory| memory.slots(budget, taken)).transpose()?;
        let stored = experts.zip(slots).map(|(memory, slots)| slots as u64 * memory.slot_bytes + memory.staging_bytes);
        let expert_bytes = stored.unwrap_or(routed);
        let needed = taken + expert_bytes;
        let keep_from = step.keep_from(budget - needed);
        Ok(Self { budget, weights, experts: expert_bytes, slots, step, keep_from, base })
    }

    /// The division of `budget` bytes for a run beside weights that are served: it has nothing but its steps.
    fn beside(budget: u64, step: StepMemory) -> Result<Self> {
        let least = step.least();
        ensure!(
            least <= budget,
            "a fine-tuning job may use {} (--finetune-memory), but this one needs at least {}: allow more, or use a smaller \
             max_length, rank or batch_size",
            mebibytes(budget),
            mebibytes(least)
        );
        let keep_from = step.keep_from(budget - least);
        Ok(Self { budget, weights: 0, experts: 0, slots: None, step, keep_from, base: 0 })
    }

    /// What the process will hold at most.
    pub fn peak(&self) -> u64 {
        let kept: u64 = self.step.kept[self.keep_from..].iter().sum();
        self.base + self.weights + self.experts + self.step.least() + kept
    }

    /// What a step's buffers may take beside what is trained.
    pub fn room(&self) -> u64 {
        self.budget - (self.base + self.weights + self.experts + self.step.parameters + self.step.holes())
    }

    fn table(&self) -> String {
        let layers = self.step.kept.len();
        let kept: u64 = self.step.kept[self.keep_from..].iter().sum();
        let experts = match self.slots {
            None => "experts, all in memory".to_owned(),
            Some(slots) => format!("experts, {slots} of them at a time"),
        };
        let again = match self.keep_from {
            0 => "what backward needs, all layers".to_owned(),
            first => format!("what backward needs, {} of {layers} layers; {first} are computed again", layers - first),
        };
        let rows = [
            ("weights".to_owned(), self.weights),
            (experts, self.experts),
            ("what is trained, with gradients and moments".to_owned(), self.step.parameters),
            ("layers' inputs".to_owned(), self.step.inputs),
            (again, kept),
            ("one layer's work, and the head's".to_owned(), self.step.work()),
            ("too short pieces between these".to_owned(), self.step.holes()),
            ("the process itself".to_owned(), self.base),
            (format!("peak, of {} that may be used", mebibytes(self.budget)), self.peak()),
        ];
        rows.iter().fold(String::new(), |mut text, (name, bytes)| {
            let _ = writeln!(text, "  {:>10}  {name}", mebibytes(*bytes));
            text
        })
    }
}

impl Prepared {
    /// Opens what the settings name. Beside weights that are `served`, which have to be those of the model that they name,
    /// the memory of the settings is the run's own. `on_bad` is told of each broken line of the data.
    ///
    /// # Errors
    /// When something is missing or broken, a target matches nothing, or the memory is too small.
    pub fn new(settings: &Settings, served: Option<Weights>, on_bad: &mut dyn FnMut(&BadLine)) -> Result<Self> {
        let compute = Compute::new(settings.threads.unwrap_or_else(host::physical_cores));
        let checkpoint = engine::open(settings.model.as_deref())?;
        let (tokenizer, template) = (checkpoint.tokenizer()?, checkpoint.chat_template()?);
        let formats = FormatOptions { format: settings.format, experts: None, dense: None };
        let decoder = match &served {
            Some(weights) => weights.decoder.clone(),
            None => Arc::new(outline(&checkpoint, &formats, Placement::Resident, &compute)?.decoder),
        };
        let info = decoder.info();
        let longest = info.max_position_embeddings;
        let max_length = settings.max_length.unwrap_or(MAX_LENGTH.min(longest));
        ensure!(max_length <= longest, "--max-length is {max_length}, but the model was made for {longest} tokens");
        let mut read =
            |files: &[PathBuf]| Data::read(files, settings, max_length, &tokenizer, template.as_ref(), on_bad);
        // All broken lines are told, whichever file they are in.
        let data = read(&settings.data).context("--data");
        let eval = if settings.eval.is_empty() { Ok(None) } else { read(&settings.eval).context(EVAL_FLAG).map(Some) };
        let (data, eval) = (data?, eval?);
        let steps = settings.max_steps.unwrap_or_else(|| data.steps(settings.epochs));
        let size = data.step_size(settings.grad_accum, eval.as_ref());
        let step = |numbers| StepMemory::new(&decoder, numbers, size.tokens, size.batch_tokens, size.longest);
        let free = || host::free_memory_bytes().map_or(u64::MAX / 2, |free| (free as f64 * SHARE_OF_FREE) as u64);
        let budget = settings.memory.unwrap_or_else(free);
        let trainee = match settings.method {
            Method::Lora => Trainee::Adapters(Box::new(adapters(settings, &checkpoint, &decoder)?)),
            Method::Full => weights(&checkpoint, targets::modules_of(&decoder, &settings.targets)?, None)?,
            Method::Router => {
                weights(&checkpoint, modules_that(&decoder, |place| matches!(place, Place::Router { .. })), None)?
            }
            Method::Experts => {
                let chosen = if is_there(&settings.output)? {
                    ChosenExperts::read(&settings.output)?
                } else {
                    // Trained experts have to be in memory.
                    let plan = MemoryPlan::new(budget, info, None, step(0))?;
                    let loaded = load(&checkpoint, &formats, Placement::Resident, &compute)?.decoder;
                    let (nothing, none) = (Trained::default(), Parameters::default());
                    let trainer = Trainer::new(compute.clone(), loaded, nothing, none, RouterLossOptions::default())?;
                    trainer.limit_memory(plan.room());
                    ChosenExperts::measure(&trainer, &data, size, settings.expert_share)?
                };
                weights(&checkpoint, modules_that(&decoder, |place| chosen.has(place)), Some(chosen))?
            }
        };
        ensure!(
            settings.routing_warmup_steps == 0 || trainee.changes_routers(),
            "--routing-warmup-steps is for routers that are trained: name them in --targets"
        );
        let step = step(trainee.numbers());
        let plan = match served {
            Some(_) => MemoryPlan::beside(budget, step.clone()),
            None => MemoryPlan::new(budget, info, None, step.clone()),
        };
        let memory = match plan {
            Ok(plan) => plan,
            Err(error) if served.is_some() || info.moe_layers.is_empty() || trainee.changes_experts() => {
                return Err(error);
            }
            Err(_) => {
                let stored = outline(&checkpoint, &formats, Placement::Stored, &compute)?;
                let experts = stored.experts.as_ref().context("experts that can stay on disk")?;
                let memory = ExpertMemory {
                    slot_bytes: experts.slot_bytes() as u64,
                    count: experts.count() as u64,
                    least: info.moe_layers.iter().map(|layer| layer.top_k as u64).max().unwrap_or(1),
                    staging_bytes: experts.conversion().map_or(0, |conversion| conversion.staging_bytes as u64),
                };
                MemoryPlan::new(budget, info, Some(memory), step)?
            }
        };
        Ok(Self { compute, checkpoint, tokenizer, data, eval, steps, size, trainee, memory, formats, served })
    }

    /// What a run would do, and its first example.
    pub fn dry_run(&self, settings: &Settings) -> Result<String> {
        Ok(self.describe(settings)? + &self.first_example()?)
    }

    /// What will be done.
    pub fn describe(&self, settings: &Settings) -> Result<String> {
        let mut text = String::new();
        let examples = self.data.examples();
        let tokens: usize = examples.iter().map(|example| example.tokens.len()).sum();
        let targets: usize = examples.iter().flat_map(|example| &example.targets).filter(|target| **target).count();
        let shapes = self.checkpoint.architecture();
        writeln!(text, "model    {} ({shapes})", self.checkpoint.name())?;
        writeln!(text, "data     {} examples, {tokens} tokens, {targets} of them learnt", examples.len())?;
        if self.data.dataset.truncated_examples() > 0 {
            let (count, cut) = (self.data.dataset.truncated_examples(), self.data.dataset.cut_tokens());
            writeln!(text, "         {count} examples are too long: {cut} tokens are cut off")?;
        }
        if self.data.dataset.skipped.count() > 0 {
            writeln!(text, "         {} broken lines are left out", self.data.dataset.skipped.count())?;
        }
        if self.data.dataset.rewritten_answers > 0 {
            let count = self.data.dataset.rewritten_answers;
            writeln!(
                text,
                "         {count} answers follow a text that the chat template writes otherwise when serving"
            )?;
        }
        if let Some(eval) = &self.eval {
            writeln!(text, "held out {} examples", eval.examples().len())?;
        }
        let packed =
            if settings.packing { format!(", packed into {} units", self.data.units()) } else { String::new() };
        writeln!(
            text,
            "steps    {}, of {} x {} examples{packed}",
            self.steps, settings.batch_size, settings.grad_accum
        )?;
        writeln!(text, "trained  {}", self.trained())?;
        write!(text, "memory\n{}", self.memory.table())?;
        Ok(text)
    }

    /// `experts: 64 x 16 adapted, …`
    fn trained(&self) -> String {
        let verb = if matches!(self.trainee, Trainee::Adapters(_)) { "adapted" } else { "trained" };
        let (mut attention, mut shared, mut head, mut routers, mut others) = (0, 0, 0, 0, 0);
        let mut experts = BTreeSet::new();
        for place in self.trainee.places() {
            match place {
                Some(Place::Qkv { .. } | Place::AttentionOutput { .. }) => attention += 1,
                Some(Place::Router { .. }) => routers += 1,
                Some(Place::GateUp { layer, expert } | Place::Down { layer, expert }) => {
                    experts.insert((layer, expert));
                }
                Some(Place::SharedGateUp { .. } | Place::SharedDown { .. }) => shared += 1,
                Some(Place::Head) => head += 1,
                None => others += 1,
            }
        }
        let mut parts = Vec::new();
        if !experts.is_empty() {
            let layers = experts.iter().map(|(layer, _)| layer).collect::<BTreeSet<_>>().len();
            let each = experts.iter().map(|(_, expert)| expert).collect::<BTreeSet<_>>().len();
            let count = experts.len();
            parts.push(if count == each * layers {
                format!("experts: {each} x {layers} {verb}")
            } else {
                format!("experts: {count} in {layers} layers {verb}")
            });
        }
        for (count, name) in [(attention, "attention"), (shared, "shared and dense feed-forward"), (head, "head")] {
            if count > 0 {
                parts.push(format!("{name}: {count} matrices {verb}"));
            }
        }
        if others > 0 {
            parts.push(format!("embedding and norms: {others} {verb}"));
        }
        parts.push(format!("{:.1} M parameters", self.trainee.numbers() as f64 / 1e6));
        parts.push(if routers > 0 { format!("{routers} routers {verb}") } else { "router frozen".to_owned() });
        parts.join(", ")
    }

    /// The first example token by token.
    fn first_example(&self) -> Result<String> {
        let mut text = String::new();
        let Some(example) = self.data.examples().first() else { return Ok(text) };
        writeln!(text, "\nfirst example, {} line {} (* is learnt)", example.file, example.line)?;
        for piece in example.pieces(&self.tokenizer) {
            writeln!(text, "  {} {:>7}  {:?}", if piece.is_target { '*' } else { ' ' }, piece.token, piece.text)?;
        }
        Ok(text)
    }
}

/// New adapters.
fn adapters(settings: &Settings, checkpoint: &Checkpoint, decoder: &Decoder) -> Result<LoraPlan> {
    let own = if checkpoint.stacks_experts() { AdapterLayout::Fused } else { AdapterLayout::PerExpert };
    let options = LoraOptions {
        rank: settings.rank,
        alpha: settings.alpha,
        rslora: settings.rslora,
        dropout: settings.dropout,
        targets: settings.targets.clone(),
        layout: settings.layout.unwrap_or(own),
        seed: settings.seed,
    };
    Ok(LoraPlan::new(decoder, checkpoint.name(), &options)?)
}

fn modules_that(decoder: &Decoder, is_meant: impl Fn(Place) -> bool) -> Vec<TrainableModule> {
    trainable_modules(decoder).into_iter().filter(|module| module.place.is_some_and(&is_meant)).collect()
}

/// The weights of `modules`, if they can be trained and written.
fn weights(checkpoint: &Checkpoint, modules: Vec<TrainableModule>, chosen: Option<ChosenExperts>) -> Result<Trainee> {
    ensure!(!modules.is_empty(), "{} has no router: use another --method", checkpoint.name());
    rewrite::check(checkpoint)?;
    if let Some(module) = modules.iter().find(|module| !matches!(module.format, Format::F32 | Format::Bf16)) {
        let (name, format) = (&module.name, module.format);
        bail!(
            "{name} is packed as {format}, but weights are trained as f32 or bf16: give another --dtype, or train adapters"
        );
    }
    Ok(Trainee::Weights { modules, chosen })
}

fn outline(
    checkpoint: &Checkpoint,
    formats: &FormatOptions,
    placement: Placement,
    compute: &Compute,
) -> Result<Outline> {
    Ok(cadre_models::outline(checkpoint, formats, placement, compute)?)
}

/// Loads the weights, with a progress bar.
///
/// # Errors
/// When they can't be read, or memory can't be had.
pub fn load(
    checkpoint: &Checkpoint,
    formats: &FormatOptions,
    placement: Placement,
    compute: &Compute,
) -> Result<LoadedModel> {
    Ok(progress::weights("loading weights", |report| {
        cadre_models::load(checkpoint, formats, placement, compute, report)
    })?)
}
