//! Random arrivals, lengths, choices, cancellations, failures, budgets and very few blocks.

use std::{collections::HashMap, sync::Arc};

use proptest::prelude::*;

use super::simulation::{Simulation, adapter, request};
use crate::{
    kv::blocks::blocks_for,
    request::{Priority, Request, Scoring},
    scheduler::SchedulerConfig,
    sequence::{RequestId, SequenceId},
};

#[derive(Debug, Clone)]
enum Act {
    Add {
        kind: u32,
        prompt_len: usize,
        max_tokens: u32,
        n: u32,
        scoring: Option<Scoring>,
        routed: Option<u32>,
        adapted: bool,
        priority: Priority,
    },
    Cancel(prop::sample::Index),
    Step(u8),
    FailStep,
    ClearCache,
}

fn act() -> impl Strategy<Value = Act> {
    let routed = prop::option::weighted(0.2, 0_u32..40);
    let scoring = (0_u32..80, 0_u32..3).prop_map(|(from, next)| Scoring { from, top: 0, next: (0..next).collect() });
    let scoring = prop::option::weighted(0.3, scoring);
    let priority = prop::sample::select(&Priority::ALL[..]);
    let lengths = (1_usize..70, 0_u32..50, 1_u32..4);
    let add = (0_u32..3, lengths, scoring, routed, any::<bool>(), priority).prop_map(
        |(kind, (prompt_len, max_tokens, n), scoring, routed, adapted, priority)| Act::Add {
            kind,
            prompt_len,
            max_tokens,
            n,
            scoring,
            routed,
            adapted,
            priority,
        },
    );
    prop_oneof![
        8 => add,
        2 => any::<prop::sample::Index>().prop_map(Act::Cancel),
        8 => (1_u8..12).prop_map(Act::Step),
        1 => Just(Act::FailStep),
        1 => Just(Act::ClearCache),
    ]
}

fn config() -> impl Strategy<Value = (SchedulerConfig, usize)> {
    (1_usize..6, 1_usize..40, 2_usize..110, 1_usize..30, any::<bool>(), 0_usize..8).prop_map(
        |(max_num_seqs, max_num_batched_tokens, max_model_len, max_scored_rows, enable_prefix_caching, spare)| {
            let config = SchedulerConfig {
                max_num_seqs,
                max_num_batched_tokens,
                max_model_len,
                max_scored_rows,
                enable_prefix_caching,
            };
            let num_blocks = blocks_for(config.max_model_len) + spare;
            (config, num_blocks)
        },
    )
}

/// What the requests that were neither cancelled nor failed must end with.
struct Expected {
    requests: HashMap<RequestId, Request>,
    /// Tokens of interactive and of background requests.
    work: [usize; 2],
}

impl Expected {
    fn add(&mut self, simulation: &mut Simulation, request: Request) {
        self.work[request.priority as usize] +=
            (request.prompt.len() + request.stop.max_tokens as usize) * request.n as usize;
        self.requests.insert(simulation.add(request.clone()), request);
    }

    fn lost(&mut self, requests: &[RequestId]) {
        requests.iter().for_each(|id| drop(self.requests.remove(id)));
    }

    fn check(&self, simulation: &Simulation) {
        for (&id, request) in &self.requests {
            for choice in 0..request.n {
                let tokens = simulation.ended(SequenceId { request: id, choice });
                assert!(tokens.starts_with(&request.prompt));
                assert_eq!(tokens.len(), request.prompt.len() + request.stop.max_tokens as usize);
            }
        }
    }
}

fn play(config: &SchedulerConfig, num_blocks: usize, acts: Vec<Act>) {
    let mut simulation = Simulation::new(config.clone(), num_blocks);
    let adapter = adapter("one");
    let mut expected = Expected { requests: HashMap::new(), work: [0; 2] };
    for act in acts {
        match act {
            Act::Add { kind, prompt_len, max_tokens, n, scoring, routed, adapted, priority } => {
                let prompt_len = prompt_len.min(config.max_model_len);
                let max_tokens = max_tokens.min((config.max_model_len - prompt_len) as u32);
                let prompt: Vec<_> = (0..prompt_len as u32).map(|at| if at < 40 { kind / 2 } else { kind }).collect();
                expected.add(
                    &mut simulation,
                    Request {
                        n,
                        scoring,
                        routed_experts_from: routed,
                        adapter: adapted.then(|| Arc::clone(&adapter)),
                        priority,
                        ..request(&prompt, max_tokens)
                    },
                );
            }
            Act::Cancel(which) => {
                let mut live: Vec<_> = expected.requests.keys().copied().collect();
                live.retain(|&id| simulation.scheduler.has(id));
                live.sort_unstable();
                if !live.is_empty() {
                    let id = live[which.index(live.len())];
                    assert!(simulation.scheduler.cancel(id).is_some());
                    expected.lost(&[id]);
                }
            }
            Act::Step(times) => (0..times).for_each(|_| drop(simulation.step())),
            Act::FailStep => {
                simulation.scheduler.plan();
                expected.lost(&simulation.scheduler.fail_running());
            }
            Act::ClearCache => simulation.scheduler.clear_prefix_cache(),
        }
        simulation.scheduler.check();
    }
    // The first running sequence computes at least one token in each step, and only a choice that waited for its
    // prompt can come in before it and take its blocks: twice the work is far more than enough. Interactive ones need no
    // longer for background ones beside them.
    let [interactive, background] = expected.work;
    let mut steps = 0;
    while !simulation.scheduler.is_empty() {
        let one_is_left = simulation.has_interactive();
        simulation.step();
        steps += 1;
        let work = if one_is_left { interactive } else { interactive + background };
        assert!(steps <= 2 * work + 2, "{steps} steps for {work} tokens");
    }
    assert_eq!(simulation.scheduler.num_used_blocks(), 0, "blocks leak");
    expected.check(&simulation);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]
    #[test]
    fn every_request_ends_and_no_block_leaks(
        (config, num_blocks) in config(),
        acts in prop::collection::vec(act(), 1..25),
    ) {
        play(&config, num_blocks, acts);
    }
}
