//! The settings of a run, each with its value.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use cadre_engine::{nn::Format, train::schedule::Shape};
use cadre_models::{adapter::AdapterLayout, dataset::LossOn};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::memory::mebibytes;

/// The most of a rank, of examples in a batch, of batches in a step, and of threads: beyond what anybody trains with, and
/// products of them don't overflow.
const MOST_COUNTED: u64 = 65_536;
/// What part of all steps the learning rate rises in if no flag says.
pub const WARMUP_RATIO: f64 = 0.03;
/// The most steps that can be asked for.
const MOST_STEPS: u64 = 1_000_000_000;

/// What is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Adapters of modules
    #[default]
    Lora,
    /// The weights themselves
    Full,
    /// The weights of those experts that the data use most (ESFT)
    Experts,
    /// The routers' weights
    Router,
}

/// Which of a chat's assistant messages the loss is on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossOnName {
    /// All of them
    #[default]
    All,
    /// The last one
    Last,
}

impl From<LossOnName> for LossOn {
    fn from(name: LossOnName) -> Self {
        match name {
            LossOnName::All => Self::AllAssistant,
            LossOnName::Last => Self::LastAssistant,
        }
    }
}

/// How experts' adapters are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LayoutName {
    /// Gate and up of an expert share one, and a file stacks all experts of a layer
    Fused,
    /// Gate, up and down of an expert have their own
    PerExpert,
}

impl From<LayoutName> for AdapterLayout {
    fn from(name: LayoutName) -> Self {
        match name {
            LayoutName::Fused => Self::Fused,
            LayoutName::PerExpert => Self::PerExpert,
        }
    }
}

/// How the learning rate goes on after warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SchedulerName {
    /// It stays
    Constant,
    /// A line down to 0
    Linear,
    /// Half a cosine down to 0
    #[default]
    Cosine,
    /// It stays, and falls to 0 in the last tenth
    Wsd,
    /// One over the root of the step
    InverseSqrt,
}

impl From<SchedulerName> for Shape {
    fn from(name: SchedulerName) -> Self {
        match name {
            SchedulerName::Constant => Self::Constant,
            SchedulerName::Linear => Self::Linear,
            SchedulerName::Cosine => Self::Cosine,
            SchedulerName::Wsd => Self::Wsd,
            SchedulerName::InverseSqrt => Self::InverseSqrt,
        }
    }
}

/// Where else steps are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReportTo {
    /// TensorBoard's event files in the output directory
    #[default]
    Tensorboard,
    /// Nowhere
    None,
}

/// What a flag calls a value.
pub fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
}

/// The settings of a run. What each means is told by the flag of its name.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the flags of the same names say what they are")]
pub struct Settings {
    pub model: Option<String>,
    /// Of the frozen weights; `None`: what loses nothing.
    pub format: Option<Format>,
    pub data: Vec<PathBuf>,
    pub eval: Vec<PathBuf>,
    pub loss_on: LossOn,
    pub skip_bad: bool,
    pub max_length: Option<usize>,
    pub packing: bool,
    pub output: PathBuf,
    pub log_every: u64,
    pub save_every: u64,
    pub eval_every: u64,
    pub keep: usize,
    pub report_to: ReportTo,
    pub price_per_hour: Option<f64>,
    pub method: Method,
    /// Empty if the method says what is trained.
    pub targets: Vec<String>,
    /// Of each layer's choices of experts, how many the chosen experts make up: for [`Method::Experts`].
    pub expert_share: f64,
    pub rank: usize,
    pub alpha: f64,
    pub rslora: bool,
    pub dropout: f64,
    pub layout: Option<AdapterLayout>,
    pub aux_loss_coef: f32,
    pub z_loss_coef: f32,
    pub routing_warmup_steps: u64,
    pub learning_rate: f64,
    pub scheduler: SchedulerName,
    /// `None`: [`WARMUP_RATIO`], or no warm-up where that is less than a step.
    pub warmup_ratio: Option<f64>,
    pub epochs: f64,
    pub max_steps: Option<u64>,
    pub batch_size: usize,
    pub grad_accum: usize,
    pub weight_decay: f64,
    pub clip: f64,
    pub spike_threshold: f64,
    pub seed: u64,
    /// In bytes.
    pub memory: Option<u64>,
    pub threads: Option<usize>,
}

impl Settings {
    /// Refuses what can't be meant.
    ///
    /// # Errors
    /// When a setting lies outside of its bounds.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.data.is_empty(), "--data is missing: name at least one file of JSON lines");
        let counts = [
            ("--rank", self.rank as u64, MOST_COUNTED),
            ("--batch-size", self.batch_size as u64, MOST_COUNTED),
            ("--grad-accum", self.grad_accum as u64, MOST_COUNTED),
            ("--max-steps", self.max_steps.unwrap_or(1), MOST_STEPS),
            ("--threads", self.threads.unwrap_or(1) as u64, MOST_COUNTED),
            ("--log-every", self.log_every, u64::MAX),
            ("--keep", self.keep as u64, u64::MAX),
        ];
        for (name, value, most) in counts {
            ensure!(value > 0, "{name} must be at least 1");
            ensure!(value <= most, "{name} must be at most {most}, found {value}");
        }
        // With these no update can make a number that isn't finite: see the optimizer.
        let positive = [
            ("--learning-rate", self.learning_rate, 1.0),
            ("--epochs", self.epochs, 1e6),
            ("--alpha", self.alpha, 1e6),
            ("--clip", self.clip, 1e9),
            ("--spike-threshold", self.spike_threshold, 1e9),
        ];
        for (name, value, most) in positive {
            ensure!(value > 0.0 && value <= most, "{name} must be above 0 and at most {most}, found {value}");
        }
        let others = [
            ("--weight-decay", self.weight_decay, 1.0),
            ("--aux-loss-coef", self.aux_loss_coef.into(), 1e6),
            ("--z-loss-coef", self.z_loss_coef.into(), 1e6),
            ("--price-per-hour", self.price_per_hour.unwrap_or(0.0), 1e9),
        ];
        for (name, value, most) in others {
            ensure!((0.0..=most).contains(&value), "{name} must be from 0 to {most}, found {value}");
        }
        let ratio = self.warmup_ratio.unwrap_or(WARMUP_RATIO);
        ensure!((0.0..=1.0).contains(&ratio), "--warmup-ratio must be from 0 to 1, found {ratio}");
        ensure!((0.0..1.0).contains(&self.dropout), "--dropout must be at least 0 and below 1, found {}", self.dropout);
        ensure!(
            self.expert_share > 0.0 && self.expert_share <= 1.0,
            "--expert-share must be above 0 and at most 1, found {}",
            self.expert_share
        );
        Ok(())
    }

    /// What part of so many steps the learning rate rises in. As the schedules round a warm-up up to whole steps, and its first
    /// step has the rate 0, a short run has one only if it is asked for.
    #[must_use]
    pub fn warmup_ratio(&self, steps: u64) -> f64 {
        let is_a_step = steps as f64 * WARMUP_RATIO >= 1.0;
        self.warmup_ratio.unwrap_or(if is_a_step { WARMUP_RATIO } else { 0.0 })
    }

    /// Those that a run on `model` has a use for, by their flags' names.
    #[must_use]
    pub fn table(&self, model: &str) -> Vec<(&'static str, String)> {
        let files =
            |files: &[PathBuf]| files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ");
        let [is_lora, is_experts] = [Method::Lora, Method::Experts].map(|method| method == self.method);
        let layout = self.layout.map(|layout| match layout {
            AdapterLayout::Fused => LayoutName::Fused,
            AdapterLayout::PerExpert => LayoutName::PerExpert,
        });
        let loss_on = match self.loss_on {
            LossOn::AllAssistant => LossOnName::All,
            LossOn::LastAssistant => LossOnName::Last,
        };
        let rows = [
            ("model", Some(model.to_owned())),
            ("dtype", Some(self.format.map_or("auto".to_owned(), |format| format.to_string()))),
            ("data", Some(files(&self.data))),
            ("eval", (!self.eval.is_empty()).then(|| files(&self.eval))),
            ("loss-on", Some(name(&loss_on))),
            ("skip-bad", Some(self.skip_bad.to_string())),
            ("max-length", self.max_length.map(|length| length.to_string())),
            ("packing", Some(self.packing.to_string())),
            ("method", Some(name(&self.method))),
            ("targets", (!self.targets.is_empty()).then(|| self.targets.join(","))),
            ("expert-share", is_experts.then(|| self.expert_share.to_string())),
            ("rank", is_lora.then(|| self.rank.to_string())),
            ("alpha", is_lora.then(|| self.alpha.to_string())),
            ("rslora", is_lora.then(|| self.rslora.to_string())),
            ("dropout", is_lora.then(|| self.dropout.to_string())),
            ("adapter-layout", layout.filter(|_| is_lora).map(|layout| name(&layout))),
            ("aux-loss-coef", Some(self.aux_loss_coef.to_string())),
            ("z-loss-coef", Some(self.z_loss_coef.to_string())),
            ("routing-warmup-steps", Some(self.routing_warmup_steps.to_string())),
            ("learning-rate", Some(self.learning_rate.to_string())),
            ("scheduler", Some(name(&self.scheduler))),
            ("warmup-ratio", self.warmup_ratio.map(|ratio| ratio.to_string())),
            ("epochs", self.max_steps.is_none().then(|| self.epochs.to_string())),
            ("max-steps", self.max_steps.map(|steps| steps.to_string())),
            ("batch-size", Some(self.batch_size.to_string())),
            ("grad-accum", Some(self.grad_accum.to_string())),
            ("weight-decay", Some(self.weight_decay.to_string())),
            ("clip", Some(self.clip.to_string())),
            ("spike-threshold", Some(self.spike_threshold.to_string())),
            ("seed", Some(self.seed.to_string())),
            ("memory", self.memory.map(mebibytes)),
            ("threads", self.threads.map(|threads| threads.to_string())),
        ];
        rows.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Those that decide what is computed, with the fingerprints of the model and of the data: a run can't go on with others.
    #[must_use]
    pub fn deciding(&self, model: &str, data: &str) -> Value {
        json!({
            "loss_on": format!("{:?}", self.loss_on), "skip_bad": self.skip_bad,
            "max_length": self.max_length, "packing": self.packing, "targets": self.targets, "rank": self.rank,
            "alpha": self.alpha, "rslora": self.rslora, "dropout": self.dropout, "adapter_layout": self.layout.map(|layout| format!("{layout:?}")),
            "expert_share": self.expert_share, "aux_loss_coef": self.aux_loss_coef, "z_loss_coef": self.z_loss_coef,
            "routing_warmup_steps": self.routing_warmup_steps, "method": self.method,
            "dtype": self.format.map(|format| format.to_string()), "learning_rate": self.learning_rate,
            "scheduler": self.scheduler, "warmup_ratio": self.warmup_ratio, "epochs": self.epochs,
            "max_steps": self.max_steps, "batch_size": self.batch_size, "grad_accum": self.grad_accum,
            "weight_decay": self.weight_decay, "clip": self.clip, "spike_threshold": self.spike_threshold,
            "seed": self.seed, "model_fingerprint": model, "data_fingerprint": data,
        })
    }
}
