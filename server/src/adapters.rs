//! The LoRA adapters that are served beside the base model.
//!
//! Those that flags name stay in memory. The others, which requests load and fine-tuning jobs make, share a budget: one is
//! read when a request names it, and those that nobody has used for the longest time leave.

use std::{
    fs::File,
    io::{self, BufRead as _},
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak},
    time::{SystemTime, UNIX_EPOCH},
};

use cadre_engine::{adapter::LoadedAdapter, train::places::PlaceInfo};
use cadre_models::adapter::{CONFIG_FILE, Lora, WEIGHTS_FILE};

use crate::{memory::mebibytes, metrics};

/// What an adapter's folder must have.
const FILES: [&str; 2] = [CONFIG_FILE, WEIGHTS_FILE];

/// An adapter and where it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterSource {
    /// The model's name in requests.
    pub name: String,
    /// The folder, as PEFT saves it.
    pub directory: PathBuf,
}

impl AdapterSource {
    /// A number that tells its files from those of others.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn fingerprint(&self) -> io::Result<String> {
        let mut hash = crc32fast::Hasher::new();
        for name in FILES {
            let mut file = io::BufReader::new(File::open(self.directory.join(name))?);
            loop {
                let bytes = file.fill_buf()?;
                if bytes.is_empty() {
                    break;
                }
                hash.update(bytes);
                let read = bytes.len();
                file.consume(read);
            }
        }
        Ok(format!("{:08x}", hash.finalize()))
    }
}

/// An adapter that requests may name.
#[derive(Debug, Clone)]
pub struct ServedAdapter {
    /// Its name.
    pub name: String,
    /// The folder that it comes from, as it was asked for.
    pub root: String,
    /// Since when requests may name it, in seconds since 1970.
    pub created: u64,
}

/// Why an adapter is not loaded.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// One of this name is there.
    #[error("there is an adapter `{0}` already: unload it first, or give another name")]
    Duplicate(String),
    /// The base model has this name.
    #[error("`{0}` is the base model's name: give the adapter another one")]
    ModelsName(String),
    /// No name, or one that other names' lists and addresses couldn't hold.
    #[error("`{0}` can't be an adapter's name: it may not be empty, nor hold a comma, a slash or a control character")]
    Name(String),
    /// It belongs to a fine-tuning job.
    #[error("`{0}` was made by a fine-tuning job: `DELETE /v1/models/{0}` removes it")]
    Jobs(String),
    /// It could never be in memory.
    #[error(
        "the adapter `{name}` takes {}, but those that aren't named by --adapter may take {} together (--adapter-memory): \
         allow more, or train one of a smaller rank", mebibytes(*bytes), mebibytes(*room)
    )]
    TooLarge {
        /// The adapter.
        name: String,
        /// What it takes.
        bytes: u64,
        /// What all may take.
        room: u64,
    },
    /// Requests under way hold all the memory that it could have.
    #[error(
        "no memory is left for the adapter `{0}`: requests for other adapters use it (--adapter-memory); try again"
    )]
    NoRoom(String),
    /// Not below the folder that adapters may be loaded from.
    #[error("`{0}` is not below the folder that adapters may be loaded from")]
    Outside(String),
    /// Nothing there.
    #[error("no adapter found in `{0}`: expected a folder as PEFT saves it, with {CONFIG_FILE} and {WEIGHTS_FILE}")]
    NotFound(String),
    /// Its files are broken, or of another model.
    #[error(transparent)]
    Read(#[from] cadre_models::Error),
    /// It doesn't fit the model.
    #[error(transparent)]
    Fit(#[from] cadre_engine::Error),
}

/// The adapters of a server.
#[derive(Debug, Default)]
pub struct Adapters {
    /// The base model's names.
    base: Vec<String>,
    /// The base model's matrices.
    places: Vec<PlaceInfo>,
    /// Where adapters may be loaded from while the server runs, without links.
    folder: Option<PathBuf>,
    /// Bytes for those that don't stay in memory.
    room: u64,
    table: RwLock<Table>,
    /// One is read at a time.
    reading: Mutex<()>,
}

#[derive(Debug, Default)]
struct Table {
    entries: Vec<Entry>,
    /// All that are in memory, if only for requests under way.
    held: Vec<Held>,
    /// How often an adapter was asked for.
    uses: u64,
    /// Entries there have been.
    made: u64,
}

/// Where an adapter comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// A flag named it: it stays in memory.
    Flag,
    /// A request loaded it.
    Request,
    /// A fine-tuning job made it.
    Job,
}

#[derive(Debug)]
struct Entry {
    served: ServedAdapter,
    directory: PathBuf,
    /// Differs from that of every other entry there has been.
    number: u64,
    adapter: Option<Arc<LoadedAdapter>>,
    origin: Origin,
    /// When it was last asked for, in uses of all adapters.
    used: u64,
}

#[derive(Debug)]
struct Held {
    adapter: Weak<LoadedAdapter>,
    stays: bool,
}

impl Table {
    /// Adds an adapter, in the place of one of its name if there is one.
    fn put(&mut self, source: AdapterSource, adapter: Option<Arc<LoadedAdapter>>, origin: Origin) {
        let AdapterSource { name, directory } = source;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let served = ServedAdapter { name, root: directory.display().to_string(), created };
        self.uses += 1;
        self.made += 1;
        let entry = Entry { served, directory, number: self.made, adapter, origin, used: self.uses };
        match self.entries.iter_mut().find(|other| other.served.name == entry.served.name) {
            Some(same) => *same = entry,
            None => self.entries.push(entry),
        }
    }

    /// Bytes of those in memory that stay, or of those that don't.
    fn bytes(&self, stays: bool) -> u64 {
        let held = self.held.iter().filter(|held| held.stays == stays);
        held.filter_map(|held| held.adapter.upgrade()).map(|adapter| adapter.bytes()).sum()
    }

    /// Lets the adapters that are longest unused leave until there is room for `bytes`; if all of them leaving wouldn't make
    /// it, none does. Whether there is room.
    fn make_room(&mut self, bytes: u64, room: u64) -> bool {
        let used = self.bytes(false);
        let is_unused = |entry: &&mut Entry| {
            entry.origin != Origin::Flag
                && entry.adapter.as_ref().is_some_and(|adapter| Arc::strong_count(adapter) == 1)
        };
        let mut unused: Vec<&mut Entry> = self.entries.iter_mut().filter(is_unused).collect();
        unused.sort_by_key(|entry| entry.used);
        let (mut leaving, mut freed) = (0, 0);
        while used.saturating_add(bytes) > room.saturating_add(freed) {
            let Some(entry) = unused.get(leaving) else { return false };
            freed += entry.adapter.as_ref().map_or(0, |adapter| adapter.bytes());
            leaving += 1;
        }
        unused.into_iter().take(leaving).for_each(|entry| entry.adapter = None);
        true
    }
}

impl Adapters {
    /// None yet, for a model that is served as `base` and has `places`; `folder` is where adapters may be loaded from
    /// while the server runs, if they may; `room` the bytes for those that don't stay in memory.
    ///
    /// # Errors
    /// When there is no such folder.
    pub fn new(base: Vec<String>, places: Vec<PlaceInfo>, folder: Option<&Path>, room: u64) -> io::Result<Self> {
        let folder = folder.map(Path::canonicalize).transpose()?;
        Ok(Self { base, places, folder, room, table: RwLock::default(), reading: Mutex::default() })
    }

    /// Loads an adapter that stays in memory.
    ///
    /// # Errors
    /// When the name is taken, or the folder has no adapter of this model.
    pub fn load(&self, source: AdapterSource) -> Result<(), AdapterError> {
        self.check_name(&source.name, false)?;
        let adapter = self.read(&source)?;
        self.hold(&adapter, true);
        self.write().put(source, Some(adapter), Origin::Flag);
        self.show_bytes();
        Ok(())
    }

    /// Loads an adapter while the server runs: `path` must lie below the folder that is meant for it. One of this name is
    /// replaced if `in_place` says so; requests under way keep what they have.
    ///
    /// # Errors
    /// When it doesn't, be it by `..` or by a link; the name is taken; the folder has no adapter of this model; or there is no
    /// memory for it.
    pub fn load_below(&self, name: &str, path: &str, in_place: bool) -> Result<(), AdapterError> {
        self.check_name(name, in_place)?;
        let source = AdapterSource { name: name.to_owned(), directory: self.below(path)? };
        let _turn = self.turn();
        // Another one may have been loaded under this name in the meantime.
        self.check_name(name, in_place)?;
        self.check_owner(name)?;
        let adapter = self.bring(&source)?;
        self.write().put(source, Some(adapter), Origin::Request);
        self.show_bytes();
        Ok(())
    }

    /// Adds a fine-tuning job's adapter, which is read when a request names it, in the place of one of its name.
    pub fn add(&self, source: AdapterSource) {
        self.write().put(source, None, Origin::Job);
        self.show_bytes();
    }

    /// The folder `path` without links, if it and the adapter's files lie below the one for adapters.
    fn below(&self, path: &str) -> Result<PathBuf, AdapterError> {
        let outside = || AdapterError::Outside(path.to_owned());
        let folder = self.folder.as_deref().ok_or_else(outside)?;
        // What lies outside is never looked at: whether it exists is nobody's business.
        let asked = folder.join(path);
        if !asked.starts_with(folder) || asked.components().any(|part| part == Component::ParentDir) {
            return Err(outside());
        }
        let missing = || AdapterError::NotFound(path.to_owned());
        let directory = asked.canonicalize().map_err(|_| missing())?;
        let files = FILES.map(|file| directory.join(file).canonicalize().map_err(|_| missing()));
        for found in files.into_iter().chain([Ok(directory.clone())]) {
            if !found?.starts_with(folder) {
                return Err(outside());
            }
        }
        Ok(directory)
    }

    /// Whether an adapter of so many bytes can be in memory without staying there.
    ///
    /// # Errors
    /// When it can't.
    pub fn check_size(&self, name: &str, bytes: u64) -> Result<(), AdapterError> {
        if bytes > self.room {
            return Err(AdapterError::TooLarge { name: name.to_owned(), bytes, room: self.room });
        }
        Ok(())
    }

    /// The same as [`Adapters::unload`] for requests.
    ///
    /// # Errors
    /// When it belongs to a fine-tuning job.
    pub fn unload_on_request(&self, name: &str) -> Result<bool, AdapterError> {
        self.check_owner(name)?;
        Ok(self.unload(name))
    }

    /// Forgets an adapter, and says whether there was one. Requests under way keep it to their end.
    pub fn unload(&self, name: &str) -> bool {
        let found = {
            let mut table = self.write();
            let before = table.entries.len();
            table.entries.retain(|entry| entry.served.name != name);
            table.entries.len() < before
        };
        self.show_bytes();
        found
    }

    /// The adapter of this name, in memory; `None` if there is none.
    ///
    /// # Errors
    /// When it can't be read, or there is no memory for it.
    pub fn get(&self, name: &str) -> Result<Option<(ServedAdapter, Arc<LoadedAdapter>)>, AdapterError> {
        if let Some(found) = self.in_memory(name) {
            return Ok(Some(found));
        }
        let _turn = self.turn();
        // Another request may have brought it in the meantime.
        if let Some(found) = self.in_memory(name) {
            return Ok(Some(found));
        }
        let entry = |entry: &Entry| (entry.number, entry.directory.clone());
        let found = self.table().entries.iter().find(|entry| entry.served.name == name).map(entry);
        let Some((number, directory)) = found else { return Ok(None) };
        let adapter = self.bring(&AdapterSource { name: name.to_owned(), directory })?;
        let mut table = self.write();
        // It may have been unloaded in the meantime.
        let Some(entry) = table.entries.iter_mut().find(|entry| entry.number == number) else { return Ok(None) };
        entry.adapter = Some(adapter.clone());
        let served = entry.served.clone();
        drop(table);
        self.show_bytes();
        Ok(Some((served, adapter)))
    }

    /// What is known of the adapter of this name.
    pub fn find(&self, name: &str) -> Option<ServedAdapter> {
        self.table().entries.iter().find(|entry| entry.served.name == name).map(|entry| entry.served.clone())
    }

    /// All of them, in the order of their coming.
    pub fn list(&self) -> Vec<ServedAdapter> {
        self.table().entries.iter().map(|entry| entry.served.clone()).collect()
    }

    fn in_memory(&self, name: &str) -> Option<(ServedAdapter, Arc<LoadedAdapter>)> {
        let mut table = self.write();
        table.uses += 1;
        let now = table.uses;
        let entry = table.entries.iter_mut().find(|entry| entry.served.name == name)?;
        entry.used = now;
        Some((entry.served.clone(), entry.adapter.clone()?))
    }

    fn read(&self, source: &AdapterSource) -> Result<Arc<LoadedAdapter>, AdapterError> {
        let Lora { trained, parameters, .. } = Lora::read_for(&source.directory, &self.places)?;
        Ok(Arc::new(LoadedAdapter::new(&source.name, &trained, parameters, &self.places)?))
    }

    /// Reads an adapter into the memory that is meant for those that don't stay.
    fn bring(&self, source: &AdapterSource) -> Result<Arc<LoadedAdapter>, AdapterError> {
        let no_room = || AdapterError::NoRoom(source.name.clone());
        let expected = file_bytes(source).min(self.room);
        self.write().make_room(expected, self.room).then_some(()).ok_or_else(no_room)?;
        let adapter = self.read(source)?;
        let bytes = adapter.bytes();
        self.check_size(&source.name, bytes)?;
        self.write().make_room(bytes, self.room).then_some(()).ok_or_else(no_room)?;
        self.hold(&adapter, false);
        Ok(adapter)
    }

    fn hold(&self, adapter: &Arc<LoadedAdapter>, stays: bool) {
        let mut table = self.write();
        table.held.retain(|held| held.adapter.strong_count() > 0);
        table.held.push(Held { adapter: Arc::downgrade(adapter), stays });
    }

    fn check_name(&self, name: &str, in_place: bool) -> Result<(), AdapterError> {
        check_name(&self.base, name)?;
        if !in_place && self.find(name).is_some() {
            return Err(AdapterError::Duplicate(name.to_owned()));
        }
        Ok(())
    }

    /// Whether requests may replace or unload the adapter of this name.
    fn check_owner(&self, name: &str) -> Result<(), AdapterError> {
        let is_jobs = self.table().entries.iter().any(|entry| entry.served.name == name && entry.origin == Origin::Job);
        if is_jobs { Err(AdapterError::Jobs(name.to_owned())) } else { Ok(()) }
    }

    fn show_bytes(&self) {
        let table = self.table();
        metrics::memory("adapters", table.bytes(true) + table.bytes(false));
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> RwLockReadGuard<'_, Table> {
        // Nothing under the lock can leave the table half changed.
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether `sources` can be served beside a model that is served as `base`, as far as that is known before it is loaded.
///
/// # Errors
/// When a name is taken, or a folder has no adapter.
pub fn check(base: &[String], sources: &[AdapterSource]) -> Result<(), AdapterError> {
    for (index, AdapterSource { name, directory }) in sources.iter().enumerate() {
        check_name(base, name)?;
        if sources[..index].iter().any(|other| other.name == *name) {
            return Err(AdapterError::Duplicate(name.clone()));
        }
        if !is_in(directory) {
            return Err(AdapterError::NotFound(directory.display().to_string()));
        }
    }
    Ok(())
}

/// Whether a folder has the files of an adapter.
pub fn is_in(directory: &Path) -> bool {
    FILES.iter().all(|file| directory.join(file).exists())
}

fn check_name(base: &[String], name: &str) -> Result<(), AdapterError> {
    match name {
        name if name.is_empty() || !name.chars().all(fits_names) => Err(AdapterError::Name(name.to_owned())),
        name if base.iter().any(|base| base == name) => Err(AdapterError::ModelsName(name.to_owned())),
        _ => Ok(()),
    }
}

/// Whether the names of adapters may hold this: metrics list them between commas, and addresses end in them.
pub fn fits_names(letter: char) -> bool {
    !letter.is_control() && letter != ',' && letter != '/'
}

/// Bytes that adapters will take at most, as far as their files tell: numbers of 32 bits in memory, 16 or 32 in the file, and
/// zeros where adapters of other modules have the outputs.
pub fn expected_bytes(sources: &[AdapterSource]) -> u64 {
    sources.iter().map(|source| file_bytes(source).saturating_mul(2)).sum()
}

fn file_bytes(source: &AdapterSource) -> u64 {
    source.directory.join(WEIGHTS_FILE).metadata().map_or(0, |file| file.len())
}
