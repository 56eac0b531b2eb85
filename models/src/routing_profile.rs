//! How often each of a pack's experts was used, kept beside the pack from one run to the next.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    files::{Files, write::write_whole},
    json,
};

const FILE: &str = "routing_profile.json";
const VERSION: u32 = 1;

/// Where the profile of a pack is kept.
#[derive(Debug, Clone)]
pub struct RoutingProfile {
    directory: PathBuf,
    /// Says which pack it is about.
    pack: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    version: u32,
    pack: String,
    /// `[layer][expert]`, of the layers with routed experts.
    uses: Vec<Vec<u32>>,
}

impl RoutingProfile {
    /// That of the pack in `directory`, which `pack` tells from others.
    pub(crate) fn new(directory: PathBuf, pack: String) -> Self {
        Self { directory, pack }
    }

    /// What was kept, as `[layer][expert]`; `None` if nothing was.
    ///
    /// # Errors
    /// When the file can't be read, is damaged, or is of another version or pack.
    pub fn read(&self) -> Result<Option<Vec<Vec<u32>>>> {
        let files = Files::Directory(self.directory.clone());
        let Some(bytes) = files.read(FILE)? else { return Ok(None) };
        let file = files.label(FILE);
        let content: Content = serde_json::from_slice(&bytes)
            .map_err(|error| Error::Json { file: file.clone(), detail: error.to_string() })?;
        let same = |field: &str, expected: String, found: String| {
            if expected == found {
                return Ok(());
            }
            Err(Error::Field { file: file.clone(), field: field.to_owned(), expected, found: json::excerpt(&found) })
        };
        same("version", VERSION.to_string(), content.version.to_string())?;
        same("pack", self.pack.clone(), content.pack)?;
        Ok(Some(content.uses))
    }

    /// Keeps `uses`, `[layer][expert]`, in place of what was kept before.
    ///
    /// # Errors
    /// When the pack's directory can't be written to.
    pub fn write(&self, uses: Vec<Vec<u32>>) -> Result<()> {
        let content = Content { version: VERSION, pack: self.pack.clone(), uses };
        let bytes = serde_json::to_vec(&content)
            .map_err(|error| Error::Json { file: FILE.to_owned(), detail: error.to_string() })?;
        write_whole(&self.directory, FILE, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_again_and_of_this_pack_only() {
        let directory = tempfile::tempdir().unwrap();
        let of = |pack: &str| RoutingProfile::new(directory.path().to_owned(), pack.to_owned());
        assert_eq!(of("a").read().unwrap(), None);
        let uses = vec![vec![1, 0, u32::MAX], vec![7]];
        of("a").write(vec![vec![5]]).unwrap();
        of("a").write(uses.clone()).unwrap();
        assert_eq!(of("a").read().unwrap(), Some(uses));
        let error = of("b").read().unwrap_err().to_string();
        assert!(error.contains("routing_profile.json: pack: expected b, found a"), "{error}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn damaged_and_newer_files_are_errors() {
        let directory = tempfile::tempdir().unwrap();
        let profile = RoutingProfile::new(directory.path().to_owned(), "a".to_owned());
        for text in [
            "",
            "{}",
            "[1]",
            r#"{"version": 2, "pack": "a", "uses": []}"#,
            r#"{"version": 1, "pack": "a", "uses": [[-1]]}"#,
        ] {
            std::fs::write(directory.path().join(FILE), text).unwrap();
            assert!(profile.read().is_err(), "{text}");
        }
    }
}
