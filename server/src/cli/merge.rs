//! `cadre merge`.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use cadre_engine::compute::Compute;
use cadre_models::{
    StoredType,
    adapter::{CONFIG_FILE, average},
    rewrite::{self, Norms, Rewriting, Rewritten},
    training_state,
};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::terminal::{stop_at_signal, unless_pipe_closed};
use crate::{engine, finetune::checkpoint, host, progress};

/// Names of tensors that are printed; a report has all.
const NAMES: usize = 5;

/// Flags of `cadre merge`.
#[derive(Debug, Args)]
#[command(
    override_usage = "cadre merge --model DIR|ID --adapter DIR --output DIR [--dtype TYPE] [--report FILE]\n       \
                      cadre merge --last K --input RUN_DIR --output DIR [--model DIR|ID]",
    after_help = "The merged checkpoint has the files, tensors and shapes of the one that it is made from, computes what \
                  that one does with the adapter, and loads wherever that one does. Interrupted, the same command goes \
                  on. An adapter that adds nothing to a part that every token passes is refused; routed experts that no \
                  token of the training reached are listed as unchanged.\n\nThe average of K checkpoints adds the mean \
                  of what each of them adds, as if their merged weights were averaged: an adapter of K times the rank. Of a \
                  run that trained weights themselves, it is the --model that the run began from with the mean of them. It \
                  can take the place of a learning rate that goes down to 0 (WSM, arXiv 2507.17634)."
)]
pub struct MergeArgs {
    /// A checkpoint's directory or its id on the Hugging Face hub, no pack [default: the embedded model]
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,

    /// The LoRA adapter's directory, as PEFT and `cadre finetune` write it
    #[arg(long, value_name = "DIR", required_unless_present = "last", conflicts_with = "last")]
    adapter: Option<PathBuf>,

    /// Average the last K checkpoints of a fine-tuning run, in place of merging an adapter
    #[arg(long, value_name = "K", requires = "input", value_parser = super::at_least_one)]
    last: Option<usize>,

    /// The run's output directory, with its `checkpoint-N` directories
    #[arg(long, value_name = "RUN_DIR", requires = "last")]
    input: Option<PathBuf>,

    /// The directory to write; nothing else may be in it
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    /// Store all weights in this type; a small change that bf16 rounds away is kept by f32 [default: as each tensor is]
    #[arg(long, value_enum, value_name = "TYPE", conflicts_with = "last")]
    dtype: Option<DtypeArg>,

    /// Write what changed, tensor by tensor, into this file, as JSON; a file that is there is replaced
    #[arg(long, value_name = "FILE", conflicts_with = "last")]
    report: Option<PathBuf>,

    /// Worker threads [default: one a physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DtypeArg {
    /// 32 bits
    #[value(alias = "float32")]
    F32,
    /// 16 bits, the range of f32
    #[value(alias = "bfloat16")]
    Bf16,
    /// 16 bits, IEEE half precision
    #[value(alias = "float16")]
    F16,
}

impl From<DtypeArg> for StoredType {
    fn from(arg: DtypeArg) -> Self {
        match arg {
            DtypeArg::F32 => Self::F32,
            DtypeArg::Bf16 => Self::Bf16,
            DtypeArg::F16 => Self::F16,
        }
    }
}

/// Merges, and prints what changed.
///
/// # Errors
/// When something can't be read or written, or the adapter changes nothing where it should.
pub fn run(args: &MergeArgs) -> Result<()> {
    let text = match (&args.adapter, args.last, &args.input) {
        (Some(adapter), ..) => merge(args, adapter)?,
        (None, Some(last), Some(run)) => average_last(args, run, last)?,
        _ => anyhow::bail!("expected --adapter, or --last and --input"),
    };
    unless_pipe_closed(io::stdout().write_all(text.as_bytes()).map_err(Into::into))
}

fn merge(args: &MergeArgs, adapter: &Path) -> Result<String> {
    let checkpoint = engine::open(args.model.as_deref())?;
    let stop = stop_at_signal()?;
    let compute = Compute::new(args.threads.map_or_else(host::physical_cores, usize::from));
    let dtype = args.dtype.map(Into::into);
    let merged = progress::weights("merging", |report| {
        let rewriting = Rewriting { output: &args.output, dtype, stop: &stop, on_bytes: report };
        cadre_models::merge::merge(&checkpoint, adapter, &compute, &rewriting)
    });
    let shown = adapter.display();
    let merged = merged.with_context(|| format!("cannot merge {shown} into {}", checkpoint.name()))?;
    if let Some(file) = &args.report {
        let report = report(&merged, checkpoint.name(), adapter, dtype);
        fs::write(file, format!("{report:#}\n")).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let mut text = table(&merged)?;
    if merged.was_finished {
        writeln!(text, "\n{} was merged already: nothing was written", args.output.display())?;
    }
    Ok(text)
}

fn average_last(args: &MergeArgs, run: &Path, last: usize) -> Result<String> {
    let mut all = checkpoint::found(run)?;
    let shown = run.display();
    ensure!(
        all.len() >= last,
        "--last {last}: expected as many checkpoint-N directories in {shown}, found {}: ask for fewer, or have \
         `cadre finetune` save and keep more (--save-every, --keep)",
        all.len()
    );
    let taken = all.split_off(all.len() - last);
    let directories: Vec<PathBuf> = taken.iter().map(|(_, directory)| directory.clone()).collect();
    let failed = || format!("cannot average the checkpoints of {shown}");
    let steps = taken.iter().map(|(step, _)| step.to_string()).collect::<Vec<_>>().join(", ");
    if !directories.iter().any(|directory| directory.join(CONFIG_FILE).exists()) {
        let model = average_weights(args, &directories).with_context(failed)?;
        return Ok(format!("{} is {model} with the mean of the weights of steps {steps}\n", args.output.display()));
    }
    ensure!(args.model.is_none(), "--model: the run in {shown} trained an adapter, whose mean needs no model");
    let averaged = average(&directories, &args.output).with_context(failed)?;
    let (rank, output) = (averaged.averaged_rank, args.output.display());
    Ok(format!(
        "{output} has the mean of the adapters of steps {steps}: {} tensors, rank {rank} ({} each)\n",
        averaged.tensors, averaged.rank
    ))
}

/// Writes the checkpoint that a run began from with the mean of the weights in `directories`; what it is called.
fn average_weights(args: &MergeArgs, directories: &[PathBuf]) -> Result<String> {
    let model = engine::open(args.model.as_deref())?;
    let fingerprint = model.fingerprint()?;
    for directory in directories {
        ensure!(
            checkpoint::model_fingerprint(directory)? == fingerprint,
            "{} is not the model that {} was trained from: name that one by --model",
            model.name(),
            directory.display()
        );
    }
    let stop = stop_at_signal()?;
    let mean = training_state::mean(directories)?;
    progress::weights("writing the model", |report| {
        let rewriting = Rewriting { output: &args.output, dtype: None, stop: &stop, on_bytes: report };
        rewrite::write_checkpoint(&model, &mean, &rewriting)
    })?;
    Ok(model.name().to_owned())
}

/// What changed of each part.
fn table(merged: &Rewritten) -> Result<String> {
    let mut text = String::new();
    let title = ["part", "tensors", "changed", "numbers changed", "change", "rounding"];
    let [part, tensors, changed, numbers, change, rounding] = title;
    writeln!(text, "{part:<22} {tensors:>8} {changed:>8} {numbers:>16} {change:>10} {rounding:>10}")?;
    for part in merged.parts() {
        let (name, numbers) = (part.part.name(), percent(share(part.changed, part.numbers)));
        let (change, rounding) = (percent(relative_change(&part.norms)), percent(relative_rounding(&part.norms)));
        let (tensors, changed) = (part.tensors, part.changed_tensors);
        writeln!(text, "{name:<22} {tensors:>8} {changed:>8} {numbers:>16} {change:>10} {rounding:>10}")?;
    }
    writeln!(text, "\n{} further tensors are as they were", merged.copied)?;
    let unchanged: Vec<&str> = merged.unchanged().collect();
    if !unchanged.is_empty() {
        let names = unchanged.iter().take(NAMES).copied().collect::<Vec<_>>().join(", ");
        let more = if unchanged.len() > NAMES { ", …" } else { "" };
        writeln!(
            text,
            "{} adapted tensors did not change (experts that saw no token, or too few for their change to outlast rounding): {names}{more}",
            unchanged.len()
        )?;
    }
    writeln!(
        text,
        "\nchange: its length, as a part of the weights' own; rounding: what storing adds, as a part of the change"
    )?;
    Ok(text)
}

/// All of it, as JSON.
fn report(merged: &Rewritten, model: &str, adapter: &Path, dtype: Option<StoredType>) -> Value {
    let numbers = |numbers: u64, changed: u64, norms: &Norms| {
        json!({
            "numbers": numbers, "numbers_changed": changed, "weight_norm": norms.weight(),
            "change_norm": norms.change(), "rounding_norm": norms.rounding(),
            "relative_change": relative_change(norms), "relative_rounding": relative_rounding(norms),
        })
    };
    let with = |mut value: Value, more: Value| {
        if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
            value.extend(more);
        }
        value
    };
    let parts = merged.parts();
    let parts = parts.iter().map(|part| {
        let head = json!({"part": part.part.name(), "tensors": part.tensors, "changed": part.changed_tensors});
        with(head, numbers(part.numbers, part.changed, &part.norms))
    });
    let tensors = merged.changes.iter().map(|change| {
        let head = json!({"name": change.name, "part": change.part.name()});
        with(head, numbers(change.numbers, change.changed, &change.norms))
    });
    json!({
        "model": model, "adapter": adapter.display().to_string(), "dtype": dtype.map(|dtype| dtype.to_string()),
        "adapted": merged.changes.len(), "changed": merged.changes.len() - merged.unchanged().count(),
        "unchanged": merged.unchanged().collect::<Vec<_>>(), "copied": merged.copied,
        "parts": parts.collect::<Vec<_>>(), "tensors": tensors.collect::<Vec<_>>(),
    })
}

/// The length of the change as a part of the weights'.
fn relative_change(norms: &Norms) -> f64 {
    norms.change() / norms.weight().max(f64::MIN_POSITIVE)
}

/// The length of what rounding adds as a part of the change's.
fn relative_rounding(norms: &Norms) -> f64 {
    norms.rounding() / norms.change().max(f64::MIN_POSITIVE)
}

#[expect(clippy::cast_precision_loss, reason = "a few digits are shown")]
fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

fn percent(share: f64) -> String {
    format!("{:.3} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_nothing_are_nothing() {
        assert_eq!(percent(share(0, 0)), "0.000 %");
        assert_eq!(percent(share(1, 8)), "12.500 %");
        let none = Norms::default();
        assert_eq!(percent(relative_change(&none)) + &percent(relative_rounding(&none)), "0.000 %0.000 %");
    }
}
