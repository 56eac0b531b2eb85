//! What is answered of a batch, and the files that are made of it.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::{
    batch::{
        request::BatchRequest,
        result::{self, Outcome},
    },
    generation::Usage,
    http::reproducible::Reproducible,
    lines::{LineSet, input::Lines, output::Told},
    storage::{Batch, Made, Progress, Storage, Upload},
};

#[derive(Deserialize)]
struct Answer {
    response: Option<Response>,
}

#[derive(Deserialize)]
struct Response {
    body: Option<Body>,
}

#[derive(Deserialize)]
struct Body {
    usage: Option<Tokens>,
}

#[derive(Deserialize)]
struct Tokens {
    prompt_tokens: usize,
    completion_tokens: usize,
}

/// What a batch's progress counts from before its answers are added: answers don't tell of the tokens that were cached.
pub(super) fn none(batch: &Batch) -> Progress {
    let cached_tokens = batch.progress.usage.cached_tokens;
    Progress { usage: Usage { cached_tokens, ..Usage::default() }, ..Progress::default() }
}

/// The tokens that an answer tells of.
pub(super) fn usage(line: &[u8]) -> Usage {
    let answer = serde_json::from_slice::<Answer>(line).ok();
    let told = answer.and_then(|answer| answer.response?.body?.usage);
    told.map_or_else(Usage::default, |Tokens { prompt_tokens, completion_tokens }| Usage {
        prompt_tokens,
        completion_tokens,
        cached_tokens: 0,
    })
}

/// The files of a batch that ends: answers, and errors. Those lines of `expired` that have no answer are errors too.
///
/// # Errors
/// When they can't be written.
pub(super) fn files(storage: &Storage, expired: Option<Lines>, answers: &Path, batch: &Batch) -> Result<Made> {
    let mut output = Sheet::new(storage);
    let mut errors = Sheet::new(storage);
    let (mut progress, mut done) = (none(batch), LineSet::default());
    each(answers, |line, told| {
        done.insert(told.number);
        progress.add(told.failed, usage(line));
        if told.failed { &mut errors } else { &mut output }.write(line)
    })?;
    // One that can't be read is the last.
    for line in expired.into_iter().flatten().map_while(Result::ok) {
        if done.contains(line.number) {
            continue;
        }
        let request = line.text.as_deref().ok().and_then(|text| BatchRequest::parse(text).ok());
        let custom_id = request.map(|request| request.custom_id);
        let expired =
            Outcome::Expired.line(custom_id.as_deref(), Reproducible { number: line.number, seed: 0, created: 0 });
        errors.write((expired + "\n").as_bytes())?;
        progress.failed += 1;
    }
    Ok(Made { output: output.finish()?, errors: errors.finish()?, progress })
}

/// Shows every whole line of the answers, with what it is of. A torn last one is none.
fn each(answers: &Path, mut see: impl FnMut(&[u8], Told) -> io::Result<()>) -> Result<()> {
    let failed = || format!("cannot read {}", answers.display());
    let file = match File::open(answers) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened.with_context(failed)?,
    };
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).with_context(failed)? > 0 {
        if let Some(told) = result::told(&line).filter(|_| line.ends_with(b"\n")) {
            see(&line, told).context("cannot write the batch's files")?;
        }
        line.clear();
    }
    Ok(())
}

/// A file that is there once it has a line.
struct Sheet<'a> {
    storage: &'a Storage,
    begun: Option<(Upload, BufWriter<File>)>,
}

impl<'a> Sheet<'a> {
    fn new(storage: &'a Storage) -> Self {
        Self { storage, begun: None }
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let (_, file) = match &mut self.begun {
            Some(begun) => begun,
            none => {
                let upload = self.storage.new_upload();
                let file = BufWriter::new(File::create(&upload.path)?);
                none.insert((upload, file))
            }
        };
        file.write_all(line)
    }

    fn finish(self) -> Result<Option<Upload>> {
        let Some((upload, mut file)) = self.begun else { return Ok(None) };
        file.flush().context("cannot write the batch's files")?;
        Ok(Some(upload))
    }
}
