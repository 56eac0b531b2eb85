//! A checkpoint: a model's configuration, weights, tokenizer and chat template, wherever they lie.

use std::{borrow::Cow, path::Path, sync::OnceLock};

use serde_json::{Map, Value};

use crate::{
    Error, Result,
    chat_template::ChatTemplate,
    config::{ConfigFile, GenerationConfig},
    embedded,
    files::Files,
    fnv::Fnv,
    hub::{self, DownloadProgress, HubSettings},
    json, registry,
    routing_profile::RoutingProfile,
    summary::Summary,
    tensors::{INDEX_FILE, TensorSet},
    tokenizer::Tokenizer,
};

/// An open checkpoint; its weights have not been read.
pub struct Checkpoint {
    name: String,
    architecture: &'static str,
    files: Files,
    config: ConfigFile,
    generation_config: GenerationConfig,
    /// Read once; large vocabularies take a while.
    tokenizer: OnceLock<Tokenizer>,
}

/// Opens the checkpoint `model`: a directory, or a hub's id like `org/name`, whose files are downloaded into the
/// shared cache if they are not there yet; `None` opens the one inside of this binary.
///
/// # Errors
/// When there is no such checkpoint, it cannot be downloaded, or its configuration cannot be used.
pub fn open(model: Option<&str>, on_download: &dyn Fn(DownloadProgress<'_>)) -> Result<Checkpoint> {
    let Some(model) = model else {
        return Checkpoint::read(embedded::NAME.to_owned(), Files::Embedded(embedded::FILES));
    };
    let path = Path::new(model);
    if path.is_dir() {
        return open_directory(path);
    }
    if path.exists() {
        return Err(Error::NotADirectory { path: model.to_owned() });
    }
    if !hub::is_hub_id(model) {
        return Err(Error::UnknownModel { model: model.to_owned() });
    }
    let accept = |files: &Files| registry::find(&read_config(files)?).map(|_| ());
    let directory = hub::fetch(&HubSettings::from_env()?, model, &accept, on_download)?;
    Checkpoint::read(model.to_owned(), Files::Directory(directory))
}

/// Opens the checkpoint in `directory`.
pub(crate) fn open_directory(directory: &Path) -> Result<Checkpoint> {
    Checkpoint::read(directory_name(directory), Files::Directory(directory.to_owned()))
}

/// A directory's own name, also of `.` and `..`.
fn directory_name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    full.file_name().unwrap_or(full.as_os_str()).to_string_lossy().into_owned()
}

fn read_config(files: &Files) -> Result<ConfigFile> {
    let bytes = files.require(CONFIG, "expected a checkpoint in the Hugging Face layout")?;
    ConfigFile::read(files.label(CONFIG), &bytes)
}

impl Checkpoint {
    fn read(name: String, files: Files) -> Result<Self> {
        const FILE: &str = "generation_config.json";
        let config = read_config(&files)?;
        let architecture = registry::find(&config)?.model_type;
        let generation_config = match files.read(FILE)? {
            Some(bytes) => GenerationConfig::read(&files.label(FILE), &bytes)?,
            None => GenerationConfig::default(),
        };
        let generation_config = generation_config.or_config(&config)?;
        let mut checkpoint = Self { name, architecture, files, config, generation_config, tokenizer: OnceLock::new() };
        if checkpoint.generation_config.eos_token_ids.is_empty()
            && let Some(id) = checkpoint.tokenizer()?.eos_token_id()
        {
            checkpoint.generation_config.eos_token_ids.push(id);
        }
        Ok(checkpoint)
    }

    /// The architecture, one of the registered ones.
    #[must_use]
    pub fn architecture(&self) -> &'static str {
        self.architecture
    }

    /// Whether transformers stacks the experts of a layer in one parameter.
    #[must_use]
    pub fn stacks_experts(&self) -> bool {
        registry::find(&self.config).is_ok_and(|architecture| architecture.stacks_experts)
    }

    /// What the model is called: the directory's name or the hub's id.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The sampling that its makers recommend, and its end-of-sequence tokens.
    #[must_use]
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation_config
    }

    /// Its tokenizer.
    ///
    /// # Errors
    /// When tokenizer.json is missing or cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        const FILE: &str = "tokenizer.json";
        if let Some(tokenizer) = self.tokenizer.get() {
            return Ok(tokenizer.clone());
        }
        let hint = "expected the fast tokenizer's file; older formats must be converted with transformers first";
        let bytes = self.files.require(FILE, hint)?;
        let tokenizer = Tokenizer::read(self.files.label(FILE), &bytes, self.tokenizer_config()?)?;
        Ok(self.tokenizer.get_or_init(|| tokenizer).clone())
    }

    /// Its chat template: chat_template.jinja, else the one inside of tokenizer_config.json; `None` if it has none.
    ///
    /// # Errors
    /// When the template cannot be compiled.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        const FILE: &str = "chat_template.jinja";
        let tokenizer_config = Value::Object(self.tokenizer_config()?);
        let Some(bytes) = self.files.read(FILE)? else {
            return ChatTemplate::from_tokenizer_config(&self.files.label(TOKENIZER_CONFIG), &tokenizer_config);
        };
        let file = self.files.label(FILE);
        let source = std::str::from_utf8(&bytes).map_err(|error| Error::TemplateSyntax {
            file: file.clone(),
            detail: format!("expected UTF-8: {error}"),
        })?;
        ChatTemplate::from_source(&file, source, &tokenizer_config).map(Some)
    }

    /// A template from another file, which may name this model's special tokens.
    ///
    /// # Errors
    /// When the file cannot be read or the template not be compiled.
    pub fn template_of(&self, path: &Path) -> Result<ChatTemplate> {
        let file = path.display().to_string();
        let source = std::fs::read_to_string(path).map_err(|reason| Error::Read { file: file.clone(), reason })?;
        ChatTemplate::from_source(&file, &source, &Value::Object(self.tokenizer_config()?))
    }

    /// What it holds, from the configuration and the tensors' headers alone.
    ///
    /// # Errors
    /// When the headers cannot be read.
    pub fn summary(&self) -> Result<Summary> {
        Summary::of(&self.config, &self.tensors()?)
    }

    /// A number that tells it from checkpoints with other tensors, types or shapes, and a pack from any other pack.
    ///
    /// # Errors
    /// When the headers cannot be read.
    pub fn identity(&self) -> Result<String> {
        Ok(self.tensors()?.header_fingerprint())
    }

    /// A number that tells it from checkpoints with another config.json or other weights, without reading them all: of a pack
    /// by the checksums of its tensors, else by each tensor's name, type and shape, and 256 bytes of its beginning, middle and
    /// end. Weights that differ in other places only are taken for the same.
    ///
    /// # Errors
    /// When the tensors cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        let tensors = self.tensors()?;
        let weights = if tensors.pack().is_some() { tensors.header_fingerprint() } else { tensors.fingerprint()? };
        let mut hash = Fnv::default();
        hash.add(&self.files.read(CONFIG)?.unwrap_or_default());
        hash.add(weights.as_bytes());
        Ok(hash.to_string())
    }

    /// The directory that it lies in; `None` for the embedded one.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        match &self.files {
            Files::Directory(directory) => Some(directory),
            Files::Embedded(_) => None,
        }
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &ConfigFile {
        &self.config
    }

    /// Where its routing profile is kept; `None` if it is no pack in a directory.
    ///
    /// # Errors
    /// When the headers cannot be read.
    pub fn routing_profile(&self) -> Result<Option<RoutingProfile>> {
        let Files::Directory(directory) = &self.files else { return Ok(None) };
        let tensors = self.tensors()?;
        Ok(tensors.pack().map(|pack| RoutingProfile::new(directory.clone(), pack.to_string())))
    }

    /// The small files: configuration, tokenizer, chat template.
    pub(crate) fn text_files(&self) -> Result<Vec<(String, Cow<'static, [u8]>)>> {
        self.files_that(hub::is_text_file)
    }

    /// The small files, and those that other programs want beside them: code, and the slow tokenizer's files.
    pub(crate) fn files_beside_weights(&self) -> Result<Vec<(String, Cow<'static, [u8]>)>> {
        const OTHERS: [&str; 4] = ["vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"];
        self.files_that(|name| hub::is_text_file(name) || name.ends_with(".py") || OTHERS.contains(&name))
    }

    fn files_that(&self, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<(String, Cow<'static, [u8]>)>> {
        let mut files = Vec::new();
        for name in self.files.names()?.into_iter().filter(|name| is_wanted(name)) {
            if let Some(bytes) = self.files.read(&name)? {
                files.push((name, bytes));
            }
        }
        Ok(files)
    }

    /// The index of its shards; `None` if it has none.
    pub(crate) fn index(&self) -> Result<Option<Cow<'static, [u8]>>> {
        self.files.read(INDEX_FILE)
    }

    /// Its tensors' headers.
    pub(crate) fn tensors(&self) -> Result<TensorSet> {
        TensorSet::open(&self.files)
    }

    /// tokenizer_config.json, completed by special_tokens_map.json as older checkpoints have it.
    fn tokenizer_config(&self) -> Result<Map<String, Value>> {
        let mut fields = self.object(TOKENIZER_CONFIG)?;
        for (name, value) in self.object("special_tokens_map.json")? {
            if fields.get(&name).is_none_or(Value::is_null) {
                fields.insert(name, value);
            }
        }
        Ok(fields)
    }

    /// The fields of a JSON file; none if there is no such file.
    fn object(&self, file: &str) -> Result<Map<String, Value>> {
        match self.files.read(file)? {
            Some(bytes) => json::object(&self.files.label(file), &bytes),
            None => Ok(Map::new()),
        }
    }
}

const CONFIG: &str = "config.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

#[cfg(test)]
mod tests;
