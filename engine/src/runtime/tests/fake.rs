//! A model whose every logit follows from all tokens of the sequence, read back through the block table: if a block
//! were lost, mixed up or stale, the tokens would change.

use std::sync::{
    Mutex,
    mpsc::{Receiver, Sender, channel},
};

use candle_core::Device;

use crate::{
    Error, Result, Tensor,
    experts::{ExpertId, FetchError},
    kv::blocks::BLOCK_SIZE,
    model::{LayerRoutes, Model, ModelInfo, SequenceRows, StepContext},
    ops::{self, Routes},
};

pub(crate) const VOCAB: usize = 64;
/// Rows with this token need an expert that can't be read.
pub(crate) const UNREADABLE: u32 = 60;
/// A step with this token returns an error.
pub(crate) const FAILS: u32 = 61;
/// A step with this token panics.
pub(crate) const PANICS: u32 = 62;
/// Logits of a sequence with this token are not finite.
pub(crate) const POISONS: u32 = 63;

pub(crate) struct Fake {
    info: ModelInfo,
    /// The token in each place of each block, in place of its key and value.
    storage: Mutex<Vec<u32>>,
    /// Told when a step has come to the model.
    reached: Mutex<Sender<()>>,
    /// Each step takes one; when the sender is gone, steps are free.
    permits: Mutex<Receiver<()>>,
}

/// Holds the model's steps until it is dropped.
pub(crate) struct Gate {
    /// Gets one for each step that has come to the model.
    pub(super) reached: Receiver<()>,
    /// One lets one step go on.
    pub(super) permits: Sender<()>,
}

impl Fake {
    /// The model, and what holds it.
    pub(crate) fn new(num_blocks: usize) -> (Self, Gate) {
        let (permits, taken) = channel();
        let (reaches, reached) = channel();
        let info = ModelInfo {
            num_layers: 2,
            hidden_size: 2,
            vocab_size: VOCAB,
            num_kv_heads: 1,
            head_dim: 16,
            max_position_embeddings: 4096,
            total_parameters: 0,
            active_parameters: 0,
            head_parameters: 0,
            weight_bytes: 0,
            dense_bytes: 0,
            head_bytes: 0,
            moe_layers: Vec::new(),
        };
        let storage = Mutex::new(vec![u32::MAX; num_blocks * BLOCK_SIZE]);
        let fake = Self { info, storage, reached: Mutex::new(reaches), permits: Mutex::new(taken) };
        (fake, Gate { reached, permits })
    }

    fn states(storage: &mut [u32], step: &StepContext<'_>, sequence: &SequenceRows) -> Vec<f32> {
        let place = |at: usize| sequence.block_table[at / BLOCK_SIZE] as usize * BLOCK_SIZE + at % BLOCK_SIZE;
        for row in sequence.rows.clone() {
            storage[place(step.batch.positions[row] as usize)] = step.batch.token_ids[row];
        }
        let context: Vec<u32> = (0..sequence.context_len).map(|at| storage[place(at)]).collect();
        let positions = sequence.rows.clone().map(|row| step.batch.positions[row] as usize);
        positions.flat_map(|at| state(&context[..=at])).collect()
    }
}

impl Model for Fake {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn embed(&self, step: &mut StepContext<'_>) -> Result<Tensor> {
        // Either fails once the gate is gone, and means: go on.
        let _ = self.reached.lock().expect("no step panics while it holds the lock").send(());
        let _ = self.permits.lock().expect("no step panics while it holds the lock").recv();
        assert!(!step.batch.token_ids.contains(&PANICS), "the fake model panics");
        if step.batch.token_ids.contains(&FAILS) {
            return Err(Error::Config("the fake model fails".into()));
        }
        let mut storage = self.storage.lock().expect("no step panics while it holds the lock");
        let states: Vec<f32> =
            step.batch.sequences.iter().flat_map(|sequence| Self::states(&mut storage, step, sequence)).collect();
        let rows = (0..).zip(&step.batch.token_ids).filter(|(_, token)| **token == UNREADABLE);
        let rows: Vec<u32> = rows.map(|(row, _)| row).collect();
        if !rows.is_empty() {
            let id = ExpertId { layer: 2, expert: 5 };
            let error = FetchError { id, tier: "the fake model".to_owned(), reason: "as asked for".to_owned() };
            return Err(Error::Fetch { error, rows });
        }
        Ok(Tensor::from_vec(states, (step.batch.token_ids.len(), 2), &Device::Cpu)?)
    }

    /// The first layer routes nothing, the second by what the sequence holds.
    fn layer(&self, step: &mut StepContext<'_>, layer: usize, hidden: Tensor) -> Result<Tensor> {
        if let Some(noted) = step.routes.as_mut().filter(|_| layer == 1) {
            let experts =
                ops::values(&hidden, |states| Ok(states.chunks_exact(2).flat_map(experts_of).collect::<Vec<_>>()))?;
            let weights = vec![0.5; experts.len()];
            noted.push(LayerRoutes { layer, routes: Routes { top_k: 2, experts, weights } });
        }
        Ok(hidden)
    }

    fn head(&self, _: &mut StepContext<'_>, hidden: &Tensor) -> Result<Tensor> {
        let rows = hidden.dims()[0];
        let logits = ops::values(hidden, |states| Ok(states.chunks_exact(2).flat_map(logits_of).collect::<Vec<_>>()))?;
        Ok(Tensor::from_vec(logits, (rows, VOCAB), &Device::Cpu)?)
    }
}

/// Two numbers that stand for everything that the sequence holds so far.
fn state(context: &[u32]) -> [f32; 2] {
    if context.contains(&POISONS) {
        return [f32::NAN; 2];
    }
    let hash = context.iter().fold(1_u64, |hash, &token| mix(hash ^ u64::from(token)));
    [(hash & 0xffff) as f32, (hash >> 48) as f32]
}

fn experts_of(state: &[f32]) -> [u32; 2] {
    [state[0] as u32 % 8, 8 + state[1] as u32 % 8]
}

/// The experts that must be told of tokens from `from` on: none of the first layer, then two.
pub(super) fn routed(tokens: &[u32], from: usize) -> Vec<u32> {
    (from..tokens.len()).flat_map(|at| [[0; 2], experts_of(&state(&tokens[..=at]))].concat()).collect()
}

fn logits_of(state: &[f32]) -> Vec<f32> {
    let seed = state[0] as u64 | (state[1] as u64) << 16;
    let logit = |token: u64| if state[0].is_nan() { f32::NAN } else { (mix(seed << 8 | token) % 997) as f32 * 0.01 };
    // The tokens that make a step fail are never generated.
    (0..VOCAB as u64).map(|token| logit(token) - if token >= u64::from(UNREADABLE) { 1000.0 } else { 0.0 }).collect()
}

fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (value ^ value >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ value >> 32
}

/// The logits after these tokens.
pub(crate) fn logits(context: &[u32]) -> Vec<f32> {
    logits_of(&state(context))
}

/// What greedy decoding must give.
pub(super) fn greedy(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let logits = logits(&tokens);
        let best = (0..VOCAB).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a token");
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}
