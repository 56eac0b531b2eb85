//! The flags of `cadre finetune`, of its config file, and of a server's jobs: to settings.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use cadre_engine::nn::Format;
use cadre_models::targets::{ALL, ALL_LINEAR};
use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::settings::{LayoutName, LossOnName, Method, ReportTo, SchedulerName, Settings, name};
use crate::cli::parse_bytes;

/// Flags of `cadre finetune`. A config file has the same names.
#[derive(Debug, Default, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct FinetuneArgs {
    /// A TOML file with these flags (but for config, dry-run and resume), without the dashes; flags win
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,

    /// Show the memory plan, what will be trained, token counts and the first example with its mask; train nothing
    #[arg(long)]
    #[serde(skip)]
    pub dry_run: bool,

    /// A checkpoint's directory or its id on the Hugging Face hub [default: the embedded model]
    #[arg(long, value_name = "DIR|ID", help_heading = "Model")]
    model: Option<String>,

    /// The frozen weights' format: auto (what loses nothing), f32, bf16, q8_0, q4_0, q4_k, q6_k or mxfp4
    #[arg(long, value_name = "FORMAT", help_heading = "Model")]
    dtype: Option<String>,

    /// Training data, JSON lines: `messages`, `prompt` and `completion`, `text`, or Alpaca's or ShareGPT's fields
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Data")]
    data: Vec<PathBuf>,

    /// Held-out data of the same kind
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Data")]
    eval: Vec<PathBuf>,

    /// Which of a chat's assistant messages the loss is on [default: all]
    #[arg(long, value_enum, value_name = "WHICH", help_heading = "Data")]
    loss_on: Option<LossOnName>,

    /// Go on with the good lines if some are broken, which are told
    #[arg(long, help_heading = "Data")]
    skip_bad: bool,

    /// The most tokens that an example keeps [default: 2048, or what the model was made for]
    #[arg(long, value_name = "TOKENS", help_heading = "Data")]
    max_length: Option<usize>,

    /// Count as one example as many as fit into the max length together; they see nothing of each other
    #[arg(long, help_heading = "Data")]
    packing: bool,

    /// Where the adapter or the new checkpoint, the run's checkpoints, log and report go
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    output: Option<PathBuf>,

    /// Go on from the latest checkpoint in the output directory, or from the start if the run was ended before the first
    #[arg(long, help_heading = "Output")]
    #[serde(skip)]
    pub resume: bool,

    /// Steps between lines of the log; the last step and checkpoints have one too [default: 1]
    #[arg(long, value_name = "STEPS", help_heading = "Output")]
    log_every: Option<u64>,

    /// Steps between checkpoints; 0: at the end only [default: 100]
    #[arg(long, value_name = "STEPS", help_heading = "Output")]
    save_every: Option<u64>,

    /// Steps between evaluations; 0: at the end only [default: 100]
    #[arg(long, value_name = "STEPS", help_heading = "Output")]
    eval_every: Option<u64>,

    /// Checkpoints that are kept, the latest ones [default: 3]
    #[arg(long, value_name = "N", help_heading = "Output")]
    keep: Option<usize>,

    /// Where else steps are written: tensorboard (event files in the output directory) or none [default: tensorboard]
    #[arg(long, value_enum, value_name = "WHERE", help_heading = "Output")]
    report_to: Option<ReportTo>,

    /// What this machine costs an hour: the report tells what a million tokens cost
    #[arg(long, value_name = "PRICE", help_heading = "Output")]
    price_per_hour: Option<f64>,

    /// What is trained: adapters of modules (lora), weights themselves (full), the weights of the experts that the data use
    /// most (experts) or of the routers (router) [default: lora]
    #[arg(long, value_enum, value_name = "METHOD", help_heading = "Method")]
    method: Option<Method>,

    /// What lora and full train: modules as on the hub (`q_proj`), or what holds them (`experts`, `self_attn`); all-linear: all
    /// matrices but the routers and the head; all, for full: everything but the routers [default: all-linear; for full: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "Method")]
    targets: Vec<String>,

    /// With --method experts: of each layer the fewest experts that get this share of the tokens' choices [default: 0.2]
    #[arg(long, value_name = "SHARE", help_heading = "Method")]
    expert_share: Option<f64>,

    /// The adapters' rank [default: 8]
    #[arg(long, value_name = "N", help_heading = "Method")]
    rank: Option<usize>,

    /// Adapters are multiplied with alpha / rank [default: twice the rank]
    #[arg(long, value_name = "X", help_heading = "Method")]
    alpha: Option<f64>,

    /// Multiply with alpha / √rank instead
    #[arg(long, help_heading = "Method")]
    rslora: bool,

    /// The probability that a value of an adapter's input is dropped in training [default: 0]
    #[arg(long, value_name = "P", help_heading = "Method")]
    dropout: Option<f64>,

    /// How experts' adapters are laid out [default: fused, as transformers 5 stacks them; per-expert for models that it
    /// doesn't know]
    #[arg(long, value_enum, value_name = "LAYOUT", help_heading = "Method")]
    adapter_layout: Option<LayoutName>,

    /// The coefficient of the routers' load-balancing loss [default: 0]
    #[arg(long, value_name = "X", help_heading = "Method")]
    aux_loss_coef: Option<f32>,

    /// The coefficient of the routers' z-loss [default: 0]
    #[arg(long, value_name = "X", help_heading = "Method")]
    z_loss_coef: Option<f32>,

    /// Steps in which noise takes part in the choice of experts, less and less, so that each of them gets tokens: for routers
    /// that are trained [default: 0]
    #[arg(long, value_name = "STEPS", help_heading = "Method")]
    routing_warmup_steps: Option<u64>,

    /// The highest learning rate [default: 2e-4 for lora, 2e-5 for weights themselves]
    #[arg(long, value_name = "X", help_heading = "Steps")]
    learning_rate: Option<f64>,

    /// How it goes on after warm-up [default: cosine]
    #[arg(long, value_enum, value_name = "SHAPE", help_heading = "Steps")]
    scheduler: Option<SchedulerName>,

    /// The part of all steps in which it rises, rounded up to whole steps [default: 0.03, or 0 if that is less than a step]
    #[arg(long, value_name = "RATIO", help_heading = "Steps")]
    warmup_ratio: Option<f64>,

    /// How often the data are gone through [default: 3]
    #[arg(long, value_name = "N", conflicts_with = "max_steps", help_heading = "Steps")]
    epochs: Option<f64>,

    /// Steps, in place of epochs
    #[arg(long, value_name = "N", help_heading = "Steps")]
    max_steps: Option<u64>,

    /// Examples that are computed together [default: 4]
    #[arg(long, value_name = "N", help_heading = "Steps")]
    batch_size: Option<usize>,

    /// Batches that make one step [default: 1]
    #[arg(long, value_name = "N", help_heading = "Steps")]
    grad_accum: Option<usize>,

    /// What is taken off matrices at each update, times the learning rate [default: 0]
    #[arg(long, value_name = "X", help_heading = "Steps")]
    weight_decay: Option<f64>,

    /// The greatest norm of a step's gradients; greater ones are scaled down [default: 1]
    #[arg(long, value_name = "X", help_heading = "Steps")]
    clip: Option<f64>,

    /// Deviations above the mean from which a loss or gradient norm counts as a spike: its update is skipped, and its
    /// examples are tried again later [default: 6]
    #[arg(long, value_name = "X", help_heading = "Steps")]
    spike_threshold: Option<f64>,

    /// Decides the order of examples and where adapters begin [default: 42]
    #[arg(long, value_name = "N", help_heading = "Steps")]
    seed: Option<u64>,

    /// Memory for the whole process, such as 8GiB: layers that don't fit are computed again, and experts are read from disk
    /// as they are needed [default: nine tenths of what is free]
    #[arg(long, value_name = "SIZE", help_heading = "Machine")]
    memory: Option<String>,

    /// Worker threads [default: one a physical core]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    threads: Option<usize>,
}

impl FinetuneArgs {
    /// The settings that `fields` name as a config file does, over the defaults.
    ///
    /// # Errors
    /// When a field is unknown, of another type, or out of its range.
    pub fn settings_of(fields: Map<String, Value>) -> Result<Settings> {
        serde_json::from_value::<Self>(Value::Object(fields))?.settings()
    }

    /// The flags over the config file over the defaults.
    ///
    /// # Errors
    /// When the file can't be read, or a setting is out of its range.
    pub fn settings(self) -> Result<Settings> {
        let args = match self.config.clone() {
            None => self,
            Some(path) => self.over_file(&path)?,
        };
        let method = args.method.unwrap_or_default();
        args.check_method(method)?;
        ensure!(
            args.epochs.is_none() || args.max_steps.is_none(),
            "epochs and max-steps both say how long to train: give one"
        );
        let output = match args.output {
            // Nothing is written: it may be any that has no run.
            None if args.dry_run => PathBuf::new(),
            output => output.context("--output is missing: say where the adapter goes")?,
        };
        let targets = match method {
            Method::Lora if args.targets.is_empty() => vec![ALL_LINEAR.to_owned()],
            Method::Full if args.targets.is_empty() => vec![ALL.to_owned()],
            _ => args.targets,
        };
        let format = args.dtype.as_deref().filter(|name| *name != "auto");
        let layout = args.adapter_layout.map(Into::into);
        let memory = args.memory.as_deref().map(parse_bytes).transpose();
        let settings = Settings {
            model: args.model,
            format: format.map(str::parse::<Format>).transpose().context("--dtype")?,
            data: args.data,
            eval: args.eval,
            loss_on: args.loss_on.unwrap_or_default().into(),
            skip_bad: args.skip_bad,
            max_length: args.max_length,
            packing: args.packing,
            output,
            log_every: args.log_every.unwrap_or(1),
            save_every: args.save_every.unwrap_or(100),
            eval_every: args.eval_every.unwrap_or(100),
            keep: args.keep.unwrap_or(3),
            report_to: args.report_to.unwrap_or_default(),
            price_per_hour: args.price_per_hour,
            method,
            targets,
            expert_share: args.expert_share.unwrap_or(0.2),
            rank: args.rank.unwrap_or(8),
            alpha: args.alpha.unwrap_or(2.0 * args.rank.unwrap_or(8) as f64),
            rslora: args.rslora,
            dropout: args.dropout.unwrap_or(0.0),
            layout,
            aux_loss_coef: args.aux_loss_coef.unwrap_or(0.0),
            z_loss_coef: args.z_loss_coef.unwrap_or(0.0),
            routing_warmup_steps: args.routing_warmup_steps.unwrap_or(0),
            learning_rate: args.learning_rate.unwrap_or(if method == Method::Lora { 2e-4 } else { 2e-5 }),
            scheduler: args.scheduler.unwrap_or_default(),
            warmup_ratio: args.warmup_ratio,
            epochs: args.epochs.unwrap_or(3.0),
            max_steps: args.max_steps,
            batch_size: args.batch_size.unwrap_or(4),
            grad_accum: args.grad_accum.unwrap_or(1),
            weight_decay: args.weight_decay.unwrap_or(0.0),
            clip: args.clip.unwrap_or(1.0),
            spike_threshold: args.spike_threshold.unwrap_or(6.0),
            seed: args.seed.unwrap_or(42),
            memory: memory.map_err(|error| anyhow::anyhow!("--memory: {error}"))?,
            threads: args.threads,
        };
        settings.check()?;
        Ok(settings)
    }

    /// Refuses flags that `method` has no use for.
    fn check_method(&self, method: Method) -> Result<()> {
        let flags = [
            ("--targets", !self.targets.is_empty(), &[Method::Lora, Method::Full][..]),
            ("--expert-share", self.expert_share.is_some(), &[Method::Experts]),
            ("--rank", self.rank.is_some(), &[Method::Lora]),
            ("--alpha", self.alpha.is_some(), &[Method::Lora]),
            ("--rslora", self.rslora, &[Method::Lora]),
            ("--dropout", self.dropout.is_some(), &[Method::Lora]),
            ("--adapter-layout", self.adapter_layout.is_some(), &[Method::Lora]),
        ];
        if let Some((flag, _, methods)) = flags.iter().find(|(_, given, methods)| *given && !methods.contains(&method))
        {
            let methods = methods.iter().map(name).collect::<Vec<_>>().join(" or ");
            bail!("{flag} is for --method {methods}, but this run's is {}", name(&method));
        }
        Ok(())
    }

    fn over_file(self, path: &Path) -> Result<Self> {
        let shown = path.display();
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))?;
        let file: Self = toml::from_str(&text).with_context(|| format!("{shown}"))?;
        Ok(self.over(file))
    }

    /// These flags, and what they leave open as in a file.
    fn over(self, file: Self) -> Self {
        fn list<T>(flags: Vec<T>, file: Vec<T>) -> Vec<T> {
            if flags.is_empty() { file } else { flags }
        }
        // Both say how long to train: a flag of one takes the place of the other in the file too.
        let (epochs, max_steps) = match (self.epochs, self.max_steps) {
            (None, None) => (file.epochs, file.max_steps),
            flags => flags,
        };
        Self {
            config: self.config,
            dry_run: self.dry_run,
            model: self.model.or(file.model),
            dtype: self.dtype.or(file.dtype),
            data: list(self.data, file.data),
            eval: list(self.eval, file.eval),
            loss_on: self.loss_on.or(file.loss_on),
            skip_bad: self.skip_bad || file.skip_bad,
            max_length: self.max_length.or(file.max_length),
            packing: self.packing || file.packing,
            output: self.output.or(file.output),
            resume: self.resume,
            log_every: self.log_every.or(file.log_every),
            save_every: self.save_every.or(file.save_every),
            eval_every: self.eval_every.or(file.eval_every),
            keep: self.keep.or(file.keep),
            report_to: self.report_to.or(file.report_to),
            price_per_hour: self.price_per_hour.or(file.price_per_hour),
            method: self.method.or(file.method),
            targets: list(self.targets, file.targets),
            expert_share: self.expert_share.or(file.expert_share),
            rank: self.rank.or(file.rank),
            alpha: self.alpha.or(file.alpha),
            rslora: self.rslora || file.rslora,
            dropout: self.dropout.or(file.dropout),
            adapter_layout: self.adapter_layout.or(file.adapter_layout),
            aux_loss_coef: self.aux_loss_coef.or(file.aux_loss_coef),
            z_loss_coef: self.z_loss_coef.or(file.z_loss_coef),
            routing_warmup_steps: self.routing_warmup_steps.or(file.routing_warmup_steps),
            learning_rate: self.learning_rate.or(file.learning_rate),
            scheduler: self.scheduler.or(file.scheduler),
            warmup_ratio: self.warmup_ratio.or(file.warmup_ratio),
            epochs,
            max_steps,
            batch_size: self.batch_size.or(file.batch_size),
            grad_accum: self.grad_accum.or(file.grad_accum),
            weight_decay: self.weight_decay.or(file.weight_decay),
            clip: self.clip.or(file.clip),
            spike_threshold: self.spike_threshold.or(file.spike_threshold),
            seed: self.seed.or(file.seed),
            memory: self.memory.or(file.memory),
            threads: self.threads.or(file.threads),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        args: FinetuneArgs,
    }

    fn settings(flags: &[&str], file: &str) -> Result<Settings> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run.toml");
        fs::write(&path, file).unwrap();
        let fixed = ["cadre", "--data", "a.jsonl", "--output", "out", "--config", path.to_str().unwrap()];
        Flags::parse_from(fixed.iter().chain(flags)).args.settings()
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = "rank = 4\nmax-steps = 3\nskip-bad = true\ntargets = [\"experts\"]\n";
        let merged = settings(&["--rank", "2", "--seed", "7"], file).unwrap();
        assert_eq!((merged.rank, merged.max_steps, merged.skip_bad, merged.seed), (2, Some(3), true, 7));
        assert_eq!(merged.targets, ["experts"]);
        let merged = settings(&["--epochs", "10"], file).unwrap();
        assert_eq!((merged.epochs, merged.max_steps), (10.0, None), "the other one of the pair is out");
        let merged = settings(&["--max-steps", "5"], "epochs = 2").unwrap();
        assert_eq!(merged.max_steps, Some(5));
    }

    #[test]
    fn what_a_file_says_is_no_default() {
        let refused = |file: &str| format!("{:#}", settings(&[], file).unwrap_err());
        assert!(refused("learning-rate = nan").contains("--learning-rate must be above 0 and at most 1, found NaN"));
        assert!(refused("epochs = 2\nmax-steps = 3").contains("give one"));
        assert!(refused("log-every = 0").contains("--log-every must be at least 1"));
        assert!(refused("resume = true").contains("resume"));
    }

    #[test]
    fn a_short_run_has_no_warmup_unless_it_is_asked_for() {
        let ratio = |flags: &[&str], steps| settings(flags, "").unwrap().warmup_ratio(steps);
        assert_eq!([1, 33, 34].map(|steps| ratio(&[], steps)), [0.0, 0.0, 0.03]);
        assert_eq!(ratio(&["--warmup-ratio", "0.03"], 10), 0.03);
    }
}
