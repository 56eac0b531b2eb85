//! `cadre pack`.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::PathBuf,
};

use anyhow::{Context, Result};
use cadre_engine::compute::Compute;
use cadre_models::{pack::Packed, summary::PartSummary};
use clap::Args;

use super::{
    FormatArgs,
    terminal::{stop_at_signal, unless_pipe_closed},
};
use crate::{engine, host, progress};

/// Flags of `cadre pack`.
#[derive(Debug, Args)]
pub struct PackArgs {
    /// A checkpoint's directory or its id on the Hugging Face hub [default: the embedded model]
    #[arg(long, value_name = "DIR|ID")]
    model: Option<String>,

    /// The directory to write; what an interrupted run left there is gone on with
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    #[command(flatten)]
    formats: FormatArgs,

    /// Worker threads [default: one a physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

/// Packs, and prints what it cost and saved.
///
/// # Errors
/// When the checkpoint can't be read, or the output can't be written.
pub fn run(args: &PackArgs) -> Result<()> {
    let checkpoint = engine::open(args.model.as_deref())?;
    let stop = stop_at_signal()?;
    let compute = Compute::new(args.threads.map_or_else(host::physical_cores, usize::from));
    let options = args.formats.options();
    let packed = progress::weights("packing", |report| {
        cadre_models::pack::pack(&checkpoint, &options, &args.output, &compute, &stop, report)
    });
    let packed = packed.with_context(|| format!("cannot pack {}", checkpoint.name()))?;
    let output = args.output.display();
    let mut text = table(&packed)?;
    if packed.was_finished {
        writeln!(text, "\n{output} was packed already: nothing was written")?;
    }
    unless_pipe_closed(io::stdout().write_all(text.as_bytes()).map_err(Into::into))
}

/// Sizes before and after, bits a weight, and the error of each part.
fn table(packed: &Packed) -> Result<String> {
    let mut text = String::new();
    writeln!(
        text,
        "{:<22} {:>14} {:>14} {:>11} {:>9}  format",
        "part", "bytes before", "after", "bits/weight", "error"
    )?;
    let mut total_before = 0;
    for part in &packed.pack.parts {
        let before = packed.source.parts.iter().find(|before| before.part == part.part);
        let error = part.error.map_or_else(|| "-".to_owned(), |error| format!("{:.3} %", error.relative() * 100.0));
        let bits = bits(part.bytes, part.parameters);
        let (name, before) = (part.part.name(), before.map_or(0, |before| before.bytes));
        total_before += before;
        writeln!(text, "{name:<22} {before:>14} {:>14} {bits:>11.2} {error:>9}  {}", part.bytes, types(part))?;
    }
    let after = packed.pack.total_bytes;
    let bits = bits(after, packed.pack.total_parameters);
    writeln!(text, "{:<22} {total_before:>14} {after:>14} {bits:>11.2}", "all")?;
    writeln!(text, "\nerror: root mean square, as a part of the weights' own")?;
    Ok(text)
}

/// What a part is stored as.
pub fn types(part: &PartSummary) -> String {
    let names: Vec<String> = part.types.iter().map(|(stored, _)| stored.to_string()).collect();
    names.join(", ")
}

#[expect(clippy::cast_precision_loss, reason = "two digits after the point are shown")]
fn bits(bytes: u64, parameters: u64) -> f64 {
    bytes as f64 * 8.0 / parameters.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_nothing() {
        assert!(bits(0, 0).abs() < f64::EPSILON);
        assert!((bits(9, 16) - 4.5).abs() < f64::EPSILON);
    }
}
