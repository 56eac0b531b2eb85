//! What decides the bytes of an output, kept beside it: a run goes on only with the same.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::input::Scan;

/// What the manifest's name is beside the output's.
const ENDING: &str = ".manifest.json";
/// What a file's name ends with until it is whole.
pub const UNFINISHED: &str = ".unfinished";
/// The name of the value that each manifest has: cadre's version.
const VERSION: &str = "cadre";

/// Names and values.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest(Map<String, Value>);

impl Manifest {
    /// Of this version of cadre on these lines, with what else decides.
    pub fn new(input: &Scan, deciding: Map<String, Value>) -> Self {
        let mut values = Map::new();
        values.insert(VERSION.to_owned(), env!("CARGO_PKG_VERSION").into());
        values.insert(
            "input".to_owned(),
            json!({"lines": input.lines, "bytes": input.bytes, "crc32": format!("{:08x}", input.crc32)}),
        );
        values.extend(deciding);
        Self(values)
    }

    /// That beside `output`, if there is one.
    ///
    /// # Errors
    /// When it can't be read, or the file of that name is something else.
    pub fn read(output: &Path) -> Result<Option<Self>> {
        let path = path(output);
        let shown = path.display();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {shown}")),
        };
        let found = serde_json::from_slice(&bytes).map(Self).ok().filter(|found| found.get(VERSION).is_some());
        found.map(Some).with_context(|| {
            format!("{shown} is there, but is no manifest of such a run: give another --output, or remove it")
        })
    }

    /// Writes it beside `output`, whole or not at all.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn write(&self, output: &Path) -> Result<()> {
        let path = path(output);
        let unfinished = beside(&path, UNFINISHED);
        let write = || -> io::Result<()> {
            fs::write(&unfinished, serde_json::to_string_pretty(&self.0)? + "\n")?;
            File::open(&unfinished)?.sync_all()?;
            fs::rename(&unfinished, &path)?;
            File::open(folder(output))?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// How many bytes the input has, uncompressed, and their checksum.
    pub fn input(&self) -> Option<(u64, u32)> {
        let input = self.get("input")?;
        let crc32 = u32::from_str_radix(input.get("crc32")?.as_str()?, 16).ok()?;
        Some((input.get("bytes")?.as_u64()?, crc32))
    }

    /// A value.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// Sets a value.
    pub fn set(&mut self, name: &str, value: Value) {
        self.0.insert(name.to_owned(), value);
    }

    /// What `now` has that is another here, in words.
    pub fn differences(&self, now: &Self) -> Vec<String> {
        let other = |(name, value): (&String, &Value)| {
            let before = self.get(name).unwrap_or(&Value::Null);
            (before != value).then(|| format!("{name} was {before} and is {value} now"))
        };
        now.0.iter().filter_map(other).collect()
    }
}

/// Where the manifest of `output` is.
pub fn path(output: &Path) -> PathBuf {
    beside(output, ENDING)
}

/// The path with something added to its name.
pub fn beside(output: &Path, ending: &str) -> PathBuf {
    let mut path = output.as_os_str().to_owned();
    path.push(ending);
    path.into()
}

/// The folder that a path is in.
pub fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
