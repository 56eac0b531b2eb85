//! How evenly each layer's experts are used, before and after, as rows of cells and as figures.

use std::fmt::{self, Formatter, Write};

use super::ExpertLoad;

/// The width of a row of cells.
const WIDTH: f64 = 360.0;
const ROW_HEIGHT: f64 = 12.0;

/// Cells are drawn in so many strengths; each is one path, so that thousands of cells stay small.
const STRENGTHS: usize = 8;

/// A load this many times the layer's mean has the full strength.
const FULL: f64 = 4.0;

/// The section.
pub(super) fn write(f: &mut Formatter<'_>, load: &ExpertLoad) -> fmt::Result {
    f.write_str(
        "<h2>Expert load</h2>\n<p>A row a layer, a cell an expert: the stronger, the more of the layer's tokens it ",
    )?;
    writeln!(f, "gets; full strength from {FULL} times the mean. Unused experts are empty.</p>\n<div class=\"grid\">")?;
    for (name, rows) in [("Before", &load.before), ("After", &load.after)] {
        map(f, name, rows)?;
    }
    f.write_str("</div>\n<div class=\"wide\"><table>\n<tr><th>layer</th><th>most loaded expert ÷ mean, before</th>")?;
    f.write_str("<th>after</th><th>unused experts, before</th><th>after</th></tr>\n")?;
    for ((layer, before), after) in load.layers.iter().zip(&load.before).zip(&load.after) {
        let (highest, unused) = ([highest(before), highest(after)], [unused(before), unused(after)]);
        write!(f, "<tr><th>{layer}</th>")?;
        highest.iter().try_for_each(|value| write!(f, "<td class=\"number\">{value:.2}</td>"))?;
        unused.iter().try_for_each(|value| write!(f, "<td class=\"number\">{value}</td>"))?;
        f.write_str("</tr>\n")?;
    }
    f.write_str("</table></div>\n")
}

fn map(f: &mut Formatter<'_>, name: &str, rows: &[Vec<u64>]) -> fmt::Result {
    let height = rows.len() as f64 * ROW_HEIGHT;
    write!(f, "<figure><b>{name}</b><svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{name}\">")?;
    let mut paths = vec![String::new(); STRENGTHS + 1];
    for (row, uses) in rows.iter().enumerate() {
        let width = WIDTH / uses.len().max(1) as f64;
        let (mean, y, cell_height) = (mean(uses), row as f64 * ROW_HEIGHT, ROW_HEIGHT - 1.0);
        for (expert, &uses) in uses.iter().enumerate() {
            let x = expert as f64 * width;
            let cell = &mut paths[strength(uses, mean)];
            write!(cell, "M{x:.1} {y}h{width:.1}v{cell_height}h-{width:.1}z")?;
        }
    }
    for (strength, path) in paths.iter().enumerate().skip(1).filter(|(_, path)| !path.is_empty()) {
        let opacity = strength as f64 / STRENGTHS as f64;
        write!(f, "<path class=\"cell\" fill-opacity=\"{opacity:.3}\" d=\"{path}\"/>")?;
    }
    f.write_str("</svg></figure>\n")
}

/// 0 for an unused expert, and no other.
fn strength(uses: u64, mean: f64) -> usize {
    if uses == 0 {
        return 0;
    }
    let part = uses as f64 / (FULL * mean);
    ((part * STRENGTHS as f64).round() as usize).clamp(1, STRENGTHS)
}

fn mean(uses: &[u64]) -> f64 {
    uses.iter().sum::<u64>() as f64 / uses.len().max(1) as f64
}

/// How many times the mean the most loaded expert has; 0 in a layer that was never used.
fn highest(uses: &[u64]) -> f64 {
    let most = uses.iter().max().copied().unwrap_or(0);
    if most == 0 { 0.0 } else { most as f64 / mean(uses) }
}

fn unused(uses: &[u64]) -> usize {
    uses.iter().filter(|uses| **uses == 0).count()
}
