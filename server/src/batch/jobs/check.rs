//! Whether a file is one of requests to a route.

use anyhow::Result;

use crate::{
    batch::{
        duplicates::{self, Duplicates},
        request::BatchRequest,
    },
    lines::input::{Input, Line},
    storage::BatchError,
};

/// How many lines that are none are told.
const MOST_ERRORS: usize = 20;

/// What is known of a file of requests.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Checked {
    /// How many there are.
    pub lines: u64,
    /// The model that all of them name, if it is one.
    pub model: Option<String>,
}

/// Looks at all lines: they have to be requests to `endpoint`, each with a `custom_id` of its own.
///
/// # Errors
/// When the file can't be read. What is wrong with its lines is within.
pub(super) fn check(input: &Input, endpoint: &str) -> Result<Result<Checked, Vec<BatchError>>> {
    let (mut errors, mut count, mut models) = (Vec::new(), 0_usize, Vec::new());
    let scan = input.scan(|line| match model_of(line, endpoint) {
        Ok(model) => {
            // A second one is enough to know that they aren't one.
            if models.len() < 2 && !models.contains(&model) {
                models.push(model);
            }
        }
        Err(error) => {
            count += 1;
            if errors.len() < MOST_ERRORS {
                errors.push(error);
            }
        }
    })?;
    if count > errors.len() {
        let message = format!("{} further lines are no requests", count - errors.len());
        errors.push(BatchError { code: "too_many_errors".to_owned(), message, param: None, line: None });
    }
    if scan.lines == 0 {
        let message = "The file has no line".to_owned();
        errors.push(BatchError { code: "empty_file".to_owned(), message, param: None, line: None });
    }
    if errors.is_empty()
        && let Err(error) = duplicates::scan(input, duplicates::MOST_HASHES)
    {
        errors.extend(error.downcast::<Duplicates>()?.told().iter().map(|duplicate| BatchError {
            code: "duplicate_custom_id".to_owned(),
            message: format!("The custom_id {:?} is that of line {} already", duplicate.custom_id, duplicate.first),
            param: Some("custom_id".to_owned()),
            line: Some(duplicate.again),
        }));
    }
    let model = if models.len() == 1 { models.swap_remove(0) } else { None };
    Ok(if errors.is_empty() { Ok(Checked { lines: scan.lines, model }) } else { Err(errors) })
}

/// The model that a line names.
fn model_of(line: &Line, endpoint: &str) -> Result<Option<String>, BatchError> {
    #[derive(serde::Deserialize)]
    struct Body {
        model: Option<serde_json::Value>,
    }
    let error = |code: &str, message: String, param: Option<&str>| BatchError {
        code: code.to_owned(),
        message,
        param: param.map(str::to_owned),
        line: Some(line.number),
    };
    let text = line.text.as_deref().map_err(|reason| error("invalid_json_line", reason.clone(), None))?;
    let request = BatchRequest::parse(text).map_err(|bad| error(bad.code, bad.message, None))?;
    if request.url != endpoint {
        let message = format!("`url` must be the batch's endpoint, {endpoint}, got {}", request.url);
        return Err(error("mismatched_endpoint", message, Some("url")));
    }
    let body = serde_json::from_str::<Body>(request.body.get()).ok();
    Ok(body.and_then(|body| body.model?.as_str().map(str::to_owned)))
}
