use super::ExpertId;

/// Where all of a model's experts lie, packed, and can be fetched from.
pub trait Tier: Send + Sync {
    /// What it is called in messages.
    fn name(&self) -> &str;

    /// Fills the front of `out` with the expert's packed bytes, and says how many it read; the rest may be overwritten. Called from several threads
    /// at once. `out` begins at a multiple of 4 KiB in memory and has a multiple of 4 KiB bytes.
    ///
    /// # Errors
    /// When they can't be read.
    fn fetch(&self, id: ExpertId, out: &mut [u8]) -> Result<usize, FetchError>;
}

/// An expert's weights can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the weights of expert {} of layer {} can't be read from {tier}: {reason}", id.expert, id.layer)]
pub struct FetchError {
    /// Which one.
    pub id: ExpertId,
    /// Where from.
    pub tier: String,
    /// Why not.
    pub reason: String,
}
