//! Multiplications on full registers and nothing else, for `roofline`: what the products are measured against.

use super::{
    LINE, Line, ROWS,
    registers::{self, Shape, W, X},
};

/// The bf16 multiply-adds of `rounds` times four multiplications, counted by multiplying ones.
///
/// # Safety
/// This and the function below: the machine has AMX, and the system lets this process use it.
pub(crate) unsafe fn bf16(rounds: usize) -> f64 {
    const ONE: [u8; 2] = 0x3f80_u16.to_le_bytes();
    let ones = Line(std::array::from_fn(|index| ONE[index % 2]));
    // SAFETY: the caller's promise; `run` configures the registers.
    let lanes = unsafe {
        run(ones, rounds, || {
            registers::multiply_bf16::<0, X, W>();
            registers::multiply_bf16::<1, X, W>();
            registers::multiply_bf16::<2, X, W>();
            registers::multiply_bf16::<3, X, W>();
        })
    };
    lanes.map(|lane| f64::from(f32::from_le_bytes(lane))).sum()
}

/// The same for int8.
///
/// # Safety
/// As above.
pub(crate) unsafe fn int8(rounds: usize) -> f64 {
    // SAFETY: the caller's promise; `run` configures the registers.
    let lanes = unsafe {
        run(Line([1; LINE]), rounds, || {
            registers::multiply_signed::<0, X, W>();
            registers::multiply_signed::<1, X, W>();
            registers::multiply_signed::<2, X, W>();
            registers::multiply_signed::<3, X, W>();
        })
    };
    lanes.map(|lane| f64::from(i32::from_le_bytes(lane))).sum()
}

/// Calls `multiply`, which adds to registers 0 to 3, so often, both operands' rows being `row`; returns the sums.
///
/// # Safety
/// As above.
unsafe fn run(row: Line, rounds: usize, multiply: impl Fn()) -> impl Iterator<Item = [u8; 4]> {
    let rows = [row; ROWS];
    let mut sums = vec![Line([0; LINE]); 4 * ROWS];
    // SAFETY: the caller's promise; operands and each register's sums are 16 lines.
    unsafe {
        registers::configure(Shape::Whole);
        registers::load::<X>(rows.as_ptr().cast(), LINE);
        registers::load::<W>(rows.as_ptr().cast(), LINE);
        for _ in 0..rounds {
            multiply();
        }
        let start = sums.as_mut_ptr();
        registers::store::<0>(start.cast(), LINE);
        registers::store::<1>(start.add(ROWS).cast(), LINE);
        registers::store::<2>(start.add(2 * ROWS).cast(), LINE);
        registers::store::<3>(start.add(3 * ROWS).cast(), LINE);
    }
    sums.into_iter().flat_map(|line| {
        let (lanes, _) = line.0.as_chunks();
        lanes.to_vec()
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn multiplications_are_those_that_are_counted() {
        if !Isa::available().contains(&Isa::Amx) {
            super::super::emulator::install();
        }
        let multiplications = 7.0 * 4.0;
        // SAFETY: the machine has the instructions, or they are emulated.
        let (bf16, int8) = unsafe { (bf16(7), int8(7)) };
        assert_eq!((bf16, int8), (multiplications * 16.0 * 16.0 * 32.0, multiplications * 16.0 * 16.0 * 64.0));
    }
}
