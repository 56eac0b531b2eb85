//! What the engine's thread does.

use std::{
    any::Any,
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use super::{StepReport, batch};
use crate::{
    Error, Result,
    compute::Compute,
    experts::FetchError,
    kv::{KvCache, blocks::PrefixCounters},
    model::{self, LayerRoutes, Model, SequenceRows, StepBatch, StepContext},
    request::{Event, Request, RequestError, TokenLogprobs},
    sampler::{BatchSampler, SampleError, Sampled},
    scheduler::{Phase, Planned, Scheduler, StepPlan},
    sequence::{RequestId, SequenceId},
};

/// Where a request's events go.
pub(super) type Sink = Box<dyn FnMut(Event) + Send>;

/// Who is told about each step.
pub(super) struct Observing {
    pub(super) observer: Box<dyn FnMut(&StepReport) + Send>,
    /// Also what the routers chose.
    pub(super) routes: bool,
}

/// What callers tell the engine.
pub(super) enum Message {
    /// A new request; the numbers in the ids ascend.
    Submit { id: RequestId, request: Arc<Request>, sink: Sink },
    /// Nobody wants this request's answer any more.
    Cancel(RequestId),
    /// One choice has all that its caller wants of it.
    EndChoice(SequenceId),
    /// End when nothing is left, or at this time. No `Submit` follows.
    Stop(Deadline),
}

/// Everything that the engine's thread owns.
pub(super) struct Engine {
    model: Box<dyn Model>,
    kv: KvCache,
    compute: Compute,
    scheduler: Scheduler,
    sampler: BatchSampler,
    /// The sink of every request that has not ended.
    sinks: HashMap<RequestId, Sink>,
    /// Requests whose sink panicked. They are cancelled between steps: a plan's sequences stay until it is concluded.
    deaf: Vec<RequestId>,
    inbox: Receiver<Message>,
    observing: Observing,
    /// What happened since the last report; the gauges are set when it is given.
    report: StepReport,
    /// Whether anything did.
    unreported: bool,
    reported_prefix: PrefixCounters,
    /// Set when the engine was told to end.
    deadline: Option<Deadline>,
}

/// The end of a time to wait; `None` if it lies beyond what the clock can say.
pub(super) struct Deadline(Option<Instant>);

impl Deadline {
    /// `wait` from now.
    pub(super) fn after(wait: Duration) -> Self {
        Self(Instant::now().checked_add(wait))
    }

    fn has_passed(&self) -> bool {
        self.0.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

impl Engine {
    pub(super) fn new(
        model: Box<dyn Model>,
        kv: KvCache,
        compute: Compute,
        scheduler: Scheduler,
        inbox: Receiver<Message>,
        observing: Observing,
    ) -> Self {
        Self {
            model,
            kv,
            sampler: BatchSampler::new(compute.clone()),
            compute,
            scheduler,
            sinks: HashMap::new(),
            deaf: Vec::new(),
            inbox,
            observing,
            report: StepReport::default(),
            unreported: false,
            reported_prefix: PrefixCounters::default(),
            deadline: None,
        }
    }

    /// Steps until it is told to stop.
    pub(super) fn run(mut self) {
        while self.wait_for_work() {
            self.step();
        }
        self.fail_all(&RequestError::ShuttingDown);
        self.give_report();
    }

    /// Takes all messages, and sleeps while there is nothing to do. False when it is time to end.
    fn wait_for_work(&mut self) -> bool {
        loop {
            while let Ok(message) = self.inbox.try_recv() {
                self.take(message);
            }
            for request in std::mem::take(&mut self.deaf) {
                self.cancel(request);
            }
            if self.deadline.as_ref().is_some_and(|deadline| self.scheduler.is_empty() || deadline.has_passed()) {
                return false;
            }
            if !self.scheduler.is_empty() {
                return true;
            }
            self.give_report();
            let Ok(message) = self.inbox.recv() else { return false };
            self.take(message);
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Submit { id, request, sink } => {
                self.scheduler.add(id, &request);
                if self.scheduler.has(id) {
                    self.sinks.insert(id, sink);
                }
            }
            Message::Cancel(id) => self.cancel(id),
            Message::EndChoice(id) => self.end_choice(id),
            Message::Stop(deadline) => self.deadline = Some(deadline),
        }
    }

    fn end_choice(&mut self, id: SequenceId) {
        self.scheduler.finish(id);
        if !self.scheduler.has(id.request) {
            self.sinks.remove(&id.request);
        }
        self.unreported = true;
    }

    fn cancel(&mut self, request: RequestId) {
        self.sinks.remove(&request);
        let cancelled = &mut self.report.cancelled;
        match self.scheduler.cancel(request) {
            None => return,
            Some(Phase::Queue) => cancelled.queue += 1,
            Some(Phase::Prefill) => cancelled.prefill += 1,
            Some(Phase::Decode) => cancelled.decode += 1,
        }
        self.unreported = true;
    }

    /// One step, whatever happens in it.
    fn step(&mut self) {
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.try_step()));
        // What a panic may have left half done is either replaced here (the books) or written anew before it is
        // read (KV blocks, working memory of the sampler).
        let failure = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!("panic: {}", panic_message(panic.as_ref()))),
        };
        if let Some(message) = failure {
            tracing::error!(message, "a step failed");
            self.fail_running(&message);
        }
        self.report.step_seconds = start.elapsed().as_secs_f64();
        self.unreported = true;
        self.give_report();
    }

    fn try_step(&mut self) -> Result<()> {
        let plan = self.scheduler.plan();
        self.report.preemptions += plan.preempted.len();
        if plan.is_empty() {
            // The scheduler's invariants exclude it; if it happened nevertheless, waiting would be for ever.
            let message = "the scheduler has sequences but planned none".to_owned();
            self.fail_all(&RequestError::Internal(message.clone()));
            return Err(Error::Config(message));
        }
        self.announce(&plan);
        let batch = batch::of(&plan, &self.scheduler);
        let mut noted = Vec::new();
        let wanted = self.observing.routes || plan.sequences.iter().any(|planned| !planned.routed.is_empty());
        let routes = wanted.then_some(&mut noted);
        let (compute, lane) = (&self.compute, batch.lane());
        let mut context = StepContext { compute, batch: &batch, kv: &mut self.kv, routes, lane };
        let logits = match model::forward(self.model.as_ref(), &mut context) {
            Err(Error::Fetch { error, rows }) => {
                self.fail_rows(&batch, &plan, &error, &rows);
                return Ok(());
            }
            other => other?,
        };
        self.report.scheduled_tokens += plan.num_tokens();
        self.report.prompt_tokens += plan.sequences.iter().map(|planned| planned.prompt_tokens).sum::<usize>();
        let vocab_size = self.model.info().vocab_size;
        match logits {
            Some(logits) => {
                let shape = [batch.logit_rows.len(), vocab_size];
                batch::with_logits(&logits, shape, |logits| self.conclude(&plan, logits, &noted))
            }
            None => self.conclude(&plan, &[], &noted),
        }?;
        if self.observing.routes {
            self.report.routes = noted;
        }
        Ok(())
    }

    fn announce(&mut self, plan: &StepPlan) {
        for admission in &plan.admitted {
            if admission.first_time && admission.id.choice == 0 {
                let cached_tokens = admission.cached_tokens as u32;
                self.send(admission.id.request, Event::Started { cached_tokens });
            }
        }
    }

    /// Notes what the step computed: scores, tokens, ends. All rows are worked on at once, then the results are noted
    /// in the plan's order.
    fn conclude(&mut self, plan: &StepPlan, logits: &[f32], routes: &[LayerRoutes]) -> Result<()> {
        let rows = batch::deal(plan, &self.scheduler, logits, self.model.info().vocab_size)?;
        let mut scores = self.sampler.score(&rows.score).into_iter();
        let mut choices = self.sampler.sample(&rows.sample).into_iter();
        let mut first_row = 0;
        for planned in &plan.sequences {
            self.tell_routes(planned, first_row, routes);
            first_row += planned.positions.len();
            let scores = scores.by_ref().take(self.num_targets(planned)).collect();
            let choice = if planned.samples { choices.next() } else { None };
            if let Err(error) = self.conclude_one(planned, scores, choice) {
                self.fail_request(planned.id.request, &error);
            }
        }
        Ok(())
    }

    /// Tells the experts of those of a sequence's tokens of which it was not done yet; its rows begin at `first_row`.
    fn tell_routes(&mut self, planned: &Planned, first_row: usize, routes: &[LayerRoutes]) {
        let Planned { id, positions, routed, .. } = planned;
        if routed.is_empty() {
            return;
        }
        let Some(sequence) = self.scheduler.sequence_mut(*id) else { return };
        sequence.told_routes(routed.end);
        let row = |position: usize| first_row + position - positions.start;
        let experts = batch::experts(routes, self.model.info().num_layers, row(routed.start)..row(routed.end));
        self.send(id.request, Event::RoutedExperts { choice: id.choice, experts });
    }

    /// How many tokens a sequence's scored positions score.
    fn num_targets(&self, planned: &Planned) -> usize {
        let Some(sequence) = self.scheduler.sequence(planned.id) else { return 0 };
        planned.scored.clone().map(|position| sequence.targets(position).len()).sum()
    }

    fn conclude_one(
        &mut self,
        planned: &Planned,
        scores: Vec<Result<TokenLogprobs, SampleError>>,
        choice: Option<Result<Sampled, SampleError>>,
    ) -> Result<(), SampleError> {
        let id = planned.id;
        self.score_prompt(id, scores)?;
        self.scheduler.advance(planned);
        if let Some(scores) = self.scheduler.sequence_mut(id).and_then(|sequence| sequence.take_scores()) {
            self.send(id.request, Event::Scores(scores));
        }
        if let Some(choice) = choice {
            self.choose_token(id, choice)?;
        }
        self.end_if_finished(id);
        Ok(())
    }

    fn score_prompt(
        &mut self,
        id: SequenceId,
        scores: Vec<Result<TokenLogprobs, SampleError>>,
    ) -> Result<(), SampleError> {
        let Some(sequence) = self.scheduler.sequence_mut(id) else { return Ok(()) };
        for score in scores {
            sequence.push_score(score?);
        }
        Ok(())
    }

    /// A choice for a sequence that is gone, with another one of its request, is nobody's.
    fn choose_token(&mut self, id: SequenceId, choice: Result<Sampled, SampleError>) -> Result<(), SampleError> {
        let Some(sequence) = self.scheduler.sequence_mut(id) else { return Ok(()) };
        let sampled = choice?;
        sequence.push_token(sampled.token);
        self.report.generated_tokens += 1;
        let event = Event::Token { choice: id.choice, token: sampled.token, logprobs: sampled.logprobs };
        self.send(id.request, event);
        Ok(())
    }

    fn end_if_finished(&mut self, id: SequenceId) {
        let Some(reason) = self.scheduler.sequence(id).and_then(|sequence| sequence.finish_reason()) else { return };
        self.scheduler.finish(id);
        self.send(id.request, Event::Finished { choice: id.choice, reason });
        if !self.scheduler.has(id.request) {
            self.sinks.remove(&id.request);
        }
    }

    fn fail_request(&mut self, request: RequestId, error: &SampleError) {
        let failure = match error {
            SampleError::NotFinite { .. } => {
                // Its keys and values may hold the same: no other request may continue from them.
                self.scheduler.clear_prefix_cache();
                RequestError::Internal(error.to_string())
            }
            SampleError::NothingAllowed { .. } => RequestError::NothingAllowed(error.to_string()),
            SampleError::UnknownToken { .. } | SampleError::Panicked => RequestError::Internal(error.to_string()),
        };
        self.scheduler.cancel(request);
        self.fail(request, failure);
    }

    /// Fails the requests that need an expert which can't be read. The step counts for nothing: the others are planned
    /// anew and write the same keys and values to the same places.
    fn fail_rows(&mut self, batch: &StepBatch, plan: &StepPlan, error: &FetchError, rows: &[u32]) {
        tracing::error!(%error, "requests failed");
        let needs = |sequence: &SequenceRows| rows.iter().any(|&row| sequence.rows.contains(&(row as usize)));
        let hit = plan.sequences.iter().zip(&batch.sequences).filter(|(_, sequence)| needs(sequence));
        let mut requests: Vec<_> = hit.map(|(planned, _)| planned.id.request).collect();
        requests.sort_unstable();
        requests.dedup();
        for request in requests {
            self.scheduler.cancel(request);
            self.fail(request, RequestError::Weights(error.id));
        }
    }

    fn fail_running(&mut self, message: &str) {
        for request in self.scheduler.fail_running() {
            self.fail(request, RequestError::Internal(message.to_owned()));
        }
    }

    fn fail_all(&mut self, error: &RequestError) {
        let mut requests: Vec<_> = self.sinks.keys().copied().collect();
        requests.sort_unstable();
        for request in requests {
            self.scheduler.cancel(request);
            self.fail(request, error.clone());
        }
    }

    /// Tells a request that the scheduler no longer has that it failed.
    fn fail(&mut self, request: RequestId, error: RequestError) {
        self.report.failed += 1;
        self.unreported = true;
        self.send(request, Event::Failed(error));
        self.sinks.remove(&request);
    }

    fn send(&mut self, request: RequestId, event: Event) {
        let Some(sink) = self.sinks.get_mut(&request) else { return };
        if catch_unwind(AssertUnwindSafe(|| sink(event))).is_err() {
            tracing::error!(request = request.number, "a request's sink panicked: the request is cancelled");
            self.sinks.remove(&request);
            self.deaf.push(request);
        }
    }

    /// Tells the observer what happened since it was last told, if anything did.
    fn give_report(&mut self) {
        if !std::mem::take(&mut self.unreported) {
            return;
        }
        let mut report = std::mem::take(&mut self.report);
        let prefix = self.scheduler.prefix_counters();
        report.prefix_queries = prefix.queries - self.reported_prefix.queries;
        report.prefix_hits = prefix.hits - self.reported_prefix.hits;
        self.reported_prefix = prefix;
        report.running = self.scheduler.num_running();
        report.waiting = self.scheduler.num_waiting();
        (report.running_adapters, report.waiting_adapters) = self.scheduler.adapters();
        report.kv_blocks_used = self.scheduler.num_used_blocks();
        report.kv_blocks_total = self.scheduler.num_blocks();
        if catch_unwind(AssertUnwindSafe(|| (self.observing.observer)(&report))).is_err() {
            tracing::error!("the observer of the engine's steps panicked");
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}
