//! Replays a routing trace against cache policies and budgets: which share of decode's accesses finds its expert.
//!
//! ```text
//! cargo run --release -p cadre-benches --bin cache_simulator -- --trace routing.jsonl
//! cargo run --release -p cadre-benches --bin cache_simulator -- --synthetic --batch 8
//! ```

mod policy;
mod trace;

use std::path::PathBuf;

use clap::Parser;
use policy::{Policy, Replay};
use serde_json::json;
use trace::{Synthetic, Trace};

const BUDGETS_PERCENT: [usize; 5] = [5, 12, 25, 50, 75];

#[derive(Debug, Parser)]
struct Args {
    /// JSON lines, one a step: {"tokens": 1, "experts": [[layer 0's distinct experts], [layer 1's], …]}.
    #[arg(long, value_name = "FILE", required_unless_present = "synthetic", conflicts_with = "synthetic")]
    trace: Option<PathBuf>,
    /// Experts of a layer of the trace [default: its largest number tells].
    #[arg(long, requires = "trace")]
    experts_per_layer: Option<usize>,
    /// Make a trace up.
    #[arg(long)]
    synthetic: bool,
    #[command(flatten)]
    like: Synthetic,
    /// A step of more tokens is a prompt, and doesn't count.
    #[arg(long, default_value_t = 64)]
    decode_tokens: usize,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let trace = match &args.trace {
        Some(path) => Trace::read(path, args.experts_per_layer)?,
        None => args.like.draw()?,
    };
    let experts = trace.layers() * trace.experts_per_layer;
    let replay = Replay { trace: &trace, decode_tokens: args.decode_tokens, warm_up: trace.steps.len() / 4 };
    let slots = BUDGETS_PERCENT.map(|percent| experts * percent / 100);
    let rates = Policy::ALL.map(|policy| slots.map(|slots| replay.hit_rate(policy, slots)));
    if args.json {
        let policies: serde_json::Map<_, _> =
            Policy::ALL.iter().zip(rates).map(|(policy, rates)| (policy.name().to_owned(), json!(rates))).collect();
        println!("{}", json!({ "experts": experts, "budgets_percent": BUDGETS_PERCENT, "hit_rates": policies }));
        return Ok(());
    }
    println!("{} steps, {} layers of {} experts", trace.steps.len(), trace.layers(), trace.experts_per_layer);
    println!("hit rate in per cent, after a first quarter of the steps, by slots in per cent of all experts:\n");
    let cells = |cells: [String; 5]| cells.map(|cell| format!("{cell:>7}")).concat();
    println!("{:<14}{}", "", cells(BUDGETS_PERCENT.map(|percent| format!("{percent} %"))));
    for (policy, rates) in Policy::ALL.iter().zip(rates) {
        println!("{:<14}{}", policy.name(), cells(rates.map(|rate| format!("{:.1}", 100.0 * rate))));
    }
    Ok(())
}
