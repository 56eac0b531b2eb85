//! A row of logits, and the order of its tokens.

use cadre_kernels::{
    isa::Isa,
    logits::{self, BLOCK, Weighing},
};

use super::SampleError;

/// A token's place in the order of rank, the best first: the highest logit, of equal ones the lowest id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank(u64);

impl Rank {
    pub(super) fn of(logit: f32, token: u32) -> Self {
        // Adding 0 makes the two zeros one. A float's bits ascend with it if the negative ones are turned round.
        let bits = (logit + 0.0).to_bits();
        let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
        Self(u64::from(!ascending) << 32 | u64::from(token))
    }

    pub(super) fn token(self) -> u32 {
        self.0 as u32
    }

    pub(super) fn logit(self) -> f32 {
        let ascending = !((self.0 >> 32) as u32);
        f32::from_bits(if ascending >> 31 == 1 { ascending ^ 1 << 31 } else { !ascending })
    }
}

/// A row of logits, none of them NaN or infinity, and the highest of each block of it: whoever looks for high logits
/// passes over most blocks. An excluded token has minus infinity.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) isa: Isa,
    pub(super) logits: &'a [f32],
    /// `[logits / BLOCK]`, rounded up.
    pub(super) peaks: &'a [f32],
}

impl<'a> Row<'a> {
    /// The model's logits, all finite. `peaks` is working memory.
    pub(super) fn raw(isa: Isa, logits: &'a [f32], peaks: &'a mut Vec<f32>) -> Result<Self, SampleError> {
        Self::new(isa, logits, peaks, |logit| logit.is_finite())
    }

    /// Logits after the request's constraints, some of them excluded. `peaks` is working memory.
    pub(super) fn constrained(isa: Isa, logits: &'a [f32], peaks: &'a mut Vec<f32>) -> Result<Self, SampleError> {
        // Only a bias or a penalty that is itself not finite, or as large as f32 goes, can give anything else.
        Self::new(isa, logits, peaks, |logit| logit < f32::INFINITY)
    }

    fn new(
        isa: Isa,
        logits: &'a [f32],
        peaks: &'a mut Vec<f32>,
        is_valid: impl Fn(f32) -> bool,
    ) -> Result<Self, SampleError> {
        peaks.resize(logits.len().div_ceil(BLOCK), 0.0);
        // The search, which does not vectorise, runs only if the pass over everything found something.
        if !logits::block_peaks(isa, logits, peaks)
            && let Some(token) = logits.iter().position(|&logit| !is_valid(logit))
        {
            return Err(SampleError::NotFinite { token, value: logits[token] });
        }
        Ok(Self { isa, logits, peaks })
    }

    /// The first id, the highest logit and the logits of each block.
    pub(super) fn blocks(self) -> impl Iterator<Item = (usize, f32, &'a [f32])> {
        let blocks = self.logits.chunks(BLOCK).zip(self.peaks).enumerate();
        blocks.map(|(index, (logits, &peak))| (index * BLOCK, peak, logits))
    }

    /// The best token; `None` if all are excluded.
    pub(super) fn best(self) -> Option<Rank> {
        let highest = self.peaks.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (start, _, logits) = self.blocks().find(|(_, peak, _)| *peak == highest && *peak > f32::NEG_INFINITY)?;
        let at = logits.iter().position(|&logit| logit == highest)?;
        Some(Rank::of(highest, (start + at) as u32))
    }

    /// Lists the `count` best tokens, without the excluded ones, in any order.
    ///
    /// One pass with a rising bar: only what beats the worst of the best so far is listed, and the list is cut back
    /// whenever it has doubled.
    pub(super) fn list_best(self, count: usize, best: &mut Vec<Rank>) {
        best.clear();
        if count == 0 {
            return;
        }
        let mut bar = self.first_bar(count, best);
        let limit = count.saturating_mul(2).max(64);
        for (start, peak, logits) in self.blocks() {
            if peak <= bar {
                continue;
            }
            for (token, &logit) in (start as u32..).zip(logits) {
                // A later token that is equal to a risen bar ranks after it.
                if logit > bar {
                    best.push(Rank::of(logit, token));
                    if best.len() == limit {
                        bar = cut_back(count, best);
                    }
                }
            }
        }
        if best.len() > count {
            cut_back(count, best);
        }
    }

    /// What the `count` best tokens are above for certain: as many blocks have a token that is. `best` is working
    /// memory.
    fn first_bar(self, count: usize, best: &mut Vec<Rank>) -> f32 {
        if self.peaks.len() < count {
            return f32::NEG_INFINITY;
        }
        best.extend(self.peaks.iter().map(|&peak| Rank::of(peak, 0)));
        let (_, &mut worst, _) = best.select_nth_unstable(count - 1);
        best.clear();
        worst.logit().next_down()
    }

    /// Logarithm of the sum of exponentials, those in f32, their sum in f64: of each block, then of the blocks.
    pub(super) fn log_sum_exp(self) -> f64 {
        let highest = self.peaks.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weighing = Weighing { highest, temperature: 1.0, least_weight: 0.0 };
        let mut weights = [0.0; BLOCK];
        let mut sum = 0.0;
        for logits in self.logits.chunks(BLOCK) {
            sum += logits::weigh(self.isa, weighing, f32::NEG_INFINITY, logits, &mut weights[..logits.len()]);
        }
        f64::from(highest) + sum.ln()
    }
}

/// Cuts `best` to its `count` best, of which there are more, and gives the logit of the worst of them.
fn cut_back(count: usize, best: &mut Vec<Rank>) -> f32 {
    let (_, &mut worst, _) = best.select_nth_unstable(count - 1);
    best.truncate(count);
    worst.logit()
}
