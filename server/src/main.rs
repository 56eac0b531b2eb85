//! `cadre`: serves mixture-of-experts language models on small hardware.
//!
//! [`cli`] has one file a subcommand, [`http`] one file an endpoint. Both start an engine with [`engine`] and ask
//! it through [`generation`]; [`adapters`] has those that are served beside the model; [`finetune`] trains, [`storage`] keeps what
//! outlives a server, and [`turns`] work on it one after the other; [`batch`] and [`score`] work on the lines of a file, whose long runs [`lines`] keeps whole; [`metrics`] counts. [`measure`] and [`plan`] tell beforehand how fast it will be.

mod adapters;
mod batch;
mod cli;
mod engine;
mod finetune;
mod generation;
mod host;
mod http;
mod lines;
mod measure;
mod memory;
mod metrics;
mod plan;
mod profile;
mod progress;
mod random;
mod routing_trace;
mod score;
mod storage;
#[cfg(test)]
mod testing;
mod turns;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
