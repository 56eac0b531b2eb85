//! How the cache stores keys and values.
//!
//! A block holds [`BLOCK_TOKENS`] tokens of one layer, and for each key/value head one contiguous stretch:
//!
//! | part | form |
//! |---|---|
//! | keys | one panel: `[places / pair][16 tokens][pair of places]` |
//! | values | `places / 16` panels: `[16 tokens / pair][16 places][pair of tokens]` |
//! | scales, `int8` only | f32 `[16]` of the keys, then `[16]` of the values: one a token |
//!
//! Both are panels of the products' form: a register holds the same place of 16 keys, or the same token of 16 places.
//! A pair is two values that lie together, as `vdpbf16ps` takes them; f32 has none. The places of a head are padded to
//! a multiple of 16 with zeros. One form serves all tiers.

use std::fmt;

use half::bf16;

use super::{AttentionLayout, BLOCK_TOKENS, PagedSequence};
use crate::{activation::LANES, format::round_to_bf16, pool::Pool, shared::SharedSlice};

/// Rows from which on writing is spread over the threads: below, a wake-up costs more than the work.
const PARALLEL_ROWS: usize = 32;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// 32-bit floats.
    F32,
    /// bf16: half the memory.
    Bf16,
    /// Integers of -127 to 127 with one f32 scale a token and head, the largest absolute value / 127: about a quarter.
    Int8,
}

impl KvDtype {
    fn value_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Int8 => 1,
        }
    }

    fn scale_bytes(self) -> usize {
        if self == Self::Int8 { 2 * BLOCK_TOKENS * size_of::<f32>() } else { 0 }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        })
    }
}

impl AttentionLayout {
    /// Bytes of one block: keys and values of 16 tokens.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.num_kv_heads * self.head_bytes()
    }

    /// Places of a head with their padding.
    pub(super) fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Values of the keys of one head of a block; as many as those of its values.
    pub(super) fn keys_len(&self) -> usize {
        self.padded_dim() * BLOCK_TOKENS
    }

    fn head_bytes(&self) -> usize {
        2 * self.keys_len() * self.dtype.value_bytes() + self.dtype.scale_bytes()
    }

    fn head_at(&self, block: u32, kv_head: usize) -> usize {
        block as usize * self.block_bytes() + kv_head * self.head_bytes()
    }
}

/// A stored value.
pub(super) trait Stored: Copy + Send + Sync + sealed::Plain {
    /// Neighbours that lie together: places of a key, tokens of a place's values.
    const PAIR: usize;
    /// Whether a token has a scale.
    const SCALED: bool;

    /// The scale of one token's values of one head.
    fn scale(values: &[f32]) -> f32;

    /// Rounds `value`; `inverse` is 1 / scale.
    fn store(value: f32, inverse: f32) -> Self;
}

mod sealed {
    /// Keeps [`super::Stored`] to types of which all bytes are values.
    pub trait Plain {}
    impl Plain for f32 {}
    impl Plain for half::bf16 {}
    impl Plain for i8 {}
}

impl Stored for f32 {
    const PAIR: usize = 1;
    const SCALED: bool = false;

    fn scale(_: &[f32]) -> f32 {
        1.0
    }

    fn store(value: f32, _: f32) -> Self {
        value
    }
}

impl Stored for bf16 {
    const PAIR: usize = 2;
    const SCALED: bool = false;

    fn scale(_: &[f32]) -> f32 {
        1.0
    }

    fn store(value: f32, _: f32) -> Self {
        Self::from_bits(round_to_bf16(value))
    }
}

impl Stored for i8 {
    const PAIR: usize = 2;
    const SCALED: bool = true;

    fn scale(values: &[f32]) -> f32 {
        // As integers, since `f32::max` would drop a NaN, and the row would look sound.
        let max = values.iter().map(|x| x.abs().to_bits()).max().map_or(0.0, f32::from_bits);
        max / 127.0
    }

    fn store(value: f32, inverse: f32) -> Self {
        /// Adding and subtracting 1.5 · 2^23 rounds to an integer, without a call.
        const ROUND: f32 = 12_582_912.0;
        // The cast turns a NaN into 0; its scale stays NaN.
        ((value * inverse).clamp(-127.0, 127.0) + ROUND - ROUND) as Self
    }
}

/// One head of one block.
pub(super) struct Head<'a, T> {
    pub keys: &'a [T],
    pub values: &'a [T],
    /// `[2, 16]`: of keys, of values; empty unless `T::SCALED`.
    pub scales: &'a [f32],
}

impl<'a, T: Stored> Head<'a, T> {
    #[inline(always)]
    pub(super) fn new(layout: &AttentionLayout, cache: &'a [u8], block: u32, kv_head: usize) -> Self {
        let bytes = head_bytes(layout, cache, block, kv_head);
        let (stored, scales) = bytes.split_at(2 * layout.keys_len() * size_of::<T>());
        let (keys, values) = plain(stored).split_at(layout.keys_len());
        Self { keys, values, scales: plain(scales) }
    }
}

/// The bytes of one head of one block.
#[inline(always)]
pub(super) fn head_bytes<'a>(layout: &AttentionLayout, cache: &'a [u8], block: u32, kv_head: usize) -> &'a [u8] {
    &cache[layout.head_at(block, kv_head)..][..layout.head_bytes()]
}

/// # Panics
/// When the bytes don't lie where a `T` may.
#[inline(always)]
fn plain<T: sealed::Plain>(bytes: &[u8]) -> &[T] {
    // SAFETY: all bytes are values of a plain type.
    let (before, values, after) = unsafe { bytes.align_to() };
    assert!(before.is_empty() && after.is_empty(), "the cache lies at a multiple of 4 bytes");
    values
}

/// # Panics
/// As [`plain`].
fn plain_mut<T: sealed::Plain>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: all bytes are values of a plain type, and all of its values are bytes.
    let (before, values, after) = unsafe { bytes.align_to_mut() };
    assert!(before.is_empty() && after.is_empty(), "the cache lies at a multiple of 4 bytes");
    values
}

/// Writes the keys and values `[rows, num_kv_heads · head_dim]` of the batch's rows to the cache of one layer, which
/// lies at a multiple of 4 bytes.
///
/// # Panics
/// When a slice has not the size that the layout needs, or a block lies outside of the cache.
pub fn write_kv(
    pool: &Pool,
    layout: &AttentionLayout,
    sequences: &[PagedSequence<'_>],
    keys: &[f32],
    values: &[f32],
    cache: &mut [u8],
) {
    let cache = SharedSlice::new(cache);
    let write = |kv_head| match layout.dtype {
        KvDtype::F32 => write_head::<f32>(layout, sequences, keys, values, &cache, kv_head),
        KvDtype::Bf16 => write_head::<bf16>(layout, sequences, keys, values, &cache, kv_head),
        KvDtype::Int8 => write_head::<i8>(layout, sequences, keys, values, &cache, kv_head),
    };
    if sequences.iter().map(|sequence| sequence.rows).sum::<usize>() < PARALLEL_ROWS {
        (0..layout.num_kv_heads).for_each(write);
    } else {
        pool.run(layout.num_kv_heads, write);
    }
}

fn write_head<T: Stored>(
    layout: &AttentionLayout,
    sequences: &[PagedSequence<'_>],
    keys: &[f32],
    values: &[f32],
    cache: &SharedSlice<u8>,
    kv_head: usize,
) {
    let (head_dim, width) = (layout.head_dim, layout.num_kv_heads * layout.head_dim);
    for sequence in sequences {
        for index in 0..sequence.rows {
            let position = sequence.first_position() + index;
            let (block, token) = (sequence.block_table[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
            let source = (sequence.first_row + index) * width + kv_head * head_dim;
            // SAFETY: each head of a block belongs to one task, which holds one at a time.
            let bytes = unsafe { cache.part(layout.head_at(block, kv_head), layout.head_bytes()) };
            let (stored, scales) = bytes.split_at_mut(2 * layout.keys_len() * size_of::<T>());
            let (stored_keys, stored_values) = plain_mut::<T>(stored).split_at_mut(layout.keys_len());
            let (keys, values) = (&keys[source..source + head_dim], &values[source..source + head_dim]);
            let [key_scale, value_scale] = [keys, values].map(T::scale);
            if T::SCALED {
                let scales = plain_mut::<f32>(scales);
                (scales[token], scales[BLOCK_TOKENS + token]) = (key_scale, value_scale);
            }
            let [key_inverse, value_inverse] = [key_scale, value_scale].map(inverse);
            // A pair of places at a time; the padding was zero from the start and is never written.
            let target = stored_keys[token * T::PAIR..].chunks_mut(LANES * T::PAIR);
            for (target, keys) in target.zip(keys.chunks(T::PAIR)) {
                for (target, key) in target.iter_mut().zip(keys) {
                    *target = T::store(*key, key_inverse);
                }
            }
            for (target, values) in stored_values.chunks_exact_mut(LANES * BLOCK_TOKENS).zip(values.chunks(LANES)) {
                let row = &mut target[token / T::PAIR * LANES * T::PAIR..];
                for (target, value) in row.chunks_exact_mut(T::PAIR).zip(values) {
                    target[token % T::PAIR] = T::store(*value, value_inverse);
                }
            }
        }
    }
}

/// `1 / scale`, and 0 for a row of zeros.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}
