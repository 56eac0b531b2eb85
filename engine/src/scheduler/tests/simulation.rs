//! Drives a scheduler the way the runtime does, with a storage of tokens in place of keys and values.

use std::{collections::HashMap, sync::Arc};

use crate::{
    adapter::LoadedAdapter,
    kv::blocks::BLOCK_SIZE,
    request::{FinishReason, Request, SamplingParams, StopParams, TokenLogprobs},
    scheduler::{Planned, Scheduler, SchedulerConfig, StepPlan},
    sequence::{RequestId, SequenceId},
    train::{parameters::Parameters, trained::Trained},
};

pub(super) fn config() -> SchedulerConfig {
    SchedulerConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_model_len: 128,
        max_scored_rows: 1000,
        enable_prefix_caching: true,
    }
}

pub(super) fn request(prompt: &[u32], max_tokens: u32) -> Request {
    Request {
        prompt: prompt.to_vec(),
        n: 1,
        sampling: SamplingParams::default(),
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
    }
}

/// An adapter that changes nothing: to the scheduler they are names.
pub(super) fn adapter(name: &str) -> Arc<LoadedAdapter> {
    Arc::new(LoadedAdapter::new(name, &Trained::default(), Parameters::default(), &[]).expect("no place"))
}

pub(super) struct Simulation {
    pub(super) scheduler: Scheduler,
    pub(super) reasons: Vec<FinishReason>,
    /// What each place of the KV storage holds; checked before each use as attention would read it.
    storage: Vec<u32>,
    ended: HashMap<SequenceId, Vec<u32>>,
    last_id: RequestId,
    last_admitted: RequestId,
}

impl Simulation {
    pub(super) fn new(config: SchedulerConfig, num_blocks: usize) -> Self {
        Self {
            scheduler: Scheduler::new(config, num_blocks).expect("limits that fit"),
            reasons: Vec::new(),
            storage: vec![u32::MAX; num_blocks * BLOCK_SIZE],
            ended: HashMap::new(),
            last_id: 0,
            last_admitted: 0,
        }
    }

    pub(super) fn add(&mut self, request: Request) -> RequestId {
        self.last_id += 1;
        self.scheduler.add(self.last_id, &Arc::new(request));
        self.last_id
    }

    /// One step, with every invariant checked; requests must be admitted first in the order of arrival.
    pub(super) fn step(&mut self) -> StepPlan {
        let plan = self.scheduler.plan();
        self.scheduler.check();
        self.scheduler.check_plan(&plan);
        for admission in plan.admitted.iter().filter(|one| one.first_time && one.id.choice == 0) {
            assert!(admission.id.request > self.last_admitted, "admitted out of order: {admission:?}");
            self.last_admitted = admission.id.request;
        }
        plan.sequences.iter().for_each(|planned| self.write(planned));
        plan.sequences.iter().for_each(|planned| self.read_back(planned));
        plan.sequences.iter().for_each(|planned| self.conclude(planned));
        self.scheduler.check();
        plan
    }

    /// Steps until nothing is left.
    pub(super) fn run_to_end(&mut self) {
        while !self.scheduler.is_empty() {
            self.step();
        }
        assert_eq!(self.scheduler.num_used_blocks(), 0);
    }

    /// The tokens that a sequence ended with.
    pub(super) fn ended(&self, id: SequenceId) -> Vec<u32> {
        self.ended[&id].clone()
    }

    /// The tokens of a sequence that has not ended.
    pub(super) fn tokens(&self, id: SequenceId) -> Vec<u32> {
        let Scheduler { running, waiting, .. } = &self.scheduler;
        running.get(&id).or(waiting.get(&id)).expect("a sequence").tokens().to_vec()
    }

    fn place(&self, planned: &Planned, position: usize) -> usize {
        let table = self.scheduler.sequence(planned.id).expect("it runs").block_table();
        table[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE
    }

    fn write(&mut self, planned: &Planned) {
        for position in planned.positions.clone() {
            let place = self.place(planned, position);
            self.storage[place] = self.tokens(planned.id)[position];
        }
    }

    fn read_back(&self, planned: &Planned) {
        let tokens = self.tokens(planned.id);
        for (position, token) in tokens[..planned.positions.end].iter().enumerate() {
            assert_eq!(self.storage[self.place(planned, position)], *token, "{:?} at {position}", planned.id);
        }
    }

    fn conclude(&mut self, planned: &Planned) {
        let id = planned.id;
        if let Some(sequence) = self.scheduler.sequence_mut(id) {
            let targets: usize = planned.scored.clone().map(|position| sequence.targets(position).len()).sum();
            for _ in 0..targets {
                sequence.push_score(TokenLogprobs { logprob: 0.0, rank: 1, top: vec![] });
            }
            sequence.told_routes(planned.routed.end);
        }
        self.scheduler.advance(planned);
        let Some(sequence) = self.scheduler.sequence_mut(id) else { return };
        assert!(!sequence.prompt_is_computed() || sequence.unscored().is_empty(), "the prompt is not wholly scored");
        if planned.samples {
            // Few different tokens, so that sequences often share more than their prompts.
            sequence.push_token((sequence.tokens().len() as u32 / 5 + id.choice) % 3);
        }
        if let Some(reason) = sequence.finish_reason() {
            self.ended.insert(id, sequence.tokens().to_vec());
            self.reasons.push(reason);
            self.scheduler.finish(id);
        }
    }
}
