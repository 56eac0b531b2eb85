//! The server, seen from the outside: what it answers, how it behaves under load, and how it ends.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

mod adapters;
mod batches;
mod chat;
mod completions;
mod concurrency;
mod ending;
mod errors;
mod formats;
mod gateway;
mod jobs;
mod leaving;
mod routed_experts;
mod routes;
mod scores;
