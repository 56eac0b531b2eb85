//! A runtime over the fake model, and the other end of a request's sink.

use std::{
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use super::fake::{Fake, Gate};
use crate::{
    compute::Compute,
    kv::{KvCache, KvDtype},
    request::{
        Event, FinishReason, Priority, Request, RequestError, SamplingParams, Scores, StopParams, TokenLogprobs,
    },
    runtime::{Runtime, RuntimeConfig, RuntimeHandle, StepReport, Ticket},
};

/// Longer than any test waits when nothing is wrong.
pub(super) const LONG: Duration = Duration::from_secs(20);

pub(super) fn config() -> RuntimeConfig {
    RuntimeConfig {
        max_num_seqs: 32,
        max_num_batched_tokens: 256,
        max_model_len: 512,
        enable_prefix_caching: true,
        report_routes: false,
    }
}

/// Greedy, and through end-of-sequence.
pub(super) fn request(prompt: &[u32], max_tokens: u32) -> Request {
    Request {
        prompt: prompt.to_vec(),
        n: 1,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        stop: StopParams {
            max_tokens,
            min_tokens: 0,
            eos_token_ids: vec![],
            ignore_eos: false,
            stop_token_ids: vec![],
        },
        logprobs: None,
        scoring: None,
        routed_experts_from: None,
        adapter: None,
        priority: Priority::Interactive,
    }
}

/// A prompt of `len` tokens that differs from those of other seeds.
pub(super) fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|at| (at * 7 + seed * 13 + at / 9) % 50).collect()
}

pub(super) struct Rig {
    /// Holds the model; `None` once steps are free. The first field, because fields are dropped in their order: a
    /// runtime waits for its step to end, and that one for its permit.
    pub(super) gate: Option<Gate>,
    pub(super) runtime: Runtime,
    pub(super) reports: Receiver<StepReport>,
}

impl Rig {
    /// A runtime whose model steps freely.
    pub(super) fn new(config: RuntimeConfig, num_blocks: usize) -> Self {
        let mut rig = Self::gated(config, num_blocks);
        rig.open();
        rig
    }

    /// A runtime whose model waits for a permit in each step.
    pub(super) fn gated(config: RuntimeConfig, num_blocks: usize) -> Self {
        let (model, gate) = Fake::new(num_blocks);
        let kv = KvCache::new(1, 1, 16, num_blocks, KvDtype::F32).expect("memory");
        let (sender, reports) = channel();
        let observer = move |report: &StepReport| drop(sender.send(report.clone()));
        let runtime = Runtime::start(Box::new(model), kv, Compute::new(1), config, observer).expect("a runtime");
        Self { runtime, reports, gate: Some(gate) }
    }

    pub(super) fn open(&mut self) {
        self.gate = None;
    }

    /// Waits until one more step is planned and has come to the model.
    pub(super) fn reached(&self) {
        self.gate().reached.recv_timeout(LONG).expect("a step");
    }

    fn gate(&self) -> &Gate {
        self.gate.as_ref().expect("gated")
    }

    /// Lets the step that waits for it go on, and gives the report that follows.
    pub(super) fn permit(&self) -> StepReport {
        self.gate().permits.send(()).expect("the model lives");
        self.reports.recv_timeout(LONG).expect("a report")
    }

    pub(super) fn submit(&self, request: Request) -> Call {
        Call::new(&self.runtime.handle(), request)
    }

    /// Everything reported so far and until the runtime has ended, summed up where it is a count.
    pub(super) fn totals(self) -> StepReport {
        self.runtime.shutdown(LONG);
        let mut totals = StepReport::default();
        for report in self.reports.try_iter() {
            totals.scheduled_tokens += report.scheduled_tokens;
            totals.prompt_tokens += report.prompt_tokens;
            totals.generated_tokens += report.generated_tokens;
            totals.preemptions += report.preemptions;
            totals.prefix_queries += report.prefix_queries;
            totals.prefix_hits += report.prefix_hits;
            totals.cancelled.queue += report.cancelled.queue;
            totals.cancelled.prefill += report.cancelled.prefill;
            totals.cancelled.decode += report.cancelled.decode;
            totals.failed += report.failed;
            (totals.running, totals.waiting, totals.kv_blocks_used) =
                (report.running, report.waiting, report.kv_blocks_used);
        }
        totals
    }
}

/// A submitted request.
pub(super) struct Call {
    pub(super) ticket: Ticket,
    pub(super) events: Receiver<Event>,
    n: usize,
}

/// All that a request was answered.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Answer {
    pub(super) cached_tokens: Option<u32>,
    pub(super) scores: Option<Scores>,
    pub(super) tokens: Vec<Vec<u32>>,
    /// The experts of each choice's tokens, as they were told.
    pub(super) routed: Vec<Vec<u32>>,
    pub(super) logprobs: Vec<Option<TokenLogprobs>>,
    pub(super) reasons: Vec<Option<FinishReason>>,
    pub(super) failed: Option<RequestError>,
}

impl Call {
    pub(super) fn new(handle: &RuntimeHandle, request: Request) -> Self {
        let (sender, events) = channel();
        let n = request.n as usize;
        let ticket = handle.submit(request, move |event| drop(sender.send(event))).expect("a valid request");
        Self { ticket, events, n }
    }

    /// Waits until the request has started.
    pub(super) fn started(self) -> Self {
        let event = self.events.recv_timeout(LONG).expect("an event");
        assert!(matches!(event, Event::Started { .. }), "{event:?}");
        self
    }

    /// Waits until the sink is gone; nothing may follow an end.
    pub(super) fn answer(self) -> Answer {
        let mut answer = Answer {
            cached_tokens: None,
            scores: None,
            tokens: vec![Vec::new(); self.n],
            routed: vec![Vec::new(); self.n],
            logprobs: Vec::new(),
            reasons: vec![None; self.n],
            failed: None,
        };
        loop {
            match self.events.recv_timeout(LONG) {
                Ok(event) => answer.take(event),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return answer,
                Err(error) => panic!("{error}: no end after {answer:?}"),
            }
        }
    }
}

impl Answer {
    fn take(&mut self, event: Event) {
        assert_eq!(self.failed, None, "an event after the end: {event:?}");
        match event {
            Event::Started { cached_tokens } => {
                assert_eq!(self.cached_tokens.replace(cached_tokens), None, "started twice");
            }
            Event::Scores(scores) => {
                assert!(self.tokens.iter().all(Vec::is_empty), "prompt scores after a token");
                assert_eq!(self.scores.replace(scores), None, "scored twice");
            }
            Event::RoutedExperts { choice, experts } => {
                assert_eq!(self.reasons[choice as usize], None, "experts after the end");
                self.routed[choice as usize].extend(experts);
            }
            Event::Token { choice, token, logprobs } => {
                assert_eq!(self.reasons[choice as usize], None, "a token after the end");
                self.tokens[choice as usize].push(token);
                self.logprobs.push(logprobs);
            }
            Event::Finished { choice, reason } => {
                assert_eq!(self.reasons[choice as usize].replace(reason), None, "finished twice");
            }
            Event::Failed(error) => self.failed = Some(error),
        }
    }
}
