//! Which format each part of a model gets.

use std::fmt;

use cadre_engine::nn::Format;

use crate::tensors::StoredType;

/// The formats asked for; `None` is what loses nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FormatOptions {
    /// Of all matrices.
    pub format: Option<Format>,
    /// Of the routed experts, in place of `format`.
    pub experts: Option<Format>,
    /// Of all other matrices, in place of `format`.
    pub dense: Option<Format>,
}

/// The formats of a model's matrices. Routers are f32; norms and biases are no matrices, and are f32 too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Formats {
    /// Routed experts.
    pub experts: Format,
    /// Attention, dense and shared feed-forwards, an untied output head.
    pub dense: Format,
    /// The token embedding, which is also a tied output head: never quantised.
    pub embedding: Format,
}

impl FormatOptions {
    /// The same format for all.
    #[must_use]
    pub fn all(format: Format) -> Self {
        Self { format: Some(format), ..Self::default() }
    }

    /// The formats for a checkpoint whose weights are stored as `stored`: bf16 stays bf16, f32 and f16 are computed in
    /// f32 where nothing else was asked for.
    pub(crate) fn resolve(&self, stored: StoredType) -> Formats {
        let auto = match stored {
            StoredType::Bf16 => Format::Bf16,
            StoredType::F32 | StoredType::F16 => Format::F32,
        };
        let dense = self.dense.or(self.format).unwrap_or(auto);
        Formats {
            experts: self.experts.or(self.format).unwrap_or(auto),
            dense,
            embedding: if matches!(dense, Format::F32 | Format::Bf16) { dense } else { auto },
        }
    }
}

impl fmt::Display for FormatOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = [("", self.format), ("experts ", self.experts), ("dense ", self.dense)];
        let asked: Vec<_> = named.iter().filter_map(|(name, format)| Some(format!("{name}{}", (*format)?))).collect();
        f.write_str(&asked.join(", "))
    }
}

impl fmt::Display for Formats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { experts, dense, .. } = self;
        if experts == dense { write!(f, "{dense}") } else { write!(f, "{experts} experts, {dense} dense") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrower_option_wins() {
        let auto = FormatOptions::default();
        assert_eq!(auto.resolve(StoredType::F16).to_string(), "f32");
        assert_eq!(auto.resolve(StoredType::Bf16).to_string(), "bf16");
        let experts = FormatOptions { experts: Some(Format::Bf16), ..FormatOptions::all(Format::F32) };
        let formats = experts.resolve(StoredType::Bf16);
        assert_eq!(formats, Formats { experts: Format::Bf16, dense: Format::F32, embedding: Format::F32 });
        assert_eq!(formats.to_string(), "bf16 experts, f32 dense");
        // The embedding is never quantised.
        let formats = FormatOptions::all(Format::Q4K).resolve(StoredType::F16);
        assert_eq!((formats.to_string(), formats.embedding), ("q4_k".to_owned(), Format::F32));
    }
}
