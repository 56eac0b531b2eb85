//! Python programs of the tests, in virtual environments with the pinned packages of `tests/python/requirements-*.txt`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::{binary::target_directory, source::root};

/// The interpreter of the environment with `requirements-<name>.txt`. It is made if there is none, or if the packages have
/// changed. It holds those packages and no others: of some, the test needs only a part, and not all that they depend on.
///
/// # Panics
/// When it can't be made: a test that needs it fails then, it isn't skipped.
pub fn interpreter(name: &str) -> PathBuf {
    let requirements = root().join(format!("tests/python/requirements-{name}.txt"));
    let wanted = fs::read_to_string(&requirements).expect("the requirements are committed");
    let home = target_directory().join("python").join(name);
    fs::create_dir_all(&home).expect("the target directory can be written to");
    // Several test programs may want it at once: one makes it, the others wait.
    let lock = File::create(home.join("lock")).expect("a lock file");
    lock.lock().expect("the lock is given sooner or later");
    let (venv, made) = (home.join("venv"), home.join("made"));
    let interpreter = venv.join("bin/python");
    if fs::read_to_string(&made).is_ok_and(|made| made == wanted) && interpreter.exists() {
        return interpreter;
    }
    let path = |path: &Path| path.to_str().expect("paths are UTF-8").to_owned();
    run("python3", &["-m", "venv", "--clear", &path(&venv)]);
    let install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-compile",
        "--no-deps",
        "--requirement",
    ];
    run(&path(&interpreter), &[&install[..], &[path(&requirements).as_str()]].concat());
    fs::write(made, wanted).expect("the target directory can be written to");
    interpreter
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert_success(&format!("{program} {args:?}"), &output);
}

/// Complains with everything that was written if the program failed.
///
/// # Panics
/// When it did.
#[track_caller]
pub fn assert_success(what: &str, output: &Output) {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{stdout}\n{stderr}", output.status);
}
