//! `cadre plan`.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

use anyhow::Result;
use cadre_engine::model::Model;
use clap::Args;
use serde_json::{Value, json};

use super::{EngineArgs, at_least_one, terminal::unless_pipe_closed};
use crate::{
    engine::{EngineOptions, Loaded, MemorySplit, Opened},
    measure::{self, Found, Kept, Key},
    plan::{Machine, Seen, Speed, Work},
};

/// The prompt whose prefill is told of, in tokens.
const PROMPT: usize = 512;
/// Sequences that decode together.
const BATCHES: [usize; 3] = [1, 8, 32];

/// Flags of `cadre plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Measure this machine again, which takes about five seconds; else it is done once for a model
    #[arg(long)]
    measure: bool,

    /// A JSON object in place of the table
    #[arg(long)]
    json: bool,

    /// Sequences that one step takes at most
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Engine", value_parser = at_least_one)]
    max_num_seqs: usize,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Prints what is to be expected. Loads no weights.
///
/// # Errors
/// When the checkpoint can't be read, doesn't fit the limits, or there is no memory to measure in.
pub fn run(args: &PlanArgs) -> Result<()> {
    let plan = Plan::new(args, &args.engine.options(args.max_num_seqs))?;
    let text = if args.json { format!("{}\n", plan.object()) } else { plan.table()? };
    unless_pipe_closed(io::stdout().write_all(text.as_bytes()).map_err(Into::into))
}

struct Plan {
    /// Model, formats and tier.
    names: [String; 3],
    threads: usize,
    split: MemorySplit,
    work: Work,
    machine: Machine,
    figures: Vec<Figure>,
}

/// What is told of one kind of step.
struct Figure {
    kind: &'static str,
    tokens: usize,
    batch: usize,
    hit_rate: f64,
    speed: Speed,
    /// By the last bench within the same budget, and what was to be expected with the hits that it had.
    measured: Option<(Found, Speed)>,
}

impl Plan {
    fn new(args: &PlanArgs, options: &EngineOptions) -> Result<Self> {
        let Opened { threads, compute, checkpoint, budget } = Opened::new(options)?;
        let outline = cadre_models::outline(&checkpoint, &options.formats, budget.placement(), &compute)?;
        let (info, formats) = (outline.decoder.info().clone(), outline.formats);
        let split = MemorySplit::new(options, budget, &info, formats, Loaded::none(&outline))?;
        let work = Work::new(info, options.max_num_batched_tokens, split.slots).with_profile_of(&checkpoint);

        let key = Key::new(&checkpoint, formats, split.kv.dtype, &compute, threads)?;
        let mut kept = Kept::open();
        let machine = match kept.machine(&key, split.slots.is_some()).filter(|_| !args.measure) {
            Some(machine) => machine.clone(),
            None => {
                let machine = measure::machine(&compute, outline, split.kv.dtype)?;
                if let Err(error) = kept.keep_machine(&key, machine.clone()) {
                    tracing::warn!("{error:#}");
                }
                machine
            }
        };
        let figure = |kind, tokens, batch, size, expected: &dyn Fn(Option<Seen>) -> Speed| {
            let found = kept.result(&key, options, kind, size);
            Figure {
                kind,
                tokens,
                batch,
                hit_rate: work.usage((tokens * batch).min(options.max_num_batched_tokens)).hit_rate,
                speed: expected(None),
                measured: found.map(|found| (found, expected(found.seen))),
            }
        };
        let prefill = figure("prefill", PROMPT, 1, PROMPT, &|seen| work.prefill(PROMPT, seen, &machine));
        let decode = BATCHES.map(|batch| figure("decode", 1, batch, batch, &|seen| work.decode(batch, seen, &machine)));
        let names = [checkpoint.name().to_owned(), formats.to_string(), compute.isa.to_string()];
        Ok(Self { names, threads, split, figures: std::iter::once(prefill).chain(decode).collect(), work, machine })
    }

    fn expert_bytes(&self) -> u64 {
        self.split.slots.map_or(0, |slots| slots as u64 * self.split.stored.slot)
    }

    fn needed(&self) -> u64 {
        let MemorySplit { weights, step, kv, stored, .. } = self.split;
        weights + step + kv.bytes() + stored.staging + self.expert_bytes()
    }

    fn object(&self) -> Value {
        let [model, format, isa] = &self.names;
        let MemorySplit { budget, weights, step, kv, stored, slots, experts } = self.split;
        let figures = self.figures.iter().map(|figure| {
            let Figure { kind, tokens, batch, hit_rate, speed: Speed { predicted, bound }, measured } = figure;
            let measured = measured.map(|(Found { speed, seen }, at_its_hits)| {
                json!({
                    "tokens_per_second": speed, "by_predicted": speed / predicted,
                    "hit_rate": seen.map(|seen| seen.hit_rate), "experts_per_step": seen.map(|seen| seen.distinct),
                    "predicted_at_hit_rate": at_its_hits.predicted, "bound_at_hit_rate": at_its_hits.bound,
                    "by_predicted_at_hit_rate": speed / at_its_hits.predicted,
                })
            });
            json!({
                "kind": kind, "tokens": tokens, "batch": batch, "hit_rate": hit_rate,
                "predicted_tokens_per_second": predicted, "bound_tokens_per_second": bound, "measured": measured,
            })
        });
        json!({
            "model": model, "format": format, "isa": isa, "threads": self.threads,
            "memory": {
                "budget_bytes": budget, "needed_bytes": self.needed(), "weight_bytes": weights, "step_bytes": step,
                "kv_bytes": kv.bytes(), "max_model_len": kv.max_model_len, "expert_slots": slots,
                "slot_bytes": stored.slot, "staging_bytes": stored.staging, "experts": experts,
            },
            "machine": {
                "read_bytes_per_second": self.machine.read_bandwidth,
                "matrix_operations_per_second": self.machine.matrix_rate,
                "disk_bytes_per_second": self.machine.disk_bandwidth(),
            },
            "routing": if self.work.has_profile() { "profile" } else { "even" },
            "figures": figures.collect::<Vec<_>>(),
        })
    }

    fn table(&self) -> Result<String> {
        let [model, format, isa] = &self.names;
        let mut text = format!("{model}: {format}, {isa}, {} threads\n\n", self.threads);
        self.memory(&mut text)?;
        write!(text, "\nthis machine: {}", self.machine.limits())?;
        let routing = if self.work.has_profile() {
            "as the routing profile beside the model tells"
        } else {
            "even: there is no routing profile beside the model yet"
        };
        writeln!(text, "\nrouting: {routing}\n")?;
        self.figures(&mut text)?;
        Ok(text)
    }

    fn memory(&self, text: &mut String) -> Result<()> {
        let MemorySplit { budget, weights, step, kv, stored, slots, experts } = self.split;
        let mut row = |what: &str, bytes: u64, note: &str| writeln!(text, "{what:<30} {:>9} MiB  {note}", bytes >> 20);
        let held = if slots.is_some() { "the process and dense weights" } else { "the process and weights" };
        row(held, weights, "")?;
        row("keys and values", kv.bytes(), &format!("sequences of up to {} tokens", kv.max_model_len))?;
        row("a step", step, "activations and logits")?;
        if stored.staging > 0 {
            row("experts between disk and slot", stored.staging, "converted when they are read: this is no pack")?;
        }
        match slots {
            Some(slots) => row("expert slots", self.expert_bytes(), &format!("{slots} of {experts} experts"))?,
            None => row("expert slots", 0, &format!("all {experts} experts are among the weights"))?,
        }
        let limit = budget.map_or_else(|| "no limit".to_owned(), |bytes| format!("of {} MiB", bytes >> 20));
        row("all", self.needed(), &limit)?;
        Ok(())
    }

    fn figures(&self, text: &mut String) -> Result<()> {
        writeln!(
            text,
            "{:<8} {:>6} {:>5} {:>6} {:>10} {:>10} {:>10} {:>6} {:>6} {:>10} {:>6}",
            "kind", "tokens", "batch", "hits", "predicted", "bound", "measured", "ratio", "hits", "predicted", "ratio"
        )?;
        for Figure { kind, tokens, batch, hit_rate, speed: Speed { predicted, bound }, measured } in &self.figures {
            let hits = percent(*hit_rate);
            write!(text, "{kind:<8} {tokens:>6} {batch:>5} {hits:>6} {predicted:>10.2} {bound:>10.2}")?;
            let Some((Found { speed, seen }, at_its_hits)) = measured else {
                writeln!(text)?;
                continue;
            };
            let hits = seen.map_or_else(|| "-".to_owned(), |seen| percent(seen.hit_rate));
            let (expected, ratio) = (at_its_hits.predicted, speed / at_its_hits.predicted);
            writeln!(text, " {speed:>10.2} {:>6.2} {hits:>6} {expected:>10.2} {ratio:>6.2}", speed / predicted)?;
        }
        writeln!(
            text,
            "\ntokens per second; measured by the last `cadre bench` with the same --memory, then its hits and what those allow"
        )?;
        Ok(())
    }
}

fn percent(part: f64) -> String {
    format!("{:.1}%", 100.0 * part)
}
