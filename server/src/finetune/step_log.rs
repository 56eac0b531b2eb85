//! The log of a run: one JSON line a step, an evaluation or a decision of the spike guard.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Deserializer, Serialize};

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Line {
    /// A step of training.
    Step(StepLine),
    /// The loss on held-out examples.
    Evaluation(EvaluationLine),
    /// How often each expert was chosen.
    Routing(RoutingLine),
    /// What the spike guard decided.
    Guard(GuardLine),
}

/// A step of training; tokens, times and experts are those of all steps since the line before. What isn't finite is `null` in
/// the file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StepLine {
    /// The step's number, from 0.
    pub step: u64,
    /// How often the examples have been gone through, in parts too.
    pub epoch: f64,
    /// The mean loss of a token that is trained on.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Of the tokens that are trained on, the part that got the highest logit.
    pub accuracy: f64,
    /// The load-balancing loss, with its coefficient.
    #[serde(deserialize_with = "null_is_nan")]
    pub aux_loss: f64,
    /// The router's z-loss, with its coefficient.
    #[serde(deserialize_with = "null_is_nan")]
    pub z_loss: f64,
    /// The gradients' norm before clipping.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// The learning rate of the update; 0 if it was skipped.
    pub learning_rate: f64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// The wall time.
    pub seconds: f64,
    /// Tokens by wall time.
    pub tokens_per_second: f64,
    /// Time in which was computed.
    pub compute_ms: f64,
    /// Time in which experts were waited for.
    pub read_ms: f64,
    /// The most memory that the process has held so far.
    pub peak_memory_bytes: u64,
    /// Experts that were in memory when they were needed.
    pub expert_hits: u64,
    /// Experts that had to be read.
    pub expert_misses: u64,
    /// The entropy of the experts' load as a part of the greatest possible, for each layer with a router.
    pub expert_entropy: Vec<f64>,
    /// The part of the choices that the most used expert got, for each layer with a router.
    pub busiest_expert: Vec<f64>,
    /// Experts without a token, for each layer with a router.
    pub idle_experts: Vec<u64>,
}

impl StepLine {
    /// This step with what the steps since the last line took.
    pub fn with(self, before: &Self) -> Self {
        let (tokens, seconds) = (self.tokens + before.tokens, self.seconds + before.seconds);
        Self {
            tokens,
            seconds,
            tokens_per_second: tokens as f64 / seconds,
            compute_ms: self.compute_ms + before.compute_ms,
            read_ms: self.read_ms + before.read_ms,
            expert_hits: self.expert_hits + before.expert_hits,
            expert_misses: self.expert_misses + before.expert_misses,
            ..self
        }
    }
}

/// The loss on held-out examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationLine {
    /// The steps made before it.
    pub step: u64,
    /// The mean loss of a token.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// The part of the tokens that got the highest logit.
    pub accuracy: f64,
}

/// How often each expert was chosen for some of the held-out examples, or of the training data if there are none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoutingLine {
    /// The steps made before it.
    pub step: u64,
    /// For each layer and expert; empty for layers without a router.
    pub loads: Vec<Vec<u64>>,
}

/// What the spike guard decided.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuardLine {
    /// The step that it judged.
    pub step: u64,
    /// The decision as a sentence.
    pub decision: String,
    /// The examples that it is about.
    pub examples: Vec<u64>,
}

/// JSON has no NaN and no infinity.
fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

impl Line {
    fn step(&self) -> u64 {
        match self {
            Self::Step(StepLine { step, .. })
            | Self::Evaluation(EvaluationLine { step, .. })
            | Self::Routing(RoutingLine { step, .. })
            | Self::Guard(GuardLine { step, .. }) => *step,
        }
    }
}

/// A log that grows line by line.
#[derive(Debug)]
pub struct StepLog {
    path: PathBuf,
    file: File,
}

impl StepLog {
    /// The log at `path`, as it was before `first_step`: what a run did after the checkpoint that it is resumed from is
    /// cut off, and so is a last line that was torn. What was measured after `first_step` steps stays. Without a file there, or
    /// with the first step 0, an empty one.
    ///
    /// # Errors
    /// When the file can't be read or written, or is no such log.
    pub fn open(path: &Path, first_step: u64) -> Result<Self> {
        let kept = match std::fs::read_to_string(path) {
            Ok(text) if first_step > 0 => kept_bytes(&text, first_step).with_context(|| path.display().to_string())?,
            Ok(_) => 0,
            Err(error) if error.kind() == ErrorKind::NotFound => 0,
            Err(error) => return Err(error).with_context(|| format!("{} can't be read", path.display())),
        };
        let opened = OpenOptions::new().create(true).append(true).open(path);
        let file = opened.with_context(|| format!("{} can't be opened to append to it", path.display()))?;
        file.set_len(kept as u64).with_context(|| format!("{} can't be cut to {kept} bytes", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Writes a line. It is in the file when this returns.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn append(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.flush());
        written.with_context(|| format!("{} can't be written", self.path.display()))
    }

    /// All lines of the log at `path`.
    ///
    /// # Errors
    /// When it can't be read or is no such log.
    pub fn read(path: &Path) -> Result<Vec<Line>> {
        let text = std::fs::read_to_string(path).with_context(|| format!("{} can't be read", path.display()))?;
        let lines: Result<Vec<Line>> = whole_lines(&text).map(|line| line.map(|(line, _)| line)).collect();
        lines.with_context(|| path.display().to_string())
    }
}

/// How many of the log's bytes belong to steps before `first_step`.
fn kept_bytes(text: &str, first_step: u64) -> Result<usize> {
    let mut kept = 0;
    for line in whole_lines(text) {
        let (line, bytes) = line?;
        let is_measured_between = matches!(line, Line::Evaluation(_) | Line::Routing(_));
        if line.step() >= first_step && !(is_measured_between && line.step() == first_step) {
            break;
        }
        kept += bytes;
    }
    Ok(kept)
}

/// The lines that were written to their end, each with its length in bytes.
fn whole_lines(text: &str) -> impl Iterator<Item = Result<(Line, usize)>> {
    let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    whole.enumerate().map(|(index, text)| {
        let expected = || format!("line {}: expected a line of a step log, found {:?}", index + 1, text.trim_end());
        Ok((serde_json::from_str(text).with_context(expected)?, text.len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Line {
        Line::Step(StepLine { step, epoch: 0.25, loss: 2.5, learning_rate: 1e-4, tokens: 512, ..StepLine::default() })
    }

    fn evaluation(step: u64) -> Line {
        Line::Evaluation(EvaluationLine { step, loss: 2.25, accuracy: 0.5 })
    }

    fn guard(step: u64) -> Line {
        Line::Guard(GuardLine { step, decision: "skipped".into(), examples: vec![3, 4] })
    }

    fn write(path: &Path, first_step: u64, lines: &[Line]) {
        let mut log = StepLog::open(path, first_step).unwrap();
        lines.iter().for_each(|line| log.append(line).unwrap());
    }

    #[test]
    fn a_line_is_json_and_is_there_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.jsonl");
        let mut log = StepLog::open(&path, 0).unwrap();
        log.append(&step(0)).unwrap();
        let expected = concat!(
            r#"{"type":"step","step":0,"epoch":0.25,"loss":2.5,"accuracy":0.0,"aux_loss":0.0,"z_loss":0.0,"#,
            r#""grad_norm":0.0,"learning_rate":0.0001,"tokens":512,"seconds":0.0,"tokens_per_second":0.0,"#,
            r#""compute_ms":0.0,"read_ms":0.0,"peak_memory_bytes":0,"expert_hits":0,"expert_misses":0,"#,
            r#""expert_entropy":[],"busiest_expert":[],"idle_experts":[]}"#,
            "\n"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        log.append(&evaluation(1)).unwrap();
        log.append(&guard(1)).unwrap();
        let routing = Line::Routing(RoutingLine { step: 1, loads: vec![vec![], vec![3, 0]] });
        log.append(&routing).unwrap();
        assert_eq!(StepLog::read(&path).unwrap(), [step(0), evaluation(1), guard(1), routing]);
    }

    #[test]
    fn what_is_not_finite_is_null_and_comes_back_as_nan() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.jsonl");
        let infinite = StepLine { loss: f64::NAN, grad_norm: f64::INFINITY, ..StepLine::default() };
        write(&path, 0, &[Line::Step(infinite)]);
        let lines = StepLog::read(&path).unwrap();
        let [Line::Step(StepLine { loss, grad_norm, aux_loss: 0.0, .. })] = lines[..] else { panic!("{lines:?}") };
        assert!(loss.is_nan() && grad_norm.is_nan());
    }

    #[test]
    fn a_resumed_run_goes_on_at_its_step() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.jsonl");
        let all = [step(0), guard(0), step(1), evaluation(2), guard(2), step(2), evaluation(3)];
        for (first_step, kept) in [(0, 0), (1, 2), (2, 4), (3, 7), (9, 7)] {
            write(&path, 0, &all);
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all(br#"{"type":"step","st"#).unwrap();
            assert_eq!(StepLog::read(&path).unwrap(), all, "a torn line is none");
            write(&path, first_step, &[step(first_step)]);
            assert_eq!(StepLog::read(&path).unwrap(), [&all[..kept], &[step(first_step)]].concat(), "{first_step}");
        }
    }

    #[test]
    fn a_file_that_is_no_log_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notes.txt");
        let text = format!("{}\nmilk, eggs\n", serde_json::to_string(&step(0)).unwrap());
        std::fs::write(&path, &text).unwrap();
        let error = format!("{:#}", StepLog::open(&path, 5).unwrap_err());
        assert!(error.contains(r#"notes.txt: line 2: expected a line of a step log, found "milk, eggs""#), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        let missing = directory.path().join("missing").join("log.jsonl");
        assert!(format!("{:#}", StepLog::open(&missing, 0).unwrap_err()).contains("missing"));
    }
}
