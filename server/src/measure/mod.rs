//! Measures what [`crate::plan`] reckons with: the limits of this machine, the steps of a model's shapes, and reads of its
//! experts, in about five seconds.

mod kept;
mod reads;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cadre_engine::{
    compute::{Compute, Roofline},
    kv::KvDtype,
    model::Model,
    nn::{Format, Probe, StepTimes},
};
use cadre_models::Outline;

pub use self::{
    kept::{Found, Kept, Key},
    reads::Reader,
};
use crate::{
    host,
    plan::{Machine, Step},
};

/// The buffer whose reading is timed: larger than any cache.
const BUFFER_BYTES: u64 = 1 << 30;
/// Below this a large cache might hold it.
const LEAST_BUFFER_BYTES: usize = 256 << 20;
/// Made-up layers: two of a model with large experts.
const LAYER_BYTES: usize = 512 << 20;
/// Sequences of the steps that are timed, and how often each is by turns.
const DECODES: [usize; 3] = [1, 8, 32];
const DECODE_TURNS: usize = 4;
/// Tokens of the prompts that are timed.
const PREFILLS: [usize; 2] = [128, 512];
/// How long steps are timed; each at least once.
const STEPS_TIME: Duration = Duration::from_millis(2200);

/// What the machine can do in a model whose experts have `format`.
///
/// # Errors
/// When there is no memory for it.
pub fn roofline(compute: &Compute, format: Format) -> Result<Roofline> {
    let quarter = host::free_memory_bytes().map_or(BUFFER_BYTES, |bytes| bytes / 4);
    let buffer_bytes = usize::try_from(BUFFER_BYTES.min(quarter))?;
    ensure!(
        buffer_bytes >= LEAST_BUFFER_BYTES,
        "measuring this machine reads a quarter of the free memory, which must be more than the caches hold: expected at \
         least {LEAST_BUFFER_BYTES} bytes, found {buffer_bytes}; free memory, or leave --roofline and --measure out"
    );
    Ok(compute.roofline(format, buffer_bytes)?)
}

/// Measures this machine for the model.
///
/// # Errors
/// When memory can't be had, or the experts can't be read.
pub fn machine(compute: &Compute, outline: Outline, kv_dtype: KvDtype) -> Result<Machine> {
    let Outline { decoder, formats, experts } = outline;
    let Roofline { read_bandwidth, matrix_rate } = roofline(compute, formats.experts)?;
    let layer_bytes = host::free_memory_bytes().map_or(LAYER_BYTES, |free| LAYER_BYTES.min(free as usize / 4));
    let mut probe = Probe::new(compute, &decoder, kv_dtype, layer_bytes)?;
    let steps = steps(&mut probe)?;
    drop(probe);
    let reads = match experts {
        Some(experts) => Reader::open(experts, decoder.info())?.measure()?,
        None => Vec::new(),
    };
    Ok(Machine { read_bandwidth, matrix_rate, steps, reads })
}

/// Each step's median: the machine's speed changes within seconds.
fn steps(probe: &mut Probe<'_>) -> Result<Vec<Step>> {
    let mut times: Vec<Vec<StepTimes>> = vec![Vec::new(); DECODES.len() + PREFILLS.len()];
    let begun = Instant::now();
    let mut warm = false;
    while begun.elapsed() < STEPS_TIME || times[0].is_empty() {
        for (&sequences, times) in DECODES.iter().zip(&mut times) {
            // The first one finds memory that was never touched.
            let turns = if warm { DECODE_TURNS } else { 1 };
            for turn in 0..turns {
                let step = probe.decode(sequences)?;
                if warm || turn > 0 {
                    times.push(step);
                }
            }
        }
        for (&tokens, times) in PREFILLS.iter().zip(&mut times[DECODES.len()..]) {
            times.push(probe.prefill(tokens)?);
        }
        warm = true;
    }
    let median = |times: &[StepTimes]| -> Option<Step> {
        let middle = |of: fn(&StepTimes) -> f64| {
            let mut all: Vec<f64> = times.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        Some(Step {
            layer_seconds: middle(|times| times.layer_seconds),
            head_seconds: middle(|times| times.head_seconds),
            expert_seconds: middle(|times| times.expert_seconds),
            rows_per_expert: middle(|times| times.rows_per_expert),
            ..(*times.first()?).into()
        })
    };
    Ok(times.iter().filter_map(|times| median(times)).collect())
}
