//! Plain HTTP and server-sent events, one connection a request.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Lines},
    time::Duration,
};

use serde_json::Value;
use ureq::{Agent, BodyReader, http::Response};

/// Longer than any answer takes; shorter than a person waits.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Asks one server.
#[derive(Clone)]
pub struct Client {
    address: String,
    agent: Agent,
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The headers, by their names in small letters.
    pub headers: BTreeMap<String, String>,
    /// The body.
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The body as JSON, if the status is 200.
    ///
    /// # Panics
    /// When it isn't.
    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        self.json()
    }
}

impl Client {
    /// Of the server at `http://host:port`.
    pub fn new(address: &str) -> Self {
        // Without kept connections, dropping an answer closes its connection: the server sees the client leave.
        let config = Agent::config_builder().http_status_as_error(false).max_idle_connections(0);
        let agent = config.timeout_global(Some(TIMEOUT)).build().new_agent();
        Self { address: address.to_owned(), agent }
    }

    /// `http://host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.address)
    }

    /// GET, if there is a server.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn try_get(&self, path: &str) -> Result<Answer, ureq::Error> {
        self.agent.get(self.url(path)).call().and_then(whole)
    }

    /// GET.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn get(&self, path: &str) -> Answer {
        self.try_get(path).unwrap_or_else(|error| panic!("GET {path}: {error}"))
    }

    /// DELETE.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn delete(&self, path: &str) -> Answer {
        let answer = self.agent.delete(self.url(path)).call().and_then(whole);
        answer.unwrap_or_else(|error| panic!("DELETE {path}: {error}"))
    }

    /// POST of JSON.
    #[track_caller]
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, "application/json", body.to_string().as_bytes())
    }

    /// POST of anything.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn post_bytes(&self, path: &str, content_type: &str, body: &[u8]) -> Answer {
        let answer = self.agent.post(self.url(path)).content_type(content_type).send(body).and_then(whole);
        answer.unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    /// POST of JSON with one more header.
    ///
    /// # Panics
    /// When there is no answer.
    #[track_caller]
    pub fn post_with(&self, (name, value): (&str, &str), path: &str, body: &Value) -> Answer {
        let request = self.agent.post(self.url(path)).content_type("application/json").header(name, value);
        let answer = request.send(body.to_string()).and_then(whole);
        answer.unwrap_or_else(|error| panic!("POST {path}: {error}"))
    }

    /// POST of JSON that is answered with a stream. Dropping the stream closes the connection.
    ///
    /// # Panics
    /// When there is no answer, or it is no stream.
    #[track_caller]
    pub fn events(&self, path: &str, body: &Value) -> Events {
        let sent = self.agent.post(self.url(path)).content_type("application/json").send(body.to_string());
        let response = sent.unwrap_or_else(|error| panic!("POST {path}: {error}"));
        let (status, headers) = (response.status().as_u16(), headers(&response));
        let is_stream = headers.get("content-type").is_some_and(|kind| kind.starts_with("text/event-stream"));
        if status != 200 || !is_stream {
            let text = whole(response).map(|answer| answer.text);
            panic!("POST {path}: expected a stream, got {status}: {text:?}");
        }
        Events { lines: BufReader::new(response.into_body().into_reader()).lines() }
    }
}

fn headers<T>(response: &Response<T>) -> BTreeMap<String, String> {
    let text = |value: &ureq::http::HeaderValue| value.to_str().unwrap_or_default().to_owned();
    response.headers().iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect()
}

fn whole(response: Response<ureq::Body>) -> Result<Answer, ureq::Error> {
    let (status, headers) = (response.status().as_u16(), headers(&response));
    Ok(Answer { status, headers, text: response.into_body().read_to_string()? })
}

/// The `data` of a stream's events, as they come. It ends where the connection does, in order or not.
pub struct Events {
    lines: Lines<BufReader<BodyReader<'static>>>,
}

impl Iterator for Events {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            let line = self.lines.next()?.ok()?;
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.to_owned());
            }
        }
    }
}

/// A stream from its beginning to its end.
#[derive(Debug, Clone, Default)]
pub struct Transcript {
    /// Every event but `[DONE]`.
    pub chunks: Vec<Value>,
    /// Whether `[DONE]` came, and came last.
    pub done: bool,
}

impl FromIterator<String> for Transcript {
    fn from_iter<I: IntoIterator<Item = String>>(events: I) -> Self {
        let mut transcript = Self::default();
        for data in events {
            transcript.done = data == "[DONE]";
            if !transcript.done {
                transcript.chunks.push(serde_json::from_str(&data).expect("events are JSON"));
            }
        }
        transcript
    }
}

impl Transcript {
    /// The parts of all chunks' choices, in order.
    pub fn choices(&self) -> impl Iterator<Item = &Value> {
        self.chunks.iter().filter_map(|chunk| chunk["choices"].as_array()).flatten()
    }

    /// The text of choice `index`, of a chat or a completion.
    pub fn text_of(&self, index: u64) -> String {
        let parts = self.choices().filter(|choice| choice["index"] == index);
        parts.filter_map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str())).collect()
    }

    /// The text of the first choice.
    pub fn text(&self) -> String {
        self.text_of(0)
    }

    /// Why the first choice ended.
    pub fn finish_reason(&self) -> Option<&str> {
        self.choices().filter(|choice| choice["index"] == 0).find_map(|choice| choice["finish_reason"].as_str())
    }

    /// The error that ended the stream.
    pub fn error(&self) -> Option<&Value> {
        self.chunks.iter().find_map(|chunk| chunk.get("error"))
    }
}
