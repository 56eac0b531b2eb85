//! A chart of curves over steps, as SVG.

use std::fmt::{self, Display, Formatter};

use super::Number;

/// The drawing's size. As wide as a phone, so that its text can be read there.
const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 180.0;

/// Where the curves lie: beside and above the axes' labels.
const LEFT: f64 = 48.0;
const RIGHT: f64 = 352.0;
const TOP: f64 = 8.0;
const BOTTOM: f64 = 156.0;

/// Horizontal lines.
const RULES: usize = 4;

/// Columns in which a long curve is drawn by its lowest and highest value, so that a spike is seen however long the run.
const COLUMNS: usize = 300;

/// How values become heights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    /// In proportion.
    Linear,
    /// By their logarithm; what isn't above 0 is left out.
    Log,
}

/// A line through (step, value) points, in order of steps.
pub(super) struct Curve {
    /// What it is of.
    pub name: &'static str,
    /// Its colour in the style sheet.
    pub class: &'static str,
    /// The points.
    pub points: Vec<(f64, f64)>,
}

/// Curves over the same axes.
pub(super) struct Chart {
    /// The heading.
    pub title: &'static str,
    /// How values become heights.
    pub scale: Scale,
    /// The curves; those without points aren't drawn.
    pub curves: Vec<Curve>,
}

/// The lowest and highest of something.
#[derive(Clone, Copy)]
struct Range {
    low: f64,
    high: f64,
}

impl Range {
    fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        values.fold(None, |range: Option<Self>, value| {
            let range = range.unwrap_or(Self { low: value, high: value });
            Some(Self { low: range.low.min(value), high: range.high.max(value) })
        })
    }

    /// Where a value lies in it, from 0 to 1; in the middle if there is but one value.
    fn part(self, value: f64) -> f64 {
        if self.high > self.low { (value - self.low) / (self.high - self.low) } else { 0.5 }
    }

    fn at(self, part: f64) -> f64 {
        self.low + part * (self.high - self.low)
    }
}

impl Scale {
    /// The height of a value in an axis' own measure; none if it can't be drawn.
    fn place(self, value: f64) -> Option<f64> {
        let place = if self == Self::Log { value.log10() } else { value };
        place.is_finite().then_some(place)
    }

    fn value(self, place: f64) -> f64 {
        if self == Self::Log { 10f64.powf(place) } else { place }
    }
}

fn x(steps: Range, step: f64) -> f64 {
    LEFT + steps.part(step) * (RIGHT - LEFT)
}

fn y(places: Range, place: f64) -> f64 {
    BOTTOM - places.part(place) * (BOTTOM - TOP)
}

impl Display for Chart {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let points = || self.curves.iter().flat_map(|curve| curve.points.iter().copied());
        let steps = Range::of(points().map(|(step, _)| step));
        let places = Range::of(points().filter_map(|(_, value)| self.scale.place(value)));
        let (Some(steps), Some(places)) = (steps, places) else { return Ok(()) };
        write!(f, "<figure><b>{}</b>", self.title)?;
        write!(f, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">", self.title)?;
        self.rules(f, places)?;
        let below = BOTTOM + 16.0;
        write!(f, "<text x=\"{LEFT}\" y=\"{below}\">step {}</text>", Number(steps.low))?;
        write!(f, "<text x=\"{RIGHT}\" y=\"{below}\" text-anchor=\"end\">{}</text>", Number(steps.high))?;
        for curve in &self.curves {
            self.curve(f, curve, steps, places)?;
        }
        f.write_str("</svg><figcaption>")?;
        for curve in self.curves.iter().filter(|curve| !curve.points.is_empty()) {
            write!(f, "<span class=\"key {}\">{}</span> ", curve.class, curve.name)?;
        }
        f.write_str("</figcaption></figure>\n")
    }
}

impl Chart {
    fn rules(&self, f: &mut Formatter<'_>, places: Range) -> fmt::Result {
        // One value has one line.
        let rules = if places.high > places.low { RULES } else { 1 };
        for rule in 0..rules {
            let place = places.at(rule as f64 / (RULES - 1) as f64);
            let y = y(places, place);
            write!(f, "<path class=\"rule\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>")?;
            let (x, baseline) = (LEFT - 4.0, y + 4.0);
            let value = Number(self.scale.value(place));
            write!(f, "<text x=\"{x}\" y=\"{baseline:.1}\" text-anchor=\"end\">{value}</text>")?;
        }
        Ok(())
    }

    /// A path that begins anew after what can't be drawn.
    fn curve(&self, f: &mut Formatter<'_>, curve: &Curve, steps: Range, places: Range) -> fmt::Result {
        if curve.points.is_empty() {
            return Ok(());
        }
        write!(f, "<path class=\"curve {}\" d=\"", curve.class)?;
        let mut is_drawing = false;
        for (step, value) in thinned(&curve.points) {
            let Some(place) = self.scale.place(value) else {
                is_drawing = false;
                continue;
            };
            let (x, y) = (x(steps, step), y(places, place));
            // A curve of one point is a short line.
            if is_drawing {
                write!(f, "L{x:.1} {y:.1}")?
            } else {
                write!(f, "M{x:.1} {y:.1}h.1")?
            }
            is_drawing = true;
        }
        f.write_str("\"/>")
    }
}

/// Of each column of a long curve the lowest and the highest point, in their order, and one that can't be drawn if there is
/// one.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let in_column = points.len().div_ceil(COLUMNS);
    if in_column <= 2 {
        return points.to_vec();
    }
    let of_column = |column: &[(f64, f64)]| {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let finite = || column.iter().filter(|(_, value)| value.is_finite());
        let gap = column.iter().find(|(_, value)| !value.is_finite());
        let mut kept: Vec<(f64, f64)> =
            [finite().min_by(by_value), finite().max_by(by_value), gap].into_iter().flatten().copied().collect();
        kept.sort_by(|a, b| a.0.total_cmp(&b.0));
        kept
    };
    points.chunks(in_column).flat_map(of_column).collect()
}
