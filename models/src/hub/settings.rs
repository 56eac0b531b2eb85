//! Where the hub and its cache are: the one place that reads the `HF_*` environment variables.

use std::path::PathBuf;

use crate::{Error, Result};

/// The hub's address when HF_ENDPOINT names none.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Where the hub and its cache are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HubSettings {
    /// HF_ENDPOINT, without a slash at its end.
    pub endpoint: String,
    /// The cache of snapshots: `hub` in HF_HOME.
    pub cache: PathBuf,
    /// HF_TOKEN; else hf-hub takes the one that was saved beside the cache.
    pub token: Option<String>,
    /// HF_HUB_OFFLINE: take the cache's copy without asking.
    pub offline: bool,
}

impl HubSettings {
    /// From the environment.
    pub(crate) fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// From `variable`, which gives a variable's value. An empty value counts as none.
    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let variable =
            |name: &str| variable(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let home = match (variable("HF_HOME"), variable("XDG_CACHE_HOME"), variable("HOME")) {
            (Some(home), _, _) => PathBuf::from(home),
            (None, Some(cache), _) => PathBuf::from(cache).join("huggingface"),
            (None, None, Some(home)) => PathBuf::from(home).join(".cache").join("huggingface"),
            (None, None, None) => {
                let expected = "a directory for downloads, as HOME is not set either";
                return Err(Error::field("environment", "HF_HOME", expected, "none"));
            }
        };
        // hf-hub links snapshots to blobs by relative paths, which it can only make of absolute ones.
        let home =
            std::path::absolute(&home).map_err(|reason| Error::Read { file: home.display().to_string(), reason })?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
            return Err(Error::field("environment", "HF_ENDPOINT", "an address with http:// or https://", endpoint));
        }
        Ok(Self {
            endpoint,
            cache: home.join("hub"),
            token: variable("HF_TOKEN"),
            offline: variable("HF_HUB_OFFLINE").is_some_and(|value| is_yes(&value)),
        })
    }
}

/// The words that huggingface_hub takes for yes.
fn is_yes(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<HubSettings> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        HubSettings::from_variables(find)
    }

    #[test]
    fn the_environment_is_honoured() {
        let all = settings(&[
            ("HF_HOME", "/data/hf"),
            ("HF_ENDPOINT", "http://mirror:8080/"),
            ("HF_TOKEN", " hf_x\n"),
            ("HF_HUB_OFFLINE", "True"),
            ("HOME", "/home/me"),
        ]);
        let expected = HubSettings {
            endpoint: "http://mirror:8080".to_owned(),
            cache: "/data/hf/hub".into(),
            token: Some("hf_x".to_owned()),
            offline: true,
        };
        assert_eq!(all.unwrap(), expected);
    }

    #[test]
    fn defaults_are_the_hubs() {
        let plain = settings(&[("HOME", "/home/me"), ("HF_TOKEN", ""), ("HF_HUB_OFFLINE", "0")]).unwrap();
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, PathBuf::from("/home/me/.cache/huggingface/hub"));
        assert_eq!((plain.token, plain.offline), (None, false));
        let xdg = settings(&[("HOME", "/home/me"), ("XDG_CACHE_HOME", "/var/cache")]).unwrap();
        assert_eq!(xdg.cache, PathBuf::from("/var/cache/huggingface/hub"));
    }

    #[test]
    fn what_cannot_work_is_said() {
        let error = settings(&[]).unwrap_err().to_string();
        assert!(error.contains("HF_HOME"), "{error}");
        let error = settings(&[("HOME", "/"), ("HF_ENDPOINT", "mirror")]).unwrap_err().to_string();
        assert!(error.contains("HF_ENDPOINT: expected an address") && error.contains("mirror"), "{error}");
    }
}
