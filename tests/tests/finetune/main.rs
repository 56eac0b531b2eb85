//! Fine-tuning: step by step against PEFT, its adapters served, and through the binary.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

mod adapters;
mod learns;
mod merge;
mod methods;
mod parity;
mod runs;
