//! AMX where the machine lacks it, for tests: an AMX instruction then raises SIGILL, whose handler decodes it, does what
//! Intel's Software Developer's Manual says on a register file of the thread, and goes on behind it.
//!
//! It knows what the kernels use: `ldtilecfg`, `tilerelease`, `tilezero`, `tileloadd`, `tilestored`, `tdpbf16ps` and the
//! four int8 products, with every operand form. Where real registers would fault, the process aborts and says why.

use std::{
    cell::{Cell, RefCell},
    sync::Once,
};

thread_local! {
    static REGISTERS: RefCell<Registers> = const { RefCell::new(Registers::new()) };
    static BROKEN: Cell<bool> = const { Cell::new(false) };
}

/// Emulates AMX in this process from now on.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: `handle` has the signature that SA_SIGINFO asks for; all else may be zero.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
        }
    });
}

/// Runs `f` on a processor whose int8 products are sometimes off by one, on this thread.
pub(super) fn broken<T>(f: impl FnOnce() -> T) -> T {
    BROKEN.set(true);
    let result = f();
    BROKEN.set(false);
    result
}

extern "C" fn handle(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // In the order of the encoding.
    const GENERAL: [libc::c_int; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    // SAFETY: the system passes the context of the interrupted thread; at its instruction pointer is code.
    let (context, code) = unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let pointer = context.uc_mcontext.gregs[libc::REG_RIP as usize] as *const u8;
        (context, Code { start: pointer, at: pointer })
    };
    let general = GENERAL.map(|register| context.uc_mcontext.gregs[register as usize].cast_unsigned());
    let Some((instruction, length)) = code.decode(&general) else {
        // Not ours: let it happen again, and end the process.
        // SAFETY: this restores what the process began with.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
        return;
    };
    // SAFETY: the program asked for these accesses.
    let result = REGISTERS.with_borrow_mut(|registers| unsafe { registers.execute(instruction) });
    if let Err(fault) = result {
        eprintln!("{instruction:x?}: {fault:?}");
        std::process::abort();
    }
    context.uc_mcontext.gregs[libc::REG_RIP as usize] += length;
}

/// What a processor raises.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// #GP: a configuration that there isn't.
    GeneralProtection(&'static str),
    /// #UD: registers that an instruction can't work on.
    Undefined(&'static str),
}

/// An instruction with its operands; addresses and strides in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instruction {
    Configure { address: u64 },
    Release,
    Zero { register: usize },
    Load { register: usize, address: u64, stride: u64 },
    Store { register: usize, address: u64, stride: u64 },
    Multiply { numbers: Numbers, c: usize, a: usize, b: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    Bf16,
    Int8 { signed_a: bool, signed_b: bool },
}

/// Instruction bytes.
pub(super) struct Code {
    start: *const u8,
    at: *const u8,
}

impl Code {
    pub(super) fn new(start: *const u8) -> Self {
        Self { start, at: start }
    }

    fn byte(&mut self) -> u8 {
        // SAFETY: bytes are only asked for while the ones before say that the instruction goes on.
        unsafe {
            let byte = *self.at;
            self.at = self.at.add(1);
            byte
        }
    }

    /// The displacement that mode `mode` has.
    fn displacement(&mut self, mode: u8) -> u64 {
        let displacement = match mode {
            0 => 0,
            1 => i64::from(self.byte().cast_signed()),
            _ => i32::from_le_bytes(std::array::from_fn(|_| self.byte())).into(),
        };
        displacement.cast_unsigned()
    }

    /// The instruction and its length; `None` for what isn't AMX. `general` holds rax, rcx, rdx, rbx, rsp, rbp, rsi,
    /// rdi, r8 to r15.
    pub(super) fn decode(mut self, general: &[u64; 16]) -> Option<(Instruction, i64)> {
        if self.byte() != 0xc4 {
            return None;
        }
        let (extensions, fields) = (self.byte(), self.byte());
        let extension = |bit: u8| usize::from(!extensions >> bit & 1) << 3;
        let (r, x, b) = (extension(7), extension(6), extension(5));
        let (map, wide, long, prefix) = (extensions & 31, fields >> 7, fields >> 2 & 1, fields & 3);
        let third = usize::from(!fields >> 3 & 15);
        if map != 2 || wide != 0 || long != 0 {
            return None;
        }
        let (opcode, modrm) = (self.byte(), self.byte());
        let (mode, reg, rm) = (modrm >> 6, r + usize::from(modrm >> 3 & 7), usize::from(modrm & 7));
        let memory = mode != 3;
        let instruction = match (opcode, prefix, memory) {
            (0x49, 0, true) if reg == 0 => {
                let (address, index) = self.operand(general, mode, rm, x, b);
                Instruction::Configure { address: address.wrapping_add(index) }
            }
            (0x49, 0, false) if reg == 0 && rm == 0 => Instruction::Release,
            (0x49, 3, false) if rm == 0 => Instruction::Zero { register: reg },
            (0x4b, 3, true) if rm == 4 => {
                let (address, stride) = self.operand(general, mode, rm, x, b);
                Instruction::Load { register: reg, address, stride }
            }
            (0x4b, 2, true) if rm == 4 => {
                let (address, stride) = self.operand(general, mode, rm, x, b);
                Instruction::Store { register: reg, address, stride }
            }
            (0x5c, 2, false) => Instruction::Multiply { numbers: Numbers::Bf16, c: reg, a: b + rm, b: third },
            (0x5e, _, false) => {
                let numbers = Numbers::Int8 { signed_a: prefix >= 2, signed_b: prefix & 1 == 1 };
                Instruction::Multiply { numbers, c: reg, a: b + rm, b: third }
            }
            _ => return None,
        };
        // SAFETY: both lead into the same code.
        Some((instruction, unsafe { self.at.offset_from(self.start) } as i64))
    }

    /// A memory operand: base plus displacement, and the scaled index.
    fn operand(&mut self, general: &[u64; 16], mode: u8, rm: usize, x: usize, b: usize) -> (u64, u64) {
        if rm == 4 {
            let sib = self.byte();
            let (scale, index, base) = (sib >> 6, x + usize::from(sib >> 3 & 7), usize::from(sib & 7));
            let index = if index == 4 { 0 } else { general[index] << scale };
            if base == 5 && mode == 0 {
                return (self.displacement(2), index);
            }
            return (general[b + base].wrapping_add(self.displacement(mode)), index);
        }
        if rm == 5 && mode == 0 {
            let displacement = self.displacement(2);
            return ((self.at as u64).wrapping_add(displacement), 0);
        }
        (general[b + rm].wrapping_add(self.displacement(mode)), 0)
    }
}

/// The rows and the bytes of a row of a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    rows: usize,
    bytes: usize,
}

/// A thread's eight registers.
pub(super) struct Registers {
    /// `None` before a configuration and after a release.
    shapes: Option<[Shape; 8]>,
    data: [[[u8; 64]; 16]; 8],
}

impl Registers {
    pub(super) const fn new() -> Self {
        Self { shapes: None, data: [[[0; 64]; 16]; 8] }
    }

    /// Row `row` of register `register`.
    pub(super) fn row(&self, register: usize, row: usize) -> &[u8; 64] {
        &self.data[register][row]
    }

    /// # Safety
    /// The addresses are those of memory that the instruction may read or write.
    pub(super) unsafe fn execute(&mut self, instruction: Instruction) -> Result<(), Fault> {
        match instruction {
            // SAFETY: the caller's promise.
            Instruction::Configure { address } => self.configure(unsafe { &*(address as *const [u8; 64]) })?,
            Instruction::Release => *self = Self::new(),
            Instruction::Zero { register } => {
                self.shape(register)?;
                self.data[register] = [[0; 64]; 16];
            }
            Instruction::Load { register, address, stride } => {
                let shape = self.shape(register)?;
                let mut data = [[0; 64]; 16];
                for (row, data) in data.iter_mut().take(shape.rows).enumerate() {
                    let address = address.wrapping_add(stride.wrapping_mul(row as u64));
                    // SAFETY: the caller's promise.
                    data[..shape.bytes].copy_from_slice(unsafe { bytes(address, shape.bytes) });
                }
                self.data[register] = data;
            }
            Instruction::Store { register, address, stride } => {
                let shape = self.shape(register)?;
                for (row, data) in self.data[register].iter().take(shape.rows).enumerate() {
                    let address = address.wrapping_add(stride.wrapping_mul(row as u64)) as *mut u8;
                    // SAFETY: the caller's promise.
                    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), address, shape.bytes) };
                }
            }
            Instruction::Multiply { numbers, c, a, b } => self.multiply(numbers, c, a, b)?,
        }
        Ok(())
    }

    fn configure(&mut self, operand: &[u8; 64]) -> Result<(), Fault> {
        let gp = |what| Err(Fault::GeneralProtection(what));
        *self = Self::new();
        match operand[0] {
            0 => return Ok(()),
            1 => (),
            _ => return gp("palette"),
        }
        if operand[1..16].iter().chain(&operand[32..48]).chain(&operand[56..]).any(|byte| *byte != 0) {
            return gp("reserved bytes, or the start row of a load that was interrupted");
        }
        let mut shapes = [Shape { rows: 0, bytes: 0 }; 8];
        for (register, shape) in shapes.iter_mut().enumerate() {
            let bytes = u16::from_le_bytes([operand[16 + 2 * register], operand[17 + 2 * register]]);
            *shape = Shape { rows: operand[48 + register].into(), bytes: bytes.into() };
            if shape.rows > 16 || shape.bytes > 64 {
                return gp("a register of more than 16 rows or 64 bytes a row");
            }
            if (shape.rows == 0) != (shape.bytes == 0) {
                return gp("a register of rows without bytes or bytes without rows");
            }
        }
        self.shapes = Some(shapes);
        Ok(())
    }

    fn shape(&self, register: usize) -> Result<Shape, Fault> {
        let Some(shapes) = self.shapes else { return Err(Fault::Undefined("no configuration")) };
        match shapes.get(register) {
            Some(shape) if shape.rows > 0 => Ok(*shape),
            _ => Err(Fault::Undefined("a register that the configuration lacks")),
        }
    }

    fn multiply(&mut self, numbers: Numbers, c: usize, a: usize, b: usize) -> Result<(), Fault> {
        let (shape_c, shape_a, shape_b) = (self.shape(c)?, self.shape(a)?, self.shape(b)?);
        if c == a || c == b || a == b {
            return Err(Fault::Undefined("one register twice"));
        }
        if [shape_c, shape_a, shape_b].iter().any(|shape| shape.bytes % 4 != 0) {
            return Err(Fault::Undefined("bytes of a row that are no multiple of 4"));
        }
        if shape_c.rows != shape_a.rows || shape_c.bytes != shape_b.bytes || shape_a.bytes / 4 != shape_b.rows {
            return Err(Fault::Undefined("shapes that don't fit"));
        }
        let columns = shape_c.bytes / 4;
        let (data_a, data_b) = (self.data[a], self.data[b]);
        let mut result = [[0; 64]; 16];
        for (row, out) in result.iter_mut().enumerate().take(shape_c.rows) {
            let a = &data_a[row].as_chunks::<4>().0[..shape_b.rows];
            let old = self.data[c][row].as_chunks::<4>().0;
            let out = out.as_chunks_mut::<4>().0;
            match numbers {
                Numbers::Bf16 => {
                    let sums = bf16_row(a, &data_b);
                    for column in 0..columns {
                        let old = f32::from_le_bytes(old[column]);
                        out[column] = flush(flush(old) + sums[column]).to_le_bytes();
                    }
                }
                Numbers::Int8 { signed_a, signed_b } => {
                    let mut sums = [0_i32; 16];
                    for (a, b) in a.iter().zip(&data_b) {
                        for (sum, b) in sums.iter_mut().zip(b.as_chunks::<4>().0) {
                            for (a, b) in a.iter().zip(b) {
                                *sum += integer(*a, signed_a) * integer(*b, signed_b);
                            }
                        }
                    }
                    for column in 0..columns {
                        out[column] = i32::from_le_bytes(old[column]).wrapping_add(sums[column]).to_le_bytes();
                    }
                }
            }
        }
        if BROKEN.get() && numbers != Numbers::Bf16 {
            result[5][8] ^= 1;
        }
        self.data[c] = result;
        Ok(())
    }
}

/// # Safety
/// `count` bytes at `address` can be read.
unsafe fn bytes<'a>(address: u64, count: usize) -> &'a [u8] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(address as *const u8, count) }
}

fn integer(byte: u8, signed: bool) -> i32 {
    if signed { byte.cast_signed().into() } else { byte.into() }
}

/// What `tdpbf16ps` adds to a row of 16 sums: two chains of fused products, for even and odd inputs, then their sum.
fn bf16_row(a: &[[u8; 4]], b: &[[u8; 64]; 16]) -> [f32; 16] {
    let pair = |bytes: [u8; 4]| {
        let widen = |low, high| flush(f32::from_le_bytes([0, 0, low, high]));
        [widen(bytes[0], bytes[1]), widen(bytes[2], bytes[3])]
    };
    let mut chains = [[0.0_f32; 2]; 16];
    for (a, b) in a.iter().zip(b) {
        let a = pair(*a);
        for (chains, b) in chains.iter_mut().zip(b.as_chunks::<4>().0) {
            let b = pair(*b);
            for (chain, (a, b)) in chains.iter_mut().zip(a.into_iter().zip(b)) {
                *chain = flush(a.mul_add(b, *chain));
            }
        }
    }
    chains.map(|[even, odd]| flush(even + odd))
}

/// Zero, with its sign, for what is below the normal range.
fn flush(value: f32) -> f32 {
    if value.is_subnormal() { 0.0_f32.copysign(value) } else { value }
}
