//! The instruction tier of the kernels, chosen once at start.

use std::{fmt, sync::OnceLock, time::Instant};

/// A tier. The portable one is the contract that the others are tested against, and has what a tier lacks: the passes
/// over logits have vector code of their own for AVX-512 only, attention for that and AVX2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AArch64 with the int8 dot product.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F/BW/DQ/VL with VNNI; bf16 weights are widened to f32.
    Avx512,
    /// The same with `vdpbf16ps`.
    Avx512Bf16,
    /// AMX tiles for bf16 and int8; the rest as `Avx512`.
    Amx,
}

/// `CADRE_CPU` names a tier that this machine lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CADRE_CPU is `{name}`, and this machine has {available}: name one of these, or leave it unset")]
pub struct NoSuchTier {
    name: String,
    available: String,
}

impl Isa {
    /// The fastest tier of this machine, or the one that `CADRE_CPU` names if the machine has it. Chosen once per
    /// process: tiers round floats differently.
    #[must_use]
    pub fn detect() -> Self {
        static CHOICE: OnceLock<Isa> = OnceLock::new();
        *CHOICE.get_or_init(Self::choose)
    }

    /// The tier that `CADRE_CPU` names; `None` if it is not set.
    ///
    /// # Errors
    /// When this machine has no tier of that name.
    pub fn requested() -> Result<Option<Self>, NoSuchTier> {
        let Ok(name) = std::env::var("CADRE_CPU") else { return Ok(None) };
        let available = Self::available();
        match available.iter().find(|isa| isa.to_string() == name) {
            Some(isa) => Ok(Some(*isa)),
            None => {
                let available = available.iter().map(Self::to_string).collect::<Vec<_>>().join(", ");
                Err(NoSuchTier { name, available })
            }
        }
    }

    fn choose() -> Self {
        if let Ok(Some(isa)) = Self::requested() {
            return isa;
        }
        // The flags alone do not tell: `vdpbf16ps` doubles the f32 rate on Zen 4 and halves it on Sapphire Rapids.
        let faster = |best, next| match next {
            Self::Avx512Bf16 | Self::Amx if !crate::matmul::multiplies_faster(next, best) => best,
            _ => next,
        };
        Self::available().into_iter().reduce(faster).unwrap_or(Self::Portable)
    }

    /// The tiers that this machine can run, slowest first by what is known of them.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut tiers = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! has {
                ($($feature:tt),*) => { $(is_x86_feature_detected!($feature))&&* };
            }
            if has!("avx2", "fma", "f16c") {
                tiers.push(Self::Avx2);
                if has!("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni") {
                    tiers.push(Self::Avx512);
                    if has!("avx512bf16") {
                        tiers.push(Self::Avx512Bf16);
                    }
                    if crate::matmul::amx::available() {
                        tiers.push(Self::Amx);
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            tiers.push(Self::Neon);
        }
        tiers
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
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

/// A function that is compiled once for each vector width of the tiers; the first argument picks one.
macro_rules! for_each_width {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $visibility fn $name(isa: crate::isa::Isa, $($arg: $type),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, reason = "the sizes and slices of one kernel")]
            fn plain($($arg: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn avx512($($arg: $type),*) {
                plain($($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn avx2($($arg: $type),*) {
                plain($($arg),*);
            }
            match isa {
                // SAFETY: a tier other than portable exists only where `Isa::available` found it.
                #[cfg(target_arch = "x86_64")]
                crate::isa::Isa::Avx512 | crate::isa::Isa::Avx512Bf16 | crate::isa::Isa::Amx => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                crate::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => plain($($arg),*),
            }
        }
    };
}
pub(crate) use for_each_width;
