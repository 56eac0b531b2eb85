use cadre_kernels::slots::SlotWriter;

use super::ExpertId;

/// Where all of a model's experts lie, packed, and can be fetched from. It decides how and in which order it works on
/// what it was given; what is given first, and whether an expert is fetched at all, is the store's affair.
pub trait Tier: Send + Sync {
    /// What it is called in messages.
    fn name(&self) -> &str;

    /// How many fetches it works on at once: it is given no more.
    fn depth(&self) -> usize;

    /// Begins to fill the front of [`Fetch::buffer`] with the expert's packed bytes; the rest may be overwritten. It should
    /// come back before the bytes do: whoever needs experts waits for it.
    fn fetch(&self, fetch: Fetch);
}

/// One expert's way into memory. Whoever owns it may write the slot, and says with [`Fetch::finish`] how it went. If it is
/// dropped before, by a panic or because a tier gives up, it has failed: nobody waits for ever.
pub struct Fetch {
    id: ExpertId,
    tier: String,
    open: Option<Open>,
}

struct Open {
    slot: SlotWriter,
    arrived: Arrived,
}

type Arrived = Box<dyn FnOnce(Result<usize, FetchError>) + Send>;

impl Fetch {
    /// The way of expert `id` into `slot`, from the tier of that name. When it ends, the slot is let go and `arrived` is
    /// told how many bytes were read.
    #[must_use]
    pub fn new(
        id: ExpertId,
        tier: &str,
        slot: SlotWriter,
        arrived: impl FnOnce(Result<usize, FetchError>) + Send + 'static,
    ) -> Self {
        Self { id, tier: tier.to_owned(), open: Some(Open { slot, arrived: Box::new(arrived) }) }
    }

    /// Which expert.
    #[must_use]
    pub fn id(&self) -> ExpertId {
        self.id
    }

    /// Where its bytes go. It begins at a multiple of 4 KiB in memory, has a multiple of 4 KiB bytes, and stays where it is
    /// as long as this lives.
    pub fn buffer(&mut self) -> &mut [u8] {
        self.open.as_mut().map_or(&mut [], |open| &mut open.slot)
    }

    /// Its bytes are at the front of the buffer, after so many were read; or they can't be had.
    pub fn finish(mut self, result: Result<usize, FetchError>) {
        self.end(result);
    }

    fn end(&mut self, result: Result<usize, FetchError>) {
        if let Some(Open { slot, arrived }) = self.open.take() {
            // Before anybody hears of it, so that who reads it need not wait.
            drop(slot);
            arrived(result);
        }
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        let reason = "reading it was given up; the log has more if that was a fault of the program".to_owned();
        let error = FetchError { id: self.id, tier: std::mem::take(&mut self.tier), reason };
        self.end(Err(error));
    }
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
