//! The binary runs. What it does is tested by the package `cadre-tests`, which relies on this file too: a package
//! with an integration test gets its binary built beside the tests, with the very same dependencies.

use std::process::Command;

fn exit_code(args: &[&str]) -> Option<i32> {
    Command::new(env!("CARGO_BIN_EXE_cadre")).args(args).output().expect("it runs").status.code()
}

#[test]
fn it_runs() {
    assert_eq!(exit_code(&["--version"]), Some(0));
    assert_eq!(exit_code(&["no-such-command"]), Some(2));
}
