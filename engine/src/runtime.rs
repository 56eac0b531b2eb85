//! The engine's thread: takes requests from a channel, steps the model, answers through each request's sink.
//!
//! One OS thread owns the model, the KV cache and the scheduler; callers, async or not, reach it by messages only.
//! It sleeps in `recv` when there is nothing to do. A request joins at the next step, and a cancelled one is gone
//! before it. A step that fails, by an error or by a panic, fails the requests that were running, no other.

mod batch;
mod engine;
mod report;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{self, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use engine::{Deadline, Engine, Message, Observing};
pub use report::{Cancelled, StepReport};

use crate::{
    Error, Result,
    compute::Compute,
    kv::KvCache,
    model::{Model, ModelInfo},
    request::{Event, Request, SubmitError},
    scheduler::{Scheduler, SchedulerConfig},
    sequence::{RequestId, SequenceId},
};

/// Autograd graphs and deep models recurse; the default of 2 MiB is not enough for them.
const STACK_BYTES: usize = 64 << 20;

/// Memory that one step may spend on the logits of prompt positions. A longer prompt is scored in several steps.
const SCORED_LOGITS_BYTES: usize = 64 << 20;

/// The limits of a runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// The most sequences that run at once.
    pub max_num_seqs: usize,
    /// The most tokens of one step.
    pub max_num_batched_tokens: usize,
    /// The longest sequence, prompt and generated tokens together.
    pub max_model_len: usize,
    /// Whether requests share the keys and values of equal prefixes.
    pub enable_prefix_caching: bool,
    /// Whether reports say what the routers chose.
    pub report_routes: bool,
}

/// A running engine. Dropping it fails what is under way and waits for the thread; see [`shutdown`](Self::shutdown).
#[derive(Debug)]
pub struct Runtime {
    handle: RuntimeHandle,
    thread: Option<JoinHandle<()>>,
}

impl Runtime {
    /// Starts the engine's thread. `observer` is called on it after each step, and when the engine falls idle.
    ///
    /// # Errors
    /// When the limits don't fit the model or the KV cache, or when no thread can be had.
    pub fn start(
        model: Box<dyn Model>,
        kv: KvCache,
        compute: Compute,
        config: RuntimeConfig,
        observer: impl FnMut(&StepReport) + Send + 'static,
    ) -> Result<Self> {
        let info = model.info().clone();
        let scheduler = scheduler_for(&config, &info, kv.num_blocks())?;
        let (sender, inbox) = mpsc::channel();
        let observing = Observing { observer: Box::new(observer), routes: config.report_routes };
        let engine = Engine::new(model, kv, compute, scheduler, inbox, observing);
        let thread = thread::Builder::new()
            .name("cadre-engine".into())
            .stack_size(STACK_BYTES)
            .spawn(move || engine.run())
            .map_err(|error| Error::Config(format!("the engine's thread could not be started: {error}")))?;
        let gate = Mutex::new(Gate { sender, last_number: 0, open: true });
        let handle = RuntimeHandle { shared: Arc::new(Shared { info, config, gate }) };
        Ok(Self { handle, thread: Some(thread) })
    }

    /// What callers submit requests with.
    #[must_use]
    pub fn handle(&self) -> RuntimeHandle {
        self.handle.clone()
    }

    /// Takes no more requests, runs those under way until `drain` has passed, fails the rest with
    /// [`ShuttingDown`](crate::request::RequestError::ShuttingDown), and waits for the thread.
    pub fn shutdown(mut self, drain: Duration) {
        self.stop(drain);
    }

    fn stop(&mut self, drain: Duration) {
        let Some(thread) = self.thread.take() else { return };
        {
            let mut gate = self.handle.shared.gate();
            gate.open = false;
            // It fails only if the thread has ended already, which is what it asks for.
            let _ = gate.sender.send(Message::Stop(Deadline::after(drain)));
        }
        if thread.join().is_err() {
            tracing::error!("the engine's thread ended by a panic outside of a step");
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

/// The way to a [`Runtime`]; cheap to clone, usable from any thread. It doesn't keep the runtime alive.
#[derive(Debug, Clone)]
pub struct RuntimeHandle {
    shared: Arc<Shared>,
}

impl RuntimeHandle {
    /// Queues a request. `sink` gets its events on the engine's thread, so it must only pass them on; it is dropped
    /// once nothing more will follow (at once if `n` is 0). A sink that panics cancels its request.
    ///
    /// # Errors
    /// When the request can't be served as it is, or when the runtime is shutting down.
    pub fn submit(&self, request: Request, sink: impl FnMut(Event) + Send + 'static) -> Result<Ticket, SubmitError> {
        self.validate(&request)?;
        // Numbering and sending are one act under the lock: numbers arrive in order, and nothing follows `Stop`.
        let mut gate = self.shared.gate();
        if !gate.open {
            return Err(SubmitError::ShuttingDown);
        }
        gate.last_number += 1;
        let id = RequestId { priority: request.priority, number: gate.last_number };
        let message = Message::Submit { id, request: Arc::new(request), sink: Box::new(sink) };
        gate.sender.send(message).map_err(|_| SubmitError::ShuttingDown)?;
        Ok(Ticket { id, sender: gate.sender.clone() })
    }

    /// The sizes of the model that runs.
    #[must_use]
    pub fn info(&self) -> &ModelInfo {
        &self.shared.info
    }

    /// The limits that it runs with.
    #[must_use]
    pub fn config(&self) -> &RuntimeConfig {
        &self.shared.config
    }

    fn validate(&self, request: &Request) -> Result<(), SubmitError> {
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        let vocab_size = self.info().vocab_size;
        if let Some(token) = named_tokens(request).find(|&token| token as usize >= vocab_size) {
            return Err(SubmitError::UnknownToken { token, vocab_size });
        }
        let (prompt_tokens, max_tokens) = (request.prompt.len(), request.stop.max_tokens as usize);
        let max_model_len = self.config().max_model_len;
        if prompt_tokens.saturating_add(max_tokens) > max_model_len {
            return Err(SubmitError::ContextLength { max_model_len, prompt_tokens, max_tokens });
        }
        Ok(())
    }
}

/// The request's place in the runtime. Dropping it cancels the request by the next step, whatever its state; that
/// changes nothing once the request has ended.
#[derive(Debug)]
pub struct Ticket {
    id: RequestId,
    sender: Sender<Message>,
}

impl Ticket {
    /// Ends one choice by the next step, as one that is finished, not cancelled: for what only the caller can see,
    /// such as a stop string. No `Finished` follows for it; tokens that were under way may.
    pub fn end_choice(&self, choice: u32) {
        // It fails only if the runtime has ended, and the request with it.
        let _ = self.sender.send(Message::EndChoice(SequenceId { request: self.id, choice }));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // It fails only if the runtime has ended, and the request with it.
        let _ = self.sender.send(Message::Cancel(self.id));
    }
}

struct Shared {
    info: ModelInfo,
    config: RuntimeConfig,
    gate: Mutex<Gate>,
}

impl Shared {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        // Nothing under the lock can leave the gate half changed.
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("info", &self.info).field("config", &self.config).finish_non_exhaustive()
    }
}

struct Gate {
    sender: Sender<Message>,
    last_number: u64,
    open: bool,
}

fn scheduler_for(config: &RuntimeConfig, info: &ModelInfo, num_blocks: usize) -> Result<Scheduler> {
    if config.max_model_len > info.max_position_embeddings {
        return Err(Error::Config(format!(
            "max_model_len is {}, but the model's positions end at {}",
            config.max_model_len, info.max_position_embeddings
        )));
    }
    let row_bytes = info.vocab_size.max(1) * size_of::<f32>();
    let config = SchedulerConfig {
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_model_len: config.max_model_len,
        max_scored_rows: (SCORED_LOGITS_BYTES / row_bytes).max(1),
        enable_prefix_caching: config.enable_prefix_caching,
    };
    Scheduler::new(config, num_blocks)
}

/// Every token id that must be in the vocabulary. Stop tokens need not be: one outside is never generated.
fn named_tokens(request: &Request) -> impl Iterator<Item = u32> {
    let sampling = &request.sampling;
    let allowed = sampling.allowed_token_ids.iter().flatten();
    let listed = request.prompt.iter().chain(allowed).chain(sampling.bad_words.iter().flatten());
    let scored = request.scoring.iter().flat_map(|scoring| &scoring.next);
    listed.chain(sampling.logit_bias.keys()).chain(scored).copied()
}
