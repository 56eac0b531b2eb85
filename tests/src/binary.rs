//! The binary under test: built once with the profile of the tests, and run.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
};

use crate::source::root;

/// The path of `cadre`, built if it isn't up to date.
pub fn cadre() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(build)
}

/// The directory of the build: `target`.
pub fn target_directory() -> PathBuf {
    profile_directory().parent().expect("the tests lie in target/<profile>/deps").to_owned()
}

fn profile_directory() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    test.ancestors().nth(2).expect("the tests lie in target/<profile>/deps").to_owned()
}

/// By way of the binary's own integration test and for the whole workspace, so that the dependencies have the features
/// that `cargo test --workspace` gives them: after it there is nothing left to build.
fn build() -> PathBuf {
    let directory = profile_directory();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    // What cargo tells this test about its own package would make build scripts that look at it (ring's) run anew.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command.args(["test", "--workspace", "--test", "binary", "--no-run", "--quiet"]).current_dir(root());
    match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => &mut command,
        Some(profile) => command.args(["--profile", profile]),
    };
    let status = command.arg("--target-dir").arg(target_directory()).status().expect("cargo runs");
    assert!(status.success(), "cadre could not be built: {status}");
    directory.join("cadre")
}

/// Sends a signal to a running program: `INT` is what Ctrl-C does.
///
/// # Panics
/// When it can't be sent.
pub fn signal(child: &Child, name: &str) {
    // The shell's own `kill`: there may be no program of that name.
    let kill = format!("kill -{name} {}", child.id());
    let status = Command::new("sh").args(["-c", &kill]).status().expect("sh runs");
    assert!(status.success(), "{kill}: {status}");
}

/// A command that runs `cadre`, away from the user's own caches and log settings.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(cadre());
    for name in ["RUST_LOG", "HF_HOME", "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("XDG_CACHE_HOME", target_directory().join("cache-of-tests")).args(args);
    command
}

/// How a run of `cadre` ended.
#[derive(Debug, Clone)]
pub struct Run {
    /// The exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// All of standard output.
    pub stdout: String,
    /// All of standard error.
    pub stderr: String,
}

/// Runs `cadre` with `stdin` to its end.
///
/// # Panics
/// When it can't be run, or writes something other than UTF-8.
pub fn run_with_input(args: &[&str], stdin: &str) -> Run {
    let mut command = command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("cadre starts");
    let mut input = child.stdin.take().expect("it is piped");
    // One that ends without reading its input is a result, not an error.
    let _ = input.write_all(stdin.as_bytes());
    drop(input);
    let output = child.wait_with_output().expect("cadre ends");
    let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs `cadre` without input to its end.
pub fn run(args: &[&str]) -> Run {
    run_with_input(args, "")
}

/// Runs `cadre`, which has to succeed, and returns its standard output.
///
/// # Panics
/// When it fails.
#[track_caller]
pub fn output(args: &[&str]) -> String {
    let run = run(args);
    assert_eq!(run.code, Some(0), "cadre {args:?} failed:\n{}", run.stderr);
    run.stdout
}
