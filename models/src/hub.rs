//! Checkpoints from a hub: download into the shared cache, or take what is there.

mod settings;

use std::{
    cell::Cell,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use hf_hub::{
    Cache, CacheRepo, Repo, RepoType,
    api::{
        Progress, RepoInfo,
        sync::{Api, ApiBuilder, ApiError, ApiRepo},
    },
};

use crate::{
    Error, Result,
    files::Files,
    tensors::{INDEX_FILE, SINGLE_FILE, is_plain_name, shards_of},
};

pub(crate) use settings::HubSettings;

/// How far the download of one file has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownloadProgress<'a> {
    /// The file's name.
    pub file: &'a str,
    /// Its bytes that are here.
    pub done_bytes: u64,
    /// Its size.
    pub total_bytes: u64,
}

/// How long the hub may take to say what a model consists of, before the cache must do.
const LISTING_TIMEOUT: Duration = Duration::from_secs(20);
/// How often a broken transfer is resumed.
const RETRIES: usize = 2;

/// Whether `model` has the form of a hub id: `org/name`.
pub(crate) fn is_hub_id(model: &str) -> bool {
    let part = |part: &str| {
        is_plain_name(part)
            && part.len() <= 96
            && !part.contains("..")
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    model.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// The directory with the files of `model`. `accept` sees config.json before anything large is fetched.
pub(crate) fn fetch(
    settings: &HubSettings,
    model: &str,
    accept: &dyn Fn(&Files) -> Result<()>,
    on_download: &dyn Fn(DownloadProgress<'_>),
) -> Result<PathBuf> {
    let hub = Hub::new(settings, model)?;
    if settings.offline {
        return hub.cached().ok_or_else(|| hub.unreachable("HF_HUB_OFFLINE is set".to_owned()));
    }
    match hub.listing() {
        Ok(listing) => hub.download(&listing, accept, on_download),
        Err(Error::HubUnreachable { endpoint, detail, cache, model }) => match hub.cached() {
            Some(directory) => {
                tracing::warn!("{endpoint} cannot be reached ({detail}): using the copy in {}", directory.display());
                Ok(directory)
            }
            None => Err(Error::HubUnreachable { endpoint, detail, cache, model }),
        },
        Err(error) => Err(error),
    }
}

/// One model on a hub and in the cache.
struct Hub<'a> {
    settings: &'a HubSettings,
    model: &'a str,
    api: Api,
    /// The cache's entry of the branch that is followed.
    branch: CacheRepo,
}

impl<'a> Hub<'a> {
    fn new(settings: &'a HubSettings, model: &'a str) -> Result<Self> {
        let cache = Cache::new(settings.cache.clone());
        let mut builder = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(settings.endpoint.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .with_user_agent("cadre", env!("CARGO_PKG_VERSION"));
        if settings.token.is_some() {
            builder = builder.with_token(settings.token.clone());
        }
        let api = builder.build().map_err(|error| Error::HubFailed {
            endpoint: settings.endpoint.clone(),
            what: model.to_owned(),
            detail: error.to_string(),
        })?;
        Ok(Self { settings, model, api, branch: cache.repo(Repo::model(model.to_owned())) })
    }

    /// What the hub's branch consists of.
    fn listing(&self) -> Result<RepoInfo> {
        let request = self.api.model(self.model.to_owned()).info_request();
        let response = request.config().timeout_global(Some(LISTING_TIMEOUT)).build().call();
        let text = response.and_then(|mut response| response.body_mut().read_to_string());
        let text = text.map_err(|error| self.error(self.model, &ApiError::from(Box::new(error))))?;
        let listing: RepoInfo = serde_json::from_str(&text)
            .map_err(|error| self.failed(self.model, format!("it answers without a list of files ({error})")))?;
        if listing.sha.is_empty() || !listing.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(self.failed(self.model, format!("it names the commit {:?}", listing.sha)));
        }
        Ok(listing)
    }

    /// Fetches what is not in the cache yet. The branch points to the new files once they are all here.
    fn download(
        &self,
        listing: &RepoInfo,
        accept: &dyn Fn(&Files) -> Result<()>,
        on_download: &dyn Fn(DownloadProgress<'_>),
    ) -> Result<PathBuf> {
        let directory = self.branch.pointer_path(&listing.sha);
        let repo = Repo::with_revision(self.model.to_owned(), RepoType::Model, listing.sha.clone());
        let snapshot = Snapshot { hub: self, directory: &directory, repo: self.api.repo(repo), on_download };
        let listed = |name: &str| listing.siblings.iter().any(|sibling| sibling.rfilename == name);
        snapshot.get("config.json")?;
        accept(&Files::Directory(directory.clone()))?;
        for sibling in &listing.siblings {
            if is_text_file(&sibling.rfilename) {
                snapshot.get(&sibling.rfilename)?;
            }
        }
        if listed(SINGLE_FILE) {
            snapshot.get(SINGLE_FILE)?;
        } else {
            snapshot.get(INDEX_FILE)?;
            for shard in shards(&directory)? {
                snapshot.get(&shard)?;
            }
        }
        self.branch.create_ref(&listing.sha).map_err(|error| self.failed(self.model, error.to_string()))?;
        Ok(directory)
    }

    /// The cache's copy of the branch, if it is complete.
    fn cached(&self) -> Option<PathBuf> {
        let directory = self.branch.get("config.json")?.parent()?.to_owned();
        let complete = directory.join(SINGLE_FILE).exists()
            || shards(&directory).is_ok_and(|shards| shards.iter().all(|shard| directory.join(shard).exists()));
        complete.then_some(directory)
    }

    /// hf-hub's error in this crate's words; `what` was asked for.
    fn error(&self, what: &str, error: &ApiError) -> Error {
        let endpoint = self.settings.endpoint.clone();
        match status(error) {
            Some(status @ (401 | 403)) => Error::HubRefused { endpoint, model: self.model.to_owned(), status },
            Some(404) => Error::HubNotFound { endpoint, what: what.to_owned() },
            Some(status) if status < 500 && status != 429 => self.failed(what, format!("status {status}")),
            Some(status) => self.unreachable(format!("status {status}")),
            None if is_transport(error) => self.unreachable(error.to_string()),
            None => self.failed(what, error.to_string()),
        }
    }

    fn failed(&self, what: &str, detail: String) -> Error {
        Error::HubFailed { endpoint: self.settings.endpoint.clone(), what: what.to_owned(), detail }
    }

    fn unreachable(&self, detail: String) -> Error {
        Error::HubUnreachable {
            endpoint: self.settings.endpoint.clone(),
            cache: self.settings.cache.display().to_string(),
            model: self.model.to_owned(),
            detail,
        }
    }
}

/// Whether a file at the top of a repository is one of the small ones that a checkpoint is read from.
pub(crate) fn is_text_file(name: &str) -> bool {
    const NAMES: [&str; 4] =
        ["config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja"];
    NAMES.contains(&name) || is_plain_name(name) && name.starts_with("tokenizer") && name.ends_with(".json")
}

/// The shards that the index in `directory` names.
fn shards(directory: &Path) -> Result<Vec<String>> {
    let files = Files::Directory(directory.to_owned());
    let index = files.require(INDEX_FILE, "expected that index or model.safetensors")?;
    shards_of(&files.label(INDEX_FILE), &index)
}

/// The files of one commit.
struct Snapshot<'a> {
    hub: &'a Hub<'a>,
    directory: &'a Path,
    repo: ApiRepo,
    on_download: &'a dyn Fn(DownloadProgress<'_>),
}

impl Snapshot<'_> {
    /// Sees that `file` is there.
    fn get(&self, file: &str) -> Result<()> {
        let path = self.directory.join(file);
        if path.exists() {
            return Ok(());
        }
        let what = format!("{} of {}", file, self.hub.model);
        let metadata = self.hub.api.metadata(&self.repo.url(file)).map_err(|error| self.hub.error(&what, &error))?;
        if !is_plain_name(metadata.etag()) || metadata.commit_hash().contains(['/', '.']) {
            return Err(self.hub.failed(&what, format!("it names the content {:?}", metadata.etag())));
        }
        let blob = self.hub.branch.blob_path(metadata.etag());
        let here =
            complete(&blob, metadata.size() as u64).and_then(|here| if here { link(&blob, &path) } else { Ok(()) });
        here.map_err(|error| self.hub.failed(&what, error.to_string()))?;
        if path.exists() {
            return Ok(());
        }
        let size = Cell::new(0);
        let progress = Reporter { file, done_bytes: 0, size: &size, on_download: self.on_download };
        let downloaded =
            self.repo.download_with_progress(file, progress).map_err(|error| self.hub.error(&what, &error))?;
        let found = downloaded.metadata().map_or(0, |file| file.len());
        if found != size.get() {
            // Not left in the cache, where it would pass for the file.
            let _ = fs::remove_file(&blob).and_then(|()| fs::remove_file(&downloaded));
            return Err(self.hub.failed(&what, format!("expected {} bytes, found {found}", size.get())));
        }
        Ok(())
    }
}

/// Whether all `size` bytes of `blob` are here. What an interrupted download left under its other name counts if it is
/// whole, and is removed if it is too long: hf-hub could not go on from either.
fn complete(blob: &Path, size: u64) -> io::Result<bool> {
    let part = blob.with_extension("part");
    match part.metadata().map(|part| part.len()) {
        Ok(found) if found == size && size > 0 => fs::rename(&part, blob)?,
        Ok(found) if found > size => fs::remove_file(&part)?,
        _ => {}
    }
    Ok(blob.metadata().is_ok_and(|blob| blob.len() == size))
}

/// Makes `path` a link to `blob`, as a download would have.
fn link(blob: &Path, path: &Path) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    std::os::unix::fs::symlink(fs::canonicalize(blob)?, path)
}

/// hf-hub's progress of one file, as ours.
struct Reporter<'a> {
    file: &'a str,
    done_bytes: u64,
    size: &'a Cell<u64>,
    on_download: &'a dyn Fn(DownloadProgress<'_>),
}

impl Reporter<'_> {
    fn tell(&self) {
        (self.on_download)(DownloadProgress {
            file: self.file,
            done_bytes: self.done_bytes,
            total_bytes: self.size.get(),
        });
    }
}

impl Progress for Reporter<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        // Also called when a transfer is resumed; then the part that is here is reported next.
        self.size.set(size as u64);
        self.done_bytes = 0;
    }

    fn update(&mut self, size: usize) {
        self.done_bytes += size as u64;
        self.tell();
    }

    fn finish(&mut self) {
        self.tell();
    }
}

/// The HTTP status that an error is about.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => match **error {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        ApiError::TooManyRetries(last) => status(last),
        _ => None,
    }
}

/// Whether the network is at fault.
fn is_transport(error: &ApiError) -> bool {
    match error {
        ApiError::RequestError(_) => true,
        ApiError::TooManyRetries(last) => is_transport(last),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
