use std::{ops::ControlFlow, sync::Arc};

use cadre_kernels::{isa::Isa, pool::Pool};
use proptest::prelude::*;

use super::*;
use crate::{
    request::TokenLogprobs,
    runtime::tests::fake::{Fake, POISONS, UNREADABLE, logits},
    sampler::Sampler,
};

const LAYERS: usize = 2;

fn lane(chunk_rows: usize) -> LayerMajor {
    // The blocks are the lane's own affair: there are as many as it could name.
    let (model, _) = Fake::new(4096);
    let compute = Compute { pool: Arc::new(Pool::new(2)), isa: Isa::Portable };
    LayerMajor::new(
        Box::new(model),
        compute,
        LayerMajorConfig { chunk_rows, max_model_len: 512, kv_dtype: KvDtype::F32 },
    )
}

fn passage(tokens: Vec<u32>, from: u32, next: Vec<u32>) -> Passage {
    Passage { tokens, scoring: Scoring { from, top: 1, next }, adapter: None }
}

/// What must come out, each passage by itself.
fn expected(passage: &Passage) -> Scores {
    let mut sampler = Sampler::new(Isa::Portable);
    let Passage { tokens, scoring, .. } = passage;
    let mut score = |before: &[u32], token| sampler.score(&logits(before), token, scoring.top).expect("finite logits");
    let prompt = (0..tokens.len())
        .map(|at| (at > 0 && at >= scoring.from as usize).then(|| score(&tokens[..at], tokens[at])))
        .collect();
    Scores { prompt, next: scoring.next.iter().map(|&token| score(tokens, token)).collect() }
}

fn go_on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Texts that often begin alike, over few tokens.
fn passages() -> impl Strategy<Value = Vec<Passage>> {
    let stem = (0_u32..3, 1_usize..90, prop::collection::vec(0_u32..4, 0..40)).prop_map(|(kind, length, end)| {
        let mut tokens: Vec<u32> = (0..length as u32).map(|at| (at * 7 + if at < 35 { 0 } else { kind }) % 5).collect();
        tokens.extend(end);
        tokens
    });
    let one = (stem, 0_u32..100, prop::collection::vec(0_u32..50, 0..3));
    prop::collection::vec(one.prop_map(|(tokens, from, next)| passage(tokens, from, next)), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is shared, cut into chunks or waits in a file: each passage's scores are those that it has alone.
    #[test]
    fn each_passage_gets_its_own_scores(passages in passages(), chunk_rows in 1_usize..60, spills in any::<bool>()) {
        let spill = spills.then(|| tempfile::tempfile().expect("a file"));
        let scores = lane(chunk_rows).score(&passages, spill, go_on).expect("it works").expect("nobody stops it");
        prop_assert_eq!(scores.len(), passages.len());
        for (passage, scores) in passages.iter().zip(scores) {
            prop_assert_eq!(scores.expect("finite"), expected(passage));
        }
    }

    /// What the caller counts is enough for what is laid out, and no more blocks are in use than were told of.
    #[test]
    fn rows_and_blocks_stay_within_what_was_told(passages in passages(), chunk_rows in 1_usize..60) {
        let config = lane(chunk_rows).config;
        let rows = Rows::new(&passages, config.chunk_rows, config.chunk_blocks());
        let befores = std::iter::once(None).chain(passages.iter().map(Some));
        let counted: usize = passages.iter().zip(befores).map(|(passage, before)| rows_after(before, passage)).sum();
        prop_assert!(rows.len() <= counted, "{} rows, {counted} counted", rows.len());
        prop_assert!(rows.num_blocks <= blocks_for(config.max_model_len) + 2 * config.chunk_blocks());
        prop_assert!(rows.chunks.iter().all(|chunk| !chunk.rows.is_empty() && chunk.rows.len() <= chunk_rows));
        let ends = rows.chunks.iter().map(|chunk| chunk.rows.end);
        let starts = rows.chunks.iter().skip(1).map(|chunk| chunk.rows.start).chain([rows.len()]);
        prop_assert!(ends.eq(starts.take(rows.chunks.len())));
    }
}

#[test]
fn what_passages_begin_with_is_computed_once() {
    let stem: Vec<u32> = (0..160).map(|at| at % 50).collect();
    let choices = (0..4).map(|choice| passage([&stem[..], &[50 + choice, 1]].concat(), 160, vec![]));
    let rows = Rows::new(&choices.collect::<Vec<_>>(), 1000, 250);
    assert_eq!(rows.len(), 160 + 4, "the prompt, and the first token of each choice");
    let labels = [passage(stem.clone(), 160, vec![1, 2]), passage(stem[..90].to_vec(), 0, vec![])];
    assert_eq!(Rows::new(&labels, 1000, 250).len(), 160, "one is the beginning of the other");
}

#[test]
fn in_turn_a_beginning_comes_before_those_that_need_it() {
    let stem = |length: u32| (0..length).map(|at| at % 50).collect::<Vec<_>>();
    let with = |length, end: &[u32]| passage([&stem(length)[..], end].concat(), 1, vec![1]);
    // Two choices of one prompt, two of another one that begins alike, and a stranger.
    let passages = [
        with(64, &[50, 1]),
        with(64, &[51, 1]),
        with(32, &[52; 40]),
        with(32, &[52; 41]),
        passage(vec![63; 40], 1, vec![]),
    ];
    let turns = in_turn(&passages);
    let needs = |index: usize| turns.iter().find(|turn| turn.0 == index).expect("each has a turn").1;
    assert_eq!((needs(4), needs(3), needs(2)), (None, None, Some(3)), "{turns:?}");
    assert_eq!((needs(1), needs(0)), (Some(3), Some(1)), "the first blocks are 3's, the others 1's: {turns:?}");
    let place = |index: usize| turns.iter().position(|turn| turn.0 == index);
    assert!(turns.iter().all(|(index, needs)| needs.is_none_or(|needs| place(needs) < place(*index))));
}

#[test]
fn logits_that_are_not_finite_are_their_own_passage_s_error() {
    let passages =
        [passage(vec![1, 2, 3], 0, vec![]), passage(vec![1, POISONS, 3], 0, vec![]), passage(vec![4, 5], 0, vec![])];
    let scores = lane(8).score(&passages, None, go_on).expect("it works").expect("nobody stops it");
    assert!(matches!(&scores[1], Err(SampleError::NotFinite { .. })), "{scores:?}");
    for at in [0, 2] {
        assert_eq!(scores[at].as_ref().ok(), Some(&expected(&passages[at])));
    }
}

#[test]
fn it_can_be_stopped_and_an_expert_that_can_not_be_read_is_an_error() {
    let passages = [passage((0..40).collect(), 0, vec![])];
    let mut seen = Vec::new();
    let stopped = lane(16).score(&passages, None, |progress| {
        seen.push((progress.done, progress.total));
        if seen.len() == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(stopped.expect("it works").is_none());
    assert_eq!(seen, [(16, 39 * LAYERS), (32, 39 * LAYERS)]);
    let unreadable = [passage(vec![1, UNREADABLE, 2], 0, vec![])];
    assert!(matches!(lane(16).score(&unreadable, None, go_on), Err(Error::Fetch { .. })));
}

#[test]
fn a_full_disk_is_an_error_that_says_so() {
    let full = File::options().write(true).read(true).open("/dev/full").expect("Linux has it");
    let error = lane(16).score(&[passage((0..40).collect(), 0, vec![])], Some(full), go_on).expect_err("it is full");
    assert!(error.to_string().contains("free some disk"), "{error}");
}

#[test]
fn a_score_is_a_logarithm_of_a_probability() {
    let every: Vec<u32> = (0..64).collect();
    let scores = lane(4).score(&[passage(vec![3, 1], 1, every)], None, go_on).expect("it works");
    let next = scores.expect("nobody stops it").remove(0).expect("finite").next;
    let sum: f32 = next.iter().map(|TokenLogprobs { logprob, .. }| logprob.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-4, "{sum}");
}
