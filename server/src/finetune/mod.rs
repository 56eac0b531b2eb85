//! What a fine-tuning run leaves behind for those who watch it and look back at it.

pub mod report;
pub mod step_log;
pub mod tensorboard;
