use std::io::{self, Write};

use cadre_engine::compute::Roofline;
use serde_json::json;

use super::{Bound, Kind, Run};
use crate::{engine::Engine, host};

/// The repetitions' figures.
pub(super) struct Speeds {
    median: f64,
    slowest: f64,
    fastest: f64,
}

impl Speeds {
    pub(super) fn of(mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        let at = |index: usize| all.get(index).copied().unwrap_or(f64::NAN);
        let middle = all.len() / 2;
        let median = if all.len().is_multiple_of(2) { (at(middle - 1) + at(middle)) / 2.0 } else { at(middle) };
        Self { median, slowest: at(0), fastest: at(all.len() - 1) }
    }
}

/// Prints figures as a table or as JSON lines.
pub(super) struct Printer {
    json: bool,
    model: String,
    threads: usize,
    format: String,
    isa: String,
}

impl Printer {
    pub(super) fn new(json: bool, engine: &Engine) -> Self {
        Self {
            json,
            model: engine.served.name().to_owned(),
            threads: engine.threads,
            format: engine.formats.to_string(),
            isa: engine.compute.isa.to_string(),
        }
    }

    /// `roofline`: what the machine can do, if the figures are held against it.
    pub(super) fn head(&self, roofline: Option<&Roofline>) -> io::Result<()> {
        if self.json {
            return Ok(());
        }
        let Self { model, threads, format, isa, .. } = self;
        let mut out = io::stdout().lock();
        writeln!(out, "{model}: {format}, {isa}, {threads} threads")?;
        if let Some(Roofline { read_bandwidth, matrix_rate }) = roofline {
            let (gigabytes, giga) = (read_bandwidth / 1e9, matrix_rate / 1e9);
            writeln!(out, "at most {gigabytes:.1} GB/s from memory, {giga:.1} G operations/s")?;
        }
        write!(out, "{:<8} {:>7} {:>6} {:>12} {:>22} {:>10}", "kind", "tokens", "batch", "tok/s", "range", "peak MiB")?;
        if roofline.is_some() {
            write!(out, " {:>12} {:>6}", "bound", "share")?;
        }
        writeln!(out)
    }

    pub(super) fn print(&self, kind: Kind, run: &Run, speeds: &Speeds, bound: Option<Bound>) -> io::Result<()> {
        let (kind, tokens, batch) = (kind.name(), kind.tokens(run), run.batch);
        let Speeds { median, slowest, fastest } = speeds;
        let peak = host::peak_rss_bytes();
        let mut out = io::stdout().lock();
        if self.json {
            let Self { model, threads, format, isa, .. } = self;
            let mut line = json!({
                "kind": kind, "tokens": tokens, "batch": batch, "tokens_per_second": median,
                "tokens_per_second_min": slowest, "tokens_per_second_max": fastest, "peak_rss_bytes": peak,
                "threads": threads, "format": format, "isa": isa, "model": model,
            });
            if let Some(Bound { tokens_per_second, roofline, share }) = bound {
                line["bound_tokens_per_second"] = json!(tokens_per_second);
                line["share_of_bound"] = json!(share);
                line["read_bytes_per_second"] = json!(roofline.read_bandwidth);
                line["matrix_operations_per_second"] = json!(roofline.matrix_rate);
            }
            writeln!(out, "{line}")?;
        } else {
            let range = format!("{slowest:.2} to {fastest:.2}");
            let peak = peak.map_or_else(|| "?".to_owned(), |bytes| (bytes >> 20).to_string());
            write!(out, "{kind:<8} {tokens:>7} {batch:>6} {median:>12.2} {range:>22} {peak:>10}")?;
            if let Some(Bound { tokens_per_second, share, .. }) = bound {
                write!(out, " {tokens_per_second:>12.2} {:>5.0}%", 100.0 * share)?;
            }
            writeln!(out)?;
        }
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Speeds::of(vec![3.0, 1.0, 2.0]).median, 2.0);
        assert_eq!(Speeds::of(vec![4.0, 1.0, 2.0, 3.0]).median, 2.5);
        let speeds = Speeds::of(vec![5.0]);
        assert_eq!((speeds.slowest, speeds.median, speeds.fastest), (5.0, 5.0, 5.0));
    }
}
