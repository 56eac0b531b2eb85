//! `/v1/files`: upload, list, get, content, delete; there only with `--storage`.

use std::{io, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::{
        Multipart, Path, State,
        multipart::{Field, MultipartRejection},
    },
    http::header,
    response::{IntoResponse, Response},
};
use rusqlite::ErrorCode;
use serde_json::{Map, Value, json};
use tokio::{fs, io::AsyncWriteExt};

use super::{
    App, answer,
    batches::seconds_after,
    blocking,
    error::{ApiError, Kind, sentence},
    messages::required,
    params,
    query::Parameters,
};
use crate::storage::{FileQuery, MAX_FILE_BYTES, Page, Purpose, StorageError, StoredFile, Upload};

/// The most files on a page.
const MAX_LIMIT: usize = 10_000;
/// The longest field beside the file.
const MAX_FIELD_BYTES: usize = 1 << 10;

/// Keeps a file.
///
/// # Errors
/// When the form lacks a field, the purpose isn't known, or the file is too large.
pub async fn upload(
    State(app): State<Arc<App>>,
    form: Result<Multipart, MultipartRejection>,
) -> Result<Response, ApiError> {
    let storage = app.storage()?.clone();
    let mut form = form.map_err(bad_form)?;
    let (mut file, mut purpose, mut expires_after, mut others) = (None, None, Map::new(), Vec::new());
    while let Some(field) = form.next_field().await.map_err(bad_form)? {
        match field.name() {
            Some("file") => {
                let name = field.file_name().unwrap_or_default().to_owned();
                let upload = storage.new_upload();
                write(field, &upload).await?;
                file = Some((name, upload));
            }
            Some("purpose") => purpose = Some(text(field).await?),
            Some("expires_after[anchor]") => drop(expires_after.insert("anchor".to_owned(), text(field).await?.into())),
            Some("expires_after[seconds]") => {
                let text = text(field).await?;
                let seconds = text.parse::<i64>().map_or(Value::from(text), Value::from);
                expires_after.insert("seconds".to_owned(), seconds);
            }
            other => others.push(other.unwrap_or_default().to_owned()),
        }
    }
    others.dedup();
    params::check_unknown(&others, app.options.strict_params)?;
    let (name, upload) = file.ok_or_else(|| required("file"))?;
    let purpose = purpose.ok_or_else(|| required("purpose"))?;
    let Some(purpose) = Purpose::UPLOADED.into_iter().find(|known| known.name() == purpose) else {
        let known = Purpose::UPLOADED.map(|known| format!("\"{}\"", known.name())).join(" or ");
        let message = format!("purpose must be {known}, got \"{purpose}\": this server uses no other files.");
        return Err(ApiError::invalid("purpose", message));
    };
    let seconds = (!expires_after.is_empty()).then(|| seconds_after(&expires_after.into(), "expires_after"));
    let seconds = seconds.transpose()?;
    let file = blocking(move || Ok(storage.add_file(upload, &name, purpose, seconds)?)).await?;
    let mut response = Json(object(&file)).into_response();
    answer::name_ignored(&mut response, &others);
    Ok(response)
}

/// Writes a form's file to the disk as it comes.
///
/// # Errors
/// When it is empty or too large, or cut off.
async fn write(mut field: Field<'_>, upload: &Upload) -> Result<(), ApiError> {
    let mut file = fs::File::create(&upload.path).await.map_err(ApiError::unwritten)?;
    let mut bytes = 0;
    while let Some(piece) = field.chunk().await.map_err(bad_form)? {
        bytes += piece.len() as u64;
        if bytes > MAX_FILE_BYTES {
            let message = format!("The file is too large: this server keeps at most {MAX_FILE_BYTES} bytes.");
            return Err(ApiError::new(Kind::BodyTooLarge, message).or_param("file"));
        }
        file.write_all(&piece).await.map_err(ApiError::unwritten)?;
    }
    if bytes == 0 {
        return Err(ApiError::invalid("file", "The file is empty."));
    }
    file.flush().await.map_err(ApiError::unwritten)
}

async fn text(mut field: Field<'_>) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(piece) = field.chunk().await.map_err(bad_form)? {
        bytes.extend_from_slice(&piece);
        if bytes.len() > MAX_FIELD_BYTES {
            let message = format!("A field of the form is too large: at most {MAX_FIELD_BYTES} bytes are read.");
            return Err(ApiError::new(Kind::BodyTooLarge, message));
        }
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn bad_form(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(Kind::InvalidRequest, format!("The body must be a form (multipart/form-data): {error}."))
}

/// All files, the latest first.
///
/// # Errors
/// When a parameter is out of range.
pub async fn list(State(app): State<Arc<App>>, query: Parameters) -> Result<Json<Value>, ApiError> {
    let storage = app.storage()?.clone();
    let ascending = match query.get("order") {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(other) => {
            return Err(ApiError::invalid("order", format!("order must be \"asc\" or \"desc\", got \"{other}\".")));
        }
    };
    let purpose = query.get("purpose").map(str::to_owned);
    let query = FileQuery { purpose, after: query.after(), limit: query.limit(MAX_LIMIT, MAX_LIMIT)?, ascending };
    let page = blocking(move || Ok(storage.files(&query)?)).await?;
    Ok(Json(list_of(&page, object)))
}

/// The rows of a page as OpenAI lists them.
pub fn list_of<T>(page: &Page<T>, object: impl Fn(&T) -> Value) -> Value {
    let data: Vec<Value> = page.data.iter().map(object).collect();
    let id = |value: Option<&Value>| value.map_or(Value::Null, |value| value["id"].clone());
    json!({
        "object": "list", "first_id": id(data.first()), "last_id": id(data.last()), "has_more": page.has_more,
        "data": data,
    })
}

/// What is known of a file.
///
/// # Errors
/// When there is no such file.
pub async fn retrieve(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(object(&find(&app, id).await?)))
}

/// Its bytes.
///
/// # Errors
/// When there is no such file.
pub async fn content(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let file = find(&app, id).await?;
    let path = app.storage()?.file_path(&file.id, file.purpose);
    let opened = fs::File::open(path).await.map_err(ApiError::internal)?;
    let pieces = futures_util::stream::try_unfold(opened, |mut file| async move {
        use tokio::io::AsyncReadExt;
        let mut piece = vec![0; 64 << 10];
        let count = file.read(&mut piece).await?;
        piece.truncate(count);
        Ok::<_, std::io::Error>((count > 0).then_some((piece, file)))
    });
    let name: String = file.filename.chars().map(|c| if c.is_ascii_graphic() && c != '"' { c } else { '_' }).collect();
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, file.bytes.to_string()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\"")),
    ];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// Removes a file.
///
/// # Errors
/// When there is no such file, or a job needs it.
pub async fn delete(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let storage = app.storage()?.clone();
    let asked = id.clone();
    if !blocking(move || Ok(storage.delete_file(&asked)?)).await? {
        return Err(no_file(&id));
    }
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}

async fn find(app: &App, id: String) -> Result<StoredFile, ApiError> {
    let storage = app.storage()?.clone();
    blocking(move || storage.file(&id)?.ok_or_else(|| no_file(&id))).await
}

fn no_file(id: &str) -> ApiError {
    ApiError::new(Kind::ObjectNotFound, format!("No such File object: {id}")).or_param("id")
}

fn object(file: &StoredFile) -> Value {
    json!({
        "id": file.id, "object": "file", "bytes": file.bytes, "created_at": file.created, "expires_at": file.expires,
        "filename": file.filename, "purpose": file.purpose.name(), "status": "processed", "status_details": null,
    })
}

impl From<StorageError> for ApiError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::FileInUse { .. } => Self::new(Kind::Conflict, sentence(&error.to_string())),
            StorageError::NoFile { role, .. } => {
                Self::new(Kind::ObjectNotFound, sentence(&error.to_string())).or_param(role)
            }
            StorageError::NothingToComeAfter(_) => Self::invalid("after", sentence(&error.to_string())),
            StorageError::Io { ref reason, .. } if reason.kind() == io::ErrorKind::StorageFull => Self::disk_full(),
            StorageError::Database(error) if error.sqlite_error_code() == Some(ErrorCode::DiskFull) => {
                Self::disk_full()
            }
            other => Self::internal(other),
        }
    }
}
