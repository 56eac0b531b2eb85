//! Steps, sinks and observers that fail, and shutting down.

use super::{
    fake::{FAILS, Fake, PANICS, POISONS, UNREADABLE},
    *,
};
use crate::{
    experts::ExpertId,
    kv::KvDtype,
    request::{RequestError, Scoring},
};

/// A failing step with one request beside the culprit, and one in the queue.
fn fail_a_step(culprit: u32, expected: &str) {
    let mut rig = Rig::gated(RuntimeConfig { max_num_seqs: 2, ..config() }, 32);
    let cached = rig.submit(request(&prompt(1, 40), 1)).started();
    rig.permit();
    cached.answer();
    let running = rig.submit(request(&prompt(1, 40), 100)).started();
    let failing = rig.submit(Request { n: 2, ..request(&[3, culprit, 4], 100) });
    let waiting = rig.submit(request(&prompt(2, 30), 20));
    let more_waiting = rig.submit(request(&prompt(1, 40), 20));
    rig.open();
    for call in [running, failing] {
        assert_eq!(call.answer().failed, Some(RequestError::Internal(expected.to_owned())));
    }
    let [waiting, more_waiting] = [waiting, more_waiting].map(Call::answer);
    assert_eq!(waiting.tokens, [greedy(&prompt(2, 30), 20)]);
    assert_eq!((more_waiting.tokens, more_waiting.cached_tokens), (vec![greedy(&prompt(1, 40), 20)], Some(0)));
    let totals = rig.totals();
    assert_eq!((totals.failed, totals.running, totals.waiting, totals.kv_blocks_used), (2, 0, 0, 0));
}

#[test]
fn a_panic_in_a_step_fails_what_ran_and_nothing_else() {
    fail_a_step(PANICS, "panic: the fake model panics");
}

#[test]
fn an_error_in_a_step_fails_what_ran_and_nothing_else() {
    fail_a_step(FAILS, "the fake model fails");
}

#[test]
fn an_expert_that_cannot_be_read_fails_those_who_need_it_only() {
    let mut rig = Rig::gated(RuntimeConfig { max_num_batched_tokens: 128, ..config() }, 32);
    let running = rig.submit(request(&prompt(1, 40), 60)).started();
    let failing = rig.submit(Request { n: 2, ..request(&[3, UNREADABLE, 4], 60) });
    let beside = rig.submit(request(&prompt(2, 30), 60));
    let also_failing = rig.submit(request(&[&prompt(1, 16)[..], &[UNREADABLE]].concat(), 60));
    rig.open();
    let unreadable = Some(RequestError::Weights(ExpertId { layer: 2, expert: 5 }));
    for call in [failing, also_failing] {
        assert_eq!(call.answer().failed, unreadable);
    }
    assert_eq!(running.answer().tokens, [greedy(&prompt(1, 40), 60)]);
    assert_eq!(beside.answer().tokens, [greedy(&prompt(2, 30), 60)]);
    let totals = rig.totals();
    assert_eq!((totals.failed, totals.running, totals.waiting, totals.kv_blocks_used), (2, 0, 0, 0));
}

#[test]
fn logits_that_are_not_finite_fail_their_own_request() {
    let rig = Rig::new(config(), 32);
    let good = rig.submit(request(&prompt(1, 40), 60));
    let bad = rig.submit(Request { n: 2, ..request(&[&prompt(2, 40)[..], &[POISONS]].concat(), 60) });
    let scored = rig.submit(Request { scoring: Some(Scoring::all(0)), ..request(&[POISONS, 1, 2], 60) });
    for call in [bad, scored] {
        let Some(RequestError::Internal(message)) = call.answer().failed else { panic!("it must fail") };
        assert!(message.starts_with("the logit of token 0 is NaN"), "{message}");
    }
    assert_eq!(good.answer().tokens, [greedy(&prompt(1, 40), 60)]);
    assert_eq!(rig.submit(request(&prompt(2, 40), 9)).answer().tokens, [greedy(&prompt(2, 40), 9)]);
    let totals = rig.totals();
    assert_eq!((totals.failed, totals.kv_blocks_used), (2, 0));
}

#[test]
fn constraints_that_leave_no_token_fail_their_own_request() {
    let rig = Rig::new(config(), 32);
    let sampling =
        SamplingParams { allowed_token_ids: Some(vec![5]), bad_words: vec![vec![5, 5]], ..SamplingParams::default() };
    let answer = rig.submit(Request { sampling, ..request(&prompt(1, 4), 9) }).answer();
    assert_eq!(answer.tokens, [[5]]);
    assert!(
        matches!(answer.failed, Some(RequestError::NothingAllowed(text)) if text.contains("leave none of the 64 tokens"))
    );
}

#[test]
fn a_panicking_sink_cancels_its_request_only() {
    let rig = Rig::new(config(), 32);
    let handle = rig.runtime.handle();
    let _tickets: Vec<_> = (0..4)
        .map(|last| {
            let mut events = 0;
            let sink = move |_| {
                events += 1;
                assert!(events <= last, "the sink panics");
            };
            handle.submit(Request { n: 2, ..request(&prompt(1, 20), 50) }, sink).expect("a valid request")
        })
        .collect();
    assert_eq!(rig.submit(request(&prompt(1, 40), 60)).answer().tokens, [greedy(&prompt(1, 40), 60)]);
    let totals = rig.totals();
    let cancelled = totals.cancelled;
    assert_eq!((cancelled.queue + cancelled.prefill + cancelled.decode, totals.kv_blocks_used), (4, 0));
}

#[test]
fn a_panicking_observer_changes_nothing() {
    let (model, gate) = Fake::new(32);
    drop(gate);
    let kv = KvCache::new(1, 1, 16, 32, KvDtype::F32).expect("memory");
    let observer = |_: &StepReport| panic!("the observer panics");
    let runtime = Runtime::start(Box::new(model), kv, Compute::new(1), config(), observer).expect("a runtime");
    assert_eq!(Call::new(&runtime.handle(), request(&[1], 9)).answer().tokens, [greedy(&[1], 9)]);
    runtime.shutdown(LONG);
}

#[test]
fn shutting_down_drains_what_is_under_way_and_refuses_what_is_new() {
    let Rig { runtime, reports: _reports, .. } = Rig::new(RuntimeConfig { max_num_seqs: 2, ..config() }, 32);
    let handle = runtime.handle();
    let calls: Vec<_> = (0..5).map(|seed| Call::new(&handle, request(&prompt(seed, 30), 100))).collect();
    runtime.shutdown(LONG);
    for (seed, call) in calls.into_iter().enumerate() {
        assert_eq!(call.answer().tokens, [greedy(&prompt(seed as u32, 30), 100)]);
    }
    assert_eq!(handle.submit(request(&[1], 1), drop).expect_err("refused"), SubmitError::ShuttingDown);
}

#[test]
fn at_the_deadline_the_rest_is_told() {
    let (rig, calls) = three_phases();
    let Rig { runtime, gate, reports } = rig;
    // The step under way ends only after the deadline; the model would go on for hundreds of steps.
    let gate = gate.expect("gated");
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        gate.permits.send(()).expect("the model lives");
        gate
    });
    runtime.shutdown(Duration::from_millis(20));
    for call in calls {
        assert_eq!(call.answer().failed, Some(RequestError::ShuttingDown));
    }
    let last = reports.try_iter().last().expect("a report");
    assert_eq!((last.failed, last.running, last.waiting, last.kv_blocks_used), (3, 0, 0, 0));
    drop(late.join().expect("it only waits"));
}

#[test]
fn a_dropped_runtime_ends_at_once() {
    let Rig { runtime, .. } = Rig::new(config(), 32);
    let call = Call::new(&runtime.handle(), request(&prompt(1, 30), 480)).started();
    drop(runtime);
    let answer = call.answer();
    assert!(answer.failed == Some(RequestError::ShuttingDown) || answer.tokens[0].len() == 480, "{answer:?}");
}
