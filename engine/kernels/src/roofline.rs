//! What the machine can do at most: the rate at which its memory is read, and the rate of the instruction that a
//! tier's products are made of. Throughput is judged against these two.

use std::{hint::black_box, time::Instant};

use crate::{
    buffer::{AllocError, Buffer},
    isa::Isa,
    pool::Pool,
    shared::SharedSlice,
};

/// Bytes that one task reads: long enough to stream, short enough that no thread waits long for the last.
const READ_TASK_BYTES: usize = 4 << 20;
/// How often the buffer is read; the best pass counts, since neighbours disturb some.
const READ_PASSES: usize = 8;
/// How often the loops run; the best run counts.
const RATE_RUNS: usize = 20;
/// The shortest run whose time is trusted.
const RATE_SECONDS: f64 = 2e-3;
/// Tasks a thread: one that was held up leaves its share to the others.
const RATE_TASKS: usize = 4;

/// What a product multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixKind {
    /// f32 by f32, f32 sums.
    F32,
    /// bf16 by bf16, f32 sums.
    Bf16,
    /// int8 by int8, i32 sums.
    Int8,
}

/// The bytes per second at which all threads together read a buffer of `bytes` in huge pages, at best. More than the
/// caches hold, or it is their rate that comes back.
///
/// # Errors
/// When the buffer can't be had.
pub fn read_bandwidth(pool: &Pool, bytes: usize) -> Result<f64, AllocError> {
    let mut buffer = Buffer::<u8>::zeroed(bytes)?;
    let tasks = bytes.div_ceil(READ_TASK_BYTES);
    let part = |task: usize| (task * READ_TASK_BYTES, READ_TASK_BYTES.min(bytes - task * READ_TASK_BYTES));
    // Pages that were never written are all the one page of zeros, which a cache holds.
    let target = SharedSlice::new(&mut buffer);
    pool.run(tasks, |task| {
        let (start, len) = part(task);
        // SAFETY: the tasks' parts are disjoint.
        unsafe { target.part(start, len) }.fill(1);
    });
    let read = || {
        pool.run(tasks, |task| {
            let (start, len) = part(task);
            black_box(read(&buffer[start..start + len]));
        });
    };
    let seconds = (0..READ_PASSES).map(|_| seconds(read)).fold(f64::INFINITY, f64::min);
    Ok(bytes as f64 / seconds)
}

/// The operations per second, two a multiply-add, of all threads together in the tier's instruction for `kind`, with
/// all operands in registers, at best.
#[must_use]
pub fn matrix_rate(pool: &Pool, isa: Isa, kind: MatrixKind) -> f64 {
    let multiply_adds = work(isa, kind);
    let tasks = RATE_TASKS * pool.threads();
    let mut rounds = 1 << 10;
    let run = |rounds: usize| seconds(|| pool.run(tasks, |_| _ = black_box(multiply_adds(black_box(rounds)))));
    while run(rounds) < RATE_SECONDS {
        rounds *= 2;
    }
    let seconds = (0..RATE_RUNS).map(|_| run(rounds)).fold(f64::INFINITY, f64::min);
    2.0 * multiply_adds(1) * rounds as f64 * tasks as f64 / seconds
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64().max(1e-9)
}

/// Combines all bytes, so that each is read.
fn read(bytes: &[u8]) -> u64 {
    let (lines, _) = bytes.as_chunks::<64>();
    let mut sums = [0; 8];
    for line in lines {
        let (words, _) = line.as_chunks();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum ^= u64::from_le_bytes(*word);
        }
    }
    sums.iter().fold(0, |all, sum| all ^ sum)
}

/// A loop of so many rounds of `1 · 1` added up in many sums; it returns their total, which is the number of
/// multiply-adds that it did (as far as the sums' type can count).
type Work = fn(usize) -> f64;

fn work(isa: Isa, kind: MatrixKind) -> Work {
    macro_rules! of_tier {
        ($($function:tt)*) => {
            |rounds| {
                // SAFETY: the tier says that the machine has the instruction.
                unsafe { $($function)*(rounds) }
            }
        };
    }
    match (isa, kind) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx, MatrixKind::Bf16) => of_tier!(crate::matmul::amx::rate::bf16),
        #[cfg(target_arch = "x86_64")]
        (Isa::Amx, MatrixKind::Int8) => of_tier!(crate::matmul::amx::rate::int8),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, MatrixKind::Bf16) => of_tier!(avx512::bf16_pairs),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16, MatrixKind::Int8) => of_tier!(avx512::int8),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx, _) => of_tier!(avx512::f32),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, MatrixKind::Int8) => of_tier!(avx2::int8),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => of_tier!(avx2::f32),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon, MatrixKind::Int8) => of_tier!(neon::int8),
        #[cfg(target_arch = "aarch64")]
        (Isa::Neon, _) => of_tier!(neon::f32),
        (_, MatrixKind::Int8) => portable_int8,
        (_, MatrixKind::F32 | MatrixKind::Bf16) => portable_f32,
    }
}

/// Values in the portable loops' operand: within the nearest cache.
const PORTABLE_VALUES: usize = 2048;

fn portable_f32(rounds: usize) -> f64 {
    let mut sums = [0.0; 32];
    let weights = black_box([1.0_f32; PORTABLE_VALUES]);
    for _ in 0..rounds {
        let x = black_box(1.0);
        for weights in weights.as_chunks::<32>().0 {
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += x * weight;
            }
        }
    }
    sums.iter().map(|sum| f64::from(*sum)).sum()
}

fn portable_int8(rounds: usize) -> f64 {
    let mut total = 0_i32;
    let weights = black_box([1_i8; PORTABLE_VALUES]);
    let x = black_box([1_i8; PORTABLE_VALUES]);
    for _ in 0..rounds {
        let weights = black_box(&weights);
        let sum: i32 = x.iter().zip(weights).map(|(x, weight)| i32::from(*x) * i32::from(*weight)).sum();
        total = total.wrapping_add(sum);
    }
    f64::from(total)
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::{
        arch::x86_64::{
            __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_reduce_add_epi32,
            _mm512_reduce_add_ps, _mm512_set1_epi8, _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps,
            _mm512_setzero_ps,
        },
        hint::black_box,
    };

    /// Independent sums, in as many of the 32 registers as a tile's are: enough to hide an instruction's latency.
    const SUMS: usize = 24;
    /// 1 as bf16.
    const ONE: i16 = 0x3f80;

    /// # Safety
    /// The machine has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn f32(rounds: usize) -> f64 {
        // Opaque, or the sums would be taken for equal and one of them computed.
        let (mut sums, one) = black_box(([_mm512_setzero_ps(); SUMS], _mm512_set1_ps(1.0)));
        for _ in 0..rounds {
            sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(one, one, *sum));
        }
        total(&sums)
    }

    /// # Safety
    /// The machine has AVX-512 F/BW and BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn bf16_pairs(rounds: usize) -> f64 {
        let (mut sums, ones) = black_box(([_mm512_setzero_ps(); SUMS], _mm512_set1_epi16(ONE)));
        // SAFETY: both are 512 bits without a rule about them.
        let ones = unsafe { std::mem::transmute::<__m512i, __m512bh>(ones) };
        for _ in 0..rounds {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, ones, ones));
        }
        total(&sums)
    }

    /// # Safety
    /// The machine has AVX-512 F/BW and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub(super) unsafe fn int8(rounds: usize) -> f64 {
        let (mut sums, ones) = black_box(([_mm512_set1_epi32(0); SUMS], _mm512_set1_epi8(1)));
        for _ in 0..rounds {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbusd_epi32(*sum, ones, ones));
        }
        sums.iter().map(|sum| f64::from(_mm512_reduce_add_epi32(*sum))).sum()
    }

    #[target_feature(enable = "avx512f")]
    fn total(sums: &[__m512; SUMS]) -> f64 {
        sums.iter().map(|sum| f64::from(_mm512_reduce_add_ps(*sum))).sum()
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::{
        arch::x86_64::{
            __m256, __m256i, _mm256_add_epi32, _mm256_fmadd_ps, _mm256_madd_epi16, _mm256_maddubs_epi16,
            _mm256_set1_epi8, _mm256_set1_epi16, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
        },
        hint::black_box,
        mem::transmute,
    };

    /// Independent sums, in as many of the 16 registers as leave room for operands.
    const SUMS: usize = 12;

    /// # Safety
    /// The machine has AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn f32(rounds: usize) -> f64 {
        let (mut sums, one) = black_box(([_mm256_setzero_ps(); SUMS], _mm256_set1_ps(1.0)));
        for _ in 0..rounds {
            sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(one, one, *sum));
        }
        // SAFETY: eight f32 are the register's bits.
        let lanes = sums.iter().flat_map(|sum| unsafe { transmute::<__m256, [f32; 8]>(*sum) });
        lanes.map(f64::from).sum()
    }

    /// Products of bytes, added in pairs twice: as the integer formats do it.
    ///
    /// # Safety
    /// The machine has AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn int8(rounds: usize) -> f64 {
        let (mut sums, mut bytes) = black_box(([_mm256_setzero_si256(); SUMS], _mm256_set1_epi8(1)));
        let words = black_box(_mm256_set1_epi16(1));
        for _ in 0..rounds {
            for sum in &mut sums {
                // Opaque, or the product would be taken once.
                // SAFETY: no instruction but a claim that `bytes` changes.
                unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) bytes, options(nomem, nostack, preserves_flags)) };
                let pairs = _mm256_maddubs_epi16(bytes, bytes);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, words));
            }
        }
        // SAFETY: eight i32 are the register's bits.
        let lanes = sums.iter().flat_map(|sum| unsafe { transmute::<__m256i, [i32; 8]>(*sum) });
        lanes.map(f64::from).sum()
    }
}

#[cfg(target_arch = "aarch64")]
mod neon {
    use std::{
        arch::{
            aarch64::{vaddlvq_s32, vaddvq_f32, vdupq_n_f32, vdupq_n_s8, vdupq_n_s32, vfmaq_f32},
            asm,
        },
        hint::black_box,
    };

    /// Independent sums, in as many of the 32 registers as a tile's are.
    const SUMS: usize = 24;

    /// # Safety
    /// The machine has NEON.
    #[target_feature(enable = "neon")]
    pub(super) unsafe fn f32(rounds: usize) -> f64 {
        let (mut sums, one) = black_box(([vdupq_n_f32(0.0); SUMS], vdupq_n_f32(1.0)));
        for _ in 0..rounds {
            sums.iter_mut().for_each(|sum| *sum = vfmaq_f32(*sum, one, one));
        }
        sums.iter().map(|sum| f64::from(vaddvq_f32(*sum))).sum()
    }

    /// # Safety
    /// The machine has NEON with the int8 dot product.
    #[target_feature(enable = "neon,dotprod")]
    pub(super) unsafe fn int8(rounds: usize) -> f64 {
        let (mut sums, ones) = black_box(([vdupq_n_s32(0); SUMS], vdupq_n_s8(1)));
        for _ in 0..rounds {
            for sum in &mut sums {
                // SAFETY: the machine has the instruction, which touches nothing but these registers.
                unsafe {
                    asm!("sdot {0:v}.4s, {1:v}.16b, {1:v}.16b", inout(vreg) *sum, in(vreg) ones,
                         options(pure, nomem, nostack, preserves_flags));
                }
            }
        }
        sums.iter().map(|sum| vaddlvq_s32(*sum) as f64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [MatrixKind; 3] = [MatrixKind::F32, MatrixKind::Bf16, MatrixKind::Int8];

    #[test]
    fn the_loops_do_what_they_count() {
        for isa in Isa::available() {
            for kind in KINDS {
                let work = work(isa, kind);
                let one = work(1);
                assert!(one >= 16.0, "{isa} {kind:?}: {one} multiply-adds a round");
                assert_eq!(work(1000), 1000.0 * one, "{isa} {kind:?}");
            }
        }
    }

    #[test]
    fn both_rates_are_numbers_for_any_threads() {
        for threads in [1, 3] {
            let pool = Pool::new(threads);
            for bytes in [1, 64, READ_TASK_BYTES + 4097] {
                let bandwidth = read_bandwidth(&pool, bytes).unwrap();
                assert!(bandwidth.is_finite() && bandwidth > 0.0, "{bytes} bytes: {bandwidth}");
            }
            for isa in Isa::available() {
                for kind in KINDS {
                    let rate = matrix_rate(&pool, isa, kind);
                    assert!(rate.is_finite() && rate > 0.0, "{isa} {kind:?}: {rate}");
                }
            }
        }
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        assert!(read_bandwidth(&Pool::new(1), usize::MAX / 2).is_err());
    }

    #[test]
    fn every_byte_is_read() {
        let mut bytes = vec![0; 192];
        for index in 0..bytes.len() {
            bytes[index] = 1;
            assert_ne!(read(&bytes), 0, "byte {index}");
            bytes[index] = 0;
        }
    }
}
