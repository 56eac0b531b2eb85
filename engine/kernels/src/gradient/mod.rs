//! What training adds to the kernels: the backward passes. All of it is f32 but for products with frozen weights, which
//! take the gradient in the form that the transposed weights have (see [`Transposed`]).
//!
//! Sums have one fixed order, as everywhere: gradients don't depend on the number of threads.

mod attention;
mod loss;
mod norm;
mod product;
mod qkv;
mod router;
mod silu;
mod transposed;

pub use attention::{Heads, attention, attention_backward};
pub use loss::cross_entropy;
pub use norm::rms_norm_backward;
pub use product::{Strided, add_product};
pub use qkv::{QkvGradients, split_qkv_backward};
pub use router::{RouterLosses, route_backward, scores};
pub use silu::{gated_silu, gated_silu_backward};
pub use transposed::Transposed;

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
use for_each_width;

#[cfg(test)]
mod tests;
