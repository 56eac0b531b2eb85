//! `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`, there only with `--allow-runtime-adapters`.

use std::sync::Arc;

use axum::{
    extract::State,
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value};

use super::{
    App, answer, blocking,
    body::JsonBody,
    error::{ApiError, Kind, sentence},
    fields::Fields,
    messages::required,
    params::{self, Endpoint},
};
use crate::adapters::AdapterError;

/// Loads the adapter in a folder under a name.
///
/// # Errors
/// When the request is at fault, or there is no adapter of the served model.
pub async fn load(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let unknown = params::admit(&body, Endpoint::Adapters, app.options.strict_params)?;
    let adapters = app.served()?.adapters.clone();
    let fields = Fields::new(&body);
    let name = named(&body)?;
    let path = fields.string("lora_path")?.ok_or_else(|| required("lora_path"))?.to_owned();
    let in_place = fields.boolean("load_inplace")?.unwrap_or(false);
    let added = format!("Success: LoRA adapter '{name}' added successfully.");
    blocking(move || Ok(adapters.load_below(&name, &path, in_place)?)).await?;
    Ok(told(added, &unknown))
}

/// Forgets the adapter of a name; requests that use it are answered to their end.
///
/// # Errors
/// When there is none of that name, or a job made it.
pub async fn unload(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let unknown = params::admit(&body, Endpoint::Adapters, app.options.strict_params)?;
    let name = named(&body)?;
    if !app.served()?.adapters.unload_on_request(&name)? {
        let message = format!("The lora adapter '{name}' cannot be found.");
        return Err(ApiError::new(Kind::ModelNotFound, message).or_param("lora_name"));
    }
    Ok(told(format!("Success: LoRA adapter '{name}' removed successfully."), &unknown))
}

fn named(body: &Map<String, Value>) -> Result<String, ApiError> {
    Ok(Fields::new(body).string("lora_name")?.ok_or_else(|| required("lora_name"))?.to_owned())
}

fn told(text: String, unknown: &[String]) -> Response {
    tracing::info!("{text}");
    let mut response = text.into_response();
    answer::name_ignored(&mut response, unknown);
    response
}

impl From<AdapterError> for ApiError {
    fn from(error: AdapterError) -> Self {
        let (kind, param) = match &error {
            AdapterError::NotFound(_) => (Kind::ModelNotFound, "lora_path"),
            AdapterError::Duplicate(_)
            | AdapterError::ModelsName(_)
            | AdapterError::Name(_)
            | AdapterError::Jobs(_) => (Kind::InvalidRequest, "lora_name"),
            AdapterError::Outside(_) | AdapterError::TooLarge { .. } | AdapterError::Read(_) | AdapterError::Fit(_) => {
                (Kind::InvalidRequest, "lora_path")
            }
            AdapterError::NoRoom(_) => (Kind::AdaptersBusy, "lora_path"),
        };
        Self::new(kind, sentence(&error.to_string())).or_param(param)
    }
}
