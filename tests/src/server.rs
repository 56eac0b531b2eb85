//! A `cadre serve` of a test's own.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, ExitStatus, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    binary,
    client::{Answer, Client, Transcript},
    metrics::Metrics,
    wait_for,
};

/// The name that the tests' servers give their model.
pub const MODEL: &str = "test-model";

/// How long a server may take to say where it listens, and to load a small model.
const START_SECONDS: u64 = 60;

/// A running server. It is killed when it is dropped.
pub struct Server {
    child: Child,
    client: Client,
    directory: TempDir,
}

impl Server {
    /// Starts `cadre serve` on a free port with these further flags, and waits until it answers.
    ///
    /// # Panics
    /// When it doesn't come up.
    #[track_caller]
    pub fn start(args: &[&str]) -> Self {
        Self::start_unnamed(&[&["--served-model-name", MODEL], args].concat())
    }

    /// The same, with the model's own name.
    ///
    /// # Panics
    /// When it doesn't come up.
    #[track_caller]
    pub fn start_unnamed(args: &[&str]) -> Self {
        let mut server = Self::spawn(args, &[]);
        server.wait_until_ready();
        server
    }

    /// Starts it and returns as soon as it listens: its model may still be loading.
    ///
    /// # Panics
    /// When it doesn't listen.
    #[track_caller]
    pub fn spawn(args: &[&str], environment: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let log = File::create(directory.path().join("log")).expect("a log file");
        let mut command = binary::command(&["serve", "--port", "0"]);
        command.args(args).envs(environment.iter().copied());
        command.env("HF_HOME", directory.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().expect("cadre starts");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let (sender, receiver) = mpsc::channel();
        // Reads on to the end, so that the server can always write.
        std::thread::spawn(move || {
            while let Some(Ok(line)) = lines.next() {
                let _ = sender.send(line);
            }
        });
        let line = receiver.recv_timeout(Duration::from_secs(START_SECONDS)).unwrap_or_default();
        let address = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap_or_default().to_owned();
        let server = Self { child, client: Client::new(&address), directory };
        assert!(!address.is_empty(), "cadre did not say where it listens:\n{}", server.log());
        server
    }

    /// Waits until `/health` says that requests are welcome.
    ///
    /// # Panics
    /// When it takes too long, or the server ends.
    #[track_caller]
    pub fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(START_SECONDS);
        loop {
            if self.client.try_get("/health").is_ok_and(|answer| answer.status == 200) {
                return;
            }
            let ended = self.child.try_wait().expect("its state can be asked");
            assert!(ended.is_none() && Instant::now() < deadline, "cadre did not come up: {ended:?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks it.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// `http://address:port`.
    pub fn address(&self) -> &str {
        self.client.address()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// A question's answer, not streamed: `{"model", "messages"}` and what `more` has.
    pub fn chat(&self, question: &str, more: Value) -> Answer {
        self.client.post("/v1/chat/completions", &chat_body(question, more))
    }

    /// A question's answer, streamed to its end.
    pub fn chat_stream(&self, question: &str, more: Value) -> Transcript {
        let mut body = chat_body(question, more);
        body["stream"] = true.into();
        self.client.events("/v1/chat/completions", &body).collect()
    }

    /// A text's or tokens' completion, not streamed.
    pub fn complete(&self, prompt: impl Into<Value>, more: Value) -> Answer {
        self.client.post("/v1/completions", &completion_body(prompt, more))
    }

    /// The ids of a text's tokens.
    ///
    /// # Panics
    /// When the server refuses.
    #[track_caller]
    pub fn tokens(&self, text: &str) -> Vec<u32> {
        let body = json!({"prompt": text, "add_special_tokens": false});
        ids(&self.client.post("/tokenize", &body).ok()["tokens"])
    }

    /// What it counts.
    pub fn metrics(&self) -> Metrics {
        Metrics::new(self.client.get("/metrics").text)
    }

    /// Waits until no request is under way.
    #[track_caller]
    pub fn wait_until_idle(&self) {
        wait_for("an idle server", 20, || {
            let metrics = self.metrics();
            metrics.value("vllm:num_requests_running", &[]) == 0.0
                && metrics.value("vllm:num_requests_waiting", &[]) == 0.0
        });
    }

    /// Sends SIGTERM.
    ///
    /// # Panics
    /// When it can't be sent.
    pub fn terminate(&self) {
        binary::signal(&self.child, "TERM");
    }

    /// Waits until the process has ended.
    ///
    /// # Panics
    /// When it takes longer than `limit`.
    #[track_caller]
    pub fn wait_for_exit(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("its state can be asked") {
                return status;
            }
            assert!(Instant::now() < deadline, "cadre still runs after {limit:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the log of the server at {}:\n{}", self.address(), self.log());
        }
    }
}

/// The body of a chat request.
pub fn chat_body(question: &str, more: Value) -> Value {
    merge(json!({"model": MODEL, "messages": [{"role": "user", "content": question}]}), more)
}

/// The body of a completion request.
pub fn completion_body(prompt: impl Into<Value>, more: Value) -> Value {
    merge(json!({"model": MODEL, "prompt": prompt.into()}), more)
}

/// `body` with the fields of `more`.
///
/// # Panics
/// When one of them is no object.
pub fn merge(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more} is no object") };
    body.as_object_mut().expect("the body is an object").extend(more);
    body
}

/// An array of token ids.
///
/// # Panics
/// When it is something else.
#[track_caller]
pub fn ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).expect("a token id");
    value.as_array().expect("an array of token ids").iter().map(id).collect()
}
