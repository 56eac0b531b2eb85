//! A hub on a free port of this machine, as small as hf-hub lets it be.

use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash, Hasher},
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

/// The first byte asked for, and the last one if it is not the file's.
pub(super) type Range = (usize, Option<usize>);

/// A request, as far as the hub looks at it.
pub(super) struct Request {
    pub path: String,
    pub range: Option<Range>,
    pub authorization: Option<String>,
}

/// What is answered instead of the file.
pub(super) enum Answer {
    Status(u16),
    /// The right headers, but the connection ends after so many bytes of the file.
    CutAfter(usize),
}

type Rule = Box<dyn Fn(&Request) -> Option<Answer> + Send>;

struct Hub {
    model: String,
    commit: String,
    files: Vec<(&'static str, Vec<u8>)>,
    rule: Mutex<Rule>,
    etag: Mutex<Option<String>>,
    requests: Mutex<Vec<String>>,
    ranges: Mutex<Vec<(String, Range)>>,
    stop: AtomicBool,
}

/// A running hub; ends when dropped.
pub(super) struct Server {
    hub: Arc<Hub>,
    address: String,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// A hub with one model at one commit.
    pub(super) fn start(model: &str, commit: &str, files: Vec<(&'static str, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let hub = Arc::new(Hub {
            model: model.to_owned(),
            commit: commit.to_owned(),
            files,
            rule: Mutex::new(Box::new(|_| None)),
            etag: Mutex::new(None),
            requests: Mutex::default(),
            ranges: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let (serving, at) = (Arc::clone(&hub), address.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if serving.stop.load(Ordering::Relaxed) {
                    return;
                }
                // A client that left is its own affair.
                let _ = serving.serve(stream.unwrap(), &at);
            }
        });
        Self { hub, address, thread: Mutex::new(Some(thread)) }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Asks `rule` before each answer.
    pub(super) fn answer(&self, rule: impl Fn(&Request) -> Option<Answer> + Send + 'static) {
        *self.hub.rule.lock().unwrap() = Box::new(rule);
    }

    /// All files claim to have this content.
    pub(super) fn etags(&self, etag: &str) {
        *self.hub.etag.lock().unwrap() = Some(etag.to_owned());
    }

    /// The paths asked for since the last call.
    pub(super) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.hub.requests.lock().unwrap())
    }

    /// What the hub calls the content of `file`.
    pub(super) fn etag(&self, file: &str) -> String {
        let (_, content) = self.hub.files.iter().find(|(name, _)| *name == file).unwrap();
        self.hub.etag_of(content)
    }

    /// The paths and ranges asked for so far.
    pub(super) fn ranges(&self) -> Vec<(String, Range)> {
        self.hub.ranges.lock().unwrap().clone()
    }

    /// From here on nobody listens.
    pub(super) fn stop(&self) {
        self.hub.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.lock().unwrap().take() {
            let _ = TcpStream::connect(self.address.trim_start_matches("http://"));
            thread.join().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Hub {
    fn serve(&self, mut stream: TcpStream, address: &str) -> std::io::Result<()> {
        let Some(request) = read_request(&stream)? else { return Ok(()) };
        self.requests.lock().unwrap().push(request.path.clone());
        self.ranges.lock().unwrap().extend(request.range.map(|range| (request.path.clone(), range)));
        let answer = (self.rule.lock().unwrap())(&request);
        if let Some(Answer::Status(status)) = answer {
            return write!(stream, "HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        if request.path == format!("/api/models/{}/revision/main", self.model) {
            return json(&mut stream, &self.listing());
        }
        let Some((content, name)) = self.file(&request.path) else {
            return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        };
        let etag = self.etag_of(content);
        // Large files lie elsewhere, as on the real hub.
        if name.ends_with(".safetensors") && !request.path.starts_with("/cdn/") {
            return write!(
                stream,
                "HTTP/1.1 302 Found\r\nLocation: {address}/cdn{}\r\nX-Repo-Commit: {}\r\nX-Linked-ETag: \"{etag}\"\r\nETag: \"git\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                request.path, self.commit,
            );
        }
        let (start, end) = request.range.unwrap_or((0, None));
        let end = end.map_or(content.len(), |end| (end + 1).min(content.len()));
        let part = &content[start.min(end)..end];
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{}/{}\r\nContent-Length: {}\r\nX-Repo-Commit: {}\r\nETag: \"{etag}\"\r\nConnection: close\r\n\r\n",
            end.saturating_sub(1),
            content.len(),
            part.len(),
            self.commit,
        )?;
        match answer {
            Some(Answer::CutAfter(bytes)) => stream.write_all(&part[..bytes.min(part.len())]),
            _ => stream.write_all(part),
        }
    }

    fn etag_of(&self, content: &[u8]) -> String {
        let mut hasher = DefaultHasher::new();
        content.hash(&mut hasher);
        self.etag.lock().unwrap().clone().unwrap_or_else(|| format!("{:016x}", hasher.finish()))
    }

    fn listing(&self) -> String {
        let siblings: Vec<_> = self.files.iter().map(|(name, _)| serde_json::json!({"rfilename": name})).collect();
        serde_json::json!({"id": self.model, "sha": self.commit, "siblings": siblings}).to_string()
    }

    fn file(&self, path: &str) -> Option<(&[u8], &str)> {
        let path = path.strip_prefix("/cdn").unwrap_or(path);
        let (_, name) = path.strip_prefix(&format!("/{}/resolve/", self.model))?.split_once('/')?;
        self.files.iter().find(|(file, _)| *file == name).map(|(name, content)| (content.as_slice(), *name))
    }
}

fn json(stream: &mut TcpStream, text: &str) -> std::io::Result<()> {
    let length = text.len();
    let headers = "Content-Type: application/json\r\nConnection: close";
    write!(stream, "HTTP/1.1 200 OK\r\n{headers}\r\nContent-Length: {length}\r\n\r\n{text}")
}

fn read_request(stream: &TcpStream) -> std::io::Result<Option<Request>> {
    let mut lines = BufReader::new(stream).lines();
    let Some(first) = lines.next().transpose()? else { return Ok(None) };
    let path = first.split(' ').nth(1).unwrap_or("/").to_owned();
    let mut request = Request { path, range: None, authorization: None };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => {
                let (start, end) = value.trim_start_matches("bytes=").split_once('-').unwrap();
                request.range = Some((start.parse().unwrap(), end.parse().ok()));
            }
            "authorization" => request.authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    Ok(Some(request))
}
