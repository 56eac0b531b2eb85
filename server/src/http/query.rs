//! Reads what stands behind the `?` of a request.

use axum::{
    extract::{FromRequestParts, Query},
    http::request::Parts,
};
use serde::de::DeserializeOwned;

use super::error::{ApiError, Kind};

/// The parameters of a request's address.
pub struct Parameters<T>(pub T);

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Parameters<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let read = Query::try_from_uri(&parts.uri);
        read.map(|Query(value)| Self(value)).map_err(|error| {
            ApiError::new(
                Kind::InvalidRequest,
                format!("The parameters of the address are wrong: {}.", error.body_text()),
            )
        })
    }
}
