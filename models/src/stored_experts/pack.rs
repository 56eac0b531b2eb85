//! A pack as a tier: where each expert lies, how it is read, and the checksum that it is held against.

use cadre_engine::experts::{BlockingTier, ExpertId, FetchError, Threads, Tier};

use super::{
    ExpertTensors, Layer, THREADS,
    io::{Io, choose},
};
use crate::{
    Error, Result,
    files::Source,
    tensors::{PackedLayout, TensorSet},
};

/// A pack's routed experts.
pub(super) struct Pack {
    pub(super) name: String,
    pub(super) tensors: TensorSet,
    pub(super) layers: Vec<Layer>,
}

/// Where an expert lies.
struct Place<'a> {
    tensor: usize,
    file: &'a Source,
    offset: u64,
    /// With the padding at its end.
    bytes: usize,
    /// Without it.
    data_bytes: usize,
}

impl Pack {
    /// The tier that reads it, in the way that is `asked` for, or in the better one that can be had.
    pub(super) fn open(self, asked: Option<Io>) -> Result<Box<dyn Tier>> {
        let name = self.name.clone();
        let failed = |reason| Error::Read { file: name, reason };
        #[cfg(target_os = "linux")]
        if let Some(ring) = choose(asked, super::uring::set_up)? {
            return Ok(Box::new(ring::RingTier::start(self, ring).map_err(failed)?));
        }
        #[cfg(not(target_os = "linux"))]
        choose(asked, || Err::<(), _>(std::io::ErrorKind::Unsupported.into()))?;
        Ok(Box::new(Threads::start(self, THREADS).map_err(failed)?))
    }

    fn place(&self, id: ExpertId) -> Result<Place<'_>, FetchError> {
        let missing = || self.failed(id, "there is no such expert".to_owned());
        let layer = self.layers.get(id.layer as usize).ok_or_else(missing)?;
        let Some(&ExpertTensors::Packed(tensor)) = layer.experts.get(id.expert as usize) else { return Err(missing()) };
        let (file, offset) = self.tensors.place(tensor);
        let layout = PackedLayout::Expert(layer.layout);
        Ok(Place { tensor, file, offset, bytes: layout.bytes() as usize, data_bytes: layout.data_bytes() as usize })
    }

    /// Holds what was read from `place` against its checksum; says how many bytes that were.
    fn check(&self, id: ExpertId, place: &Place<'_>, read: &[u8]) -> Result<usize, FetchError> {
        let data = read.get(..place.data_bytes).unwrap_or(read);
        let (expected, found) = (self.tensors.info(place.tensor).checksum, crc32fast::hash(data));
        if expected == Some(found) {
            return Ok(place.bytes);
        }
        let (file, expected) = (place.file.label(), expected.unwrap_or(0));
        let told = format!("{file} is damaged: expected checksum {expected:08x}, found {found:08x}");
        Err(self.failed(id, format!("{told}; remove it and run `cadre pack` again")))
    }

    fn failed(&self, id: ExpertId, reason: String) -> FetchError {
        FetchError { id, tier: self.name.clone(), reason }
    }
}

impl BlockingTier for Pack {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, id: ExpertId, out: &mut [u8]) -> Result<usize, FetchError> {
        let place = self.place(id)?;
        let (bytes, room) = (place.bytes, out.len());
        let Some(out) = out.get_mut(..bytes) else {
            return Err(self.failed(id, format!("it has {bytes} bytes, its slot {room}")));
        };
        place.file.read_direct(place.offset, out).map_err(|error| self.failed(id, error.to_string()))?;
        self.check(id, &place, out)
    }
}

#[cfg(target_os = "linux")]
mod ring {
    use std::{io, sync::Arc};

    use cadre_engine::experts::{BlockingTier as _, Fetch, Tier};

    use super::{
        super::uring::{DEPTH, Read, Ring, SetUp},
        Pack,
    };

    /// A pack that is read through a ring.
    pub(super) struct RingTier {
        pack: Arc<Pack>,
        ring: Ring,
    }

    impl RingTier {
        pub(super) fn start(pack: Pack, ring: SetUp) -> io::Result<Self> {
            let pack = Arc::new(pack);
            let reader = Arc::clone(&pack);
            let ring = Ring::start(ring, move |fetch, result| reader.arrived(fetch, result))?;
            Ok(Self { pack, ring })
        }
    }

    impl Tier for RingTier {
        fn name(&self) -> &str {
            &self.pack.name
        }

        fn depth(&self) -> usize {
            DEPTH
        }

        fn fetch(&self, mut fetch: Fetch) {
            let file = self.pack.place(fetch.id()).ok().and_then(|place| Some((place.file.file()?, place)));
            match file {
                Some((file, place)) => {
                    self.ring.read(Read { fetch, file: Arc::clone(file), offset: place.offset, bytes: place.bytes });
                }
                // Nothing to wait for: no such expert, or one inside of the binary.
                None => {
                    let result = self.pack.fetch(fetch.id(), fetch.buffer());
                    fetch.finish(result);
                }
            }
        }
    }

    impl Pack {
        fn arrived(&self, mut fetch: Fetch, result: io::Result<()>) {
            let id = fetch.id();
            let checked = self.place(id).and_then(|place| {
                let failed =
                    |error| self.failed(id, place.file.read_error(place.offset, place.bytes, error).to_string());
                result.map_err(failed)?;
                self.check(id, &place, fetch.buffer())
            });
            fetch.finish(checked);
        }
    }
}
