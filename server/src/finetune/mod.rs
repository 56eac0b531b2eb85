//! A fine-tuning run: from settings and data to an adapter.
//!
//! | part | does |
//! |---|---|
//! | [`args`] | flags, a config file, a job's hyperparameters: to settings |
//! | [`settings`] | what was asked for |
//! | [`affinity`] | the experts that the data use most, if those are trained |
//! | [`data`] | the examples, and which of them make which step |
//! | [`prepare`] | opens the model, finds what is trained, divides the memory; what `--dry-run` shows |
//! | [`run`](mod@run) | the steps |
//! | [`checkpoint`] | what a run needs to go on bit for bit |
//! | [`jobs`], [`hyperparameters`] | a server's runs, one at a time, and what they are asked for |
//! | [`step_log`], [`tensorboard`], [`report`] | what a run leaves behind for those who watch it and look back at it |

mod affinity;
mod args;
pub mod checkpoint;
mod data;
pub mod hyperparameters;
pub mod jobs;
mod prepare;
pub mod report;
mod run;
pub mod settings;
pub mod step_log;
pub mod tensorboard;

pub use args::FinetuneArgs;
pub use prepare::{Prepared, Weights};
pub use run::{Ended, Watcher, check_output, run};
