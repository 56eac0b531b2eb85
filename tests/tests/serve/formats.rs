//! Quantised weights over HTTP: the same tokens on every instruction tier, for any threads and neighbours.

use cadre_tests::{
    client::Transcript,
    server::{MODEL, Server, chat_body},
};
use serde_json::{Value, json};

use crate::concurrency::QUESTIONS;

/// Those that this machine lacks are refused at start; the first one exists everywhere.
const TIERS: &[&str] = &["portable", "neon", "avx2", "avx512", "avx512-bf16", "amx"];

fn requests() -> Vec<Value> {
    QUESTIONS.iter().map(|question| chat_body(question, json!({"stream": true, "temperature": 0}))).collect()
}

fn serve(format: &str, tier: &str, threads: &str) -> Server {
    let args = ["--served-model-name", MODEL, "--format", format, "--threads", threads];
    let mut server = Server::spawn(&args, &[("CADRE_CPU", tier)]);
    server.wait_until_ready();
    server
}

fn available(tier: &str) -> bool {
    let mut command = cadre_tests::binary::command(&["inspect"]);
    let output = command.env("CADRE_CPU", tier).output().unwrap();
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(message.contains("CADRE_CPU") && message.contains("portable"), "{message}");
        eprintln!("this machine has no {tier}: not tested");
    }
    output.status.success()
}

fn ask(server: &Server, body: &Value) -> (String, Option<String>) {
    let transcript: Transcript = server.client().events("/v1/chat/completions", body).collect();
    assert!(transcript.done && transcript.error().is_none());
    (transcript.text(), transcript.finish_reason().map(str::to_owned))
}

#[test]
fn integer_formats_give_the_same_text_on_every_tier() {
    let requests = requests();
    let tiers: Vec<_> = TIERS.iter().filter(|tier| available(tier)).collect();
    assert!(tiers.len() > 1 || !cfg!(target_arch = "x86_64"), "{tiers:?}");
    for format in ["q8_0", "q4_0", "q4_k", "q6_k", "mxfp4"] {
        let server = serve(format, "portable", "1");
        let expected: Vec<_> = requests.iter().map(|body| ask(&server, body)).collect();
        drop(server);
        for tier in &tiers {
            let server = serve(format, tier, "2");
            let found: Vec<_> = std::thread::scope(|scope| {
                let clients: Vec<_> = requests.iter().map(|body| scope.spawn(|| ask(&server, body))).collect();
                clients.into_iter().map(|client| client.join().unwrap()).collect()
            });
            assert_eq!(expected, found, "{format} on {tier}, two threads, all at once");
        }
    }
}
