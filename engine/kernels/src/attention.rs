//! Causal attention over paged keys and values, with an online softmax (Milakov and Gimelshein, arXiv:1805.02867).
//!
//! - `storage.rs`: what a block looks like, and how rows get there.
//! - `walk.rs`: a query walks the blocks of its sequence in order, in steps that begin at multiples of the same number
//!   of tokens, whatever else is in the batch: its result depends on nothing else. All query heads of a group, and the
//!   rows of a prefill chunk, share each step's keys and values while they are in the nearest cache.
//! - `portable.rs` has the two products as they are meant; `avx2.rs` and `avx512.rs` as vectors.
//!
//! The tier with `vdpbf16ps` multiplies bf16: it rounds queries and weights, and turns int8 into bf16, which is exact.
//! The others, and f32 keys and values on every tier, multiply f32.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
mod storage;
mod walk;

use half::bf16;

pub use self::storage::{KvDtype, write_kv};
use self::{portable::Portable, walk::Task};
use crate::{activation::LANES, isa::Isa, pool::Pool, shared::SharedSlice};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = LANES;
/// Queries that one task takes: enough to share each step, few enough to spread over the threads.
const TASK_QUERIES: usize = 48;

/// The sizes of a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionLayout {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; each serves `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How keys and values are stored.
    pub dtype: KvDtype,
}

/// One sequence's rows of the batch.
#[derive(Debug, Clone, Copy)]
pub struct PagedSequence<'a> {
    /// Index of its first row in the batch.
    pub first_row: usize,
    /// The rows' positions, ascending without gaps: the last is `context_len - 1`.
    pub rows: usize,
    /// Tokens in the cache, this step's included.
    pub context_len: usize,
    /// The blocks that hold them.
    pub block_table: &'a [u32],
}

impl PagedSequence<'_> {
    fn first_position(&self) -> usize {
        self.context_len - self.rows
    }
}

/// The queries of a batch, and what they attend to.
#[derive(Debug, Clone, Copy)]
pub struct AttentionInput<'a> {
    /// The sizes.
    pub layout: AttentionLayout,
    /// What scores are multiplied with.
    pub scale: f32,
    /// The sequences that the rows belong to.
    pub sequences: &'a [PagedSequence<'a>],
    /// `[rows, num_heads · head_dim]`
    pub queries: &'a [f32],
}

/// `out[row, head] = softmax(scale · query · keys) · values` over the row's position and all before it in its
/// sequence; `out` is `[rows, num_heads · head_dim]`, `cache` what [`write_kv`] wrote.
///
/// # Panics
/// When a slice has not the size that the layout needs, or a block lies outside of the cache.
pub fn paged_attention(pool: &Pool, isa: Isa, input: &AttentionInput<'_>, cache: &[u8], out: &mut [f32]) {
    assert_eq!(input.queries.len(), out.len(), "queries and outputs");
    let kv_heads = input.layout.num_kv_heads;
    let task_rows = (TASK_QUERIES * kv_heads / input.layout.num_heads).max(1);
    let mut tasks: Vec<Task<'_>> = input
        .sequences
        .iter()
        .flat_map(|sequence| {
            (0..sequence.rows).step_by(task_rows).flat_map(move |start| {
                let rows = start..sequence.rows.min(start + task_rows);
                (0..kv_heads).map(move |kv_head| Task { sequence, rows: rows.clone(), kv_head })
            })
        })
        .collect();
    // The longest first, so that the ends of the threads meet.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.rows.len() * (task.sequence.first_position() + task.rows.end)));
    let target = SharedSlice::new(out);
    pool.run(tasks.len(), |index| {
        let task = &tasks[index];
        // SAFETY: a tier other than portable exists only where `Isa::available` found it; no two tasks share rows
        // and heads.
        unsafe {
            match (isa, input.layout.dtype) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Bf16, KvDtype::Bf16) => avx512::attend_bf16::<bf16>(task, input, cache, &target),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Bf16, KvDtype::Int8) => avx512::attend_bf16::<i8>(task, input, cache, &target),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx, KvDtype::F32) => {
                    avx512::attend::<f32>(task, input, cache, &target)
                }
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512 | Isa::Amx, KvDtype::Bf16) => avx512::attend::<bf16>(task, input, cache, &target),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512 | Isa::Amx, KvDtype::Int8) => avx512::attend::<i8>(task, input, cache, &target),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, KvDtype::F32) => avx2::attend::<f32>(task, input, cache, &target),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, KvDtype::Bf16) => avx2::attend::<bf16>(task, input, cache, &target),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, KvDtype::Int8) => avx2::attend::<i8>(task, input, cache, &target),
                (_, KvDtype::F32) => walk::attend::<f32, Portable>(task, input, cache, &target),
                (_, KvDtype::Bf16) => walk::attend::<bf16, Portable>(task, input, cache, &target),
                (_, KvDtype::Int8) => walk::attend::<i8, Portable>(task, input, cache, &target),
            }
        }
    });
}

#[cfg(test)]
mod tests;
