use super::*;
use crate::finetune::step_log::{EvaluationLine, GuardLine};

fn step(step: u64) -> Line {
    Line::Step(StepLine {
        step,
        loss: 3.0 - 0.125 * step as f64,
        grad_norm: 1.0 + step as f64,
        learning_rate: 1e-4,
        tokens: 1_000,
        seconds: 2.0,
        tokens_per_second: 500.0,
        peak_memory_bytes: 3 << 30,
        expert_hits: 90,
        expert_misses: 10,
        ..StepLine::default()
    })
}

fn html(lines: &[Line]) -> String {
    Report { title: "A run", lines, ..Report::default() }.to_string()
}

/// The `d` of the curves of a class.
fn curves<'a>(html: &'a str, class: &str) -> Vec<&'a str> {
    let start = format!("<path class=\"curve {class}\" d=\"");
    html.split(&start).skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

/// Every element is closed in its turn, every attribute quoted, and `&` begins an entity.
fn assert_well_formed(html: &str) {
    let html = html.strip_prefix("<!DOCTYPE html>\n").expect("a doctype");
    let mut open: Vec<&str> = Vec::new();
    for part in html.split('<').skip(1) {
        let (tag, text) = part.split_once('>').unwrap_or_else(|| panic!("a tag without an end: {part}"));
        assert!(!text.contains('>') || open.last() == Some(&"style"), "a stray > in {text}");
        for entity in text.split('&').skip(1).chain(tag.split('&').skip(1)) {
            let is_known = ["amp;", "lt;", "gt;", "quot;", "#39;"].iter().any(|known| entity.starts_with(known));
            assert!(is_known, "&{entity} is no entity");
        }
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed in its turn");
            continue;
        }
        let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        assert_eq!(attributes.matches('"').count(), 2 * attributes.matches("=\"").count(), "{tag}");
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "not closed: {open:?}");
}

fn whole_report() -> String {
    let mut lines: Vec<Line> = (0..8).map(step).collect();
    lines.insert(4, Line::Evaluation(EvaluationLine { step: 4, loss: 2.75, accuracy: 0.5 }));
    lines.push(Line::Evaluation(EvaluationLine { step: 8, loss: 2.25, accuracy: 0.5 }));
    lines.push(Line::Guard(GuardLine { step: 5, decision: "loss 6 <skipped>".into(), examples: vec![1] }));
    let settings = [("rank", "8".into()), ("data <b>&'\"\u{1}", "<script>alert(1)</script>".into())];
    let expert_load = Some(ExpertLoad {
        layers: vec![1, 2],
        before: vec![vec![10, 10, 10, 10], vec![40, 0, 0, 0]],
        after: vec![vec![20, 10, 10, 0], vec![10, 10, 10, 10]],
    });
    let price_per_hour = Some(1.5);
    Report { title: "tiny & <mine>", settings: &settings, lines: &lines, expert_load, price_per_hour }.to_string()
}

#[test]
fn it_has_the_runs_numbers() {
    let html = whole_report();
    for expected in [
        "<title>tiny &amp; &lt;mine&gt;</title>",
        "<tr><th>Steps</th><td>8</td></tr>",
        "<tr><th>Tokens</th><td>8,000</td></tr>",
        "<tr><th>Training loss, first to last step</th><td>3 → 2.125</td></tr>",
        "<tr><th>Evaluation loss, first to last</th><td>2.750 → 2.250</td></tr>",
        "<tr><th>Peak memory</th><td>3,072 MiB</td></tr>",
        "<tr><th>Experts found in memory</th><td>90.0 % of 800</td></tr>",
        "8,000 tokens ÷ 16 s × 3,600 s/h = <b>1,800,000 tokens per hour</b>",
        "1.5/h ÷ 1,800,000 tokens/h × 1,000,000 = <b>0.833 per million tokens</b>",
        "<tr><th>1</th><td class=\"number\">1.00</td><td class=\"number\">2.00</td><td class=\"number\">0</td>\
         <td class=\"number\">1</td></tr>",
        "<tr><th>2</th><td class=\"number\">4.00</td><td class=\"number\">1.00</td><td class=\"number\">3</td>\
         <td class=\"number\">0</td></tr>",
        "<tr><th>step 5</th><td>loss 6 &lt;skipped&gt;</td></tr>",
        "<tr><th>rank</th><td>8</td></tr>",
        "<tr><th>data &lt;b&gt;&amp;&#39;&quot;\u{FFFD}</th><td>&lt;script&gt;alert(1)&lt;/script&gt;</td></tr>",
    ] {
        assert!(html.contains(expected), "expected {expected} in\n{html}");
    }
}

#[test]
fn lines_that_were_left_out_count_as_steps() {
    let html = html(&[step(0), step(5), step(7)]);
    for expected in ["<tr><th>Steps</th><td>8</td></tr>", "<tr><th>Tokens</th><td>3,000</td></tr>"] {
        assert!(html.contains(expected), "expected {expected} in\n{html}");
    }
}

#[test]
fn it_is_well_formed_and_needs_nothing_else() {
    for html in [whole_report(), html(&[]), html(&[step(0)])] {
        assert_well_formed(&html);
        for foreign in ["http:", "https:", "src=", "href=", "url(", "@import", "<script"] {
            assert!(!html.contains(foreign), "{foreign}");
        }
    }
}

/// The loss falls in a line from the upper left to the lower right corner.
#[test]
fn a_curve_is_drawn_to_scale() {
    let html = html(&(0..5).map(step).collect::<Vec<_>>());
    assert_eq!(curves(&html, "a")[0], "M48.0 8.0h.1L124.0 45.0L200.0 82.0L276.0 119.0L352.0 156.0");
    assert_eq!(curves(&html, "b"), [""; 0], "no evaluations, no curve");
    let constant = curves(&html, "a")[2];
    assert!(constant.starts_with("M48.0 82.0h.1L124.0 82.0"), "a value that stays is in the middle: {constant}");
}

#[test]
fn what_is_not_finite_is_a_gap() {
    let mut lines: Vec<Line> = (0..5).map(step).collect();
    let Line::Step(line) = &mut lines[2] else { panic!() };
    line.loss = f64::NAN;
    assert_eq!(curves(&html(&lines), "a")[0], "M48.0 8.0h.1L124.0 45.0M276.0 119.0h.1L352.0 156.0");
}

#[test]
fn what_has_no_finite_value_has_no_chart() {
    let Line::Step(line) = step(0) else { panic!() };
    let html = html(&[Line::Step(StepLine { loss: f64::NAN, ..line })]);
    assert!(!html.contains("aria-label=\"Loss\"") && html.contains("NaN → NaN"), "{html}");
    assert_well_formed(&html);
}

#[test]
fn a_long_run_stays_small_and_keeps_its_spike() {
    let mut lines: Vec<Line> = (0..50_000).map(|number| step(number % 8)).collect();
    for (line, number) in lines.iter_mut().zip(0..) {
        let Line::Step(line) = line else { panic!() };
        (line.step, line.loss) = (number, if number == 23_456 { 100.0 } else { line.loss });
    }
    let html = html(&lines);
    assert!(html.len() < 100_000, "{} bytes", html.len());
    let loss = curves(&html, "a")[0];
    assert_eq!(loss.matches(" 8.0").count(), 1, "the spike's height");
}

#[test]
fn cells_are_as_strong_as_their_load() {
    let load = ExpertLoad { layers: vec![0], before: vec![vec![2, 4, 0, 26]], after: vec![vec![8; 4]] };
    let html = Report { expert_load: Some(load), ..Report::default() }.to_string();
    let cells = |strength: &str| html.split(&format!("fill-opacity=\"{strength}\" d=\"")).nth(1).map(str::to_owned);
    // 2 and 4 are a quarter and half the mean of 8; 26 is 3.25 times as much; 8 is the mean.
    assert!(cells("0.125").unwrap().starts_with("M0.0 0h90.0v11h-90.0zM90.0 0h90.0v11h-90.0z\""), "{html}");
    assert!(cells("0.875").unwrap().starts_with("M270.0 0h90.0"), "{html}");
    assert_eq!(cells("0.250").unwrap().split('"').next().unwrap().matches('M').count(), 4);
    assert_eq!(html.matches("M180.0 0h90.0").count(), 1, "the unused expert is empty before");
}

#[test]
fn numbers_have_as_many_digits_as_tell_something() {
    for (value, text) in [
        (0.0, "0"),
        (1e-4, "1.0e-4"),
        (0.0123, "0.012"),
        (2.34567, "2.346"),
        (45.678, "45.7"),
        (345.6, "346"),
        (1_234_567.8, "1,234,568"),
        (-1_000.0, "-1,000"),
        (f64::NAN, "NaN"),
    ] {
        assert_eq!(Number(value).to_string(), text);
    }
}
