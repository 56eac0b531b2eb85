//! What an item's scores come to.

use cadre_engine::request::{Scores, TokenLogprobs};
use cadre_models::Tokenizer;
use serde_json::{Map, Value, json};

use super::item::{Continuation, Item, Label, Question};

/// What became of a passage: its scores, or why it has none.
pub type Scored = Result<Scores, String>;

/// Puts scores into words.
#[derive(Clone)]
pub struct Teller {
    /// Tokens to text.
    pub tokenizer: Tokenizer,
    /// Also tell each token's log-probability.
    pub token_logprobs: bool,
}

/// The log-probabilities of a text's tokens.
struct Measured<'a> {
    tokens: &'a [u32],
    logprobs: Vec<&'a TokenLogprobs>,
}

impl Measured<'_> {
    fn log_likelihood(&self) -> f64 {
        self.logprobs.iter().map(|one| f64::from(one.logprob)).sum()
    }

    /// Whether the most likely tokens are these.
    fn is_greedy(&self) -> bool {
        self.logprobs.iter().all(|one| one.rank == 1)
    }
}

impl Teller {
    /// The result of an item whose passages came to `scores`.
    ///
    /// # Errors
    /// When one of them could not be scored.
    pub fn tell(&self, item: &Item, scores: &[Scored]) -> Result<Map<String, Value>, String> {
        let scores: Vec<&Scores> =
            scores.iter().map(|scores| scores.as_ref().map_err(Clone::clone)).collect::<Result<_, _>>()?;
        let mut told = Map::new();
        match &item.question {
            Question::Text { bytes, tokens } => {
                let logprobs = scores.iter().flat_map(|scores| scores.prompt.iter().flatten()).collect();
                let measured = Measured { tokens: &tokens[1..], logprobs };
                let log_likelihood = measured.log_likelihood();
                told.insert("log_likelihood".to_owned(), log_likelihood.into());
                told.insert("tokens".to_owned(), measured.tokens.len().into());
                told.insert("bytes".to_owned(), (*bytes).into());
                told.insert("perplexity".to_owned(), (-log_likelihood / measured.tokens.len() as f64).exp().into());
                self.add_tokens(&mut told, &measured);
            }
            Question::Completion(continuation) => told = self.continuation(continuation, &scores),
            Question::Choices(choices) => {
                let all: Vec<_> = choices.iter().map(|choice| measured(choice, &scores).log_likelihood()).collect();
                let by = |length: &dyn Fn(&Continuation) -> usize| -> Vec<f64> {
                    choices.iter().zip(&all).map(|(choice, all)| all / length(choice) as f64).collect()
                };
                told.insert("best".to_owned(), largest(&all).into());
                told.insert("best_by_tokens".to_owned(), largest(&by(&|choice| choice.tokens.len())).into());
                told.insert("best_by_bytes".to_owned(), largest(&by(&|choice| choice.bytes)).into());
                let choices = choices.iter().map(|choice| Value::Object(self.continuation(choice, &scores)));
                told.insert("choices".to_owned(), choices.collect());
            }
            Question::Labels(labels) => {
                let logprobs: Vec<f64> =
                    labels.iter().map(|(_, label)| measured(label, &scores).log_likelihood()).collect();
                told.insert("best".to_owned(), largest(&logprobs).into());
                let labels = labels.iter().zip(logprobs.iter().zip(shares(&logprobs)));
                let label = |((label, continuation), (logprob, probability)): (&(Label, Continuation), (&f64, f64))| {
                    let token = continuation.tokens[0];
                    let label = if let Label::Text(text) = label { text.clone() } else { self.name(token) };
                    json!({
                        "label": label, "token": token, "log_likelihood": logprob, "probability": probability,
                    })
                };
                told.insert("labels".to_owned(), labels.map(label).collect());
            }
        }
        Ok(told)
    }

    fn continuation(&self, continuation: &Continuation, scores: &[&Scores]) -> Map<String, Value> {
        let measured = measured(continuation, scores);
        let mut told = Map::new();
        told.insert("log_likelihood".to_owned(), measured.log_likelihood().into());
        told.insert("tokens".to_owned(), continuation.tokens.len().into());
        told.insert("bytes".to_owned(), continuation.bytes.into());
        told.insert("is_greedy".to_owned(), measured.is_greedy().into());
        self.add_tokens(&mut told, &measured);
        told
    }

    fn add_tokens(&self, told: &mut Map<String, Value>, measured: &Measured<'_>) {
        if self.token_logprobs {
            let one = |(&id, of): (&u32, &&TokenLogprobs)| json!({"token": self.name(id), "id": id, "logprob": of.logprob, "rank": of.rank});
            told.insert("token_logprobs".to_owned(), measured.tokens.iter().zip(&measured.logprobs).map(one).collect());
        }
    }

    fn name(&self, token: u32) -> String {
        String::from_utf8_lossy(&self.tokenizer.token_bytes(token)).into_owned()
    }
}

fn measured<'a>(continuation: &'a Continuation, scores: &[&'a Scores]) -> Measured<'a> {
    let Continuation { tokens, passage, next, .. } = continuation;
    let Scores { prompt, next: followers } = scores[*passage];
    let before = &prompt[prompt.len() + 1 - tokens.len()..];
    Measured { tokens, logprobs: before.iter().flatten().chain([&followers[*next]]).collect() }
}

/// The place of the largest, the first of equals.
fn largest(values: &[f64]) -> usize {
    (0..values.len()).rev().max_by(|&one, &other| values[one].total_cmp(&values[other])).unwrap_or(0)
}

/// The part that each has of the probability of all together.
pub fn shares(logprobs: &[f64]) -> Vec<f64> {
    let most = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logprobs.iter().map(|logprob| (logprob - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logprobs(logprob: f32, rank: u32) -> TokenLogprobs {
        TokenLogprobs { logprob, rank, top: vec![] }
    }

    fn teller() -> Teller {
        let tokenizer = cadre_models::open(None, &|_| ()).unwrap().tokenizer().unwrap();
        Teller { tokenizer, token_logprobs: false }
    }

    fn item(question: Question) -> Item {
        Item { id: None, question, passages: Vec::new() }
    }

    fn continuation(bytes: usize, tokens: &[u32], passage: usize, next: usize) -> Continuation {
        Continuation { bytes, tokens: tokens.to_vec(), passage, next }
    }

    #[test]
    fn choices_are_ranked_as_they_are_and_by_length() {
        let scores = [
            Ok(Scores { prompt: vec![None, None], next: vec![logprobs(-2.0, 1), logprobs(-3.0, 4)] }),
            Ok(Scores { prompt: vec![None, None, Some(logprobs(-1.5, 1))], next: vec![logprobs(-1.0, 1)] }),
        ];
        let choices = vec![continuation(8, &[5], 0, 0), continuation(30, &[6], 0, 1), continuation(9, &[7, 8], 1, 0)];
        let told = Value::Object(teller().tell(&item(Question::Choices(choices)), &scores).unwrap());
        assert_eq!((&told["best"], &told["best_by_tokens"], &told["best_by_bytes"]), (&json!(0), &json!(2), &json!(1)));
        let greedy: Vec<_> = told["choices"].as_array().unwrap().iter().map(|choice| &choice["is_greedy"]).collect();
        assert_eq!(greedy, [true, false, true]);
        assert_eq!(told["choices"][2]["log_likelihood"], -2.5);
    }

    #[test]
    fn labels_share_one_probability() {
        let next = [0.2_f32, 0.6].map(|p| logprobs(p.ln(), 2)).to_vec();
        let labels = (0..2).map(|at| (Label::Token(5 + at), continuation(0, &[5 + at], 0, at as usize))).collect();
        let scores = [Ok(Scores { prompt: vec![None], next })];
        let told = Value::Object(teller().tell(&item(Question::Labels(labels)), &scores).unwrap());
        let share = |at: usize| told["labels"][at]["probability"].as_f64().unwrap();
        assert!((share(0) - 0.25).abs() < 1e-6 && (share(1) - 0.75).abs() < 1e-6, "{told}");
        assert_eq!(told["best"], 1);
    }

    #[test]
    fn a_text_of_several_windows_is_one() {
        let scores = [
            Ok(Scores { prompt: vec![None, Some(logprobs(-1.0, 1))], next: vec![] }),
            Ok(Scores { prompt: vec![None, Some(logprobs(-3.0, 1))], next: vec![] }),
        ];
        let text = item(Question::Text { bytes: 9, tokens: vec![1, 2, 3] });
        let told = Value::Object(Teller { token_logprobs: true, ..teller() }.tell(&text, &scores).unwrap());
        assert_eq!((&told["log_likelihood"], &told["tokens"]), (&json!(-4.0), &json!(2)));
        assert!((told["perplexity"].as_f64().unwrap() - 2.0_f64.exp()).abs() < 1e-9);
        assert_eq!(told["token_logprobs"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn what_can_not_be_scored_is_an_error() {
        let bad = [Err("its logits are not finite".to_owned())];
        assert!(teller().tell(&item(Question::Completion(continuation(1, &[1], 0, 0))), &bad).is_err());
    }
}
