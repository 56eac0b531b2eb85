use std::{
    f64::consts::PI,
    sync::{PoisonError, RwLock},
};

use cadre_kernels::qkv::RopeTable;

/// A rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Places of a head that turn; even.
    pub rotary_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// The length that the model was trained for.
    pub max_position_embeddings: usize,
    /// How positions beyond are reached.
    pub scaling: RopeScaling,
}

/// How a rotary embedding reaches positions beyond its training. The definitions are transformers'.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions are divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// The base grows with the position once it passes the trained length. A position turns as it would if its token
    /// were the last: what token-by-token decoding gives, whatever the chunks of the prefill.
    Dynamic {
        /// How much longer the context is to be.
        factor: f64,
    },
    /// NTK by parts (Peng et al., arXiv:2309.00071).
    Yarn {
        /// How much longer the context is to be.
        factor: f64,
        /// The trained length.
        original_max_position_embeddings: usize,
        /// Turns within the trained length above which a frequency is kept.
        beta_fast: f64,
        /// Turns below which a frequency is divided by `factor`.
        beta_slow: f64,
        /// Cosines and sines are multiplied by it.
        attention_factor: f64,
        /// Round the bounds between kept and divided frequencies to whole places.
        truncate: bool,
    },
}

/// The cosines and sines of a [`RopeConfig`], computed as far as positions were asked for.
#[derive(Debug)]
pub struct Rope {
    config: RopeConfig,
    table: RwLock<Table>,
}

#[derive(Debug, Default)]
struct Table {
    positions: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// An empty table.
    #[must_use]
    pub fn new(config: RopeConfig) -> Self {
        Self { config, table: RwLock::default() }
    }

    /// Gives `f` a table that holds all of `positions`.
    pub fn with_table<T>(&self, positions: &[u32], f: impl FnOnce(&RopeTable<'_>) -> T) -> T {
        let needed = positions.iter().max().map_or(0, |last| *last as usize + 1);
        if self.table.read().unwrap_or_else(PoisonError::into_inner).positions < needed {
            // Grown in powers of two, so that decoding does not grow it at every step.
            self.grow(needed.next_power_of_two());
        }
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        f(&RopeTable { half: self.config.rotary_dim / 2, cos: &table.cos, sin: &table.sin })
    }

    fn grow(&self, positions: usize) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let constant = self.config.frequencies(0);
        let factor = self.config.attention_factor();
        for position in table.positions..positions {
            let own = self.config.depends_on(position).then(|| self.config.frequencies(position));
            for frequency in own.as_ref().unwrap_or(&constant) {
                // The reference multiplies in f32.
                let angle = f64::from(position as f32 * frequency);
                table.cos.push((angle.cos() * factor) as f32);
                table.sin.push((angle.sin() * factor) as f32);
            }
        }
        table.positions = table.positions.max(positions);
    }
}

impl RopeConfig {
    /// The longest sequence that the embedding reaches: the trained length, stretched as the scaling says.
    #[must_use]
    pub fn max_positions(&self) -> usize {
        let stretched = |length: usize, factor: f64| (length as f64 * factor) as usize;
        let trained = self.max_position_embeddings;
        match self.scaling {
            RopeScaling::Default => trained,
            RopeScaling::Linear { factor } | RopeScaling::Dynamic { factor } => stretched(trained, factor),
            // A config may name the stretched length itself.
            RopeScaling::Yarn { factor, original_max_position_embeddings, .. } => {
                trained.max(stretched(original_max_position_embeddings, factor))
            }
        }
    }

    fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Whether the frequencies at this position differ from those at position 0.
    fn depends_on(&self, position: usize) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. }) && position >= self.max_position_embeddings
    }

    /// The angle per position of each pair of places.
    fn frequencies(&self, position: usize) -> Vec<f32> {
        let plain = |base: f64| move |exponent: f64| 1.0 / base.powf(exponent);
        match self.scaling {
            RopeScaling::Default => self.each(plain(self.theta)),
            RopeScaling::Linear { factor } => self.each(|exponent| plain(self.theta)(exponent) / factor),
            RopeScaling::Dynamic { factor } => {
                let trained = self.max_position_embeddings as f64;
                let length = (position as f64 + 1.0).max(trained);
                let dim = self.rotary_dim as f64;
                let growth = factor * length / trained - (factor - 1.0);
                self.each(plain(self.theta * growth.powf(dim / (dim - 2.0))))
            }
            RopeScaling::Yarn { .. } => self.yarn(),
        }
    }

    fn each(&self, frequency: impl Fn(f64) -> f64) -> Vec<f32> {
        let dim = self.rotary_dim as f64;
        (0..self.rotary_dim / 2).map(|i| frequency(2.0 * i as f64 / dim) as f32).collect()
    }

    fn yarn(&self) -> Vec<f32> {
        let RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, truncate, .. } =
            self.scaling
        else {
            return Vec::new();
        };
        let dim = self.rotary_dim as f64;
        // The place whose frequency makes `turns` turns within the trained length.
        let place = |turns: f64| {
            dim * (original_max_position_embeddings as f64 / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (place(beta_fast), place(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        self.each(|exponent| {
            let divided = ((exponent * dim / 2.0 - low) / (high - low)).clamp(0.0, 1.0);
            let kept = 1.0 / self.theta.powf(exponent);
            kept / factor * divided + kept * (1.0 - divided)
        })
    }
}
