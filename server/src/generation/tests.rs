use std::sync::atomic::Ordering;

use cadre_engine::{
    request::{Priority, SamplingParams, StopParams},
    runtime::StepReport,
};

use super::*;
use crate::{
    metrics::exporter,
    testing::{END, Fake, machine, say, token},
};

fn request(n: u32) -> Request {
    Request {
        prompt: vec![1, 2, 3],
        n,
        sampling: SamplingParams::default(),
        stop: StopParams {
            max_tokens: 100,
            min_tokens: 0,
            eos_token_ids: vec![END],
            ignore_eos: false,
            stop_token_ids: vec![u32::from(b'!')],
        },
        logprobs: None,
        scoring: None,
        routed_experts_from: None,
        adapter: None,
        priority: Priority::Interactive,
    }
}

fn stopping_at(stop: &[&str]) -> OutputOptions {
    OutputOptions { stop: stop.iter().map(|&text| text.to_owned()).collect(), ..OutputOptions::default() }
}

fn start(fake: &Arc<Fake>, request: Request, options: OutputOptions) -> Generation {
    Generation::start(&machine(fake.clone()), vec![request], options).unwrap()
}

async fn deltas(generation: &mut Generation) -> Vec<Delta> {
    let mut deltas = Vec::new();
    while let Some(update) = generation.next().await.unwrap() {
        if let Update::Delta(delta) = update {
            deltas.push(delta);
        }
    }
    deltas
}

#[tokio::test]
async fn text_comes_in_whole_characters_and_ends_without_the_end_token() {
    let fake = Fake::saying("né🙂");
    let mut generation = start(&fake, request(1), OutputOptions::default());
    let texts: Vec<String> = deltas(&mut generation).await.into_iter().map(|delta| delta.text).collect();
    assert_eq!(texts, ["n", "é", "🙂", ""]);
    assert_eq!(generation.usage(), Usage { prompt_tokens: 3, completion_tokens: 8, cached_tokens: 1 });
}

#[tokio::test]
async fn tokens_wait_for_the_text_that_they_are_part_of() {
    let fake = Fake::saying("é");
    let mut generation = start(&fake, request(1), OutputOptions::default());
    let deltas = deltas(&mut generation).await;
    let ids = |delta: &Delta| delta.tokens.iter().map(|token| token.id).collect::<Vec<_>>();
    assert_eq!(ids(&deltas[0]), [0xC3, 0xA9]);
    assert_eq!(ids(&deltas[1]), [END]);
}

#[tokio::test]
async fn a_stop_string_over_token_borders_ends_the_choice_and_the_request() {
    let fake = Fake::saying("one two three");
    let mut generation = start(&fake, request(1), stopping_at(&["tw", "o t"]));
    let completed = generation.collect().await.unwrap();
    assert_eq!(completed.choices[0].text, "one ");
    assert_eq!(completed.choices[0].finish, Some(Finish::StopString("tw".to_owned())));
    assert_eq!(generation.usage().completion_tokens, 6);
    assert_eq!(fake.wanted.load(Ordering::SeqCst), 0, "the ticket is dropped");
}

#[tokio::test]
async fn text_that_looked_like_a_stop_string_comes_out_at_the_end() {
    let fake = Fake::saying("a <en");
    let mut generation = start(&fake, request(1), stopping_at(&["<end>"]));
    let completed = generation.collect().await.unwrap();
    assert_eq!(completed.choices[0].text, "a <en");
    assert_eq!(completed.choices[0].finish, Some(Finish::EndOfSequence));
}

#[tokio::test]
async fn stop_strings_before_min_tokens_pass() {
    let fake = Fake::saying("xxaxx");
    let mut request = request(1);
    request.stop.min_tokens = 4;
    let mut generation = start(&fake, request, stopping_at(&["x"]));
    let completed = generation.collect().await.unwrap();
    assert_eq!(completed.choices[0].text, "xxa");
}

#[tokio::test]
async fn a_stop_tokens_text_is_kept_only_when_asked_for() {
    for (include_stop, text) in [(false, "hi"), (true, "hi!")] {
        let fake = Fake::new(|request| {
            let mut events: Vec<Event> = b"hi!".iter().map(|&byte| token(request, 0, byte.into())).collect();
            events.push(Event::Finished { choice: 0, reason: FinishReason::StopToken(u32::from(b'!')) });
            events
        });
        let options = OutputOptions { include_stop, ..OutputOptions::default() };
        let completed = start(&fake, request(1), options).collect().await.unwrap();
        assert_eq!(completed.choices[0].text, text);
        assert_eq!(completed.choices[0].tokens.len(), 3);
    }
}

#[tokio::test]
async fn an_ignored_end_token_is_text_if_special_tokens_are() {
    let fake = Fake::new(|request| {
        let mut events = vec![token(request, 0, u32::from(b'a')), token(request, 0, END)];
        events.push(Event::Finished { choice: 0, reason: FinishReason::Length });
        events
    });
    let mut request = request(1);
    request.stop.ignore_eos = true;
    let options = OutputOptions { skip_special_tokens: false, ..OutputOptions::default() };
    let completed = start(&fake, request, options).collect().await.unwrap();
    assert_eq!(completed.choices[0].text, "a<|end|>");
}

#[tokio::test]
async fn an_incomplete_character_at_the_end_is_replaced() {
    let fake =
        Fake::new(|request| vec![token(request, 0, 0xC3), Event::Finished { choice: 0, reason: FinishReason::Length }]);
    let completed = start(&fake, request(1), OutputOptions::default()).collect().await.unwrap();
    assert_eq!(completed.choices[0].text, "\u{FFFD}");
}

#[tokio::test]
async fn choices_end_one_by_one_and_the_ticket_goes_with_the_last() {
    let fake = Fake::new(|_| Vec::new());
    let mut generation = start(&fake, request(2), stopping_at(&["b"]));
    let told = fake.last_request();
    fake.tell(0, token(&told, 0, u32::from(b'b')));
    fake.tell(0, token(&told, 0, u32::from(b'c')));
    fake.tell(0, token(&told, 1, u32::from(b'd')));
    let Some(Update::Delta(first)) = generation.next().await.unwrap() else { panic!("no delta") };
    assert_eq!((first.choice, first.finish), (0, Some(Finish::StopString("b".to_owned()))));
    let Some(Update::Delta(second)) = generation.next().await.unwrap() else { panic!("no delta") };
    assert_eq!((second.choice, second.text.as_str()), (1, "d"), "what follows a stop string is not told");
    assert_eq!(fake.wanted.load(Ordering::SeqCst), 1);
    fake.tell(0, Event::Finished { choice: 1, reason: FinishReason::Length });
    generation.next().await.unwrap();
    assert_eq!(generation.next().await.unwrap(), None);
    assert_eq!(fake.wanted.load(Ordering::SeqCst), 0);
    assert_eq!(generation.usage().completion_tokens, 2);
}

#[tokio::test]
async fn several_prompts_number_their_choices_through() {
    let fake = Fake::new(|request| say(request, if request.prompt == [9] { "nine" } else { "other" }));
    let requests = [vec![1], vec![9]].map(|prompt| Request { prompt, ..request(2) });
    let mut generation = Generation::start(&machine(fake.clone()), requests.into(), OutputOptions::default()).unwrap();
    let completed = generation.collect().await.unwrap();
    let texts: Vec<&str> = completed.choices.iter().map(|choice| choice.text.as_str()).collect();
    assert_eq!(texts, ["other", "other", "nine", "nine"]);
}

#[tokio::test]
async fn a_request_that_is_not_taken_takes_the_others_back() {
    let fake = Fake::saying("x");
    let requests = vec![request(1), Request { prompt: Vec::new(), ..request(1) }];
    let refused = Generation::start(&machine(fake.clone()), requests, OutputOptions::default());
    assert!(matches!(refused, Err(SubmitError::EmptyPrompt)));
    assert_eq!(fake.wanted.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn dropping_cancels() {
    let fake = Fake::new(|_| Vec::new());
    let generation = start(&fake, request(1), OutputOptions::default());
    assert_eq!(fake.wanted.load(Ordering::SeqCst), 1);
    drop(generation);
    assert_eq!(fake.wanted.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn failures_and_silence_are_errors() {
    let fake = Fake::new(|_| vec![Event::Failed(RequestError::ShuttingDown)]);
    let error = start(&fake, request(1), OutputOptions::default()).next().await.unwrap_err();
    assert!(matches!(error, GenerationError::Request(RequestError::ShuttingDown)));

    let fake = Fake::new(|_| Vec::new());
    let mut generation = start(&fake, request(1), OutputOptions::default());
    fake.hang_up(0);
    let error = generation.next().await.unwrap_err();
    assert!(matches!(error, GenerationError::Request(RequestError::Internal(_))));
}

/// The last report on a short request can come before the engine's queue has given its ticket away.
#[test]
fn nothing_waits_when_all_has_been_reported() {
    let recorder = exporter().unwrap().build_recorder();
    let waiting =
        || recorder.handle().render().contains("vllm:num_requests_waiting{model_name=\"fake\",engine=\"0\"} 1");
    let meters = metrics::with_local_recorder(&recorder, || Arc::new(Meters::new("fake")));
    let engines = meters.clone();
    let quick = Fake::new(move |request| {
        engines.step(&StepReport::default());
        say(request, "x")
    });
    for (fake, prompt, waits) in
        [(Fake::saying("x"), vec![1], true), (quick, vec![1], false), (Fake::saying("x"), Vec::new(), false)]
    {
        meters.step(&StepReport::default());
        let machine = Machine { meters: meters.clone(), ..machine(fake) };
        let _generation = Generation::start(&machine, vec![Request { prompt, ..request(1) }], OutputOptions::default());
        assert_eq!(waiting(), waits);
    }
}
