//! The tile registers and the instructions on them, as inline assembly: stable Rust has no intrinsics for them.
//!
//! A register holds up to 16 rows of 64 bytes. Registers 0 to 3 hold sums, 16 rows of 16 outputs, f32 or i32; 4 and 5
//! hold rows of activations, 6 and 7 the weights that they meet. See [`Shape`].
//!
//! The compiler doesn't know these registers, so what one function leaves there the next one finds. No block says
//! `nomem` or `pure`: they stay in order, among each other and with the accesses to memory.

use std::arch::asm;

/// Rows of a register.
pub(super) const ROWS: usize = 16;
/// Bytes from a line to the next one.
pub(super) const LINE: usize = size_of::<Line>();

/// Activations.
pub(super) const X: u8 = 4;
pub(super) const X2: u8 = 5;
/// Weights.
pub(super) const W: u8 = 6;
pub(super) const W2: u8 = 7;

/// A row of a register in memory.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

/// How deep the registers of operands are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shape {
    /// 32 bf16 or 64 int8 inputs: all registers are 16 rows by 64 bytes.
    Whole,
    /// 32 int8 inputs: activations are 16 rows by 32 bytes, weights 8 by 64.
    Half,
}

impl Shape {
    /// The operand of `ldtilecfg`: palette 1, the bytes of a row of each register, its rows.
    const fn configuration(self) -> Line {
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut register = 0;
        while register < 8 {
            let half = matches!(self, Self::Half);
            let (is_x, is_w) = (register == X || register == X2, register == W || register == W2);
            bytes[16 + 2 * register as usize] = if half && is_x { 32 } else { 64 };
            bytes[48 + register as usize] = if half && is_w { 8 } else { 16 };
            register += 1;
        }
        Line(bytes)
    }
}

/// Gives this thread's registers their shapes and zeroes them; before all else.
///
/// # Safety
/// This and the functions below: the machine has AMX, and the system lets this process use it.
pub(super) unsafe fn configure(shape: Shape) {
    const WHOLE: Line = Shape::Whole.configuration();
    const HALF: Line = Shape::Half.configuration();
    let operand = match shape {
        Shape::Whole => &WHOLE,
        Shape::Half => &HALF,
    };
    // SAFETY: the caller's promise; the operand is 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const *operand, options(nostack, preserves_flags)) }
}

/// Register `R` = 0.
///
/// # Safety
/// As above, and for this and the functions below: this thread has called [`configure`].
#[inline(always)]
pub(super) unsafe fn zero<const R: u8>() {
    // SAFETY: the caller's promise.
    unsafe { asm!("tilezero tmm{}", const R, options(nostack, preserves_flags)) }
}

/// Registers 0 to 3 = 0.
///
/// # Safety
/// As above.
#[inline(always)]
pub(super) unsafe fn zero_sums() {
    // SAFETY: the caller's promise.
    unsafe {
        zero::<0>();
        zero::<1>();
        zero::<2>();
        zero::<3>();
    }
}

/// Register `R` = its rows at `start`, `start + stride`, …
///
/// # Safety
/// As above; the rows can be read.
#[inline(always)]
pub(super) unsafe fn load<const R: u8>(start: *const u8, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tileloadd tmm{}, [{} + {} * 1]", const R, in(reg) start, in(reg) stride, options(nostack, preserves_flags));
    }
}

/// Writes the rows of register `R` to `start`, `start + stride`, …
///
/// # Safety
/// As above; the rows can be written.
#[inline(always)]
pub(super) unsafe fn store<const R: u8>(start: *mut u8, stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tilestored [{1} + {2} * 1], tmm{0}", const R, in(reg) start, in(reg) stride, options(nostack, preserves_flags));
    }
}

macro_rules! multiply {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As above; the registers' shapes fit.
        #[inline(always)]
        pub(super) unsafe fn $name<const C: u8, const X: u8, const W: u8>() {
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    concat!($instruction, " tmm{}, tmm{}, tmm{}"),
                    const C,
                    const X,
                    const W,
                    options(nostack, preserves_flags)
                );
            }
        }
    };
}

multiply! {
    /// `C += X · W` of bf16. In one instruction the even inputs' products are added in one chain and the odd ones' in
    /// another; then both sums are added and the result goes to `C`. Numbers too small for f32's normal range are zeros.
    multiply_bf16, "tdpbf16ps"
}
multiply! {
    /// `C += X · W` of signed activations and signed weights.
    multiply_signed, "tdpbssd"
}
multiply! {
    /// `C += X · W` of signed activations and unsigned weights.
    multiply_unsigned, "tdpbsud"
}
