//! Passages as requests to the runtime, for models that memory holds.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use cadre_engine::{
    request::{Event, RequestError, Scores},
    runtime::RuntimeHandle,
    score::{Passage, in_turn},
};

use super::result::Scored;

/// How often a look is taken at whether to stop.
const TICK: Duration = Duration::from_millis(100);

/// Scores `passages`, with at most `in_flight` of them under way; `tell` is told how many passages are done. None if `stop` is
/// set before the end.
///
/// # Errors
/// When the runtime can't go on.
pub fn score(
    runtime: &RuntimeHandle,
    in_flight: usize,
    passages: &[Passage],
    stop: &AtomicBool,
    mut tell: impl FnMut(usize),
) -> Result<Option<Vec<Scored>>> {
    let mut ready = VecDeque::new();
    let mut waiting: HashMap<usize, Vec<usize>> = HashMap::new();
    for (index, needs) in in_turn(passages) {
        match needs {
            Some(needs) => waiting.entry(needs).or_default().push(index),
            None => ready.push_back(index),
        }
    }
    let mut scored: Vec<Option<Scored>> = vec![None; passages.len()];
    let mut tickets = HashMap::new();
    let (sender, receiver) = mpsc::channel();
    let mut done = 0;
    while done < passages.len() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        while let Some(index) = ready.pop_front_if(|_| tickets.len() < in_flight) {
            let sender = sender.clone();
            let sink = move |event| {
                let outcome: Result<Scores, RequestError> = match event {
                    Event::Scores(scores) => Ok(scores),
                    Event::Failed(error) => Err(error),
                    _ => return,
                };
                // Nobody listens once the run is over.
                let _ = sender.send((index, outcome));
            };
            let ticket = runtime.submit(passages[index].clone().request(), sink);
            tickets.insert(index, ticket.context("the engine doesn't take a passage")?);
        }
        let (index, outcome) = match receiver.recv_timeout(TICK) {
            Ok(told) => told,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => bail!("the engine has ended"),
        };
        scored[index] = Some(match outcome {
            Ok(scores) => Ok(scores),
            Err(RequestError::Internal(reason)) => Err(reason),
            Err(error) => return Err(error.into()),
        });
        tickets.remove(&index);
        ready.extend(waiting.remove(&index).unwrap_or_default());
        done += 1;
        tell(done);
    }
    Ok(scored.into_iter().collect())
}
