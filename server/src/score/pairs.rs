//! Pairs of a query and a document: the prompt that asks whether one answers the other, and the labels whose probabilities tell.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use cadre_models::{ChatTemplate, Checkpoint, RenderOptions, Tokenizer};
use serde_json::{Map, Value, json};

/// The labels when no flag gives any; the score is the probability of the first.
const LABELS: [&str; 2] = ["yes", "no"];

/// How pairs are asked about.
#[derive(Debug, Clone, Default)]
pub struct PairOptions {
    /// A template of messages with the roles `query` and `document`; a question by the chat template if absent.
    pub template: Option<PathBuf>,
    /// A token each, the first being the one that is wanted; `yes` and `no` if empty.
    pub labels: Vec<String>,
}

/// Makes prompts of pairs.
#[derive(Clone)]
pub struct Pairs {
    prompt: Prompt,
    labels: Result<Vec<u32>, String>,
}

/// What makes the prompt.
#[derive(Clone)]
enum Prompt {
    /// A template made for pairs.
    Pair(ChatTemplate),
    /// The model's own, which is told a question.
    Question(ChatTemplate),
    /// Nothing.
    Missing,
}

/// Why a pair has no prompt.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// The model has no template.
    #[error(
        "this model has no chat template to ask about pairs by: give `query` and `items` as whole prompts, or start the server \
         with --score-template"
    )]
    NoTemplate,
    /// The template refuses or fails.
    #[error(transparent)]
    Template(#[from] cadre_models::Error),
}

impl Pairs {
    /// By the flags, for a model.
    ///
    /// # Errors
    /// When the template can't be read or compiled, or a label that a flag gives is no token.
    pub fn new(options: &PairOptions, checkpoint: &Checkpoint) -> Result<Self> {
        let prompt = match &options.template {
            Some(path) => Prompt::Pair(checkpoint.template_of(path).context("--score-template")?),
            None => checkpoint.chat_template()?.map_or(Prompt::Missing, Prompt::Question),
        };
        let tokenizer = checkpoint.tokenizer()?;
        let labels = if options.labels.is_empty() {
            tokens(&tokenizer, &LABELS.map(str::to_owned))
        } else {
            Ok(tokens(&tokenizer, &options.labels).map_err(|reason| anyhow!("--score-labels: {reason}"))?)
        };
        Ok(Self { prompt, labels })
    }

    /// The labels, or why this model has none when nobody gives any.
    pub fn labels(&self) -> Result<&[u32], &str> {
        self.labels.as_deref().map_err(String::as_str)
    }

    /// The prompt, whose next token is a label; `kwargs` are further variables of the template.
    ///
    /// # Errors
    /// When there is no template, or it refuses or fails.
    pub fn prompt(&self, query: &str, document: &str, kwargs: Map<String, Value>) -> Result<String, PairError> {
        let options = RenderOptions { add_generation_prompt: true, kwargs, ..RenderOptions::default() };
        match &self.prompt {
            Prompt::Pair(template) => {
                let pair =
                    [json!({"role": "query", "content": query}), json!({"role": "document", "content": document})];
                Ok(template.render(&pair, &options)?)
            }
            Prompt::Question(template) => {
                let mut options = options;
                // The next token is to be the answer, not the first of many thoughts.
                options.kwargs.entry("enable_thinking").or_insert(false.into());
                Ok(template.render(&[json!({"role": "user", "content": question(query, document)})], &options)?)
            }
            Prompt::Missing => Err(PairError::NoTemplate),
        }
    }
}

/// What all documents have in common stands first: it is computed once.
fn question(query: &str, document: &str) -> String {
    format!(
        "Does the document answer the query? Say yes or no, and nothing else.\n\nQuery: {query}\n\nDocument: {document}"
    )
}

/// Each label's token.
fn tokens(tokenizer: &Tokenizer, labels: &[String]) -> Result<Vec<u32>, String> {
    if labels.len() < 2 {
        return Err(format!("expected at least two labels, got {}", labels.len()));
    }
    let token = |label: &String| match tokenizer.encode(label, false).map_err(|error| error.to_string())?[..] {
        [token] => Ok(token),
        ref tokens => Err(format!("the label {label:?} is {} tokens of this model, not one", tokens.len())),
    };
    labels.iter().map(token).collect()
}

/// What a pair's score says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreOptions {
    /// The first label is held against the others; else against all tokens.
    pub softmax: bool,
    /// It is a probability; else what that is made of: log-odds against the others, or a log-probability.
    pub activation: bool,
}

/// The score of labels with these log-probabilities. There is at least one, and a second one for `softmax`.
pub fn score(logprobs: &[f64], options: ScoreOptions) -> f64 {
    let (first, others) =
        logprobs.split_first().map_or((f64::NEG_INFINITY, &[][..]), |(first, others)| (*first, others));
    match options {
        ScoreOptions { softmax: true, activation: true } => {
            super::result::shares(logprobs).first().copied().unwrap_or(0.0)
        }
        ScoreOptions { softmax: true, activation: false } => first - log_sum(others),
        ScoreOptions { softmax: false, activation: true } => first.exp(),
        ScoreOptions { softmax: false, activation: false } => first,
    }
}

/// The logarithm of the probability of all together.
fn log_sum(logprobs: &[f64]) -> f64 {
    let most = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + logprobs.iter().map(|logprob| (logprob - most).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(softmax: bool, activation: bool) -> ScoreOptions {
        ScoreOptions { softmax, activation }
    }

    #[test]
    fn a_score_is_a_probability_or_what_makes_one() {
        let logprobs = [0.2_f64, 0.1, 0.1].map(f64::ln);
        let close = |one: f64, other: f64| assert!((one - other).abs() < 1e-12, "{one} {other}");
        close(score(&logprobs, options(true, true)), 0.5);
        close(score(&logprobs, options(true, false)), 0.0);
        close(score(&logprobs, options(false, true)), 0.2);
        close(score(&logprobs, options(false, false)), 0.2_f64.ln());
        // Those of a model that is very sure are no NaN.
        close(score(&[-900.0, -1.0], options(true, true)), 0.0);
        close(score(&[-900.0, -1.0], options(true, false)), -899.0);
    }

    #[test]
    fn flags_that_fit_no_model_say_so() {
        let checkpoint = cadre_models::open(None, &|_| ()).unwrap();
        let error = |options: PairOptions| format!("{:#}", Pairs::new(&options, &checkpoint).map(drop).unwrap_err());
        let labels = |labels: &[&str]| PairOptions {
            labels: labels.iter().map(|label| (*label).to_owned()).collect(),
            ..PairOptions::default()
        };
        assert!(error(labels(&["yes"])).contains("--score-labels: expected at least two"));
        assert!(error(labels(&["a whole sentence", "no"])).contains("tokens of this model, not one"));
        let folder = tempfile::tempdir().unwrap();
        let template = |text: &str| {
            let path = folder.path().join("pairs.jinja");
            std::fs::write(&path, text).unwrap();
            PairOptions { template: Some(path), ..PairOptions::default() }
        };
        assert!(error(template("{% for")).contains("--score-template"));
        let missing = PairOptions { template: Some(folder.path().join("none")), ..PairOptions::default() };
        assert!(error(missing).contains("none"));
        let made = "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}|\
                    {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}|{{ mood }}";
        let pairs = Pairs::new(&template(made), &checkpoint).unwrap();
        let kwargs = [("mood".to_owned(), json!("good"))].into_iter().collect();
        assert_eq!(pairs.prompt("who?", "me", kwargs).unwrap(), "who?|me|good");
    }
}
