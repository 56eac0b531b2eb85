//! `cadre finetune`.

use std::io::{self, Write as _};

use anyhow::{Result, anyhow};
use cadre_models::DatasetError;
use indicatif::{ProgressBar, ProgressStyle};

use super::terminal::{INTERRUPTED, stop_at_signal, unless_pipe_closed};
use crate::finetune::{
    self, Ended, FinetuneArgs, Prepared, Watcher,
    settings::Settings,
    step_log::{EvaluationLine, StepLine},
};

/// Trains.
///
/// # Errors
/// When a setting is wrong, the data are broken, the memory is too small, or the system refuses.
pub fn run(args: FinetuneArgs) -> Result<()> {
    let (resume, dry_run) = (args.resume, args.dry_run);
    let settings = args.settings()?;
    if dry_run {
        let text = prepare(&settings)?.dry_run(&settings)?;
        return unless_pipe_closed(io::stdout().write_all(text.as_bytes()).map_err(Into::into));
    }
    finetune::check_output(&settings, resume)?;
    let prepared = prepare(&settings)?;
    eprint!("{}", prepared.describe(&settings)?);
    let stop = stop_at_signal()?;
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg} eta {eta}");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut terminal = Terminal { bar: &bar, loss: None, evaluations: Vec::new() };
    let ended = finetune::run(&settings, prepared, resume, &stop, &mut terminal);
    bar.finish_and_clear();
    match ended? {
        Ended::Finished { made } => eprintln!("{made}"),
        Ended::Stopped { step } => {
            eprintln!("stopped after step {step}: go on with --resume");
            std::process::exit(INTERRUPTED);
        }
    }
    Ok(())
}

/// Looks at what the settings name; broken lines of the data are told one by one.
fn prepare(settings: &Settings) -> Result<Prepared> {
    let prepared = Prepared::new(settings, None, &mut |line| eprintln!("{line}"));
    prepared.map_err(|error| match error.downcast_ref::<DatasetError>() {
        Some(DatasetError::BadLines(lines)) => {
            let count = lines.count();
            anyhow!("lines of the data that cannot be used: {count}, as told above; --skip-bad goes on without them")
        }
        _ => error,
    })
}

/// Shows a run on standard error.
struct Terminal<'a> {
    bar: &'a ProgressBar,
    /// The latest step's.
    loss: Option<f64>,
    /// Each with the loss of the step before it.
    evaluations: Vec<(Option<f64>, EvaluationLine)>,
}

/// Evaluations that are shown together, the latest ones.
const EVALUATIONS_SHOWN: usize = 8;

impl Terminal<'_> {
    fn table(&self) -> String {
        let titles = ["step", "train loss", "held-out loss", "perplexity", "accuracy"];
        let row = |[step, train, held_out, perplexity, accuracy]: [String; 5]| {
            format!("{step:>8}  {train:>10}  {held_out:>13}  {perplexity:>10}  {accuracy:>8}\n")
        };
        let mut text = row(titles.map(str::to_owned));
        for (train, EvaluationLine { step, loss, accuracy }) in
            &self.evaluations[self.evaluations.len().saturating_sub(EVALUATIONS_SHOWN)..]
        {
            let train = train.map_or("-".to_owned(), |loss| format!("{loss:.4}"));
            let (perplexity, percent) = (loss.exp(), accuracy * 100.0);
            text += &row([
                step.to_string(),
                train,
                format!("{loss:.4}"),
                format!("{perplexity:.2}"),
                format!("{percent:.1} %"),
            ]);
        }
        text
    }
}

impl Watcher for Terminal<'_> {
    fn begins(&mut self, step: u64, steps: u64) {
        self.bar.set_length(steps);
        self.bar.set_position(step);
    }

    fn step(&mut self, line: &StepLine) {
        self.loss = Some(line.loss);
        self.bar.set_position(line.step + 1);
        self.bar.set_message(format!("loss {:.4}, {:.0} tokens/s", line.loss, line.tokens_per_second));
    }

    fn guard(&mut self, step: u64, decision: &str) {
        self.bar.suspend(|| eprintln!("step {step}: {decision}"));
    }

    fn evaluated(&mut self, line: &EvaluationLine) {
        self.evaluations.push((self.loss, line.clone()));
        self.bar.suspend(|| eprint!("{}", self.table()));
    }

    fn saved(&mut self, _: u64) {}

    fn saves_what_is_stopped(&mut self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evaluations_stand_below_each_other() {
        let line = |step, loss| EvaluationLine { step, loss, accuracy: 0.5 };
        let evaluations = vec![(None, line(0, 2.0)), (Some(1.25), line(100, 1.0))];
        let bar = ProgressBar::hidden();
        let mut terminal = Terminal { bar: &bar, loss: Some(0.5), evaluations };
        assert_eq!(
            terminal.table(),
            "    step  train loss  held-out loss  perplexity  accuracy\n       \
             0           -         2.0000        7.39    50.0 %\n     \
             100      1.2500         1.0000        2.72    50.0 %\n"
        );
        (0..20).for_each(|step| terminal.evaluated(&line(200 + step, 1.0)));
        assert_eq!(terminal.table().lines().count(), 1 + EVALUATIONS_SHOWN);
    }
}
