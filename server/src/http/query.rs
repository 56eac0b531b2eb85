//! Reads what stands behind the `?` of a request.

use axum::{
    extract::{FromRequestParts, Query},
    http::request::Parts,
};

use super::error::{ApiError, Kind};

/// The parameters of a request's address, in their order.
#[derive(Debug, Clone)]
pub struct Parameters(Vec<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Parameters {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let read = Query::try_from_uri(&parts.uri);
        read.map(|Query(pairs)| Self(pairs)).map_err(|error| {
            ApiError::new(
                Kind::InvalidRequest,
                format!("The parameters of the address are wrong: {}.", error.body_text()),
            )
        })
    }
}

impl Parameters {
    /// A parameter's value; of several the last one's.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// The id of the row that a page is to come after.
    pub fn after(&self) -> Option<String> {
        self.get("after").map(str::to_owned)
    }

    /// How many rows a page may have: `limit`, or if it isn't given `default`.
    ///
    /// # Errors
    /// When more than `most` are asked for, or none.
    pub fn limit(&self, default: usize, most: usize) -> Result<usize, ApiError> {
        let Some(asked) = self.get("limit") else { return Ok(default) };
        asked.parse().ok().filter(|limit| (1..=most).contains(limit)).ok_or_else(|| {
            ApiError::invalid("limit", format!("limit must be a whole number from 1 to {most}, got `{asked}`."))
        })
    }

    /// Keys and values of the parameters `name[KEY]`.
    pub fn below(&self, name: &str) -> Vec<(String, String)> {
        let key = |full: &str| Some(full.strip_prefix(name)?.strip_prefix('[')?.strip_suffix(']')?.to_owned());
        self.0.iter().filter_map(|(full, value)| Some((key(full)?, value.clone()))).collect()
    }
}
