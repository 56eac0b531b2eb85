mod properties;
mod simulation;

use simulation::{Simulation, adapter, config, request};

use super::*;
use crate::request::{FinishReason, Scoring};

fn positions(plan: &StepPlan) -> Vec<(u64, u32, std::ops::Range<usize>)> {
    plan.sequences.iter().map(|one| (one.id.request.number, one.id.choice, one.positions.clone())).collect()
}

#[test]
fn refuses_limits_that_cannot_work() {
    let message = |config: SchedulerConfig, blocks| Scheduler::new(config, blocks).expect_err("an error").to_string();
    let text = message(SchedulerConfig { max_model_len: 33, ..config() }, 2);
    assert!(text.contains("takes 3 KV blocks") && text.contains("there are 2"), "{text}");
    assert_eq!(message(SchedulerConfig { max_num_seqs: 0, ..config() }, 9), "max_num_seqs is 0: expected at least 1");
    assert!(Scheduler::new(SchedulerConfig { max_model_len: 32, ..config() }, 2).is_ok());
}

#[test]
fn decodes_come_first_and_prompts_fill_the_rest_in_chunks() {
    let mut simulation = Simulation::new(SchedulerConfig { max_num_batched_tokens: 10, ..config() }, 16);
    simulation.add(request(&[1; 4], 5));
    assert_eq!(positions(&simulation.step()), [(1, 0, 0..4)]);
    simulation.add(request(&[2; 20], 5));
    simulation.add(request(&[3; 3], 5));
    assert_eq!(positions(&simulation.step()), [(1, 0, 4..5), (2, 0, 0..9)]);
    assert_eq!(positions(&simulation.step()), [(1, 0, 5..6), (2, 0, 9..18)]);
    assert_eq!(positions(&simulation.step()), [(1, 0, 6..7), (2, 0, 18..20), (3, 0, 0..3)]);
    simulation.run_to_end();
}

#[test]
fn the_youngest_is_preempted_and_comes_back_first_with_all_its_tokens() {
    let mut simulation = Simulation::new(SchedulerConfig { max_model_len: 64, ..config() }, 5);
    simulation.add(request(&[1; 16], 40));
    simulation.add(request(&[2; 16], 40));
    let mut preempted = None;
    for _ in 0..60 {
        let plan = simulation.step();
        if let Some(&id) = plan.preempted.first() {
            preempted = Some((id, simulation.tokens(id)));
            break;
        }
    }
    let (id, tokens) = preempted.expect("5 blocks don't hold 2 * 56 tokens");
    assert_eq!(id.request.number, 2);
    simulation.add(request(&[3; 4], 1));
    let admitted = std::iter::repeat_with(|| simulation.step().admitted).find(|admitted| !admitted.is_empty());
    let admitted: Vec<_> = admitted.into_iter().flatten().map(|one| (one.id.request.number, one.first_time)).collect();
    assert_eq!(admitted[..1], [(2, false)], "the preempted one is ahead of what came later");
    simulation.run_to_end();
    assert!(simulation.ended(id).starts_with(&tokens));
    assert_eq!(simulation.ended(id).len(), 56);
}

/// The numbers of the requests that left the queue in a step, and of those that went back to it.
fn changes(plan: &StepPlan) -> (Vec<u64>, Vec<u64>) {
    let number = |id: SequenceId| id.request.number;
    (plan.admitted.iter().map(|one| number(one.id)).collect(), plan.preempted.iter().map(|&id| number(id)).collect())
}

fn background(request: Request) -> Request {
    Request { priority: Priority::Background, ..request }
}

#[test]
fn background_requests_start_after_all_interactive_ones_and_give_their_places_up() {
    let mut simulation = Simulation::new(SchedulerConfig { max_num_seqs: 2, ..config() }, 16);
    for _ in 0..3 {
        simulation.add(background(request(&[1; 5], 9)));
    }
    assert_eq!(changes(&simulation.step()), (vec![1, 2], vec![]));
    simulation.add(request(&[2; 5], 3));
    assert_eq!(changes(&simulation.step()), (vec![4], vec![2]), "the last one goes");
    simulation.add(request(&[3; 5], 3));
    simulation.add(request(&[4; 5], 3));
    assert_eq!(changes(&simulation.step()), (vec![5], vec![1]));
    assert_eq!(changes(&simulation.step()), (vec![], vec![]));
    assert_eq!(changes(&simulation.step()), (vec![6], vec![]), "an interactive one waits for interactive ones");
    assert_eq!(changes(&simulation.step()), (vec![1], vec![]), "the one that came first comes back first");
    simulation.run_to_end();
}

#[test]
fn background_requests_give_their_blocks_up_the_last_first() {
    let mut simulation = Simulation::new(config(), 8);
    for token in 3..6 {
        simulation.add(background(request(&[token; 20], 9)));
    }
    simulation.step();
    simulation.add(request(&[2; 80], 9));
    let (admitted, preempted) = changes(&simulation.step());
    assert_eq!((admitted, preempted), (vec![4], vec![3, 2]), "5 blocks beside the 2 of the first");
    let rest: Vec<_> = std::iter::from_fn(|| (!simulation.scheduler.is_empty()).then(|| simulation.step())).collect();
    assert!(rest.iter().all(|plan| plan.preempted.is_empty()));
}

#[test]
fn background_requests_take_a_small_part_of_a_step_while_interactive_ones_run() {
    let mut simulation = Simulation::new(config(), 16);
    simulation.add(background(request(&[1; 100], 1)));
    simulation.add(request(&[2; 10], 3));
    assert_eq!(positions(&simulation.step()), [(2, 0, 0..10), (1, 0, 0..8)]);
    assert_eq!(positions(&simulation.step()), [(2, 0, 10..11), (1, 0, 8..16)]);
    assert_eq!(positions(&simulation.step()), [(2, 0, 11..12), (1, 0, 16..24)]);
    assert_eq!(positions(&simulation.step()), [(1, 0, 24..88)]);
    simulation.run_to_end();
}

#[test]
fn a_prefix_is_reused_but_never_the_last_token() {
    let mut simulation = Simulation::new(config(), 16);
    let prompt: Vec<u32> = (0..48).collect();
    let mut cached = Vec::new();
    for prompt in [&prompt[..], &prompt, &prompt[..47], &prompt[..16], &prompt[1..]] {
        simulation.add(request(prompt, 1));
        cached.push(simulation.step().admitted[0].cached_tokens);
        simulation.run_to_end();
    }
    assert_eq!(cached, [0, 32, 32, 0, 0]);
    let counters = simulation.scheduler.prefix_counters();
    assert_eq!((counters.queries, counters.hits), (48 + 48 + 47 + 16 + 47, 64));
}

/// Also of an adapter that was loaded again under its name, and also in the second turn.
#[test]
fn prefixes_are_shared_among_requests_of_one_adapter() {
    let mut simulation = Simulation::new(config(), 64);
    let adapters = [None, Some(adapter("one")), Some(adapter("two")), Some(adapter("one"))];
    for expected in [0, 48] {
        for adapter in &adapters {
            simulation.add(Request { adapter: adapter.clone(), ..request(&[6; 50], 1) });
            assert_eq!(simulation.step().admitted[0].cached_tokens, expected, "{adapter:?}");
            simulation.run_to_end();
        }
    }
}

#[test]
fn tells_whose_adapters_run_and_wait() {
    let mut simulation = Simulation::new(SchedulerConfig { max_num_seqs: 2, ..config() }, 64);
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert_eq!(simulation.scheduler.adapters(), (vec![], vec![]));
    let [one, two] = ["one", "two"].map(adapter);
    for adapter in [Some(&two), None, Some(&two), Some(&one), Some(&one)] {
        simulation.add(Request { adapter: adapter.cloned(), ..request(&[3; 5], 9) });
    }
    simulation.step();
    assert_eq!(simulation.scheduler.adapters(), (names(&["two"]), names(&["one", "two"])));
    simulation.run_to_end();
    assert_eq!(simulation.scheduler.adapters(), (vec![], vec![]));
}

#[test]
fn generated_tokens_are_reused_by_the_next_turn() {
    let mut simulation = Simulation::new(config(), 16);
    let id = simulation.add(request(&[7; 10], 30));
    simulation.run_to_end();
    let mut next = simulation.ended(SequenceId { request: id, choice: 0 });
    next.extend([8; 4]);
    simulation.add(request(&next, 1));
    assert_eq!(simulation.step().admitted[0].cached_tokens, 32, "39 tokens were computed");
}

#[test]
fn scoring_a_prompt_skips_the_cache_and_is_bounded_per_step() {
    let mut simulation = Simulation::new(SchedulerConfig { max_scored_rows: 20, ..config() }, 16);
    simulation.add(request(&[5; 40], 1));
    simulation.run_to_end();
    simulation.add(Request { scoring: Some(Scoring::all(0)), ..request(&[5; 40], 1) });
    let steps: Vec<_> = (0..2).map(|_| simulation.step()).collect();
    assert_eq!(steps[0].admitted[0].cached_tokens, 0);
    let scored: Vec<_> = steps.iter().map(|plan| plan.sequences[0].scored.clone()).collect();
    assert_eq!(scored, [0..20, 20..39]);
    assert!(steps[1].sequences[0].samples);
}

#[test]
fn choices_share_the_prompt_even_without_a_cache_between_requests() {
    let mut simulation = Simulation::new(SchedulerConfig { enable_prefix_caching: false, ..config() }, 16);
    for number in 1..=2 {
        simulation.add(Request { n: 3, ..request(&[4; 40], 9) });
        assert_eq!(positions(&simulation.step()), [(number, 0, 0..40)]);
        let second = simulation.step();
        let cached: Vec<_> = second.admitted.iter().map(|one| (one.id.choice, one.cached_tokens)).collect();
        assert_eq!(cached, [(1, 32), (2, 32)]);
        assert_eq!(simulation.scheduler.num_used_blocks(), 2 + 3);
        simulation.run_to_end();
    }
    assert_eq!(simulation.scheduler.prefix_counters(), PrefixCounters::default());
}

#[test]
fn further_choices_wait_for_the_prompt_and_may_be_overtaken_meanwhile() {
    let budget = SchedulerConfig { max_num_batched_tokens: 30, max_scored_rows: 10, ..config() };
    let mut simulation = Simulation::new(budget, 16);
    simulation.add(Request { n: 2, scoring: Some(Scoring::all(0)), ..request(&[4; 20], 9) });
    simulation.add(request(&[5; 6], 9));
    assert_eq!(positions(&simulation.step()), [(1, 0, 0..10), (2, 0, 0..6)]);
    assert_eq!(positions(&simulation.step()), [(2, 0, 6..7), (1, 0, 10..20)]);
    assert_eq!(positions(&simulation.step()), [(1, 0, 20..21), (2, 0, 7..8), (1, 1, 16..20)]);
}

#[test]
fn a_cancelled_request_leaves_at_once_from_every_phase() {
    let mut simulation = Simulation::new(SchedulerConfig { max_num_batched_tokens: 8, ..config() }, 16);
    let [decoding, prefilling, queued] = [4, 30, 5].map(|len| simulation.add(request(&[1; 30][..len], 9)));
    simulation.step();
    simulation.step();
    assert_eq!(simulation.scheduler.cancel(queued), Some(Phase::Queue));
    assert_eq!(simulation.scheduler.cancel(prefilling), Some(Phase::Prefill));
    assert_eq!(simulation.scheduler.cancel(decoding), Some(Phase::Decode));
    assert_eq!(simulation.scheduler.cancel(decoding), None);
    simulation.scheduler.check();
    assert!(simulation.scheduler.is_empty());
    assert_eq!(simulation.scheduler.num_used_blocks(), 0);
}

#[test]
fn a_failed_step_removes_what_ran_and_keeps_what_waits() {
    let mut simulation = Simulation::new(SchedulerConfig { max_num_seqs: 2, ..config() }, 16);
    simulation.add(request(&[1; 20], 9));
    simulation.add(Request { n: 2, ..request(&[2; 20], 9) });
    simulation.add(request(&[1; 20], 9));
    simulation.step();
    simulation.scheduler.plan();
    let failed = simulation.scheduler.fail_running();
    assert_eq!(failed.iter().map(|id| id.number).collect::<Vec<_>>(), [1, 2]);
    simulation.scheduler.check();
    assert_eq!((simulation.scheduler.num_running(), simulation.scheduler.num_waiting()), (0, 1));
    let plan = simulation.step();
    assert_eq!((positions(&plan), plan.admitted[0].cached_tokens), (vec![(3, 0, 0..20)], 0));
    simulation.run_to_end();
}

#[test]
fn a_prompt_alone_is_evaluated_and_ends() {
    let mut simulation = Simulation::new(config(), 16);
    simulation.add(request(&[1; 20], 0));
    let plan = simulation.step();
    assert_eq!((plan.num_tokens(), plan.sequences[0].samples), (20, false));
    assert_eq!(simulation.reasons, [FinishReason::Length]);
    assert!(simulation.scheduler.is_empty());
}
