//! A whole file's items: as many at a time as a super-batch holds, written in their order.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use cadre_engine::score::{Passage, rows_after};
use serde_json::{Map, Value, json};

use super::{
    item::{Item, Reader},
    lane::Lane,
    result::{Scored, Teller},
};
use crate::lines::{
    LineSet,
    input::{Line, Lines},
    output::{Finished, Told, Writer},
};

/// Bytes of the items of a super-batch: short ones have little to compute and much to keep.
const MOST_BYTES: usize = 64 << 20;

/// What a run has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Totals {
    /// Items that are written.
    pub lines: u64,
    /// Those of them that have no scores.
    pub failed: u64,
    /// Tokens of all passages.
    pub tokens: u64,
    /// Those of them that went through the model: what passages of a super-batch begin with goes once.
    pub rows: u64,
    /// Super-batches.
    pub batches: u64,
}

/// What is told of a run.
#[derive(Debug, Clone, Copy)]
pub struct Status {
    /// What is done.
    pub totals: Totals,
    /// Items under way.
    pub lines: u64,
    /// Which part of them is done.
    pub part: f64,
}

/// An item, or why it is none, by the number of its line; its passages, so many, are the super-batch's.
struct Read {
    number: u64,
    item: Result<Item, (Option<Value>, String)>,
    passages: usize,
}

/// Items that are scored together.
#[derive(Default)]
struct SuperBatch {
    items: Vec<Read>,
    passages: Vec<Passage>,
    rows: usize,
    bytes: usize,
}

impl SuperBatch {
    fn push(&mut self, line: Line, reader: &Reader) {
        let Line { number, text } = line;
        self.bytes += text.as_ref().map_or(0, String::len);
        let mut item = text.map_err(|reason| (None, reason)).and_then(|text| reader.read(&text));
        let own = item.as_mut().map_or_else(|_| Vec::new(), |item| std::mem::take(&mut item.passages));
        self.items.push(Read { number, item, passages: own.len() });
        for passage in own {
            self.rows += rows_after(self.passages.last(), &passage);
            self.passages.push(passage);
        }
    }
}

/// Scores items.
pub struct Scorer {
    /// The way that their passages go.
    pub lane: Lane,
    /// Reads them.
    pub reader: Reader,
    /// Puts their scores into words.
    pub teller: Teller,
    /// About how many rows a super-batch has.
    pub rows: usize,
}

impl Scorer {
    /// Scores all items that aren't `done`; `tell` is told how it goes. Some are missing if `stop` is set before the end: then it
    /// is false.
    ///
    /// # Errors
    /// When the input can't be read, the output not written, or the lane fails.
    pub fn run(
        &mut self,
        input: &mut Lines,
        done: &LineSet,
        writer: &mut Writer,
        stop: &AtomicBool,
        mut tell: impl FnMut(Status),
    ) -> Result<bool> {
        let mut totals = Totals::default();
        while !stop.load(Ordering::Relaxed) {
            let mut batch = SuperBatch::default();
            while batch.rows < self.rows && batch.bytes < MOST_BYTES {
                let Some(line) = input.take_window(done, 1, 1)?.pop() else { break };
                batch.push(line, &self.reader);
            }
            if batch.items.is_empty() {
                return Ok(true);
            }
            let (lines, passages) = (batch.items.len() as u64, &batch.passages);
            let mut scores = Vec::with_capacity(passages.len());
            for (part, rows) in parts(passages, self.rows) {
                let done = scores.len() as f64;
                let tell_part = |share: f64| {
                    let part = (done + share * part.len() as f64) / passages.len() as f64;
                    tell(Status { totals, lines, part });
                };
                let Some(scored) = self.lane.score(part, stop, tell_part)? else { return Ok(false) };
                scores.extend(scored);
                totals.tokens += part.iter().map(|passage| passage.computed() as u64).sum::<u64>();
                totals.rows += rows as u64;
                totals.batches += 1;
            }
            let mut scores = scores.into_iter();
            for read in batch.items {
                let own: Vec<Scored> = scores.by_ref().take(read.passages).collect();
                let line = line(read, &own, &self.teller);
                totals.lines += 1;
                totals.failed += u64::from(line.told.failed);
                writer.write(line)?;
            }
            writer.sync()?;
            tell(Status { totals, lines: 0, part: 0.0 });
        }
        Ok(false)
    }
}

/// Passages in parts of about `most` rows, with their rows: one, but for an item that alone has more.
fn parts(passages: &[Passage], most: usize) -> Vec<(&[Passage], usize)> {
    let mut parts = Vec::new();
    let (mut start, mut rows) = (0, 0);
    for (index, passage) in passages.iter().enumerate() {
        if rows >= most {
            parts.push((&passages[start..index], rows));
            (start, rows) = (index, 0);
        }
        rows += rows_after(passages[start..index].last(), passage);
    }
    if start < passages.len() {
        parts.push((&passages[start..], rows));
    }
    parts
}

/// The line of the output.
fn line(read: Read, scores: &[Scored], teller: &Teller) -> Finished {
    let (id, outcome) = match read.item {
        Ok(item) => (item.id.clone(), teller.tell(&item, scores)),
        Err((id, reason)) => (id, Err(reason)),
    };
    let mut told = Map::new();
    told.insert("line".to_owned(), read.number.into());
    told.extend(id.map(|id| ("id".to_owned(), id)));
    let failed = outcome.is_err();
    match outcome {
        Ok(scores) => told.extend(scores),
        Err(reason) => {
            told.insert("error".to_owned(), json!({"message": format!("line {}: {reason}", read.number)}));
        }
    }
    Finished { told: Told { number: read.number, failed }, text: Value::Object(told).to_string() }
}

/// What a line of the output is of.
pub fn told(line: &[u8]) -> Option<Told> {
    let line: Map<String, Value> = serde_json::from_slice(line).ok()?;
    Some(Told { number: line.get("line")?.as_u64()?, failed: line.contains_key("error") })
}
