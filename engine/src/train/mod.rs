//! The parts of a trainer that know no model: what is trained, and how a gradient changes it.

pub mod guard;
pub mod optimizer;
pub mod parameters;
pub mod schedule;
