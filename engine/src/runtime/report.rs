//! What an observer is told after each step.

use crate::model::LayerRoutes;

/// One step, or a change while no step ran. The first four, and the adapters, are the state afterwards; the others count what happened
/// since the last report, so that adding them up over all reports gives totals.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepReport {
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait, new or preempted.
    pub waiting: usize,
    /// KV blocks that sequences hold; cached blocks that nobody holds are not among them.
    pub kv_blocks_used: usize,
    /// KV blocks in all.
    pub kv_blocks_total: usize,
    /// Tokens that went through the model.
    pub scheduled_tokens: usize,
    /// Those of them that are prompts' tokens. After a preemption they count again.
    pub prompt_tokens: usize,
    /// Tokens that were chosen.
    pub generated_tokens: usize,
    /// Sequences that had to give their blocks back.
    pub preemptions: usize,
    /// Prompt tokens that were looked for in the prefix cache.
    pub prefix_queries: u64,
    /// Those that were found.
    pub prefix_hits: u64,
    /// Requests that were cancelled.
    pub cancelled: Cancelled,
    /// Requests that failed.
    pub failed: usize,
    /// How long the step took; 0 if none ran.
    pub step_seconds: f64,
    /// The names of adapters that running sequences have, ascending, each once.
    pub running_adapters: Vec<String>,
    /// The names of adapters that waiting sequences have, likewise.
    pub waiting_adapters: Vec<String>,
    /// What the routers chose in the step, if the runtime was to say so.
    pub routes: Vec<LayerRoutes>,
}

/// Cancelled requests by how far they had come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cancelled {
    /// None of the request's sequences was running.
    pub queue: usize,
    /// Its prompt was being computed.
    pub prefill: usize,
    /// It was generating.
    pub decode: usize,
}
