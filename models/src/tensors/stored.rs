//! The number types that checkpoints store, and how their bytes become f32.

use std::fmt;

use cadre_engine::nn::Format;
use half::{bf16, f16};

use super::ALIGNMENT;

/// How a tensor's numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stored {
    /// One after the other, as checkpoints have them.
    Plain(StoredType),
    /// As the kernels take them: a pack's matrices and experts.
    Packed(Format),
}

impl Stored {
    /// What a safetensors header calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain(StoredType::F32) => "F32",
            Self::Plain(StoredType::F16) => "F16",
            Self::Plain(StoredType::Bf16) => "BF16",
            Self::Packed(_) => "U8",
        }
    }

    /// What its place in a pack is a multiple of, in bytes.
    pub(crate) fn alignment(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.bytes(),
            Self::Packed(_) => ALIGNMENT,
        }
    }
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Packed(format) => write!(f, "packed {format}"),
        }
    }
}

/// A number type that weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StoredType {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of 32-bit floats.
    Bf16,
}

impl StoredType {
    /// What transformers calls it.
    pub(crate) fn long_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The type that a safetensors header calls `name`.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        match name {
            "F32" => Some(Self::F32),
            "F16" => Some(Self::F16),
            "BF16" => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Bytes of one number.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Little-endian `bytes` as f32, exactly; as many numbers as fit both slices.
    pub(crate) fn widen(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => each(bytes, out, f32::from_le_bytes),
            Self::F16 => each(bytes, out, |two| f16::from_le_bytes(two).to_f32()),
            Self::Bf16 => each(bytes, out, |two| f32::from_bits(u32::from(u16::from_le_bytes(two)) << 16)),
        }
    }

    /// `values` as little-endian bytes, each rounded to the nearest number of this type, ties to even.
    pub(crate) fn round(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        }
    }
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], read: impl Fn([u8; N]) -> f32) {
    let (numbers, _) = bytes.as_chunks::<N>();
    for (value, number) in out.iter_mut().zip(numbers) {
        *value = read(*number);
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_pattern_widens_as_half_does() {
        for bits in 0..=u16::MAX {
            let mut out = [0.0];
            StoredType::F16.widen(&bits.to_le_bytes(), &mut out);
            assert_eq!(out[0].to_bits(), f16::from_bits(bits).to_f32().to_bits());
            StoredType::Bf16.widen(&bits.to_le_bytes(), &mut out);
            let expected = bf16::from_bits(bits).to_f32();
            assert!(out[0] == expected || expected.is_nan() && out[0].is_nan(), "{bits:04x}");
        }
    }

    #[test]
    fn rounding_is_to_the_nearest_and_back_again_exact() {
        // Halfway between two bf16 numbers, just above that, and what is too large for f16.
        let values = [1.0 + 1.0 / 256.0, 1.0 + 1.1 / 256.0, 1e6];
        let again = |dtype: StoredType| {
            let mut out = [0.0; 3];
            dtype.widen(&dtype.round(&values), &mut out);
            out
        };
        assert_eq!(again(StoredType::F32), values);
        assert_eq!(again(StoredType::Bf16), [1.0, 1.0 + 1.0 / 128.0, 999_424.0]);
        assert_eq!(again(StoredType::F16), [1.0 + 1.0 / 256.0, 1.0 + 4.0 / 1024.0, f32::INFINITY]);
    }

    #[test]
    fn f32_is_copied() {
        let values = [1.5_f32, -0.0, f32::MIN_POSITIVE];
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut out = [0.0; 3];
        StoredType::F32.widen(&bytes, &mut out);
        assert_eq!(out.map(f32::to_bits), values.map(f32::to_bits));
    }
}
