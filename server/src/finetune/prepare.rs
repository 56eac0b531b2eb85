//! What is there before the first step: the model's sizes, the data, what is trained, and how the memory is divided.

use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use cadre_engine::{
    compute::Compute,
    model::{Model, ModelInfo},
    train::{memory::StepMemory, places::Place},
};
use cadre_models::{
    Checkpoint, FormatOptions, Outline, Placement, Tokenizer,
    adapter::{AdapterLayout, Lora, LoraOptions},
};

use super::{data::Data, settings::Settings};
use crate::{engine, host, memory::ExpertMemory};

/// Tokens that an example keeps when no flag says: more than most chats have.
const MAX_LENGTH: usize = 2048;
/// Of the free memory, what is used when no budget is given: the rest of the machine lives too.
const SHARE_OF_FREE: f64 = 0.9;
/// What a process takes beside what is reckoned.
const BASE_BYTES: u64 = 32 << 20;

/// What is there before the first step.
pub struct Prepared {
    pub compute: Compute,
    pub checkpoint: Checkpoint,
    pub tokenizer: Tokenizer,
    pub data: Data,
    pub eval: Option<Data>,
    pub steps: u64,
    pub lora: Lora,
    pub memory: MemoryPlan,
    pub formats: FormatOptions,
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
        let taken = base + weights + step.least();
        let least = taken + experts.map_or(routed, ExpertMemory::least_bytes);
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

    /// What the process will hold at most.
    pub fn peak(&self) -> u64 {
        let kept: u64 = self.step.kept[self.keep_from..].iter().sum();
        self.base + self.weights + self.experts + self.step.least() + kept
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
            ("one layer's work, or the head's".to_owned(), self.step.layer.max(self.step.head)),
            ("the process itself".to_owned(), self.base),
            (format!("peak, of {} that may be used", mebibytes(self.budget)), self.peak()),
        ];
        rows.iter().fold(String::new(), |mut text, (name, bytes)| {
            let _ = writeln!(text, "  {:>10}  {name}", mebibytes(*bytes));
            text
        })
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

impl Prepared {
    /// Opens what the settings name.
    ///
    /// # Errors
    /// When something is missing or broken, a target matches nothing, or the memory is too small.
    pub fn new(settings: &Settings) -> Result<Self> {
        let compute = Compute::new(settings.threads.unwrap_or_else(host::physical_cores).max(1));
        let checkpoint = engine::open(settings.model.as_deref())?;
        let (tokenizer, template) = (checkpoint.tokenizer()?, checkpoint.chat_template()?);
        let formats = FormatOptions { format: settings.format, experts: None, dense: None };
        let resident = outline(&checkpoint, &formats, Placement::Resident, &compute)?;
        let info = resident.decoder.info();
        let longest = info.max_position_embeddings;
        let max_length = settings.max_length.unwrap_or(MAX_LENGTH.min(longest));
        ensure!(max_length <= longest, "--max-length is {max_length}, but the model was made for {longest} tokens");
        let read =
            |files: &[std::path::PathBuf]| Data::read(files, settings, max_length, &tokenizer, template.as_ref());
        let data = read(&settings.data).context("--data")?;
        let eval = if settings.eval.is_empty() { None } else { Some(read(&settings.eval).context("--eval")?) };
        let steps = settings.max_steps.unwrap_or_else(|| data.steps(settings.epochs));
        let layout = settings.layout.unwrap_or(if checkpoint.stacks_experts() {
            AdapterLayout::Fused
        } else {
            AdapterLayout::PerExpert
        });
        let options = LoraOptions {
            rank: settings.rank,
            alpha: settings.alpha,
            rslora: settings.rslora,
            targets: settings.targets.clone(),
            layout,
            seed: settings.seed,
        };
        let lora = Lora::new(&resident.decoder, checkpoint.name(), &options)?;
        let [step_tokens, batch_tokens, longest] = data.most_tokens(settings.grad_accum);
        let step = StepMemory::new(&resident.decoder, &lora.parameters, step_tokens, batch_tokens, longest);
        let free = || host::free_memory_bytes().map_or(u64::MAX / 2, |free| (free as f64 * SHARE_OF_FREE) as u64);
        let budget = settings.memory.unwrap_or_else(free);
        let memory = match MemoryPlan::new(budget, info, None, step.clone()) {
            Ok(plan) => plan,
            Err(error) if info.moe_layers.is_empty() => return Err(error),
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
        Ok(Self { compute, checkpoint, tokenizer, data, eval, steps, lora, memory, formats })
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
        if !self.data.dataset.skipped.0.is_empty() {
            writeln!(text, "         {} broken lines are left out", self.data.dataset.skipped.0.len())?;
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
        let (mut attention, mut shared, mut head) = (0, 0, 0);
        let (mut experts, mut layers, mut routers) =
            (std::collections::BTreeSet::new(), std::collections::BTreeSet::new(), 0);
        for (place, _) in self.lora.trained.matrices() {
            match place {
                Place::Qkv { .. } | Place::AttentionOutput { .. } => attention += 1,
                Place::Router { .. } => routers += 1,
                Place::GateUp { layer, expert } | Place::Down { layer, expert } => {
                    experts.insert(expert);
                    layers.insert(layer);
                }
                Place::SharedGateUp { .. } | Place::SharedDown { .. } => shared += 1,
                Place::Head => head += 1,
            }
        }
        let mut parts = Vec::new();
        if !experts.is_empty() {
            parts.push(format!("experts: {} x {} adapted", experts.len(), layers.len()));
        }
        for (count, name) in [(attention, "attention"), (shared, "shared and dense feed-forward"), (head, "head")] {
            if count > 0 {
                parts.push(format!("{name}: {count} matrices adapted"));
            }
        }
        parts.push(format!("{:.1} M parameters", self.lora.parameters.count() as f64 / 1e6));
        parts.push(if routers > 0 { format!("{routers} routers adapted") } else { "router frozen".to_owned() });
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

fn outline(
    checkpoint: &Checkpoint,
    formats: &FormatOptions,
    placement: Placement,
    compute: &Compute,
) -> Result<Outline> {
    Ok(cadre_models::outline(checkpoint, formats, placement, compute)?)
}

/// Shows what a run would do.
///
/// # Errors
/// As the run itself would, before its first step.
pub fn dry_run(settings: &Settings) -> Result<()> {
    let prepared = Prepared::new(settings)?;
    print!("{}{}", prepared.describe(settings)?, prepared.first_example()?);
    Ok(())
}
