//! Two servers behind vllm-router: whose requests they get, and what clients see when one of them is killed.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{
    collections::BTreeSet,
    net::TcpListener,
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use cadre_tests::{
    client::Client,
    python,
    server::{MODEL, Server, completion_body},
    wait_for,
};
use serde_json::{Value, json};

/// Clients that ask at the same time, each with a session and a beginning of its prompts of its own.
const CLIENTS: usize = 16;

/// The name by which a replica signs its answers; it also has the name that clients ask for.
fn replica(name: &str) -> Server {
    Server::start_unnamed(&["--served-model-name", name, "--served-model-name", MODEL])
}

/// A running vllm-router. It is killed when it is dropped.
struct Router {
    child: Child,
    client: Client,
}

impl Router {
    fn start(policy: &str, replicas: &[&Server]) -> Self {
        let program = python::interpreter("scale-out").with_file_name("vllm-router");
        let (port, metrics_port) = (free_port(), free_port());
        let mut command = Command::new(program);
        command.args(["--host", "127.0.0.1", "--port", &port, "--prometheus-port", &metrics_port, "--policy", policy]);
        // Below the five times that a request is tried: else all of them may go to a dead replica.
        command.args(["--cb-failure-threshold", "3"]);
        command.arg("--worker-urls").args(replicas.iter().map(|replica| replica.address()));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let router = Self { child, client: Client::new(&format!("http://127.0.0.1:{port}")) };
        wait_for("the router", 60, || router.client.try_get("/health").is_ok_and(|answer| answer.status == 200));
        router
    }

    /// A client's request number `number`: the name of the replica that answered, and what it said.
    #[track_caller]
    fn ask(&self, client: usize, number: usize) -> (String, String) {
        let session = format!("session-{client}");
        let answer =
            self.client.post_with(("x-session-id", &session), "/v1/completions", &request(client, number)).ok();
        (text(&answer["model"]), text(&answer["choices"][0]["text"]))
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

fn request(client: usize, number: usize) -> Value {
    let beginning = format!("{client} is the number with which the prompts of this client begin. ").repeat(3);
    completion_body(format!("{beginning}Request {number}:"), json!({"max_tokens": 16, "ignore_eos": true}))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

/// Each client asks `count` times, one after the other; `see` is told who answered, and what.
fn ask_at_once(router: &Router, count: usize, see: impl Fn(usize, usize, (String, String)) + Sync) {
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let see = &see;
            scope.spawn(move || (0..count).for_each(|number| see(client, number, router.ask(client, number))));
        }
    });
}

/// Each client stays with one replica, and both have clients.
fn check_that_clients_stay(router: &Router) {
    let answered_by: Vec<_> = (0..CLIENTS).map(|_| Mutex::new(BTreeSet::new())).collect();
    ask_at_once(router, 4, |client, _, (replica, _)| {
        answered_by[client].lock().unwrap().insert(replica);
    });
    let answered_by: Vec<BTreeSet<String>> = answered_by.into_iter().map(|names| names.into_inner().unwrap()).collect();
    assert!(answered_by.iter().all(|names| names.len() == 1), "a client went from one to the other: {answered_by:?}");
    let used: BTreeSet<String> = answered_by.into_iter().flatten().collect();
    assert_eq!(used.len(), 2, "only {used:?} had clients");
}

/// One replica is killed while it works: every request of every client is still answered, with the text that it would
/// have got otherwise.
fn check_that_nothing_is_lost(router: &Router, first: Server, second: &Server) {
    let (count, answered) = (12, AtomicUsize::new(0));
    thread::scope(|scope| {
        let answered = &answered;
        scope.spawn(move || {
            let running = || first.metrics().value("vllm:num_requests_running", &[]) > 0.0;
            wait_for("answers, and requests under way", 60, || {
                answered.load(Ordering::Relaxed) >= 2 * CLIENTS && running()
            });
            // With SIGKILL.
            drop(first);
        });
        scope.spawn(move || {
            ask_at_once(router, count, |client, number, (_, said)| {
                answered.fetch_add(1, Ordering::Relaxed);
                let alone = second.client().post("/v1/completions", &request(client, number)).ok();
                assert_eq!(said, text(&alone["choices"][0]["text"]), "client {client}, request {number}");
            });
        });
    });
    assert_eq!(answered.into_inner(), CLIENTS * count);
}

#[test]
fn sessions_stay_with_a_replica_and_no_request_is_lost_when_one_is_killed() {
    let (first, second) = (replica("first"), replica("second"));
    let router = Router::start("consistent_hash", &[&first, &second]);
    check_that_clients_stay(&router);
    check_that_nothing_is_lost(&router, first, &second);
}

#[test]
fn equal_beginnings_stay_with_a_replica_and_no_request_is_lost_when_one_is_killed() {
    let (first, second) = (replica("first"), replica("second"));
    let router = Router::start("cache_aware", &[&first, &second]);
    check_that_clients_stay(&router);
    check_that_nothing_is_lost(&router, first, &second);
}

/// Where many ask at once, the router learns from the others' failures.
#[test]
fn a_client_alone_loses_no_request_either() {
    let (first, second) = (replica("first"), replica("second"));
    let router = Router::start("consistent_hash", &[&first, &second]);
    let answered_by: BTreeSet<String> = (0..CLIENTS).map(|client| router.ask(client, 0).0).collect();
    assert_eq!(answered_by.len(), 2, "only {answered_by:?} had clients");
    drop(first);
    assert!((0..CLIENTS).all(|client| router.ask(client, 1).0 == "second"));
}
