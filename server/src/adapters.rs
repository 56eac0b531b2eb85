//! The LoRA adapters that are served beside the base model: from flags, and loaded and unloaded while it runs.

use std::{
    io,
    path::{Component, Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{SystemTime, UNIX_EPOCH},
};

use cadre_engine::{adapter::LoadedAdapter, train::places::PlaceInfo};
use cadre_models::adapter::{CONFIG_FILE, Lora, WEIGHTS_FILE};

use crate::metrics;

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

/// An adapter that requests may name.
#[derive(Debug, Clone)]
pub struct ServedAdapter {
    /// The adapter, with its name.
    pub adapter: Arc<LoadedAdapter>,
    /// The folder that it came from, as it was asked for.
    pub root: String,
    /// When it was loaded, in seconds since 1970.
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
    /// No name at all.
    #[error("an adapter's name may not be empty")]
    Unnamed,
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

/// The table of adapters.
#[derive(Debug, Default)]
pub struct Adapters {
    /// The base model's names.
    base: Vec<String>,
    /// The base model's matrices.
    places: Vec<PlaceInfo>,
    /// Where adapters may be loaded from while the server runs, without links.
    folder: Option<PathBuf>,
    loaded: RwLock<Vec<ServedAdapter>>,
}

impl Adapters {
    /// None yet, for a model that is served as `base` and has `places`; `folder` is where adapters may be loaded from
    /// while the server runs, if they may.
    ///
    /// # Errors
    /// When there is no such folder.
    pub fn new(base: Vec<String>, places: Vec<PlaceInfo>, folder: Option<&Path>) -> io::Result<Self> {
        let folder = folder.map(Path::canonicalize).transpose()?;
        Ok(Self { base, places, folder, loaded: RwLock::default() })
    }

    /// Loads an adapter; one of this name is replaced if `in_place` says so. Requests under way keep what they have.
    ///
    /// # Errors
    /// When the name is taken, or the folder has no adapter of this model.
    pub fn load(&self, source: &AdapterSource, in_place: bool) -> Result<(), AdapterError> {
        let AdapterSource { name, directory } = source;
        self.check_name(name, in_place)?;
        let Lora { trained, parameters, .. } = Lora::read_for(directory, &self.places)?;
        let adapter = Arc::new(LoadedAdapter::new(name, &trained, &parameters, &self.places)?);
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let served = ServedAdapter { adapter, root: directory.display().to_string(), created };
        {
            let mut loaded = self.write();
            let same = loaded.iter().position(|other| other.adapter.name() == name);
            match same {
                None => loaded.push(served),
                Some(index) if in_place => loaded[index] = served,
                // Another one was loaded under this name in the meantime.
                Some(_) => return Err(AdapterError::Duplicate(name.clone())),
            }
        }
        self.show_bytes();
        Ok(())
    }

    /// The same while the server runs: `path` must lie below the folder that is meant for it.
    ///
    /// # Errors
    /// When it doesn't, be it by `..` or by a link; and as for [`Adapters::load`].
    pub fn load_below(&self, name: &str, path: &str, in_place: bool) -> Result<(), AdapterError> {
        let name = name.to_owned();
        self.check_name(&name, in_place)?;
        let directory = self.below(path)?;
        self.load(&AdapterSource { name, directory }, in_place)
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

    /// Forgets an adapter, and says whether there was one. Requests under way keep it to their end.
    pub fn unload(&self, name: &str) -> bool {
        let found = {
            let mut loaded = self.write();
            let before = loaded.len();
            loaded.retain(|served| served.adapter.name() != name);
            loaded.len() < before
        };
        self.show_bytes();
        found
    }

    /// The adapter of this name.
    pub fn get(&self, name: &str) -> Option<ServedAdapter> {
        self.read().iter().find(|served| served.adapter.name() == name).cloned()
    }

    /// All of them, in the order of their loading.
    pub fn list(&self) -> Vec<ServedAdapter> {
        self.read().clone()
    }

    fn check_name(&self, name: &str, in_place: bool) -> Result<(), AdapterError> {
        check_name(&self.base, name)?;
        if !in_place && self.get(name).is_some() {
            return Err(AdapterError::Duplicate(name.to_owned()));
        }
        Ok(())
    }

    fn show_bytes(&self) {
        metrics::memory("adapters", self.read().iter().map(|served| served.adapter.bytes()).sum());
    }

    fn read(&self) -> RwLockReadGuard<'_, Vec<ServedAdapter>> {
        // Nothing under the lock can leave the table half changed.
        self.loaded.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<ServedAdapter>> {
        self.loaded.write().unwrap_or_else(PoisonError::into_inner)
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
        if !FILES.iter().all(|file| directory.join(file).exists()) {
            return Err(AdapterError::NotFound(directory.display().to_string()));
        }
    }
    Ok(())
}

fn check_name(base: &[String], name: &str) -> Result<(), AdapterError> {
    match name {
        "" => Err(AdapterError::Unnamed),
        name if base.iter().any(|base| base == name) => Err(AdapterError::ModelsName(name.to_owned())),
        _ => Ok(()),
    }
}

/// Bytes that adapters will take at most, as far as their files tell: numbers of 32 bits in memory, 16 or 32 in the file, and
/// zeros where adapters of other modules have the outputs.
pub fn expected_bytes(sources: &[AdapterSource]) -> u64 {
    let file = |source: &AdapterSource| source.directory.join(WEIGHTS_FILE).metadata().map_or(0, |file| file.len());
    sources.iter().map(|source| file(source).saturating_mul(2)).sum()
}
