//! A whole file's lines: read in windows, answered many at a time, written as they finish.
//!
//! Three stages beside each other, with short queues between them: a thread reads and sorts, tasks ask the engine, a thread
//! writes. What memory holds is a window, the requests under way, and answers that wait for earlier ones: of all these as many
//! as a window has lines, for one is begun only then.

use std::{
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc as blocking,
    },
    thread,
    time::Duration,
};

use anyhow::{Result, anyhow};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use super::{Answered, Answerer, order};
use crate::lines::{LineSet, input, output::Writer};

/// How often a look is taken at whether to stop.
const TICK: Duration = Duration::from_millis(100);
/// Answers that may wait for the disk.
const UNWRITTEN: usize = 1024;
/// Bytes of a window, and of the lines that are asked at a time: a line more may be of either.
const MOST_BYTES: usize = 16 << 20;

/// How much is taken at a time.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Lines that are asked at a time.
    pub in_flight: usize,
    /// Lines that are sorted at a time, and that are begun and not written: at least as many as are asked.
    pub window: usize,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All lines are written.
    Finished,
    /// It was told to stop; what is written is whole.
    Stopped,
}

/// Puts all lines that aren't `done` through, and shows every answer to `see`, until `stop` is set.
///
/// # Errors
/// When the input can't be read, or the output not written.
pub async fn run(
    answerer: Answerer,
    input: input::Lines,
    done: LineSet,
    writer: Writer,
    limits: Limits,
    stop: &AtomicBool,
    mut see: impl FnMut(&Answered),
) -> Result<Ended> {
    let (read, mut to_ask) = mpsc::channel(1);
    let (written, to_write) = blocking::sync_channel(UNWRITTEN);
    // Holds a place for each line that is begun. All lines of a window come before the next one's, so those that wait for a line
    // that isn't begun are of its own window, and leave a place for it.
    let (begin, begun) = blocking::sync_channel(limits.window);
    let reading = thread::spawn(move || read_windows(input, &done, limits, &begin, &read));
    let writing = thread::spawn(move || {
        writer.write_all(&to_write, || {
            let _ = begun.try_recv();
        })
    });
    let mut asked = JoinSet::new();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut is_read, mut asked_bytes, mut failure) = (false, 0, None);
    while !is_read || !asked.is_empty() {
        tokio::select! {
            line = to_ask.recv(), if !is_read && asked.len() < limits.in_flight && asked_bytes < MOST_BYTES => match line {
                Some(line) => {
                    let (answerer, bytes) = (answerer.clone(), line.text.as_ref().map_or(0, String::len));
                    asked_bytes += bytes;
                    asked.spawn(async move { (answerer.answer(&line).await, bytes) });
                }
                None => is_read = true,
            },
            Some(answered) = asked.join_next() => match answered {
                Ok((answered, bytes)) => {
                    asked_bytes -= bytes;
                    see(&answered);
                    // Fails only if the writer has ended, which then says why.
                    if written.send(answered.line).is_err() {
                        break;
                    }
                }
                Err(error) => {
                    failure = Some(anyhow!(error).context("a line was lost"));
                    break;
                }
            },
            _ = ticks.tick() => if stop.load(Ordering::Relaxed) { break },
        }
    }
    let ended = if is_read && asked.is_empty() { Ended::Finished } else { Ended::Stopped };
    // Nobody waits for those under way any more.
    asked.shutdown().await;
    drop((to_ask, written));
    for thread in [reading, writing] {
        thread.join().map_err(|_| anyhow!("a thread has failed"))??;
    }
    failure.map_or(Ok(ended), Err)
}

/// Sends the lines that aren't done, window by window, until nobody wants them.
fn read_windows(
    mut input: input::Lines,
    done: &LineSet,
    limits: Limits,
    begin: &blocking::SyncSender<()>,
    lines: &mpsc::Sender<input::Line>,
) -> Result<()> {
    loop {
        let window = input.take_window(done, limits.window, MOST_BYTES)?;
        if window.is_empty() {
            return Ok(());
        }
        for line in order::sorted(window) {
            if begin.send(()).is_err() || lines.blocking_send(line).is_err() {
                return Ok(());
            }
        }
    }
}
