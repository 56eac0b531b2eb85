//! `cadre inspect`.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

use anyhow::Result;
use cadre_models::{ChatTemplate, Checkpoint, Stored, Summary};
use clap::Args;
use serde_json::{Map, Value, json};

use super::{pack::types, terminal::unless_pipe_closed};
use crate::engine;

/// Flags of `cadre inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A checkpoint's directory or its id on the Hugging Face hub [default: the embedded model]
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,

    /// A JSON object in place of the table
    #[arg(long)]
    json: bool,

    /// The chat template's text as well
    #[arg(long)]
    template: bool,
}

/// Prints what a checkpoint is. Reads headers only, no weights.
///
/// # Errors
/// When it can't be read.
pub fn run(args: &InspectArgs) -> Result<()> {
    let checkpoint = engine::open(args.model.as_deref())?;
    let summary = checkpoint.summary()?;
    let template = checkpoint.chat_template()?;
    let text = if args.json {
        format!("{}\n", object(&checkpoint, &summary, template.as_ref())?)
    } else {
        table(&checkpoint, &summary, template.as_ref(), args.template)?
    };
    unless_pipe_closed(io::stdout().write_all(text.as_bytes()).map_err(Into::into))
}

fn object(checkpoint: &Checkpoint, summary: &Summary, template: Option<&ChatTemplate>) -> Result<Value> {
    let parts: Map<String, Value> = summary
        .parts
        .iter()
        .map(|part| {
            let error = part.error.map(|error| error.relative());
            let value = json!({
                "tensors": part.tensors, "parameters": part.parameters, "bytes": part.bytes,
                "types": types_object(&part.types), "packing_error": error,
            });
            (part.part.name().to_owned(), value)
        })
        .collect();
    Ok(json!({
        "model": checkpoint.name(),
        "architecture": checkpoint.architecture(),
        "layers": summary.layers,
        "hidden_size": summary.hidden_size,
        "experts": summary.experts,
        "experts_per_token": summary.experts_per_token,
        "total_parameters": summary.total_parameters,
        "active_parameters": summary.active_parameters,
        "total_bytes": summary.total_bytes,
        "parts": parts,
        "types": types_object(&summary.types),
        "vocab_size": checkpoint.tokenizer()?.vocab_size(),
        "eos_token_ids": checkpoint.generation_config().eos_token_ids,
        "chat_template": template.map(ChatTemplate::source),
    }))
}

fn types_object(types: &[(Stored, u64)]) -> Map<String, Value> {
    types.iter().map(|(stored, bytes)| (stored.to_string(), (*bytes).into())).collect()
}

fn table(
    checkpoint: &Checkpoint,
    summary: &Summary,
    template: Option<&ChatTemplate>,
    whole_template: bool,
) -> Result<String> {
    let mut text = String::new();
    head(&mut text, checkpoint, summary)?;
    writeln!(text)?;
    parts(&mut text, summary)?;
    let types: Vec<String> = summary.types.iter().map(|(kind, bytes)| format!("{kind} ({bytes} bytes)")).collect();
    writeln!(text, "\nstored as      {}", types.join(", "))?;
    let Some(source) = template.map(ChatTemplate::source) else {
        writeln!(text, "chat template  none")?;
        return Ok(text);
    };
    writeln!(text, "chat template  {} characters, {} lines", source.chars().count(), source.lines().count())?;
    if whole_template {
        writeln!(text, "\n{source}")?;
    }
    Ok(text)
}

fn head(text: &mut String, checkpoint: &Checkpoint, summary: &Summary) -> Result<()> {
    let told = |number: Option<u64>| number.map_or_else(|| "?".to_owned(), |number| number.to_string());
    writeln!(text, "model          {}", checkpoint.name())?;
    writeln!(text, "architecture   {}", checkpoint.architecture())?;
    writeln!(text, "layers         {}, hidden size {}", told(summary.layers), told(summary.hidden_size))?;
    let (experts, used) = (told(summary.experts), told(summary.experts_per_token));
    writeln!(text, "experts        {experts} a layer, {used} a token")?;
    let (total, active) = (scaled(summary.total_parameters), scaled(summary.active_parameters));
    writeln!(text, "parameters     {total}, of which a token uses {active}")?;
    writeln!(text, "tokens         {} in the vocabulary", checkpoint.tokenizer()?.vocab_size())?;
    Ok(())
}

fn parts(text: &mut String, summary: &Summary) -> Result<()> {
    writeln!(text, "{:<30} {:>12} {:>16} {:>7}  stored as", "part", "parameters", "bytes", "share")?;
    for part in &summary.parts {
        let share = percent(part.bytes, summary.total_bytes);
        let (name, parameters, types) = (part.part.name(), scaled(part.parameters), types(part));
        writeln!(text, "{name:<30} {parameters:>12} {:>16} {share:>6.1}%  {types}", part.bytes)?;
    }
    let total = scaled(summary.parts.iter().map(|part| part.parameters).sum());
    writeln!(text, "{:<30} {total:>12} {:>16}", "all", summary.total_bytes)?;
    Ok(())
}

/// A number in three digits and a unit.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn scaled(number: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(1_000_000_000_000, "T"), (1_000_000_000, "B"), (1_000_000, "M"), (1000, "K")];
    match UNITS.iter().find(|(size, _)| number >= *size) {
        Some((size, unit)) => format!("{:.2}{unit}", number as f64 / *size as f64),
        None => number.to_string(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "one digit after the point is shown")]
fn percent(part: u64, whole: u64) -> f64 {
    part as f64 * 100.0 / whole.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_scaled() {
        assert_eq!(scaled(999), "999");
        assert_eq!(scaled(1500), "1.50K");
        assert_eq!(scaled(16_800_000_000), "16.80B");
    }

    #[test]
    fn shares_of_nothing() {
        assert!(percent(0, 0).abs() < f64::EPSILON);
        assert!((percent(1, 4) - 25.0).abs() < f64::EPSILON);
    }
}
