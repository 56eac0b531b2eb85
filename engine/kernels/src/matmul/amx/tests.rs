use std::sync::Once;

use proptest::prelude::*;

use super::{
    emulator::{self, Code, Fault, Instruction, Numbers, Registers},
    *,
};
use crate::{
    format::{INTEGER_K, SUPER_BLOCK},
    matmul::{matmul, walk},
    pool::Pool,
    test_support::{bits, values},
};

const INTEGER: &[Format] = &[Format::Q8_0, Format::Q4_0, Format::Q4K, Format::Q6K, Format::Mxfp4];

/// Makes `Isa::Amx` runnable: natively, or emulated where the machine lacks AMX and has the AVX-512 that the tier also
/// needs.
fn runnable() -> bool {
    static SAID: Once = Once::new();
    let native = Isa::available().contains(&Isa::Amx);
    // What the processor executes itself can't be emulated.
    let runnable = native || Isa::available().contains(&Isa::Avx512) && !instructions();
    if runnable && !native {
        emulator::install();
    }
    let is_refused = !native && Isa::available().contains(&Isa::Avx512) && instructions() && permission();
    assert!(!is_refused, "this machine has AMX, and its self-check fails");
    SAID.call_once(|| match (native, runnable) {
        (true, _) => eprintln!("AMX tests run on this machine's AMX"),
        (_, true) => eprintln!("AMX tests run emulated: this machine has no AMX"),
        _ if instructions() => {
            eprintln!("AMX tests don't run: the system doesn't let processes use this machine's AMX")
        }
        _ => eprintln!("AMX tests don't run: this machine lacks AVX-512 VNNI"),
    });
    runnable
}

fn product(pool: &Pool, isa: Isa, x: &[f32], weights: &Packed<'_>) -> Vec<f32> {
    let layout = weights.layout();
    let mut y = vec![f32::NAN; x.len() / layout.k * layout.n];
    matmul(pool, isa, x, weights, &mut y);
    y
}

fn packed(layout: Layout, seed: u64) -> Buffer<u8> {
    let mut bytes = Buffer::zeroed(layout.bytes()).unwrap();
    pack(layout, &values(layout.n * layout.k, seed), &mut bytes);
    bytes
}

/// Any bytes that a panel can have, with scales of moderate size; quants are random or all at one end.
fn any_panel(format: Format, k: usize, seed: u64) -> Buffer<u8> {
    let mut panel = Buffer::<u8>::zeroed(format.panel_bytes(k)).unwrap();
    let random = values(panel.len(), seed);
    for (byte, random) in panel.iter_mut().zip(&random) {
        *byte = match seed % 3 {
            0 => 0,
            1 => 0xff,
            _ => (random.to_bits() >> 3) as u8,
        };
    }
    let scale = |index: usize| half::f16::from_f32(0.001 + random[index].abs()).to_bits().to_le_bytes();
    let inputs = if matches!(format, Format::Q4K | Format::Q6K) { SUPER_BLOCK } else { INTEGER_K };
    let whole = format.panel_bytes(inputs);
    for (index, block) in panel.chunks_mut(whole).enumerate() {
        let halves = match format {
            Format::Mxfp4 => 0,
            Format::Q6K => 16,
            _ => 32,
        };
        for (place, bytes) in block.as_chunks_mut::<2>().0.iter_mut().enumerate().take(halves) {
            *bytes = scale(index * 32 + place);
        }
        if format == Format::Mxfp4 {
            block[..32].iter_mut().enumerate().for_each(|(place, exponent)| *exponent = 120 + place as u8 % 16);
        }
        if format == Format::Q4K {
            let parts = (block.len() - 64) / 288;
            block[64..64 + parts * 32].iter_mut().for_each(|number| *number &= 63);
        }
        if format == Format::Q6K && !seed.is_multiple_of(5) {
            // The scale that is farthest out.
            let units = (block.len() - 64) / 832;
            block[64..64 + units * 64].fill(0x80);
        }
    }
    panel
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn integers_have_the_bits_of_the_contract(rows in 1_usize..72, n in 1_usize..150, k in 1_usize..700, seed: u64) {
        if !runnable() {
            return Ok(());
        }
        let pool = Pool::new(2);
        let x = values(rows * k, seed);
        for format in INTEGER {
            let layout = Layout { format: *format, n, k };
            let bytes = packed(layout, seed ^ 7);
            let weights = Packed::new(layout, &bytes);
            let (y, contract) = (product(&pool, Isa::Amx, &x, &weights), product(&pool, Isa::Portable, &x, &weights));
            prop_assert_eq!(bits(&y), bits(&contract), "{}", format);
        }
    }

    #[test]
    fn any_weights_and_the_largest_activations_have_the_bits_of_the_contract(
        rows in 5_usize..34, units in 1_usize..12, seed: u64, same_sign: bool,
    ) {
        if !runnable() {
            return Ok(());
        }
        let (pool, k) = (Pool::new(1), units * INTEGER_K);
        let sign = |x: &f32| if same_sign { 1.0 } else { x.signum() };
        let x: Vec<f32> = values(rows * k, seed).iter().map(sign).collect();
        for format in INTEGER {
            let bytes = any_panel(*format, k, seed);
            let weights = Packed::new(Layout { format: *format, n: PANEL, k }, &bytes);
            let (y, contract) = (product(&pool, Isa::Amx, &x, &weights), product(&pool, Isa::Portable, &x, &weights));
            prop_assert_eq!(bits(&y), bits(&contract), "{}", format);
        }
    }

    #[test]
    fn bf16_is_near_the_exact_product_and_a_row_the_same_in_any_batch(
        rows in 1_usize..72, n in 1_usize..150, k in 1_usize..300, seed: u64,
    ) {
        if !runnable() {
            return Ok(());
        }
        let layout = Layout { format: Format::Bf16, n, k };
        let (x, w) = (values(rows * k, seed), values(n * k, seed ^ 7));
        let bytes = packed(layout, seed ^ 7);
        let weights = Packed::new(layout, &bytes);
        let y = product(&Pool::new(2), Isa::Amx, &x, &weights);
        let round = |v: f32| f64::from(half::bf16::from_f32(v).to_f32());
        for (index, y) in y.iter().enumerate() {
            let (row, column) = (index / n, index % n);
            let (mut exact, mut size) = (0.0, 0.0);
            for (x, w) in x[row * k..].iter().zip(&w[column * k..]).take(k) {
                exact += round(*x) * round(*w);
                size += (round(*x) * round(*w)).abs();
            }
            // A rounding of each product's sum, of two chains' sum and of its sum with the ones before.
            let bound = size * (k + k / 16 + 2) as f64 * f64::from(f32::EPSILON) + 1e-30;
            prop_assert!((f64::from(*y) - exact).abs() <= bound, "{y} against {exact} at {index}");
        }
        for row in [0, rows / 2, rows - 1] {
            let alone = product(&Pool::new(1), Isa::Amx, &x[row * k..(row + 1) * k], &weights);
            prop_assert_eq!(bits(&alone), bits(&y[row * n..(row + 1) * n]));
        }
    }
}

#[test]
fn rows_may_lie_anywhere_and_more_than_once() {
    if !runnable() {
        return;
    }
    let (k, rows) = (320, 40);
    for format in [Format::Bf16, Format::Q8_0, Format::Q4K] {
        let layout = Layout { format, n: 100, k };
        let bytes = packed(layout, 3);
        let weights = Packed::new(layout, &bytes);
        let mut activations = Converted::zeroed(&Pool::new(1), Isa::Portable, format, rows, k);
        let writer = activations.writer();
        for (index, row) in values(rows * k, 5).chunks_exact(k).enumerate() {
            // SAFETY: nothing else uses the rows.
            unsafe { writer.write(index, 0, row) };
        }
        let outputs = |order: &[usize]| {
            let rows: Vec<_> = order.iter().map(|row| activations.row(*row)).collect();
            let mut y = vec![[0.0; 112]; order.len()];
            // SAFETY: rows of this format and k.
            unsafe {
                walk(Isa::Amx, &rows, &weights, 0..layout.panels(), &mut new_sums(), |row, panel, sums| {
                    y[row][panel * PANEL..][..sums.len() * PANEL].copy_from_slice(sums.as_flattened());
                });
            }
            y
        };
        let straight = outputs(&(0..rows).collect::<Vec<_>>());
        let order: Vec<usize> = (0..rows + 7).map(|index| index * 13 % rows).collect();
        for (row, y) in order.iter().zip(outputs(&order)) {
            assert_eq!(bits(&y), bits(&straight[*row]), "{format} row {row}");
        }
    }
}

#[test]
fn the_check_at_detection_accepts_amx_and_refuses_a_wrong_one() {
    if !runnable() {
        return;
    }
    // SAFETY: `runnable` found or emulates AMX.
    assert!(unsafe { agrees_with_portable() });
    if !available() {
        // SAFETY: emulated.
        assert!(!emulator::broken(|| unsafe { agrees_with_portable() }));
    }
}

/// A register file with a configuration: byte 0 the palette, then (register, rows, bytes of a row).
fn configured(shapes: &[(usize, u8, u16)]) -> Registers {
    let mut registers = Registers::new();
    assert_eq!(configure(&mut registers, &configuration(shapes)), Ok(()));
    registers
}

fn configuration(shapes: &[(usize, u8, u16)]) -> [u8; 64] {
    let mut operand = [0; 64];
    operand[0] = 1;
    for (register, rows, bytes) in shapes {
        operand[16 + 2 * register..][..2].copy_from_slice(&bytes.to_le_bytes());
        operand[48 + register] = *rows;
    }
    operand
}

fn configure(registers: &mut Registers, operand: &[u8; 64]) -> Result<(), Fault> {
    // SAFETY: the operand is there.
    unsafe { registers.execute(Instruction::Configure { address: operand.as_ptr() as u64 }) }
}

/// Loads `bytes` as rows of `stride` bytes.
fn load(registers: &mut Registers, register: usize, bytes: &[u8], stride: u64) -> Result<(), Fault> {
    // SAFETY: the tests give enough bytes.
    unsafe { registers.execute(Instruction::Load { register, address: bytes.as_ptr() as u64, stride }) }
}

fn multiply(registers: &mut Registers, numbers: Numbers, [c, a, b]: [usize; 3]) -> Result<(), Fault> {
    // SAFETY: no memory is touched.
    unsafe { registers.execute(Instruction::Multiply { numbers, c, a, b }) }
}

fn dword(registers: &Registers, register: usize, row: usize, column: usize) -> u32 {
    u32::from_le_bytes(registers.row(register, row).as_chunks::<4>().0[column])
}

#[test]
fn the_emulator_refuses_what_a_processor_refuses() {
    let mut registers = Registers::new();
    let signed = Numbers::Int8 { signed_a: true, signed_b: true };
    let lines = [0_u8; 1024];
    assert!(matches!(load(&mut registers, 0, &lines, 64), Err(Fault::Undefined(_))), "no configuration");
    type Spoil = fn(&mut [u8; 64]);
    let spoilt: [(&str, Spoil); 6] = [
        ("palette", |operand| operand[0] = 2),
        ("reserved bytes", |operand| operand[9] = 1),
        ("more than eight registers", |operand| operand[56] = 1),
        ("17 rows", |operand| operand[48] = 17),
        ("65 bytes", |operand| operand[16] = 65),
        ("rows without bytes", |operand| operand[50] = 1),
    ];
    for (what, spoil) in spoilt {
        let mut operand = configuration(&[(0, 16, 64)]);
        spoil(&mut operand);
        assert!(matches!(configure(&mut registers, &operand), Err(Fault::GeneralProtection(_))), "{what}");
    }
    let mut registers = configured(&[(0, 16, 64), (1, 16, 32), (2, 8, 64), (3, 16, 64), (4, 16, 30)]);
    assert_eq!(multiply(&mut registers, signed, [0, 1, 2]), Ok(()));
    for (what, operands) in [
        ("one register twice", [0, 1, 1]),
        ("depths that differ", [0, 3, 2]),
        ("rows that differ", [2, 1, 3]),
        ("bytes that are no multiple of 4", [0, 4, 2]),
        ("a register without a shape", [0, 1, 5]),
    ] {
        assert!(matches!(multiply(&mut registers, signed, operands), Err(Fault::Undefined(_))), "{what}");
    }
    // SAFETY: no memory is touched.
    assert_eq!(unsafe { registers.execute(Instruction::Release) }, Ok(()));
    assert!(matches!(load(&mut registers, 0, &lines, 64), Err(Fault::Undefined(_))), "after the release");
}

#[test]
fn the_emulator_moves_rows_by_stride_and_zeroes_what_lies_outside_of_a_shape() {
    let mut registers = configured(&[(1, 3, 8)]);
    let bytes: Vec<u8> = (0..64).collect();
    assert_eq!(load(&mut registers, 1, &bytes, 20), Ok(()));
    assert_eq!(registers.row(1, 2)[..8], bytes[40..48]);
    assert!(registers.row(1, 2)[8..].iter().all(|byte| *byte == 0), "past the row's bytes");
    let mut out = [0xee_u8; 64];
    // SAFETY: three rows of 8 bytes lie in `out`.
    let stored =
        unsafe { registers.execute(Instruction::Store { register: 1, address: out.as_mut_ptr() as u64, stride: 10 }) };
    assert_eq!(stored, Ok(()));
    assert_eq!((&out[10..18], &out[18..20]), (&bytes[20..28], &[0xee, 0xee][..]));
}

#[test]
fn the_emulator_multiplies_bytes_with_their_signs() {
    for (signed_a, signed_b) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut registers = configured(&[(0, 2, 8), (1, 2, 8), (2, 2, 8)]);
        let a: [u8; 16] = std::array::from_fn(|index| (index * 37 + 100) as u8);
        let b: [u8; 16] = std::array::from_fn(|index| (index * 91 + 200) as u8);
        load(&mut registers, 1, &a, 8).unwrap();
        load(&mut registers, 2, &b, 8).unwrap();
        let numbers = Numbers::Int8 { signed_a, signed_b };
        multiply(&mut registers, numbers, [0, 1, 2]).unwrap();
        multiply(&mut registers, numbers, [0, 1, 2]).unwrap();
        let number = |byte: u8, signed| if signed { i32::from(byte.cast_signed()) } else { i32::from(byte) };
        for (row, column) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let sum: i32 = (0..8)
                .map(|k| number(a[8 * row + k], signed_a) * number(b[k / 4 * 8 + column * 4 + k % 4], signed_b))
                .sum();
            assert_eq!(dword(&registers, 0, row, column).cast_signed(), 2 * sum, "{numbers:?} {row} {column}");
        }
    }
}

/// One sum of `x · w`, bf16 pairs, on top of `start`.
fn bf16_sum(start: f32, x: &[f32], w: &[f32]) -> f32 {
    let pairs = (x.len() / 2) as u8;
    let mut registers = configured(&[(0, 1, 4), (1, 1, 4 * u16::from(pairs)), (2, pairs, 4)]);
    let bytes =
        |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|value| value.to_le_bytes()[2..].to_vec()).collect() };
    load(&mut registers, 0, &start.to_le_bytes(), 64).unwrap();
    load(&mut registers, 1, &bytes(x), 64).unwrap();
    load(&mut registers, 2, &bytes(w), 4).unwrap();
    multiply(&mut registers, Numbers::Bf16, [0, 1, 2]).unwrap();
    f32::from_bits(dword(&registers, 0, 0, 0))
}

#[test]
fn the_emulator_adds_bf16_in_two_chains_and_flushes_denormals() {
    let big = 2_f32.powi(24);
    assert_eq!(bf16_sum(1.0, &[2.0, 3.0], &[5.0, 7.0]), 32.0);
    // Even and odd inputs are in different chains, and what was there comes last: in one chain from `start` on, the
    // second 1 would be lost.
    assert_eq!(bf16_sum(0.0, &[big, 1.0, 0.0, 1.0], &[1.0; 4]), big + 2.0);
    assert_eq!(bf16_sum(big, &[1.0, 0.0, 1.0, 0.0], &[1.0; 4]), big + 2.0);
    // In one chain, each 1 is lost.
    assert_eq!(bf16_sum(0.0, &[big, 0.0, 1.0, 0.0, 1.0, 0.0], &[1.0; 6]), big);
    let small = f32::MIN_POSITIVE;
    assert_eq!(bf16_sum(0.0, &[small / 2.0, 0.0], &[big, 0.0]), 0.0, "a denormal input");
    assert_eq!(bf16_sum(0.0, &[small, 0.0], &[0.5, 0.0]), 0.0, "a denormal product");
    assert_eq!(bf16_sum(small / 2.0, &[0.0; 2], &[0.0; 2]), 0.0, "a denormal sum");
    assert_eq!(bf16_sum(0.0, &[small, 0.0], &[1.0, 0.0]), small);
}

#[test]
fn the_emulator_decodes_every_form_of_operand() {
    let mut general = [0; 16];
    for (index, value) in general.iter_mut().enumerate() {
        *value = 0x1000 * (index as u64 + 1);
    }
    let (rax, rcx, r8, r13) = (general[0], general[1], general[8], general[13]);
    // As LLVM assembles them.
    let forms: &[(&[u8], Instruction)] = &[
        // ldtilecfg [rax]
        (&[0xc4, 0xe2, 0x78, 0x49, 0x00], Instruction::Configure { address: rax }),
        // ldtilecfg [r13 + 8]
        (&[0xc4, 0xc2, 0x78, 0x49, 0x45, 0x08], Instruction::Configure { address: r13 + 8 }),
        // ldtilecfg [r8 + 2 * rcx - 256]
        (
            &[0xc4, 0xc2, 0x78, 0x49, 0x84, 0x48, 0x00, 0xff, 0xff, 0xff],
            Instruction::Configure { address: r8 + 2 * rcx - 256 },
        ),
        // tilerelease
        (&[0xc4, 0xe2, 0x78, 0x49, 0xc0], Instruction::Release),
        // tilezero tmm3
        (&[0xc4, 0xe2, 0x7b, 0x49, 0xd8], Instruction::Zero { register: 3 }),
        // tileloadd tmm6, [rax + rcx]
        (&[0xc4, 0xe2, 0x7b, 0x4b, 0x34, 0x08], Instruction::Load { register: 6, address: rax, stride: rcx }),
        // tileloadd tmm7, [r13 + 4 * r8]
        (&[0xc4, 0x82, 0x7b, 0x4b, 0x7c, 0x85, 0x00], Instruction::Load { register: 7, address: r13, stride: 4 * r8 }),
        // tileloadd tmm1, [2 * rcx + 4096]
        (
            &[0xc4, 0xe2, 0x7b, 0x4b, 0x0c, 0x4d, 0x00, 0x10, 0x00, 0x00],
            Instruction::Load { register: 1, address: 4096, stride: 2 * rcx },
        ),
        // tilestored [rax + r8], tmm2
        (&[0xc4, 0xa2, 0x7a, 0x4b, 0x14, 0x00], Instruction::Store { register: 2, address: rax, stride: r8 }),
        // tdpbf16ps tmm1, tmm4, tmm5
        (&[0xc4, 0xe2, 0x52, 0x5c, 0xcc], Instruction::Multiply { numbers: Numbers::Bf16, c: 1, a: 4, b: 5 }),
    ];
    for (bytes, instruction) in forms {
        let decoded = Code::new(bytes.as_ptr()).decode(&general);
        assert_eq!(decoded, Some((*instruction, bytes.len() as i64)));
    }
    for (fields, signed_a, signed_b) in
        [(0x53, true, true), (0x52, true, false), (0x51, false, true), (0x50, false, false)]
    {
        let bytes = [0xc4, 0xe2, fields, 0x5e, 0xc4];
        let instruction = Instruction::Multiply { numbers: Numbers::Int8 { signed_a, signed_b }, c: 0, a: 4, b: 5 };
        assert_eq!(Code::new(bytes.as_ptr()).decode(&general), Some((instruction, 5)));
    }
    // vpmovzxbw ymm0, xmm0 and ud2 are none of ours.
    assert_eq!(Code::new([0xc4, 0xe2, 0x7d, 0x30, 0xc0].as_ptr()).decode(&general), None);
    assert_eq!(Code::new([0x0f, 0x0b].as_ptr()).decode(&general), None);
}
