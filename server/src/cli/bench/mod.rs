//! `cadre bench`: throughput of prefill and decode, measured through the runtime that serves.
//!
//! Prompts are random token ids, different each time, and answers run through end-of-sequence tokens, so nothing
//! is cached and nothing ends early. Each figure is the median of the repetitions; `--roofline` holds it against what
//! the machine can do.

mod limits;
mod printer;

use std::{
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, bail};
use cadre_engine::{
    experts::{ExpertStore, StoreCounters},
    request::{Event, Priority, Request, SamplingParams, StopParams},
};
use clap::Args;

use self::{
    limits::Limits,
    printer::{Bound, Figures, Printer, Speeds},
};
use super::{EngineArgs, at_least_one, terminal::unless_pipe_closed};
use crate::{
    engine::{self, Engine, EngineOptions, Served},
    generation::Ticket,
    measure::{Found, Kept, Key},
    plan::{Machine, Seen, Speed, Work},
};

/// Prompt tokens of each sequence before it decodes.
const DECODE_PROMPT: usize = 16;

/// Flags of `cadre bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Prompt lengths to prefill
    #[arg(long, value_name = "TOKENS,…", value_delimiter = ',', default_values_t = [128, 512, 2048],
          value_parser = at_least_one)]
    prompt: Vec<usize>,

    /// Tokens that each sequence decodes, after a prompt of 16
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = at_least_two)]
    generate: usize,

    /// Numbers of sequences to decode together
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 8, 32], value_parser = at_least_one)]
    batch: Vec<usize>,

    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,

    /// Measure what this machine's memory, cores and, if experts don't fit the memory, disk can do, before and after each
    /// run since neighbours change it, and give each figure as a share of what they allow; the peak then includes
    /// buffers of up to 1.3 GiB
    #[arg(long)]
    roofline: bool,

    /// One JSON object a line in place of the table
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Measures, and prints each figure when it is there.
///
/// # Errors
/// When the model can't be loaded, or fails.
pub fn run(args: &BenchArgs) -> Result<()> {
    let max_num_seqs = args.batch.iter().copied().max().unwrap_or(1);
    // What random prompts use is no profile to begin with or to keep.
    let options = EngineOptions { prefix_caching: false, routing_profile: false, ..args.engine.options(max_num_seqs) };
    let engine = engine::start(&options)?;
    let result = measure(args, &options, &engine);
    if let Some(store) = &engine.store {
        eprintln!("{}", store.counters());
    }
    engine.runtime.shutdown(Duration::ZERO);
    unless_pipe_closed(result)
}

fn measure(args: &BenchArgs, options: &EngineOptions, engine: &Engine) -> Result<()> {
    let mut kept = Kept::open();
    let key = Key::new(&engine.checkpoint, engine.formats, engine.kv_dtype, &engine.compute, engine.threads)?;
    let measured = kept.machine(&key, engine.store.is_some()).cloned();
    let (info, slots) = (engine.runtime.handle().info().clone(), engine.store.as_ref().map(ExpertStore::slots));
    let work = Work::new(info, args.engine.max_num_batched_tokens, slots).with_profile_of(&engine.checkpoint);
    let steps = || measured.as_ref().map_or_else(Vec::new, |machine| machine.steps.clone());
    let mut limits = args.roofline.then(|| Limits::new(engine, options, steps())).transpose()?;
    let printer = Printer::new(args.json, engine, measured.is_some());
    printer.head(limits.as_ref().map(Limits::last))?;
    let mut bench =
        Bench { served: engine.served.clone(), store: engine.store.clone(), numbers: 0x9E37_79B9_7F4A_7C15 };
    bench.run(&Run { batch: 1, prompt: 8, tokens: 8 })?;
    let prefill = |&prompt| (Kind::Prefill, Run { batch: 1, prompt, tokens: 1 });
    let decode = |&batch| (Kind::Decode, Run { batch, prompt: DECODE_PROMPT, tokens: args.generate });
    for (kind, run) in args.prompt.iter().map(prefill).chain(args.batch.iter().map(decode)) {
        if let Some(why) = run.does_not_fit(engine) {
            eprintln!("{} of {} tokens, batch {}: skipped, {why}", kind.name(), kind.tokens(&run), run.batch);
            continue;
        }
        let (mut speeds, mut bounds, mut predicted) = (Vec::new(), Vec::new(), Vec::new());
        let (mut experts, mut seen, mut together) = (None, None, true);
        for _ in 0..args.repetitions {
            let times = bench.run(&run)?;
            let speed = kind.speed(&run, &times);
            speeds.push(speed);
            experts = kind.experts(&times);
            together &= times.together;
            seen = experts.as_ref().map(Seen::of);
            let expected = |machine| kind.expected(&work, &run, seen, machine);
            if let Some(limits) = &mut limits {
                let machine = limits.around()?;
                let Speed { predicted: of_steps, bound } = expected(&machine);
                bounds.push(Bound::new(machine, bound, speed));
                predicted.push(of_steps);
            } else if let Some(machine) = &measured {
                predicted.push(expected(machine).predicted);
            }
        }
        let bound = median_by(bounds, |bound| bound.share);
        // Without steps that were timed nothing can be expected.
        let predicted = median_by(predicted, |speed| *speed).filter(|_| measured.is_some());
        let speeds = Speeds::of(speeds);
        let (size, found) = (kind.size(&run), Found { speed: speeds.median, seen });
        if kind == Kind::Prefill || together {
            keep(kept.keep_result(&key, options, (kind.name(), size), found));
        } else {
            eprintln!("of {size} sequences some had ended before all had begun: give a larger --generate");
        }
        printer.print(kind, &run, Figures { speeds, bound, experts, predicted })?;
    }
    if let (Some(limits), Some(_)) = (limits, &measured) {
        keep(kept.keep_machine(&key, limits.last().clone()));
    }
    Ok(())
}

/// A number of tokens of which the first only begins the time.
fn at_least_two(text: &str) -> Result<usize, String> {
    let count = at_least_one(text)?;
    if count < 2 {
        Err("expected at least 2, found 1: decoding is timed from the first on".to_owned())
    } else {
        Ok(count)
    }
}

/// What can't be kept has been printed all the same.
fn keep(result: Result<()>) {
    if let Err(error) = result {
        tracing::debug!("{error:#}");
    }
}

/// The middle one by `key`, the lower of two.
fn median_by<T>(mut all: Vec<T>, key: impl Fn(&T) -> f64) -> Option<T> {
    all.sort_by(|a, b| key(a).total_cmp(&key(b)));
    let middle = all.len().checked_sub(1)? / 2;
    Some(all.swap_remove(middle))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Prefill,
    Decode,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// The tokens that the figure is about: of the prompt, or of each answer.
    fn tokens(self, run: &Run) -> usize {
        match self {
            Self::Prefill => run.prompt,
            Self::Decode => run.tokens,
        }
    }

    /// What tells a run from others of its kind: the prompt's tokens, or the sequences.
    fn size(self, run: &Run) -> usize {
        match self {
            Self::Prefill => run.prompt,
            Self::Decode => run.batch,
        }
    }

    /// What is to be expected of a run whose experts fare as was `seen`.
    fn expected(self, work: &Work, run: &Run, seen: Option<Seen>, machine: &Machine) -> Speed {
        match self {
            Self::Prefill => work.prefill(run.prompt, seen, machine),
            Self::Decode => work.decode(run.batch, seen, machine),
        }
    }

    /// How experts that don't fit the memory fared in the time that the speed is of.
    fn experts(self, times: &Times) -> Option<StoreCounters> {
        let [start, all_begun, end] = times.experts.as_ref()?;
        Some(match self {
            Self::Prefill => all_begun.since(start),
            Self::Decode => end.since(all_begun),
        })
    }

    /// Tokens per second: for prefill up to the first token; for decode from when all sequences have
    /// their first token to the last token of all.
    fn speed(self, run: &Run, times: &Times) -> f64 {
        match self {
            Self::Prefill => per_second(run.prompt * run.batch, times.all_begun - times.start),
            Self::Decode => per_second(times.after_all_begun, times.end - times.all_begun),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "token counts are small")]
fn per_second(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(1e-9)
}

/// Requests to run together.
struct Run {
    batch: usize,
    prompt: usize,
    tokens: usize,
}

impl Run {
    fn does_not_fit(&self, engine: &Engine) -> Option<String> {
        let length = self.prompt + self.tokens;
        if length > engine.served.max_model_len {
            return Some(format!("{length} tokens don't fit the context of {}", engine.served.max_model_len));
        }
        let needed = length.div_ceil(engine.kv_block_tokens) * self.batch;
        let had = engine.kv_blocks;
        (needed > had).then(|| format!("it needs {needed} KV blocks and there are {had}: give a larger --kv-memory"))
    }
}

/// When things happened in a run.
struct Times {
    start: Instant,
    all_begun: Instant,
    end: Instant,
    after_all_begun: usize,
    /// Whether none had ended before all had begun.
    together: bool,
    /// What the expert store had done at the three moments.
    experts: Option<[StoreCounters; 3]>,
}

struct Bench {
    served: Arc<Served>,
    store: Option<ExpertStore>,
    numbers: u64,
}

impl Bench {
    fn run(&mut self, run: &Run) -> Result<Times> {
        let requests: Vec<Request> = (0..run.batch).map(|_| self.request(run)).collect();
        let (sender, events) = mpsc::channel();
        let experts = self.store.as_ref().map(ExpertStore::counters);
        let all_begun: Arc<Mutex<Option<StoreCounters>>> = Arc::default();
        let start = Instant::now();
        let mut tickets: Vec<Box<dyn Ticket>> = Vec::with_capacity(run.batch);
        for (index, request) in requests.into_iter().enumerate() {
            let (sender, store, all_begun) = (sender.clone(), self.store.clone(), Arc::clone(&all_begun));
            let mut begun = false;
            let sink = Box::new(move |event| {
                // On the engine's thread, between two steps. The last one to begin has the last word.
                if matches!(event, Event::Token { .. }) && !std::mem::replace(&mut begun, true) {
                    *all_begun.lock().unwrap_or_else(PoisonError::into_inner) =
                        store.as_ref().map(ExpertStore::counters);
                }
                // Nobody listens any more once a run has failed.
                let _ = sender.send((index, Instant::now(), event));
            });
            tickets.push(self.served.backend.submit(request, sink)?);
        }
        drop(sender);
        let tokens = token_times(&events, run)?;
        let all_begun = all_begun.lock().unwrap_or_else(PoisonError::into_inner).take();
        let end = self.store.as_ref().map(ExpertStore::counters);
        let times = times(start, &tokens).ok_or_else(|| anyhow!("the run gave no tokens"))?;
        let experts = experts.zip(all_begun).zip(end).map(|((start, all_begun), end)| [start, all_begun, end]);
        Ok(Times { experts, ..times })
    }

    fn request(&mut self, run: &Run) -> Request {
        Request {
            prompt: (0..run.prompt).map(|_| self.token()).collect(),
            n: 1,
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            stop: StopParams {
                max_tokens: u32::try_from(run.tokens).unwrap_or(u32::MAX),
                min_tokens: 0,
                eos_token_ids: self.served.eos_token_ids.clone(),
                ignore_eos: true,
                stop_token_ids: Vec::new(),
            },
            logprobs: None,
            scoring: None,
            routed_experts_from: None,
            adapter: None,
            priority: Priority::Interactive,
        }
    }

    /// A random token id, by splitmix64.
    fn token(&mut self) -> u32 {
        self.numbers = self.numbers.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.numbers;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        u32::try_from((z ^ (z >> 31)) % self.served.vocab_size.max(1) as u64).unwrap_or(0)
    }
}

/// When each request's tokens came.
fn token_times(events: &mpsc::Receiver<(usize, Instant, Event)>, run: &Run) -> Result<Vec<Vec<Instant>>> {
    let mut tokens = vec![Vec::with_capacity(run.tokens); run.batch];
    let mut open = run.batch;
    while open > 0 {
        let (index, at, event) = events.recv()?;
        match event {
            Event::Token { .. } => tokens[index].push(at),
            Event::Finished { .. } => open -= 1,
            Event::Failed(error) => bail!(error),
            Event::Started { .. } | Event::Scores(_) | Event::RoutedExperts { .. } => {}
        }
    }
    Ok(tokens)
}

fn times(start: Instant, tokens: &[Vec<Instant>]) -> Option<Times> {
    let firsts: Option<Vec<Instant>> = tokens.iter().map(|times| times.first().copied()).collect();
    let all_begun = firsts?.into_iter().max()?;
    let end = tokens.iter().filter_map(|times| times.last().copied()).max()?;
    let after_all_begun = tokens.iter().flatten().filter(|&&at| at > all_begun).count();
    let together = tokens.iter().all(|times| times.last() >= Some(&all_begun));
    Some(Times { start, all_begun, end, after_all_begun, together, experts: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_counts_from_when_all_have_begun() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let tokens = [vec![at(1), at(2), at(3), at(4)], vec![at(2), at(3), at(4), at(5)]];
        let times = times(start, &tokens).unwrap();
        let run = Run { batch: 2, prompt: 10, tokens: 4 };
        // After second 2: tokens at 3, 4 and 3, 4, 5, in three seconds.
        assert!((Kind::Decode.speed(&run, &times) - 5.0 / 3.0).abs() < 1e-9);
        assert!((Kind::Prefill.speed(&run, &times) - 10.0).abs() < 1e-9);
        assert!(times.together);
    }

    #[test]
    fn those_that_ended_before_all_had_begun_are_not_together() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!times(start, &[vec![at(1), at(2)], vec![at(3), at(4)]]).unwrap().together);
    }

    #[test]
    fn a_sequence_without_tokens_is_no_run() {
        assert!(times(Instant::now(), &[vec![]]).is_none());
    }
}
