//! The instruction tier of the kernels, chosen once at start.

use std::{fmt, sync::OnceLock, time::Instant};

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
    /// The fastest tier of this machine, or the one that `CADRE_CPU` names if the machine has it. Chosen once per
    /// process: tiers round differently.
    #[must_use]
    pub fn detect() -> Self {
        static CHOICE: OnceLock<Isa> = OnceLock::new();
        *CHOICE.get_or_init(Self::choose)
    }

    fn choose() -> Self {
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

/// Whether `a` takes less time than `b`, by the shortest of many runs in turn: neighbours disturb some of the runs,
/// and both kinds alike.
pub(crate) fn is_faster(mut a: impl FnMut(), mut b: impl FnMut()) -> bool {
    let seconds = |f: &mut dyn FnMut()| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    let mut shortest = (f64::INFINITY, f64::INFINITY);
    for _ in 0..50 {
        shortest = (shortest.0.min(seconds(&mut a)), shortest.1.min(seconds(&mut b)));
    }
    shortest.0 < shortest.1
}
