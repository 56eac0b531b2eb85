//! What `/score` and `/rerank` share: pairs of texts to prompts, and prompts to the scores of their label tokens.

use std::sync::Arc;

use cadre_engine::{
    request::{Priority, Request, Scoring, SubmitError},
    score::{Passage, in_turn},
};
use serde_json::{Map, Value};

use super::{
    App,
    error::{ApiError, Kind, sentence},
    fields::{Fields, wrong},
    messages::required,
};
use crate::{
    engine::Served,
    generation::{Generation, OutputOptions, Usage},
    score::pairs::{PairError, ScoreOptions, score},
};

/// The most pairs of a request.
const MAX_PAIRS: usize = 4096;

/// A prompt, and the field that it is made of.
pub struct Asked {
    /// Token ids; a label follows them.
    pub prompt: Vec<u32>,
    /// The path of its part that is another one in each pair.
    pub path: String,
}

/// Scores to be told, checked and tokenised.
pub struct Prepared {
    served: Arc<Served>,
    passages: Vec<Passage>,
    options: ScoreOptions,
}

impl Prepared {
    /// Of these prompts.
    ///
    /// # Errors
    /// When there are too many, one is too long, or the labels are none.
    pub fn new(served: &Arc<Served>, fields: Fields<'_>, asked: Vec<Asked>) -> Result<Self, ApiError> {
        let options = ScoreOptions {
            softmax: fields.boolean("apply_softmax")?.unwrap_or(true),
            activation: fields.boolean("use_activation")?.unwrap_or(true),
        };
        let labels = labels(served, fields, options)?;
        let passage = |Asked { prompt, path }: Asked| {
            let scoring = Scoring { from: prompt.len() as u32, top: 0, next: labels.clone() };
            match prompt.len() {
                0 => Err(ApiError::invalid(path, "The prompt has no token: nothing precedes a label.")),
                length if length > served.max_model_len => {
                    let error = SubmitError::ContextLength {
                        max_model_len: served.max_model_len,
                        prompt_tokens: length,
                        max_tokens: 0,
                    };
                    Err(ApiError::from(error).or_param(&path))
                }
                _ => Ok(Passage { tokens: prompt, scoring, adapter: served.adapter.clone() }),
            }
        };
        let passages = asked.into_iter().map(passage).collect::<Result<_, _>>()?;
        Ok(Self { served: served.clone(), passages, options })
    }

    /// The name that the answer carries.
    pub fn model(&self) -> &str {
        self.served.name()
    }

    /// The scores, and the tokens that they took. What prompts begin with is computed once.
    ///
    /// # Errors
    /// When the engine fails or the server ends.
    pub async fn score(self, app: &App, priority: Priority) -> Result<(Vec<f64>, Usage), ApiError> {
        let Self { served, passages, options } = self;
        let turns = in_turn(&passages);
        let mut scores = vec![0.0; passages.len()];
        let mut used = Usage::default();
        for first in [true, false] {
            let places: Vec<usize> =
                turns.iter().filter(|(_, needs)| needs.is_none() == first).map(|(place, _)| *place).collect();
            let requests: Vec<Request> =
                places.iter().map(|&place| Request { priority, ..passages[place].clone().request() }).collect();
            let mut generation = Generation::start(&served.machine(), requests, OutputOptions::default())?;
            let completed = app.unless_closing(generation.collect()).await?;
            for (place, told) in places.into_iter().zip(completed.scores) {
                let told = told.ok_or_else(|| ApiError::internal("a passage has no scores"))?;
                let logprobs: Vec<f64> = told.next.iter().map(|label| f64::from(label.logprob)).collect();
                scores[place] = score(&logprobs, options);
            }
            used += generation.usage();
        }
        Ok((scores, used))
    }
}

/// The labels that the request names, else the server's.
fn labels(served: &Served, fields: Fields<'_>, options: ScoreOptions) -> Result<Vec<u32>, ApiError> {
    const NAME: &str = "label_token_ids";
    let Some(asked) = fields.token_ids(NAME, served.vocab_size)? else {
        let none = |reason| {
            ApiError::invalid(NAME, format!("`{NAME}` is required: {reason}, and no --score-labels names others."))
        };
        return served.pairs.labels().map(<[u32]>::to_vec).map_err(none);
    };
    let least = if options.softmax { 2 } else { 1 };
    if asked.len() < least {
        let message = format!(
            "`{NAME}` must hold at least {least} tokens, got {}: the first is held against the others.",
            asked.len()
        );
        return Err(ApiError::invalid(NAME, message));
    }
    match asked.iter().enumerate().find(|(place, label)| asked[..*place].contains(label)) {
        Some((_, label)) => Err(ApiError::invalid(NAME, format!("`{NAME}` names token {label} twice."))),
        None => Ok(asked),
    }
}

/// Renders pairs.
pub struct Asking<'a> {
    served: &'a Served,
    kwargs: Map<String, Value>,
}

impl<'a> Asking<'a> {
    /// As the request wants it.
    ///
    /// # Errors
    /// When its variables for the template are none.
    pub fn new(served: &'a Served, fields: Fields<'_>) -> Result<Self, ApiError> {
        Ok(Self { served, kwargs: fields.object("chat_template_kwargs")?.cloned().unwrap_or_default() })
    }

    /// The prompt of a pair; the document lies at `path`.
    ///
    /// # Errors
    /// When the model has no template, or it refuses.
    pub fn ask(&self, query: &str, document: &str, path: String) -> Result<Asked, ApiError> {
        let text = self.served.pairs.prompt(query, document, self.kwargs.clone()).map_err(|error| match error {
            PairError::Template(error) if !error.is_callers_mistake() => ApiError::internal(error),
            refused => ApiError::new(Kind::InvalidRequest, sentence(&refused.to_string())),
        })?;
        let prompt = self.served.tokenizer.encode(&text, false).map_err(ApiError::internal)?;
        Ok(Asked { prompt, path })
    }
}

/// The field's texts; one string stands for a list of one.
///
/// # Errors
/// When it is absent, empty or something else.
pub fn texts<'a>(fields: Fields<'a>, name: &str) -> Result<Vec<&'a str>, ApiError> {
    let value = fields.get(name).ok_or_else(|| required(name))?;
    match value {
        Value::String(text) => Ok(vec![text]),
        Value::Array(values) => {
            check_count(values.len(), name)?;
            let text = |(place, value): (usize, &'a Value)| {
                value.as_str().ok_or_else(|| wrong(&format!("{name}[{place}]"), "a string", value))
            };
            values.iter().enumerate().map(text).collect()
        }
        other => Err(wrong(name, "a string or an array of strings", other)),
    }
}

/// Holds the number of the field's elements against the limits.
///
/// # Errors
/// When there are none or too many.
pub fn check_count(count: usize, name: &str) -> Result<(), ApiError> {
    match count {
        0 => Err(ApiError::invalid(name, format!("`{name}` must not be empty."))),
        count if count > MAX_PAIRS => {
            Err(ApiError::invalid(name, format!("A request may score at most {MAX_PAIRS} pairs, got {count}.")))
        }
        _ => Ok(()),
    }
}
