use std::io::{self, Write};

use cadre_engine::experts::StoreCounters;
use serde_json::{Value, json};

use super::{Kind, Run};
use crate::{engine::Engine, host, plan::Machine};

/// The repetitions' figures.
pub(super) struct Speeds {
    pub(super) median: f64,
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

/// What the machine allowed a run, why, and how much of it the run reached.
pub(super) struct Bound {
    tokens_per_second: f64,
    machine: Machine,
    pub(super) share: f64,
}

impl Bound {
    /// Of a run at `speed` tokens per second, for which the machine, as it was around the run, allowed `tokens_per_second`.
    pub(super) fn new(machine: Machine, tokens_per_second: f64, speed: f64) -> Self {
        Self { tokens_per_second, machine, share: speed / tokens_per_second }
    }
}

/// What is told of a run and its repetitions.
pub(super) struct Figures {
    pub(super) speeds: Speeds,
    /// What the machine allowed, if that was measured.
    pub(super) bound: Option<Bound>,
    /// What `cadre plan` expects, if it has measured the machine.
    pub(super) predicted: Option<f64>,
    /// How experts that don't fit the memory fared in the last repetition.
    pub(super) experts: Option<StoreCounters>,
}

/// Prints figures as a table or as JSON lines.
pub(super) struct Printer {
    json: bool,
    model: String,
    threads: usize,
    format: String,
    isa: String,
    predicts: bool,
    stored: bool,
}

impl Printer {
    pub(super) fn new(json: bool, engine: &Engine, predicts: bool) -> Self {
        Self {
            json,
            model: engine.served.name().to_owned(),
            threads: engine.threads,
            format: engine.formats.to_string(),
            isa: engine.compute.isa.to_string(),
            predicts,
            stored: engine.store.is_some(),
        }
    }

    /// `machine`: what it can do, if the figures are held against that.
    pub(super) fn head(&self, machine: Option<&Machine>) -> io::Result<()> {
        if self.json {
            return Ok(());
        }
        let Self { model, threads, format, isa, .. } = self;
        let mut out = io::stdout().lock();
        writeln!(out, "{model}: {format}, {isa}, {threads} threads")?;
        if let Some(machine) = machine {
            writeln!(out, "at most {}", machine.limits())?;
        }
        write!(out, "{:<8} {:>7} {:>6} {:>12} {:>22} {:>10}", "kind", "tokens", "batch", "tok/s", "range", "peak MiB")?;
        if machine.is_some() {
            write!(out, " {:>12} {:>6}", "bound", "share")?;
        }
        if self.predicts {
            write!(out, " {:>12}", "predicted")?;
        }
        if self.stored {
            write!(out, " {:>7} {:>12} {:>8} {:>8} {:>8}", "hits", "experts/step", "read GB", "ms/read", "stall s")?;
        }
        writeln!(out)
    }

    pub(super) fn print(&self, kind: Kind, run: &Run, figures: Figures) -> io::Result<()> {
        let (kind, tokens, batch) = (kind.name(), kind.tokens(run), run.batch);
        let Figures { speeds: Speeds { median, slowest, fastest }, bound, predicted, experts } = figures;
        let peak = host::peak_rss_bytes();
        let mut out = io::stdout().lock();
        if self.json {
            let Self { model, threads, format, isa, .. } = self;
            let mut line = json!({
                "kind": kind, "tokens": tokens, "batch": batch, "tokens_per_second": median,
                "tokens_per_second_min": slowest, "tokens_per_second_max": fastest, "peak_rss_bytes": peak,
                "threads": threads, "format": format, "isa": isa, "model": model,
            });
            if let Some(Bound { tokens_per_second, machine, share }) = bound {
                line["bound_tokens_per_second"] = json!(tokens_per_second);
                line["share_of_bound"] = json!(share);
                line["read_bytes_per_second"] = json!(machine.read_bandwidth);
                line["matrix_operations_per_second"] = json!(machine.matrix_rate);
                if let Some(disk) = machine.disk_bandwidth() {
                    line["disk_bytes_per_second"] = json!(disk);
                }
            }
            if let Some(predicted) = predicted {
                line["predicted_tokens_per_second"] = json!(predicted);
            }
            if let Some(experts) = experts {
                line["experts"] = object(&experts);
            }
            writeln!(out, "{line}")?;
        } else {
            let range = format!("{slowest:.2} to {fastest:.2}");
            let peak = peak.map_or_else(|| "?".to_owned(), |bytes| (bytes >> 20).to_string());
            write!(out, "{kind:<8} {tokens:>7} {batch:>6} {median:>12.2} {range:>22} {peak:>10}")?;
            if let Some(Bound { tokens_per_second, share, .. }) = bound {
                write!(out, " {tokens_per_second:>12.2} {:>5.0}%", 100.0 * share)?;
            }
            if let Some(predicted) = predicted {
                write!(out, " {predicted:>12.2}")?;
            }
            if let Some(experts) = experts {
                let (hits, active) = (100.0 * experts.hit_rate(), experts.active_per_step.mean());
                let (read, each) = (experts.fetched_bytes as f64 / 1e9, 1e3 * experts.fetch_seconds.mean());
                let stalled = experts.stalled.as_secs_f64();
                write!(out, " {hits:>6.1}% {active:>12.0} {read:>8.2} {each:>8.2} {stalled:>8.2}")?;
            }
            writeln!(out)?;
        }
        out.flush()
    }
}

/// What a run did with its experts, for machines.
fn object(experts: &StoreCounters) -> Value {
    json!({
        "hits": experts.hits(),
        "misses": experts.misses(),
        "hit_rate": experts.hit_rate(),
        "layer_hit_rates": experts.layer_hit_rates().collect::<Vec<_>>(),
        "evictions": experts.evictions,
        "ahead_used": experts.ahead_used,
        "ahead_wasted_bytes": experts.ahead_wasted_bytes,
        "read_bytes": experts.fetched_bytes,
        "read_seconds_mean": experts.fetch_seconds.mean(),
        "active_per_step_mean": experts.active_per_step.mean(),
        "stall_seconds": experts.stalled.as_secs_f64(),
    })
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
