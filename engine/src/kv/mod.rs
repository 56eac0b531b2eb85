//! The paged KV cache: [`blocks`] keeps the books, [`KvCache`] holds the keys and values.

pub mod blocks;

pub use cadre_kernels::attention::KvDtype;
use cadre_kernels::{
    attention::{AttentionInput, AttentionLayout, PagedSequence, paged_attention, write_kv},
    buffer::{AllocError, Buffer},
};

use crate::{Error, Result, compute::Compute, model::StepBatch};

/// The keys and values of all layers, in blocks of [`blocks::BLOCK_SIZE`] tokens.
pub struct KvCache {
    num_kv_heads: usize,
    head_dim: usize,
    dtype: KvDtype,
    num_blocks: usize,
    /// One that all layers use in turn, or one for each.
    layers: Vec<Buffer>,
    in_turn: bool,
}

impl KvCache {
    /// A cache of `num_blocks` blocks in each of `num_layers` layers. Its memory is taken as blocks are first used.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(
        num_layers: usize,
        num_kv_heads: usize,
        head_dim: usize,
        num_blocks: usize,
        dtype: KvDtype,
    ) -> Result<Self> {
        let bytes = Self::block_bytes(1, num_kv_heads, head_dim, dtype)
            .checked_mul(num_blocks)
            .ok_or_else(|| AllocError { bytes: usize::MAX, reason: format!("{num_blocks} KV blocks overflow") })?;
        let layers = (0..num_layers).map(|_| Buffer::zeroed(bytes)).collect::<Result<_, _>>()?;
        Ok(Self { num_kv_heads, head_dim, dtype, num_blocks, layers, in_turn: false })
    }

    /// A cache that holds the keys and values of one layer at a time, for who goes on to the next one when it is done with all
    /// tokens of the last.
    ///
    /// # Errors
    /// As [`KvCache::new`].
    pub fn layer_by_layer(num_kv_heads: usize, head_dim: usize, num_blocks: usize, dtype: KvDtype) -> Result<Self> {
        Ok(Self { in_turn: true, ..Self::new(1, num_kv_heads, head_dim, num_blocks, dtype)? })
    }

    /// Bytes of one block over all layers.
    #[must_use]
    pub fn block_bytes(num_layers: usize, num_kv_heads: usize, head_dim: usize, dtype: KvDtype) -> usize {
        num_layers * AttentionLayout { num_heads: num_kv_heads, num_kv_heads, head_dim, dtype }.block_bytes()
    }

    /// Blocks.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Writes the batch's keys and values `[tokens, num_kv_heads · head_dim]` of layer `layer`, then attends: `queries`
    /// and `out` are `[tokens, heads · head_dim]`.
    pub(crate) fn attend(
        &mut self,
        compute: &Compute,
        batch: &StepBatch,
        layer: usize,
        io: AttentionIo<'_>,
    ) -> Result<()> {
        let layout = self.layout(io.queries.len(), batch)?;
        let sequences: Vec<_> = batch
            .sequences
            .iter()
            .map(|sequence| PagedSequence {
                first_row: sequence.rows.start,
                rows: sequence.rows.len(),
                context_len: sequence.context_len,
                block_table: &sequence.block_table,
            })
            .collect();
        let AttentionIo { scale, queries, keys, values, out } = io;
        let input = AttentionInput { layout, scale, sequences: &sequences, queries };
        let cache = &mut self.layers[if self.in_turn { 0 } else { layer }];
        write_kv(&compute.pool, &layout, &sequences, keys, values, cache);
        paged_attention(&compute.pool, compute.isa, &input, cache, out);
        Ok(())
    }

    fn layout(&self, query_values: usize, batch: &StepBatch) -> Result<AttentionLayout> {
        let per_token = query_values / batch.token_ids.len().max(1);
        let num_heads = per_token / self.head_dim;
        if num_heads * self.head_dim != per_token || !num_heads.is_multiple_of(self.num_kv_heads) {
            return Err(Error::Shape {
                what: "queries against the KV cache".into(),
                expected: vec![batch.token_ids.len(), self.num_kv_heads * self.head_dim],
                found: vec![batch.token_ids.len(), per_token],
            });
        }
        let Self { num_kv_heads, head_dim, dtype, .. } = *self;
        Ok(AttentionLayout { num_heads, num_kv_heads, head_dim, dtype })
    }
}

/// What attention reads and writes besides the cache.
pub(crate) struct AttentionIo<'a> {
    pub scale: f32,
    pub queries: &'a [f32],
    pub keys: &'a [f32],
    pub values: &'a [f32],
    pub out: &'a mut [f32],
}
