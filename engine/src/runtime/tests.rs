pub(crate) mod fake;
mod faults;
mod rig;

use std::{sync::mpsc::RecvTimeoutError, time::Duration};

use fake::{VOCAB, greedy, routed};
use rig::{Answer, Call, LONG, Rig, config, prompt, request};

use super::*;
use crate::request::{FinishReason, Priority, SamplingParams, Scores, Scoring, StopParams};

fn is_shared_between_threads<T: Clone + Send + Sync + 'static>(_: &T) {}

#[test]
fn a_request_is_answered_greedily_to_its_length() {
    let rig = Rig::new(config(), 32);
    is_shared_between_threads(&rig.runtime.handle());
    let answer = rig.submit(request(&prompt(1, 40), 50)).answer();
    assert_eq!(answer.tokens, [greedy(&prompt(1, 40), 50)]);
    assert_eq!((answer.reasons, answer.cached_tokens), (vec![Some(FinishReason::Length)], Some(0)));
    let totals = rig.totals();
    assert_eq!((totals.prompt_tokens, totals.generated_tokens, totals.scheduled_tokens), (40, 50, 89));
    assert_eq!((totals.running, totals.waiting, totals.kv_blocks_used), (0, 0, 0));
}

/// Requests of all kinds: greedy and drawn, one and several choices, scored and not, interactive and not, some with equal
/// beginnings.
fn mixed() -> Vec<Request> {
    let of = |at: u32| {
        let prompt = if at.is_multiple_of(3) { prompt(0, 20 + at as usize) } else { prompt(at, 5 + 7 * at as usize) };
        let drawn =
            SamplingParams { seed: u64::from(at), top_p: 0.9, presence_penalty: 0.3, ..SamplingParams::default() };
        let mut request = request(&prompt, 10 + at * 3);
        request.n = 1 + at % 3;
        request.logprobs = at.is_multiple_of(2).then_some(2);
        request.scoring = at.is_multiple_of(5).then(|| Scoring::all(1));
        request.routed_experts_from = (at % 4 < 2).then_some(at % 3);
        if at % 5 < 2 {
            request.priority = Priority::Background;
        }
        if !at.is_multiple_of(4) {
            request.sampling = drawn;
        }
        request
    };
    (0..12).map(of).collect()
}

/// The answers, without what may differ: how much came from the cache, and the order among choices.
fn answers(config: RuntimeConfig, num_blocks: usize, together: bool) -> (Vec<Answer>, StepReport) {
    let rig = Rig::new(config, num_blocks);
    let mut answers: Vec<_> = if together {
        let calls: Vec<_> = mixed().into_iter().map(|request| rig.submit(request)).collect();
        calls.into_iter().map(Call::answer).collect()
    } else {
        mixed().into_iter().map(|request| rig.submit(request).answer()).collect()
    };
    for answer in &mut answers {
        assert_eq!(answer.failed, None);
        answer.cached_tokens = None;
        if answer.tokens.len() > 1 {
            answer.logprobs.clear();
        }
    }
    (answers, rig.totals())
}

#[test]
fn neighbours_priorities_chunks_preemption_and_caching_never_change_an_answer() {
    let (alone, _) = answers(config(), 32, false);
    let (together, _) = answers(config(), 200, true);
    assert_eq!(together, alone, "among others");
    let (chunked, _) = answers(RuntimeConfig { max_num_batched_tokens: 3, ..config() }, 200, true);
    assert_eq!(chunked, alone, "in chunks of 3");
    let tight = RuntimeConfig { max_model_len: 144, max_num_batched_tokens: 20, ..config() };
    let (preempted, totals) = answers(tight.clone(), 9, true);
    assert_eq!(preempted, alone, "with 9 blocks");
    assert!(totals.preemptions > 3, "{totals:?}");
    let (uncached, totals) = answers(RuntimeConfig { enable_prefix_caching: false, ..tight }, 9, true);
    assert_eq!((uncached, totals.prefix_hits), (alone, 0), "without a prefix cache");
}

/// Each token that went through the model once, also when its sequence was preempted and computed again.
#[test]
fn experts_are_told_of_each_token_once() {
    let tight = RuntimeConfig { max_model_len: 144, max_num_batched_tokens: 20, ..config() };
    let (answers, totals) = answers(tight, 9, true);
    assert!(totals.preemptions > 3, "{totals:?}");
    for (request, answer) in mixed().iter().zip(answers) {
        for (choice, (tokens, found)) in answer.tokens.iter().zip(answer.routed).enumerate() {
            let whole = [&request.prompt[..], tokens].concat();
            let first = |from: u32| if choice == 0 { from as usize } else { request.prompt.len() };
            let expected = request.routed_experts_from.map(|from| routed(&whole[..whole.len() - 1], first(from)));
            assert_eq!(found, expected.unwrap_or_default(), "choice {choice} of {request:?}");
        }
    }
}

#[test]
fn known_beginnings_come_from_the_cache_if_nobody_asks_for_their_experts() {
    let rig = Rig::new(config(), 64);
    let first = rig.submit(request(&prompt(1, 100), 1)).answer();
    assert!(first.routed[0].is_empty());
    let cached = |from: u32| {
        let request = Request { routed_experts_from: Some(from), ..request(&prompt(1, 100), 1) };
        let answer = rig.submit(request).answer();
        assert_eq!(answer.routed[0], routed(&prompt(1, 100), from as usize), "from {from}");
        answer.cached_tokens
    };
    assert_eq!([cached(0), cached(50), cached(99)], [Some(0), Some(48), Some(96)]);
}

#[test]
fn reports_have_the_routes_of_each_step_if_the_runtime_is_to_give_them() {
    let rig = Rig::gated(RuntimeConfig { report_routes: true, ..config() }, 32);
    let call = rig.submit(request(&prompt(1, 5), 2));
    let experts: Vec<_> = (0..2).flat_map(|_| rig.permit().routes).map(|layer| layer.routes.experts).collect();
    let tokens = [prompt(1, 5), greedy(&prompt(1, 5), 1)].concat();
    let expected = routed(&tokens, 0).chunks_exact(4).flat_map(|token| token[2..].to_vec()).collect::<Vec<_>>();
    assert_eq!(experts, [&expected[..10], &expected[10..]]);
    assert_eq!(call.answer().reasons, [Some(FinishReason::Length)]);
    let silent = Rig::gated(config(), 32);
    let _call = silent.submit(request(&prompt(1, 5), 1));
    assert!(silent.permit().routes.is_empty());
}

#[test]
fn choices_differ_when_drawn_and_repeat_with_the_seed() {
    let rig = Rig::new(config(), 64);
    let drawn = |seed: u64| {
        let sampling = SamplingParams { seed, ..SamplingParams::default() };
        rig.submit(Request { n: 3, sampling, ..request(&prompt(1, 40), 12) }).answer().tokens
    };
    let first = drawn(5);
    assert!(first[0] != first[1] && first[1] != first[2] && first[0] != first[2], "{first:?}");
    assert_eq!(drawn(5), first);
    assert_ne!(drawn(6), first);
    let greedy_ones = rig.submit(Request { n: 3, ..request(&prompt(1, 40), 12) }).answer().tokens;
    assert_eq!(greedy_ones, vec![greedy(&prompt(1, 40), 12); 3]);
}

#[test]
fn equal_prompts_are_computed_once() {
    let rig = Rig::new(config(), 64);
    let first = rig.submit(request(&prompt(1, 100), 1)).answer();
    let second = rig.submit(Request { n: 4, ..request(&prompt(1, 100), 1) }).answer();
    assert_eq!((first.cached_tokens, second.cached_tokens), (Some(0), Some(96)));
    let totals = rig.totals();
    assert_eq!((totals.prompt_tokens, totals.prefix_queries, totals.prefix_hits), (100 + 4 * 4, 500, 4 * 96));
}

#[test]
fn stop_conditions_end_a_continuation() {
    let rig = Rig::new(config(), 32);
    let prompt = prompt(3, 9);
    let natural = greedy(&prompt, 30);
    let fifth = natural[4];
    let at = natural.iter().position(|&token| token == fifth).expect("it is there") + 1;
    let ends = |change: &dyn Fn(&mut StopParams)| {
        let mut request = request(&prompt, 30);
        change(&mut request.stop);
        let answer = rig.submit(request).answer();
        (answer.tokens[0].clone(), answer.reasons[0].expect("it ended"))
    };
    assert_eq!(
        ends(&|stop| stop.stop_token_ids = vec![fifth]),
        (natural[..at].to_vec(), FinishReason::StopToken(fifth))
    );
    assert_eq!(ends(&|stop| stop.eos_token_ids = vec![fifth]), (natural[..at].to_vec(), FinishReason::EndOfSequence));
    let ignored = ends(&|stop| (stop.eos_token_ids, stop.ignore_eos) = (vec![fifth], true));
    assert_eq!(ignored, (natural.clone(), FinishReason::Length));
    let (tokens, _) = ends(&|stop| (stop.eos_token_ids, stop.min_tokens) = (vec![fifth], 12));
    assert!(tokens.len() >= 12 && !tokens[..11].contains(&fifth), "{tokens:?}");
}

#[test]
fn a_prompt_can_be_scored_without_generating() {
    let score = |config: RuntimeConfig| {
        let rig = Rig::new(config, 32);
        let answer = rig.submit(Request { scoring: Some(Scoring::all(2)), ..request(&prompt(4, 60), 0) }).answer();
        assert_eq!((&answer.tokens[0][..], answer.reasons[0]), (&[][..], Some(FinishReason::Length)));
        answer.scores.expect("they were asked for").prompt
    };
    let whole = score(config());
    assert_eq!((whole.len(), &whole[0]), (60, &None));
    assert!(whole[1..].iter().flatten().all(|one| one.top.len() == 2 && one.rank >= 1 && one.logprob < 0.0));
    assert_eq!(score(RuntimeConfig { max_num_batched_tokens: 7, ..config() }), whole);
    let rig = Rig::new(config(), 32);
    let single = rig.submit(Request { scoring: Some(Scoring::all(2)), ..request(&[1], 0) }).answer();
    assert_eq!(single.scores, Some(Scores { prompt: vec![None], next: vec![] }));
}

#[test]
fn scores_that_begin_late_or_go_past_the_prompt_are_those_of_the_longer_prompt() {
    let prompt = prompt(4, 60);
    let rig = Rig::new(config(), 32);
    let score = |prompt: &[u32], scoring: Scoring| {
        let answer = rig.submit(Request { scoring: Some(scoring), ..request(prompt, 0) }).answer();
        answer.scores.expect("they were asked for")
    };
    let whole = score(&prompt, Scoring::all(1)).prompt;
    // The prefix is in the cache by now, and gives the same.
    let late = score(&prompt[..55], Scoring { from: 40, top: 1, next: vec![prompt[55]] });
    assert_eq!(late.prompt[..40], vec![None; 40]);
    assert_eq!((&late.prompt[40..], &late.next[..]), (&whole[40..55], &[whole[55].clone().unwrap()][..]));
    let next = score(&prompt[..20], Scoring { from: 20, top: 0, next: (0..64).collect() }).next;
    let sum: f32 = next.iter().map(|one| one.logprob.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-4, "all tokens together: {sum}");
    let unknown = Scoring { next: vec![64], ..Scoring::default() };
    let refused = rig.runtime.handle().submit(Request { scoring: Some(unknown), ..request(&prompt, 0) }, drop);
    assert_eq!(refused.expect_err("refused"), SubmitError::UnknownToken { token: 64, vocab_size: 64 });
}

#[test]
fn logprobs_come_with_each_token_if_asked_for() {
    let rig = Rig::new(config(), 32);
    let answer = rig.submit(Request { logprobs: Some(3), ..request(&prompt(4, 6), 5) }).answer();
    assert_eq!(answer.logprobs.len(), 5);
    for (token, logprobs) in answer.tokens[0].iter().zip(answer.logprobs) {
        let logprobs = logprobs.expect("they were asked for");
        assert_eq!((logprobs.rank, logprobs.top.len(), logprobs.top[0]), (1, 3, (*token, logprobs.logprob)));
    }
}

#[test]
fn what_cannot_be_served_is_refused() {
    let rig = Rig::new(config(), 32);
    let refused = |request: Request| rig.runtime.handle().submit(request, drop).expect_err("refused");
    assert_eq!(refused(request(&[], 1)), SubmitError::EmptyPrompt);
    let unknown = SubmitError::UnknownToken { token: 64, vocab_size: VOCAB };
    assert_eq!(refused(request(&[1, 64], 1)), unknown);
    let banned = SamplingParams { bad_words: vec![vec![3], vec![3, 64]], ..SamplingParams::default() };
    assert_eq!(refused(Request { sampling: banned, ..request(&[1], 1) }), unknown);
    let biased = SamplingParams { logit_bias: [(64, 1.0)].into(), ..SamplingParams::default() };
    assert_eq!(refused(Request { sampling: biased, ..request(&[1], 1) }), unknown);
    let long = SubmitError::ContextLength { max_model_len: 512, prompt_tokens: 500, max_tokens: 13 };
    assert_eq!(refused(request(&prompt(1, 500), 13)), long);
    assert_eq!(rig.submit(request(&prompt(1, 500), 12)).answer().tokens[0].len(), 12);
    let nothing = rig.submit(Request { n: 0, ..request(&[1], 1) }).answer();
    assert_eq!((nothing.cached_tokens, nothing.failed), (None, None));
}

#[test]
fn a_runtime_must_fit_model_and_cache() {
    let start = |config: RuntimeConfig, blocks: usize| {
        let (model, _gate) = fake::Fake::new(blocks);
        let kv = KvCache::new(1, 1, 16, blocks, crate::kv::KvDtype::F32).expect("memory");
        Runtime::start(Box::new(model), kv, Compute::new(1), config, |_| {}).expect_err("an error").to_string()
    };
    let text = start(RuntimeConfig { max_model_len: 5000, ..config() }, 400);
    assert_eq!(text, "max_model_len is 5000, but the model's positions end at 4096");
    assert!(start(config(), 31).contains("takes 32 KV blocks"));
}

/// One request that decodes, one in prefill and one in the queue, at a step that waits for its permit.
fn three_phases() -> (Rig, [Call; 3]) {
    let rig = Rig::gated(RuntimeConfig { max_num_seqs: 2, max_num_batched_tokens: 8, ..config() }, 32);
    let decoding = rig.submit(request(&prompt(1, 4), 100)).started();
    let prefilling = rig.submit(request(&prompt(2, 60), 100));
    let queued = rig.submit(request(&prompt(3, 4), 5));
    rig.reached();
    assert_eq!(rig.permit().running, 1);
    rig.reached();
    let prefilling = prefilling.started();
    let report = rig.permit();
    assert_eq!((report.running, report.waiting, report.scheduled_tokens, report.prompt_tokens), (2, 1, 8, 7));
    rig.reached();
    (rig, [decoding, prefilling, queued])
}

#[test]
fn a_dropped_ticket_cancels_by_the_next_step_in_every_phase() {
    let (rig, calls) = three_phases();
    calls.into_iter().for_each(|call| drop(call.ticket));
    let last = rig.permit();
    assert_eq!((last.running, last.scheduled_tokens), (2, 8), "the step under way is carried through");
    let idle = rig.reports.recv_timeout(LONG).expect("a report that says that it is idle");
    assert_eq!(idle.cancelled, Cancelled { queue: 1, prefill: 1, decode: 1 });
    assert_eq!((idle.running, idle.waiting, idle.kv_blocks_used, idle.scheduled_tokens), (0, 0, 0, 0));
    assert_eq!((idle.kv_blocks_total, idle.step_seconds), (32, 0.0));
}

#[test]
fn cancelling_one_leaves_the_others() {
    for cancelled in 0..3 {
        let (mut rig, calls) = three_phases();
        let mut calls: Vec<_> = calls.into_iter().collect();
        drop(calls.remove(cancelled).ticket);
        rig.open();
        let tokens: Vec<_> = calls.into_iter().map(|call| call.answer().tokens.remove(0)).collect();
        let mut expected = vec![greedy(&prompt(1, 4), 100), greedy(&prompt(2, 60), 100), greedy(&prompt(3, 4), 5)];
        expected.remove(cancelled);
        assert_eq!(tokens, expected);
        let totals = rig.totals();
        let counts = [totals.cancelled.decode, totals.cancelled.prefill, totals.cancelled.queue];
        assert_eq!((counts[cancelled], counts.iter().sum::<usize>()), (1, 1));
    }
}

#[test]
fn a_choice_that_its_caller_ends_is_finished_not_cancelled() {
    let (mut rig, [ended, kept, queued]) = three_phases();
    ended.ticket.end_choice(0);
    rig.open();
    let answer = ended.answer();
    assert!(answer.tokens[0].len() < 5 && answer.reasons == [None], "{answer:?}");
    assert_eq!(kept.answer().tokens, [greedy(&prompt(2, 60), 100)]);
    assert_eq!(queued.answer().tokens, [greedy(&prompt(3, 4), 5)]);
    let totals = rig.totals();
    assert_eq!((totals.cancelled, totals.kv_blocks_used), (Cancelled::default(), 0));
}

#[test]
fn the_other_choices_go_on_when_one_is_ended() {
    let mut rig = Rig::gated(config(), 32);
    let call = rig.submit(Request { n: 3, ..request(&prompt(1, 40), 50) });
    rig.reached();
    call.ticket.end_choice(0);
    rig.open();
    let answer = call.answer();
    assert_eq!(answer.reasons, [None, Some(FinishReason::Length), Some(FinishReason::Length)]);
    let expected = greedy(&prompt(1, 40), 50);
    assert_eq!(answer.tokens[1..], [expected.clone(), expected]);
}

#[test]
fn an_idle_runtime_reports_nothing_and_wakes_for_a_request() {
    let rig = Rig::new(config(), 32);
    rig.submit(request(&prompt(1, 5), 3)).answer();
    while rig.reports.recv_timeout(Duration::from_millis(50)).is_ok() {}
    assert_eq!(rig.reports.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
    assert_eq!(rig.submit(request(&prompt(1, 5), 3)).answer().tokens[0].len(), 3);
}

#[test]
fn a_new_request_joins_at_the_next_step() {
    let rig = Rig::gated(config(), 32);
    let _first = rig.submit(request(&prompt(1, 4), 100)).started();
    let second = rig.submit(request(&prompt(2, 9), 100));
    assert_eq!(rig.permit().scheduled_tokens, 4);
    let _second = second.started();
    assert_eq!(rig.permit().scheduled_tokens, 1 + 9);
}
