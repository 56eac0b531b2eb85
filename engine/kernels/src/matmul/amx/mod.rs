//! Tiles on AMX (Intel, Sapphire Rapids and later): one instruction multiplies 16 rows of activations with the weights
//! of 16 outputs, over 32 bf16 or 64 int8 inputs. A panel's bytes are what it takes: 16 outputs side by side, 4 bytes of
//! each.
//!
//! - `registers.rs`: the instructions, and the shapes of the tile registers.
//! - `bf16.rs`, `integer.rs`: the formats. Integers have the bits of every other tier.
//! - `emulator.rs`, for tests: the instructions on machines that lack them.
//!
//! A product of 16 rows takes 16 cycles, 1 or 16 rows the same, a store as long, a load 8 from the first cache and 20 from
//! the second. Beside these instructions a core does one multiplication or conversion of 512 bits a cycle in place of two,
//! so what is added to the products in vector instructions bounds the integer formats.

mod bf16;
#[cfg(test)]
#[cfg(target_os = "linux")]
mod emulator;
mod integer;
pub(crate) mod rate;
mod registers;

use std::{
    arch::{
        asm,
        x86_64::{__cpuid_count, _MM_HINT_T0, _mm_prefetch, _mm512_loadu_si512, _mm512_store_si512},
    },
    cell::RefCell,
    ops::Range,
    sync::OnceLock,
};

use registers::{LINE, Line, ROWS, Shape};

use super::{TILE_PANELS, new_sums};
use crate::{
    buffer::Buffer,
    format::{Format, Layout, PANEL, Packed, pack},
    isa::Isa,
    matmul::activations::Converted,
    pool::Pool,
};

/// Whether a product of this many rows runs on the tile registers: these multiply 16 rows or none. Few rows of an integer
/// format go to the vector tier, which has the same bits. Where the two meet was measured on a Xeon of 2024.
pub(super) fn takes(format: Format, rows: usize) -> bool {
    match format {
        Format::F32 => false,
        Format::Bf16 => rows > 0,
        Format::Q4K | Format::Q6K => rows > 9,
        Format::Q8_0 | Format::Q4_0 | Format::Mxfp4 => rows > 12,
    }
}

/// Whether so many rows are laid side by side at a cost that many panels should share.
pub(super) fn lays(format: Format, rows: usize) -> bool {
    takes(format, rows) && rows > ROWS
}

/// Most rows that are laid side by side at a time: enough that unpacking a panel costs little beside multiplying it, and few
/// enough that they stay in the second cache.
pub(super) const ROWS_AT_A_TIME: usize = 128;

/// How far ahead of the loads a panel is fetched: four registers' weights.
const PREFETCH_BYTES: usize = 4096;

/// What one thread works with.
#[derive(Default)]
struct Workspace {
    /// Of each 16 rows, for each 64 bytes of them, a line of each: `[rows / 16][units][16]`. Lines past the last row hold
    /// what they held.
    activations: Vec<Line>,
    /// What integer rows are scaled with, and the sums of their parts.
    scales: Vec<Line>,
    part_sums: Vec<Line>,
    /// Unpacked weights.
    weights: Vec<Line>,
    /// What four registers of integer sums held.
    products: Vec<Line>,
    /// Sums `[rows][panels]`.
    sums: Vec<Line>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

impl Workspace {
    /// Makes the registers' shapes `shape`, whatever they were, and room for what the formats need.
    ///
    /// # Safety
    /// The machine has AMX, and the system lets this process use it.
    unsafe fn configure(&mut self, shape: Shape) {
        // SAFETY: the caller's promise.
        unsafe { registers::configure(shape) };
        grow(&mut self.weights, integer::PANELS * integer::WEIGHTS);
        grow(&mut self.products, 4 * ROWS);
    }

    /// Lays `units` times 64 bytes of each row as [`Workspace::activations`] says: rows may lie anywhere, a register's
    /// load takes one stride.
    ///
    /// # Safety
    /// The rows have so many bytes, and the machine has AVX-512.
    #[target_feature(enable = "avx512f")]
    unsafe fn lay(&mut self, rows: &[*const u8], units: usize) -> *const Line {
        grow(&mut self.activations, rows.len().next_multiple_of(ROWS) * units);
        let lines = self.activations.as_mut_ptr();
        for (group, rows) in rows.chunks(ROWS).enumerate() {
            for unit in 0..units {
                for (index, row) in rows.iter().enumerate() {
                    // SAFETY: the row has the unit, and there are lines for all of them.
                    unsafe {
                        let line = lines.add((group * units + unit) * ROWS + index);
                        _mm512_store_si512(line.cast(), _mm512_loadu_si512(row.add(unit * LINE).cast()));
                    }
                }
            }
        }
        lines
    }

    /// Room for the sums of `rows` rows, in whole registers, by `panels` panels.
    fn sums(&mut self, rows: usize, panels: usize) -> *mut f32 {
        grow(&mut self.sums, rows.next_multiple_of(ROWS) * panels);
        self.sums.as_mut_ptr().cast()
    }

    /// Calls `sink` with each row's sums.
    fn each_row(&self, rows: usize, panels: usize, mut sink: impl FnMut(usize, &[[f32; PANEL]])) {
        for (row, lines) in self.sums.chunks_exact(panels).take(rows).enumerate() {
            // SAFETY: a line is 16 plain values.
            sink(row, unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), panels) });
        }
    }
}

fn grow(lines: &mut Vec<Line>, count: usize) {
    if lines.len() < count {
        lines.resize(count, Line([0; LINE]));
    }
}

/// Fetches `bytes` bytes further on, into the next panel at the end of one.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(LINE) {
        // Past the end of the memory it is harmless.
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES + line).cast());
    }
}

/// [`super::walk_panels`] for the rows that [`takes`] names.
///
/// # Safety
/// The machine has AMX for bf16 and int8 and the AVX-512 of `vnni`, and the system lets this process use it; rows
/// have the form and panels the size that format and `k` say.
pub(super) unsafe fn walk(
    format: Format,
    k: usize,
    rows: &[*const u8],
    panels: Range<usize>,
    panel_start: impl Fn(usize) -> *const u8,
    mut sink: impl FnMut(usize, usize, &[[f32; PANEL]]),
) {
    WORKSPACE.with_borrow_mut(|workspace| {
        // Of like size: a rest of few rows would cost as much as 16.
        let chunks = rows.len().div_ceil(ROWS_AT_A_TIME);
        let size = rows.len().div_ceil(chunks).next_multiple_of(2 * ROWS);
        for (index, rows) in rows.chunks(size).enumerate() {
            let sink = |row, panel, sums: &[_]| sink(index * size + row, panel, sums);
            // SAFETY: the caller's promises.
            unsafe {
                match format {
                    Format::Bf16 => bf16::walk(workspace, k, rows, panels.clone(), &panel_start, sink),
                    _ => integer::walk(workspace, format, k, rows, panels.clone(), &panel_start, sink),
                }
            }
        }
    });
}

/// Whether this machine has the instructions, the system lets this process use them, and they give what the contract
/// says. Asked once per process. The caller has found the AVX-512 of `vnni`.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        // SAFETY: the two before say that the machine has AMX and that the system permits it.
        instructions() && permission() && unsafe { agrees_with_portable() }
    })
}

/// Whether the processor has AMX for bf16 and int8, and the system saves its registers.
fn instructions() -> bool {
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u32 = 1 << 17 | 1 << 18;
    if __cpuid_count(0, 0).eax < 7 || __cpuid_count(1, 0).ecx & OSXSAVE == 0 {
        return false;
    }
    let saved: u32;
    // SAFETY: the processor has xgetbv, as OSXSAVE says.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") saved, out("edx") _, options(nomem, nostack, preserves_flags)) };
    __cpuid_count(7, 0).edx & FEATURES == FEATURES && saved & TILE_STATE == TILE_STATE
}

/// Asks Linux for the tile registers' state, 8 KiB more of each thread that uses them.
#[cfg(target_os = "linux")]
fn permission() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    const XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the request takes two numbers and touches no memory of this process.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permission() -> bool {
    false
}

/// Whether small products of every format come out as the contract says: integers bit for bit, bf16 within its roundings.
/// A machine that this tier was not tested on must not serve wrong numbers.
///
/// # Safety
/// As for [`walk`].
unsafe fn agrees_with_portable() -> bool {
    /// A whole super-block and a part of one.
    const K: usize = 320;
    /// Whole tiles and parts of them, one group of 16 rows and two, one panel and several; rows that the vector tier takes.
    const SHAPES: [(usize, usize); 4] = [(2 * ROWS, TILE_PANELS), (ROWS + 1, 2), (2 * ROWS + 5, 1), (4, 2)];
    let value = |index: usize| ((index * 7919 + index / 64 * 31) % 251) as f32 / 125.0 - 1.0;
    let agrees = |format: Format, count: usize, panels: usize| {
        let layout = Layout { format, n: panels * PANEL, k: K };
        let w: Vec<f32> = (0..layout.n * K).map(|index| value(index + 17)).collect();
        let Ok(mut bytes) = Buffer::<u8>::zeroed(layout.bytes()) else { return false };
        pack(layout, &w, &mut bytes);
        let weights = Packed::new(layout, &bytes);
        let mut activations = Converted::zeroed(&Pool::new(1), Isa::Portable, format, count, K);
        let writer = activations.writer();
        for (index, row) in (0..count * K).map(value).collect::<Vec<_>>().chunks_exact(K).enumerate() {
            // SAFETY: nothing else uses the rows.
            unsafe { writer.write(index, 0, row) };
        }
        let rows: Vec<_> = (0..count).map(|index| activations.row(index)).collect();
        let product = |isa| {
            let mut y = vec![f32::NAN; count * layout.n];
            // SAFETY: rows of the format and K, in the form that both tiers take; the caller promises the tier.
            unsafe {
                super::walk(isa, &rows, &weights, 0..panels, &mut new_sums(), |row, panel, sums| {
                    y[row * layout.n + panel * PANEL..][..sums.len() * PANEL].copy_from_slice(sums.as_flattened());
                });
            }
            y
        };
        // K roundings of sums of at most K.
        let bound = (K * K) as f32 * f32::EPSILON;
        let (ours, contract) = (product(Isa::Amx), product(Isa::Portable));
        ours.iter().zip(&contract).all(|(ours, contract)| match format {
            Format::Bf16 => (ours - contract).abs() <= bound,
            _ => ours.to_bits() == contract.to_bits(),
        })
    };
    let formats = Format::ALL.iter().filter(|format| **format != Format::F32);
    formats
        .flat_map(|format| SHAPES.map(|shape| (*format, shape)))
        .all(|(format, (rows, panels))| agrees(format, rows, panels))
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests;
