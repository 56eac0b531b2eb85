//! Arrays in NumPy's file format.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::Value;

/// An array of small whole numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Its numbers, the last dimension's neighbours beside each other.
    pub numbers: Vec<u32>,
}

impl Array {
    /// Reads a `.npy` file of unsigned numbers in base64.
    ///
    /// # Panics
    /// When it is none.
    #[track_caller]
    pub fn from_base64(value: &Value) -> Self {
        let file = BASE64_STANDARD.decode(value.as_str().expect("a string")).expect("base64");
        assert_eq!(&file[..8], b"\x93NUMPY\x01\x00");
        let length = usize::from(u16::from_le_bytes([file[8], file[9]]));
        let (header, data) = file[10..].split_at(length);
        let header = std::str::from_utf8(header).expect("a header in ASCII");
        assert!(header.contains("'fortran_order': False") && (10 + length) % 64 == 0, "{header}");
        let width = if header.contains("'|u1'") { 1 } else { 2 };
        let shape = header.split_once("'shape': (").and_then(|(_, rest)| rest.split_once(')')).expect("a shape").0;
        let shape: Vec<usize> = shape.split(", ").map(|size| size.parse().expect("a size")).collect();
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte));
        let numbers: Vec<u32> = data.chunks_exact(width).map(number).collect();
        assert_eq!(numbers.len(), shape.iter().product::<usize>(), "{header}");
        Self { shape, numbers }
    }

    /// The numbers of one place of the first dimension and the next ones.
    pub fn rows(&self) -> Vec<&[u32]> {
        self.numbers.chunks_exact(self.shape[1..].iter().product()).collect()
    }
}
