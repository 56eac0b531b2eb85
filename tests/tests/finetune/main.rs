//! Fine-tuning: step by step against PEFT, and through the binary.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

mod merge;
mod parity;
mod runs;
