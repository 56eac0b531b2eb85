//! What the end-to-end tests share. They run the real binary, as a user would, and see it from the outside only.
//!
//! - [`binary`]: builds `cadre` once, and runs its subcommands.
//! - [`server`]: a `cadre serve` on a free port, ended when it is dropped.
//! - [`client`]: plain HTTP, and server-sent events.
//! - [`metrics`]: what `/metrics` says.
//! - [`npy`]: NumPy's files.
//! - [`heldout`]: questions and answers for the embedded model.
//! - [`checkpoint`], [`adapter`]: random checkpoints and adapters, written on the fly.
//! - [`peak`]: how much memory a run takes.
//! - [`python`]: a virtual environment with pinned packages.
//! - [`source`]: the workspace's own files, for tests about its structure.
//!
//! Everything here panics with a message when it fails: that is what a test wants.

#![expect(clippy::panic, reason = "a test helper that fails fails the test")]

pub mod adapter;
pub mod binary;
pub mod checkpoint;
pub mod client;
pub mod heldout;
pub mod metrics;
pub mod npy;
pub mod peak;
pub mod python;
pub mod server;
pub mod source;

use std::time::{Duration, Instant};

/// Waits until `condition` holds.
///
/// # Panics
/// When it doesn't within `seconds`; `what` says what was waited for.
#[track_caller]
pub fn wait_for(what: &str, seconds: u64, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < deadline, "waited {seconds} s for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
