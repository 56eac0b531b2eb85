//! The report of a run: one HTML file that needs nothing else, made from the step log.

mod chart;
mod heat;

use std::fmt::{self, Display, Formatter};

use self::chart::{Chart, Curve, Scale};
use super::step_log::{Line, StepLine};

/// What a report is made of.
#[derive(Debug, Clone, Default)]
pub struct Report<'a> {
    /// What was trained on what.
    pub title: &'a str,
    /// The run's settings, in the order of their table.
    pub settings: &'a [(&'a str, String)],
    /// The step log.
    pub lines: &'a [Line],
    /// The experts' load, where there are experts.
    pub expert_load: Option<ExpertLoad>,
    /// What the machine costs an hour, if it was told.
    pub price_per_hour: Option<f64>,
}

/// How often each layer's experts were chosen on the same text, before and after training: a row a layer with routed
/// experts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ExpertLoad {
    /// Each layer's number in the model.
    pub layers: Vec<usize>,
    /// Before.
    pub before: Vec<Vec<u64>>,
    /// After.
    pub after: Vec<Vec<u64>>,
}

/// Text in which nothing is markup.
#[derive(Debug, Clone, Copy)]
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|letter| match letter {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            // HTML allows no other control characters.
            letter if letter.is_control() && !letter.is_whitespace() => f.write_str("\u{FFFD}"),
            letter => write!(f, "{letter}"),
        })
    }
}

/// A number with as many digits as tell something.
#[derive(Debug, Clone, Copy)]
struct Number(f64);

impl Display for Number {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self(value) = *self;
        let size = value.abs();
        if !value.is_finite() {
            write!(f, "{value}")
        } else if size >= 1000.0 {
            f.write_str(&grouped(value))
        } else if size >= 100.0 || value.fract() == 0.0 {
            write!(f, "{value:.0}")
        } else if size >= 10.0 {
            write!(f, "{value:.1}")
        } else if size >= 0.01 {
            write!(f, "{value:.3}")
        } else {
            write!(f, "{value:.1e}")
        }
    }
}

/// A whole number, its digits in threes.
fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What all steps together come to; a line has what has come since the one before.
struct Totals {
    steps: u64,
    tokens: u64,
    seconds: f64,
    peak_memory_bytes: u64,
    expert_hits: u64,
    expert_misses: u64,
}

impl Totals {
    fn of(steps: &[&StepLine]) -> Self {
        let sum = |of: fn(&StepLine) -> u64| steps.iter().map(|step| of(step)).sum();
        Self {
            steps: steps.last().map_or(0, |step| step.step + 1),
            tokens: sum(|step| step.tokens),
            seconds: steps.iter().map(|step| step.seconds).sum(),
            peak_memory_bytes: steps.iter().map(|step| step.peak_memory_bytes).max().unwrap_or(0),
            expert_hits: sum(|step| step.expert_hits),
            expert_misses: sum(|step| step.expert_misses),
        }
    }

    /// Nothing without time.
    fn tokens_per_hour(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.tokens as f64 / self.seconds * 3600.0)
    }
}

impl Display for Report<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let title = Escaped(self.title);
        write!(f, "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n")?;
        writeln!(
            f,
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<title>{title}</title>"
        )?;
        write!(f, "<style>\n{}</style>\n</head>\n<body>\n<h1>{title}</h1>\n", include_str!("report.css"))?;
        let steps = self.lines.iter().filter_map(|line| if let Line::Step(step) = line { Some(step) } else { None });
        let steps: Vec<&StepLine> = steps.collect();
        let totals = Totals::of(&steps);
        self.summary(f, &steps, &totals)?;
        self.curves(f, &steps)?;
        self.cost(f, &totals)?;
        if let Some(load) = &self.expert_load {
            heat::write(f, load)?;
        }
        self.decisions(f)?;
        table(f, "Settings", self.settings.iter().cloned())?;
        f.write_str("</body>\n</html>\n")
    }
}

impl Report<'_> {
    fn evaluations(&self) -> Vec<(f64, f64)> {
        let of_line = |line: &Line| match line {
            Line::Evaluation(line) => Some((line.step as f64, line.loss)),
            _ => None,
        };
        self.lines.iter().filter_map(of_line).collect()
    }

    fn summary(&self, f: &mut Formatter<'_>, steps: &[&StepLine], totals: &Totals) -> fmt::Result {
        let mut rows = vec![("Steps", grouped(totals.steps as f64)), ("Tokens", grouped(totals.tokens as f64))];
        rows.push(("Time in steps", format!("{} s", Number(totals.seconds))));
        if let (Some(first), Some(last)) = (steps.first(), steps.last()) {
            rows.push(("Training loss, first to last step", from_to(first.loss, last.loss)));
        }
        if let [(_, first), .., (_, last)] = self.evaluations()[..] {
            rows.push(("Evaluation loss, first to last", from_to(first, last)));
        }
        rows.push(("Peak memory", format!("{} MiB", grouped(totals.peak_memory_bytes as f64 / f64::from(1 << 20)))));
        let uses = totals.expert_hits + totals.expert_misses;
        if uses > 0 {
            let rate = 100.0 * totals.expert_hits as f64 / uses as f64;
            rows.push(("Experts found in memory", format!("{rate:.1} % of {}", grouped(uses as f64))));
        }
        table(f, "Summary", rows.into_iter())
    }

    fn curves(&self, f: &mut Formatter<'_>, steps: &[&StepLine]) -> fmt::Result {
        let of = |value: fn(&StepLine) -> f64| steps.iter().map(|step| (step.step as f64, value(step))).collect();
        let one = |name, value| vec![Curve { name, class: "a", points: of(value) }];
        let evaluation = Curve { name: "evaluation", class: "b", points: self.evaluations() };
        let train = Curve { name: "training", class: "a", points: of(|step| step.loss) };
        let charts = [
            Chart { title: "Loss", scale: Scale::Linear, curves: vec![train, evaluation] },
            Chart { title: "Gradient norm", scale: Scale::Log, curves: one("before clipping", |step| step.grad_norm) },
            Chart { title: "Learning rate", scale: Scale::Linear, curves: one("applied", |step| step.learning_rate) },
            Chart {
                title: "Tokens per second",
                scale: Scale::Linear,
                curves: one("wall time", |step| step.tokens_per_second),
            },
            Chart {
                title: "Peak memory, MiB",
                scale: Scale::Linear,
                curves: one("so far", |step| step.peak_memory_bytes as f64 / f64::from(1 << 20)),
            },
        ];
        f.write_str("<h2>By step</h2>\n<div class=\"grid\">\n")?;
        charts.iter().try_for_each(|chart| write!(f, "{chart}"))?;
        f.write_str("</div>\n")
    }

    fn cost(&self, f: &mut Formatter<'_>, totals: &Totals) -> fmt::Result {
        let Some(per_hour) = totals.tokens_per_hour() else { return Ok(()) };
        let (tokens, seconds) = (grouped(totals.tokens as f64), Number(totals.seconds));
        let per_hour_text = grouped(per_hour);
        writeln!(f, "<h2>Cost</h2>")?;
        writeln!(f, "<p>{tokens} tokens ÷ {seconds} s × 3,600 s/h = <b>{per_hour_text} tokens per hour</b></p>")?;
        if let Some(price) = self.price_per_hour {
            let per_million = Number(price / per_hour * 1e6);
            writeln!(
                f,
                "<p>{price}/h ÷ {per_hour_text} tokens/h × 1,000,000 = <b>{per_million} per million tokens</b></p>"
            )?;
        }
        writeln!(f, "<p>The time is that of the steps: loading, evaluations and checkpoints come on top.</p>")
    }

    fn decisions(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let of_line = |line: &Line| match line {
            Line::Guard(line) => Some((format!("step {}", line.step), line.decision.clone())),
            _ => None,
        };
        let decisions: Vec<(String, String)> = self.lines.iter().filter_map(of_line).collect();
        table(f, "Spikes", decisions.iter().map(|(step, decision)| (step.as_str(), decision.clone())))
    }
}

fn from_to(first: f64, last: f64) -> String {
    format!("{} → {}", Number(first), Number(last))
}

/// A heading and rows of a name and a value; nothing without rows.
fn table<'a>(f: &mut Formatter<'_>, heading: &str, rows: impl Iterator<Item = (&'a str, String)>) -> fmt::Result {
    let mut rows = rows.peekable();
    if rows.peek().is_none() {
        return Ok(());
    }
    writeln!(f, "<h2>{heading}</h2>\n<div class=\"wide\"><table>")?;
    for (name, value) in rows {
        writeln!(f, "<tr><th>{}</th><td>{}</td></tr>", Escaped(name), Escaped(&value))?;
    }
    writeln!(f, "</table></div>")
}

#[cfg(test)]
mod tests;
