//! The instruction tier of the kernels, chosen once at start.

use std::{fmt, time::Instant};

/// A tier. Each has all kernels; the portable one is the contract that the others are tested against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX-512 F/BW/VL; bf16 weights are widened to f32.
    Avx512,
    /// AVX-512 with `vdpbf16ps`.
    Avx512Bf16,
}

impl Isa {
    /// The fastest tier of this machine, or the one that `CADRE_CPU` names if the machine has it.
    #[must_use]
    pub fn detect() -> Self {
        let available = Self::available();
        if let Ok(name) = std::env::var("CADRE_CPU")
            && let Some(isa) = available.iter().find(|isa| isa.to_string() == name)
        {
            return *isa;
        }
        let best = available.last().copied().unwrap_or(Self::Portable);
        // The flag alone does not tell: `vdpbf16ps` doubles the f32 rate on Zen 4 and halves it on Sapphire Rapids.
        if best == Self::Avx512Bf16 && !crate::matmul::bf16_dot_is_faster() { Self::Avx512 } else { best }
    }

    /// The tiers that this machine can run, slowest first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut tiers = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
            {
                tiers.push(Self::Avx512);
                if is_x86_feature_detected!("avx512bf16") {
                    tiers.push(Self::Avx512Bf16);
                }
            }
        }
        tiers
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
        })
    }
}

/// The shortest of several runs of `f`, in seconds: the one least disturbed by neighbours.
pub(crate) fn shortest_seconds(mut f: impl FnMut()) -> f64 {
    (0..5)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}
