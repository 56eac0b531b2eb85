//! A request from prompt to text: hands token ids to the engine, turns its events into text per choice.
//!
//! Chat and text completions, `cadre generate` and `cadre chat` all go through here. Per choice: streaming
//! detokeniser, then stop strings, then an [`Update`]. Dropping a [`Generation`] cancels what is unfinished.

mod routed;
mod stop;

use std::{collections::VecDeque, ops::AddAssign, sync::Arc, time::Instant};

use cadre_engine::request::{Event, FinishReason, Request, RequestError, Scores, SubmitError, TokenLogprobs};
use cadre_engine::runtime::RuntimeHandle;
use cadre_models::{TextStream, Tokenizer};
use tokio::sync::mpsc;

use crate::metrics::{Meters, Timeline};
pub use routed::RoutedShape;
use stop::StopMatcher;

/// Takes what the engine tells about a request.
pub type Sink = Box<dyn FnMut(Event) + Send>;

/// Held while a request is wanted; dropping it cancels what has not ended.
pub trait Ticket: Send {
    /// Ends one choice that has all that is wanted of it.
    fn end_choice(&self, choice: u32);
}

impl Ticket for cadre_engine::runtime::Ticket {
    fn end_choice(&self, choice: u32) {
        Self::end_choice(self, choice);
    }
}

/// Where requests go: the runtime, or a stand-in in tests.
pub trait Backend: Send + Sync {
    /// Queues a request; `sink` is told how it goes.
    ///
    /// # Errors
    /// When the request can't be taken.
    fn submit(&self, request: Request, sink: Sink) -> Result<Box<dyn Ticket>, SubmitError>;
}

impl Backend for RuntimeHandle {
    fn submit(&self, request: Request, sink: Sink) -> Result<Box<dyn Ticket>, SubmitError> {
        let ticket = Self::submit(self, request, sink)?;
        Ok(Box::new(ticket))
    }
}

/// How tokens become text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputOptions {
    /// A choice ends where one of these appears in its text.
    pub stop: Vec<String>,
    /// Keep the stop string, and the text of a stop token.
    pub include_stop: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
}

impl Default for OutputOptions {
    fn default() -> Self {
        Self { stop: Vec::new(), include_stop: false, skip_special_tokens: true }
    }
}

/// What a generation needs of its surroundings.
#[derive(Clone)]
pub struct Machine {
    /// Takes the requests.
    pub backend: Arc<dyn Backend>,
    /// Turns tokens into text.
    pub tokenizer: Tokenizer,
    /// Counts and times.
    pub meters: Arc<Meters>,
    /// How the experts of tokens are told, if requests may ask for them.
    pub routed: Option<RoutedShape>,
}

/// The next thing to tell.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// How likely a prompt is, and what might follow it.
    Scores {
        /// Which prompt.
        prompt: usize,
        /// As its request asks.
        scores: Scores,
    },
    /// A choice has grown, or ended, or both.
    Delta(Delta),
}

/// How a choice has grown.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// Which choice: prompt number times `n`, plus the number among the prompt's choices.
    pub choice: usize,
    /// More text: whole characters.
    pub text: String,
    /// The tokens since the last delta.
    pub tokens: Vec<GeneratedToken>,
    /// Set in a choice's last delta.
    pub finish: Option<Finish>,
    /// There too, if they were asked for: the experts of all tokens that went through the model, from the position asked
    /// for on, as a file of NumPy's.
    pub routed_experts: Option<Vec<u8>>,
}

/// One generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    /// Its id.
    pub id: u32,
    /// Its log-probabilities, if asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// By an end-of-sequence token.
    EndOfSequence,
    /// By a stop token.
    StopToken(u32),
    /// By a stop string.
    StopString(String),
    /// By its length.
    Length,
}

impl Finish {
    /// OpenAI's word for it.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::EndOfSequence | Self::StopToken(_) | Self::StopString(_) => "stop",
        }
    }
}

impl From<FinishReason> for Finish {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::EndOfSequence => Self::EndOfSequence,
            FinishReason::StopToken(token) => Self::StopToken(token),
            FinishReason::Length => Self::Length,
        }
    }
}

/// Tokens used so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens generated, over all choices.
    pub completion_tokens: usize,
    /// Tokens of the prompts that the prefix cache held.
    pub cached_tokens: usize,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.cached_tokens += other.cached_tokens;
    }
}

/// Why a generation failed.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The engine didn't take it.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The engine gave it up.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The tokenizer failed.
    #[error(transparent)]
    Text(#[from] cadre_models::Error),
}

/// A generation under way: one or more prompts, `n` choices of each.
pub struct Generation {
    meters: Arc<Meters>,
    routed: Option<RoutedShape>,
    prompts: Vec<Prompt>,
    choices: Vec<Choice>,
    options: OutputOptions,
    events: mpsc::UnboundedReceiver<Told>,
    ready: VecDeque<Update>,
}

struct Prompt {
    request: Request,
    ticket: Option<Box<dyn Ticket>>,
    first_choice: usize,
    open: usize,
    cached_tokens: usize,
    timeline: Timeline,
}

struct Choice {
    stream: TextStream,
    matcher: StopMatcher,
    generated: usize,
    untold: Vec<GeneratedToken>,
    /// The experts of its tokens: of the first choice, the prompt's before those of the generated ones.
    routed: Vec<u8>,
    finished: bool,
    last_token: Option<Instant>,
}

/// An event, which prompt it is about and when it happened.
struct Told {
    prompt: usize,
    at: Instant,
    event: Event,
}

impl Generation {
    /// Submits the requests, all or none.
    ///
    /// # Errors
    /// When the engine doesn't take one of them.
    pub fn start(machine: &Machine, requests: Vec<Request>, options: OutputOptions) -> Result<Self, SubmitError> {
        let (sender, events) = mpsc::unbounded_channel();
        let stops: Arc<[String]> = options.stop.clone().into();
        let mut prompts = Vec::with_capacity(requests.len());
        let mut choices = Vec::new();
        for (index, request) in requests.into_iter().enumerate() {
            let first_choice = choices.len();
            choices.extend((0..request.n).map(|_| Choice::new(machine, &stops, &options)));
            let meters = &machine.meters;
            meters.submitting(request.n);
            let ticket = machine.backend.submit(request.clone(), sink(sender.clone(), index));
            let ticket = ticket.inspect_err(|_| meters.refused(request.n))?;
            meters.submitted(&request);
            prompts.push(Prompt {
                open: request.n as usize,
                request,
                ticket: Some(ticket),
                first_choice,
                cached_tokens: 0,
                timeline: Timeline::new(Instant::now()),
            });
        }
        let (meters, routed) = (machine.meters.clone(), machine.routed);
        Ok(Self { meters, routed, prompts, choices, options, events, ready: VecDeque::new() })
    }

    /// The next update; `None` once every choice has ended. Losing the future loses nothing.
    ///
    /// # Errors
    /// When the engine or the tokenizer fails; nothing follows.
    pub async fn next(&mut self) -> Result<Option<Update>, GenerationError> {
        loop {
            if let Some(update) = self.ready.pop_front() {
                return Ok(Some(update));
            }
            if self.prompts.iter().all(|prompt| prompt.open == 0) {
                return Ok(None);
            }
            let Some(told) = self.events.recv().await else {
                return Err(RequestError::Internal("the engine thread has ended".to_owned()).into());
            };
            self.take(told)?;
        }
    }

    /// All updates to the end, put together.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn collect(&mut self) -> Result<Completed, GenerationError> {
        let mut completed = Completed {
            choices: (0..self.choices.len()).map(|choice| Delta { choice, ..Delta::default() }).collect(),
            scores: vec![None; self.prompts.len()],
        };
        while let Some(update) = self.next().await? {
            completed.add(update);
        }
        Ok(completed)
    }

    /// Tokens used so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompts.iter().map(|prompt| prompt.request.prompt.len()).sum(),
            completion_tokens: self.choices.iter().map(|choice| choice.generated).sum(),
            cached_tokens: self.prompts.iter().map(|prompt| prompt.cached_tokens).sum(),
        }
    }

    fn take(&mut self, told: Told) -> Result<(), GenerationError> {
        let Told { prompt: index, at, event } = told;
        let Some(prompt) = self.prompts.get_mut(index) else { return Ok(()) };
        match event {
            Event::Started { cached_tokens } => {
                prompt.cached_tokens = cached_tokens as usize;
                prompt.timeline.started(at, cached_tokens, &self.meters);
            }
            Event::Scores(scores) => self.ready.push_back(Update::Scores { prompt: index, scores }),
            Event::RoutedExperts { choice, experts } => {
                let choice = self.choices.get_mut(prompt.first_choice + choice as usize);
                // A stop string that was met since: what follows is nobody's.
                if let (Some(shape), Some(choice)) = (self.routed, choice.filter(|choice| !choice.finished)) {
                    shape.push(&mut choice.routed, &experts);
                }
            }
            Event::Token { choice, token, logprobs } => {
                let choice = prompt.first_choice + choice as usize;
                self.token(index, choice, GeneratedToken { id: token, logprobs }, at)?;
            }
            Event::Finished { choice, reason } => {
                let choice = prompt.first_choice + choice as usize;
                self.ended(index, choice, reason.into(), at)?;
            }
            Event::Failed(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn token(
        &mut self,
        prompt: usize,
        index: usize,
        token: GeneratedToken,
        at: Instant,
    ) -> Result<(), GenerationError> {
        let Some(choice) = self.choices.get_mut(index).filter(|choice| !choice.finished) else { return Ok(()) };
        self.prompts[prompt].timeline.token(at, choice.last_token.replace(at), &self.meters);
        let stop = &self.prompts[prompt].request.stop;
        let ends =
            stop.stop_token_ids.contains(&token.id) || !stop.ignore_eos && stop.eos_token_ids.contains(&token.id);
        let text = if ends && !self.options.include_stop { String::new() } else { choice.stream.push(token.id)? };
        choice.generated += 1;
        choice.untold.push(token);
        let found = choice.matcher.push(&text, choice.generated >= stop.min_tokens as usize);
        if found.stop.is_some() || !found.text.is_empty() {
            self.tell(prompt, index, found.text, found.stop.map(Finish::StopString), at);
        }
        Ok(())
    }

    fn ended(&mut self, prompt: usize, index: usize, finish: Finish, at: Instant) -> Result<(), GenerationError> {
        let Some(choice) = self.choices.get_mut(index).filter(|choice| !choice.finished) else { return Ok(()) };
        let min_tokens = self.prompts[prompt].request.stop.min_tokens as usize;
        let rest = choice.stream.finish()?;
        let mut found = choice.matcher.push(&rest, choice.generated >= min_tokens);
        if found.stop.is_none() {
            found.text.push_str(&choice.matcher.finish());
        }
        let finish = found.stop.map_or(finish, Finish::StopString);
        self.tell(prompt, index, found.text, Some(finish), at);
        Ok(())
    }

    /// Queues a delta; closes the choice if it is its last, and the prompt with its last choice.
    fn tell(&mut self, prompt: usize, index: usize, text: String, finish: Option<Finish>, at: Instant) {
        let routed_experts = finish.as_ref().and_then(|_| self.routed_experts(prompt, index));
        let choice = &mut self.choices[index];
        let tokens = std::mem::take(&mut choice.untold);
        if let Some(finish) = &finish {
            choice.finished = true;
            self.meters.choice_finished(finish.reason(), choice.generated);
            let prompt = &mut self.prompts[prompt];
            if let (Finish::StopString(_), Some(ticket)) = (finish, &prompt.ticket) {
                // The engine knows no strings: it would go on.
                ticket.end_choice((index - prompt.first_choice) as u32);
            }
            prompt.open -= 1;
            if prompt.open == 0 {
                prompt.ticket = None;
                prompt.timeline.finished(at, choice.generated, &self.meters);
            }
        }
        self.ready.push_back(Update::Delta(Delta { choice: index, text, tokens, finish, routed_experts }));
    }

    /// The experts of a choice's tokens, if they were asked for. The prompt's, which are the same for all choices, lie with
    /// the first one's.
    fn routed_experts(&self, prompt: usize, index: usize) -> Option<Vec<u8>> {
        let Prompt { request, first_choice, .. } = &self.prompts[prompt];
        let (shape, from) = (self.routed?, request.routed_experts_from?);
        let of_prompt = if index == *first_choice {
            &[]
        } else {
            let first = &self.choices[*first_choice].routed;
            let bytes = request.prompt.len().saturating_sub(from as usize) * shape.token_bytes();
            &first[..bytes.min(first.len())]
        };
        Some(shape.npy(&[of_prompt, &self.choices[index].routed].concat()))
    }
}

impl Choice {
    fn new(machine: &Machine, stops: &Arc<[String]>, options: &OutputOptions) -> Self {
        Self {
            stream: machine.tokenizer.stream(options.skip_special_tokens),
            matcher: StopMatcher::new(stops.clone(), options.include_stop),
            generated: 0,
            untold: Vec::new(),
            routed: Vec::new(),
            finished: false,
            last_token: None,
        }
    }
}

fn sink(sender: mpsc::UnboundedSender<Told>, prompt: usize) -> Sink {
    Box::new(move |event| {
        // Nobody listens once the generation is dropped: it is being cancelled.
        let _ = sender.send(Told { prompt, at: Instant::now(), event });
    })
}

/// A whole generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Completed {
    /// Each choice, as if told at once.
    pub choices: Vec<Delta>,
    /// Of each prompt, if asked for.
    pub scores: Vec<Option<Scores>>,
}

impl Completed {
    fn add(&mut self, update: Update) {
        match update {
            Update::Scores { prompt, scores } => self.scores[prompt] = Some(scores),
            Update::Delta(delta) => {
                let choice = &mut self.choices[delta.choice];
                choice.text.push_str(&delta.text);
                choice.tokens.extend(delta.tokens);
                choice.finish = delta.finish.or(choice.finish.take());
                choice.routed_experts = delta.routed_experts.or(choice.routed_experts.take());
            }
        }
    }
}

#[cfg(test)]
mod tests;
