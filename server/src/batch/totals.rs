//! What a run has done so far.

use std::{
    collections::BTreeSet,
    fmt::{self, Display, Formatter},
    time::Duration,
};

use super::Answered;
use crate::generation::Usage;

/// How many names of ignored fields are told.
const MOST_IGNORED: usize = 16;

/// Counts of lines and tokens.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    /// Lines.
    pub lines: u64,
    /// Those of them that have not what they asked for.
    pub failed: u64,
    /// Tokens.
    pub usage: Usage,
    ignored: BTreeSet<String>,
}

impl Totals {
    /// Adds a line.
    pub fn add(&mut self, answered: &Answered) {
        self.lines += 1;
        self.failed += u64::from(answered.line.told.failed);
        self.usage += answered.usage;
        let names = answered.ignored.iter().flat_map(|names| names.split(',')).filter(|name| !name.is_empty());
        for name in names {
            if self.ignored.len() < MOST_IGNORED {
                self.ignored.insert(name.to_owned());
            }
        }
    }

    /// The speed and what was saved, in a few words.
    pub fn rates(&self, after: Duration) -> String {
        let Self { usage, .. } = self;
        format!(
            "{:.0} tokens/s generated, {:.0} tokens/s in all, {:.0} % of prompts from the cache",
            per(usage.completion_tokens, after.as_secs_f64()),
            per(usage.completion_tokens + usage.prompt_tokens, after.as_secs_f64()),
            100.0 * per(usage.cached_tokens, usage.prompt_tokens as f64),
        )
    }

    /// All of it, after the run.
    pub fn summary(&self, after: Duration, price_per_hour: Option<f64>) -> Summary<'_> {
        Summary { totals: self, after, price_per_hour }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
fn per(count: usize, of: f64) -> f64 {
    if of > 0.0 { count as f64 / of } else { 0.0 }
}

/// A run's totals in sentences.
pub struct Summary<'a> {
    totals: &'a Totals,
    after: Duration,
    price_per_hour: Option<f64>,
}

impl Display for Summary<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Totals { lines, failed, usage, ignored } = self.totals;
        let seconds = self.after.as_secs_f64();
        let (prompt, generated) = (usage.prompt_tokens, usage.completion_tokens);
        write!(f, "{lines} lines in {seconds:.1} s, {failed} of them failed")?;
        write!(f, "\n{prompt} prompt tokens and {generated} generated: {}", self.totals.rates(self.after))?;
        if let Some(price) = self.price_per_hour {
            let cost = price * seconds / 3600.0;
            let million = |tokens: usize| if tokens == 0 { 0.0 } else { cost * per(1_000_000, tokens as f64) };
            write!(
                f,
                "\n{price}/h × {seconds:.1} s = {cost:.4}: {:.4} per million generated tokens, {:.4} per million in all",
                million(generated),
                million(prompt + generated)
            )?;
        }
        if !ignored.is_empty() {
            let names: Vec<&str> = ignored.iter().map(String::as_str).collect();
            write!(f, "\nfields that nobody knows were ignored: {}", names.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lines::output::{Finished, Told};

    #[test]
    fn a_summary_tells_speed_cost_and_what_was_ignored() {
        let mut totals = Totals::default();
        for (number, failed) in [(1, false), (2, true)] {
            let line = Finished { told: Told { number, failed }, text: String::new() };
            let usage = Usage { prompt_tokens: 300, completion_tokens: 200, cached_tokens: 75 };
            totals.add(&Answered { line, usage, ignored: Some("shape,colour".to_owned()) });
        }
        let summary = totals.summary(Duration::from_secs(4), Some(9.0)).to_string();
        assert_eq!(
            summary,
            "2 lines in 4.0 s, 1 of them failed\n600 prompt tokens and 400 generated: 100 tokens/s generated, 250 tokens/s in \
             all, 25 % of prompts from the cache\n9/h × 4.0 s = 0.0100: 25.0000 per million generated tokens, 10.0000 per \
             million in all\nfields that nobody knows were ignored: colour, shape"
        );
        assert!(Totals::default().summary(Duration::ZERO, Some(1.0)).to_string().contains("0 lines"));
    }
}
