//! One choice of a request: its tokens, how far they are computed, its KV blocks, and what its sampler must know.

use std::{collections::HashMap, ops::Range, sync::Arc};

use crate::{
    kv::blocks::BlockId,
    request::{FinishReason, Priority, Request, Scores, TokenLogprobs},
};

/// The name of a request. Its order is that of precedence: by priority, then by arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId {
    /// The request's own.
    pub priority: Priority,
    /// Its place in the order of arrival.
    pub number: u64,
}

/// The name of a sequence. Its order is that of precedence: by its request's, then by choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId {
    /// The request that it belongs to.
    pub request: RequestId,
    /// Which of the request's `n` choices it is.
    pub choice: u32,
}

/// One choice's state. Preemption takes its blocks and `computed`; everything else stays, so nothing is lost.
#[derive(Debug)]
pub struct Sequence {
    id: SequenceId,
    request: Arc<Request>,
    tokens: Vec<u32>,
    counts: TokenCounts,
    /// What is scored of the prompt so far; `None` if it isn't asked of this choice.
    scores: Option<Scores>,
    /// The first position whose experts were not told; `None` if nobody asks.
    unrouted: Option<usize>,
    /// Leading tokens whose keys and values are in the cache.
    pub(crate) computed: usize,
    /// The blocks that hold them, and the place for the next step's.
    pub(crate) block_table: Vec<BlockId>,
    /// Leading blocks that were offered to the prefix cache.
    pub(crate) registered: usize,
    /// Whether it was ever admitted.
    pub(crate) started: bool,
}

impl Sequence {
    /// Choice `id.choice` of `request`, nothing computed.
    #[must_use]
    pub fn new(id: SequenceId, request: Arc<Request>) -> Self {
        // The prompt is the same for every choice: it is scored once.
        let scoring = request.scoring.as_ref().filter(|_| id.choice == 0);
        let unscored = |from: u32| vec![None; (from as usize).clamp(1, request.prompt.len())];
        Self {
            id,
            tokens: request.prompt.clone(),
            counts: TokenCounts::new(&request),
            scores: scoring.map(|scoring| Scores { prompt: unscored(scoring.from), next: Vec::new() }),
            // So are its experts.
            unrouted: request
                .routed_experts_from
                .map(|from| if id.choice == 0 { from as usize } else { request.prompt.len() }),
            request,
            computed: 0,
            block_table: Vec::new(),
            registered: 0,
            started: false,
        }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> SequenceId {
        self.id
    }

    /// The request that it belongs to.
    #[must_use]
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// The prompt and what was generated so far.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_len(&self) -> usize {
        self.request.prompt.len()
    }

    /// What was generated so far.
    #[must_use]
    pub fn generated(&self) -> &[u32] {
        self.tokens.get(self.prompt_len()..).unwrap_or_default()
    }

    /// Leading tokens whose keys and values are in the cache.
    #[must_use]
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// The KV blocks: token `p` lies in block `block_table()[p / BLOCK_SIZE]`.
    #[must_use]
    pub fn block_table(&self) -> &[BlockId] {
        &self.block_table
    }

    /// Which tokens have appeared, as far as its penalties ask.
    #[must_use]
    pub fn counts(&self) -> &TokenCounts {
        &self.counts
    }

    /// Tokens that are still to be computed: one in decode, more in prefill (also when it was preempted).
    #[must_use]
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether the prompt's keys and values are in the cache.
    #[must_use]
    pub fn prompt_is_computed(&self) -> bool {
        self.computed >= self.prompt_len()
    }

    /// Whether only the token generated last is still to be computed.
    #[must_use]
    pub fn is_decoding(&self) -> bool {
        self.pending() == 1 && !self.generated().is_empty()
    }

    /// Whether a token is to be chosen once everything pending is computed.
    #[must_use]
    pub fn wants_token(&self) -> bool {
        self.generated().len() < self.request.stop.max_tokens as usize
    }

    /// The prompt positions whose logits are still wanted: those at `p` score [`targets`](Self::targets) of `p`. Each is
    /// scored once, also when a preempted prompt is computed again.
    #[must_use]
    pub fn unscored(&self) -> Range<usize> {
        let last = self.prompt_len() - 1;
        let Some(scores) = &self.scores else { return last..last };
        let scores_next = scores.next.len() < self.targets(last).len();
        scores.prompt.len() - 1..last + usize::from(scores_next)
    }

    /// The tokens that are scored by the logits of prompt position `position`.
    #[must_use]
    pub fn targets(&self, position: usize) -> &[u32] {
        match self.request.prompt.get(position + 1) {
            Some(token) => std::slice::from_ref(token),
            None => self.request.scoring.as_ref().map_or(&[], |scoring| &scoring.next),
        }
    }

    /// Notes the log-probabilities of the next target of the first unscored position.
    pub fn push_score(&mut self, logprobs: TokenLogprobs) {
        if let Some(scores) = &mut self.scores {
            if scores.prompt.len() < self.request.prompt.len() {
                scores.prompt.push(Some(logprobs));
            } else {
                scores.next.push(logprobs);
            }
        }
    }

    /// The prompt's log-probabilities, once and as soon as they are complete.
    pub fn take_scores(&mut self) -> Option<Scores> {
        if self.prompt_is_computed() && self.unscored().is_empty() { self.scores.take() } else { None }
    }

    /// The first position whose experts were not told; `None` if nobody asks. It stays when the sequence is preempted:
    /// each position is told once.
    #[must_use]
    pub fn unrouted(&self) -> Option<usize> {
        self.unrouted
    }

    /// Notes that the experts of all positions before `end` were told.
    pub fn told_routes(&mut self, end: usize) {
        self.unrouted = self.unrouted.map(|start| start.max(end));
    }

    /// Appends a generated token.
    pub fn push_token(&mut self, token: u32) {
        self.tokens.push(token);
        self.counts.push(token);
    }

    /// Why the sequence has ended, if it has.
    #[must_use]
    pub fn finish_reason(&self) -> Option<FinishReason> {
        if !self.prompt_is_computed() {
            return None;
        }
        let stop = &self.request.stop;
        if let Some(last) = self.generated().last()
            && self.generated().len() >= stop.min_tokens as usize
        {
            if !stop.ignore_eos && stop.eos_token_ids.contains(last) {
                return Some(FinishReason::EndOfSequence);
            }
            if stop.stop_token_ids.contains(last) {
                return Some(FinishReason::StopToken(*last));
            }
        }
        (!self.wants_token()).then_some(FinishReason::Length)
    }
}

/// Which tokens have appeared in one sequence. Empty, and without cost, when no penalty asks for it.
#[derive(Debug, Default)]
pub struct TokenCounts {
    /// The prompt's distinct tokens, ascending; only for the repetition penalty.
    prompt: Vec<u32>,
    /// How often each token was generated; `None` if no penalty asks.
    generated: Option<HashMap<u32, u32>>,
}

impl TokenCounts {
    fn new(request: &Request) -> Self {
        let sampling = &request.sampling;
        let repetition = sampling.repetition_penalty != 1.0;
        let wanted = repetition || sampling.presence_penalty != 0.0 || sampling.frequency_penalty != 0.0;
        let mut prompt = if repetition { request.prompt.clone() } else { Vec::new() };
        prompt.sort_unstable();
        prompt.dedup();
        Self { prompt, generated: wanted.then(HashMap::new) }
    }

    fn push(&mut self, token: u32) {
        if let Some(generated) = &mut self.generated {
            *generated.entry(token).or_default() += 1;
        }
    }

    /// Each generated token with how often it was generated, in no order.
    pub fn generated(&self) -> impl Iterator<Item = (u32, u32)> {
        self.generated.iter().flatten().map(|(&token, &count)| (token, count))
    }

    /// Each token of the prompt or generated, once, in no order.
    pub fn seen(&self) -> impl Iterator<Item = u32> {
        let of_prompt = |token: &u32| self.prompt.binary_search(token).is_ok();
        let only_generated = self.generated().map(|(token, _)| token).filter(move |token| !of_prompt(token));
        self.prompt.iter().copied().chain(only_generated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{SamplingParams, Scoring, StopParams};

    fn sequence(sampling: SamplingParams, stop: StopParams, scoring: Option<Scoring>) -> Sequence {
        let request = Request {
            prompt: vec![5, 3, 5],
            n: 1,
            sampling,
            stop,
            logprobs: None,
            scoring,
            routed_experts_from: None,
            adapter: None,
            priority: Priority::Interactive,
        };
        Sequence::new(
            SequenceId { request: RequestId { priority: Priority::Interactive, number: 1 }, choice: 0 },
            Arc::new(request),
        )
    }

    fn stop(max_tokens: u32) -> StopParams {
        StopParams { max_tokens, min_tokens: 0, eos_token_ids: vec![9], ignore_eos: false, stop_token_ids: vec![8] }
    }

    #[test]
    fn ends_for_the_right_reason() {
        let ended = |stop: StopParams, tokens: &[u32]| {
            let mut sequence = sequence(SamplingParams::default(), stop, None);
            sequence.computed = 3;
            tokens.iter().for_each(|&token| sequence.push_token(token));
            sequence.finish_reason()
        };
        assert_eq!(ended(stop(3), &[1]), None);
        assert_eq!(ended(stop(3), &[1, 9]), Some(FinishReason::EndOfSequence));
        assert_eq!(ended(stop(3), &[1, 2, 9]), Some(FinishReason::EndOfSequence));
        assert_eq!(ended(stop(3), &[8]), Some(FinishReason::StopToken(8)));
        assert_eq!(ended(stop(3), &[1, 1, 1]), Some(FinishReason::Length));
        assert_eq!(ended(stop(0), &[]), Some(FinishReason::Length));
        assert_eq!(ended(StopParams { ignore_eos: true, ..stop(3) }, &[9]), None);
        assert_eq!(ended(StopParams { min_tokens: 2, ..stop(3) }, &[9]), None);
    }

    #[test]
    fn counts_only_what_a_penalty_asks_for() {
        let counts = |sampling: SamplingParams| {
            let mut sequence = sequence(sampling, stop(9), None);
            [3, 7, 7].into_iter().for_each(|token| sequence.push_token(token));
            let mut seen: Vec<_> = sequence.counts().seen().collect();
            let mut generated: Vec<_> = sequence.counts().generated().collect();
            seen.sort_unstable();
            generated.sort_unstable();
            (seen, generated)
        };
        assert_eq!(counts(SamplingParams::default()), (vec![], vec![]));
        let presence = SamplingParams { presence_penalty: 1.0, ..SamplingParams::default() };
        assert_eq!(counts(presence), (vec![3, 7], vec![(3, 1), (7, 2)]));
        let repetition = SamplingParams { repetition_penalty: 1.1, ..SamplingParams::default() };
        assert_eq!(counts(repetition), (vec![3, 5, 7], vec![(3, 1), (7, 2)]));
    }

    #[test]
    fn prompt_positions_are_scored_once_and_given_once() {
        let mut sequence = sequence(SamplingParams::default(), stop(1), Some(Scoring::all(0)));
        let logprobs = TokenLogprobs { logprob: -1.0, rank: 1, top: vec![] };
        assert_eq!(sequence.unscored(), 0..2);
        sequence.push_score(logprobs.clone());
        assert_eq!((sequence.unscored(), sequence.take_scores()), (1..2, None));
        sequence.push_score(logprobs.clone());
        sequence.computed = 3;
        let scores = Scores { prompt: vec![None, Some(logprobs.clone()), Some(logprobs)], next: vec![] };
        assert_eq!(sequence.take_scores(), Some(scores));
        assert_eq!((sequence.unscored(), sequence.take_scores()), (2..2, None));
    }

    #[test]
    fn scoring_may_begin_late_and_go_past_the_prompt() {
        let logprobs = |rank| TokenLogprobs { logprob: -1.0, rank, top: vec![] };
        let scoring = |from, next: &[u32]| Some(Scoring { from, top: 0, next: next.to_vec() });
        let sequence = |scoring| sequence(SamplingParams::default(), stop(0), scoring);
        assert_eq!(sequence(scoring(2, &[])).unscored(), 1..2);
        // Beyond the prompt there is only what might follow.
        assert_eq!(sequence(scoring(9, &[])).unscored(), 2..2);
        let mut late = sequence(scoring(2, &[7, 8]));
        assert_eq!((late.unscored(), late.targets(1), late.targets(2)), (1..3, &[5][..], &[7, 8][..]));
        late.push_score(logprobs(1));
        late.push_score(logprobs(2));
        late.computed = 3;
        assert_eq!((late.unscored(), late.take_scores()), (2..3, None));
        late.push_score(logprobs(3));
        let scores = Scores { prompt: vec![None, None, Some(logprobs(1))], next: vec![logprobs(2), logprobs(3)] };
        assert_eq!(late.take_scores(), Some(scores));
    }
}
