//! Whatever ends a run, the same command goes on to the same bytes.

use std::{
    fs::{self, File},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use cadre_tests::{
    binary,
    checkpoint::{Qwen3Moe, copy_embedded},
    wait_for,
};

use super::{Batch, requests, sorted, values};

/// Random numbers that are the same every time: where a run is killed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn start(batch: &Batch, output: &str, flags: &[&str]) -> Child {
    let args = batch.args(output, flags);
    let mut command = binary::command(&args.iter().map(AsRef::as_ref).collect::<Vec<_>>());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn has_ended(child: &mut Child) -> bool {
    child.try_wait().unwrap().is_some()
}

/// Runs it, and kills it each time when it has written some more; returns how often it was killed before it was done.
fn run_with_kills(batch: &Batch, output: &str, flags: &[&str], kills: u32, bytes_between: u64) -> u32 {
    let mut numbers = Numbers(0x1234_5678_9ABC_DEF1);
    let path = batch.path(output);
    let size = || fs::metadata(&path).map_or(0, |file| file.len());
    let mut killed = 0;
    while killed < kills {
        let mut child = start(batch, output, flags);
        let enough = size() + numbers.below(bytes_between);
        // Some die as soon as they have written enough, some a little later, some before they write at all.
        let wants = numbers.below(4) > 0;
        wait_for("a run to write", 120, || has_ended(&mut child) || !wants || size() > enough);
        thread::sleep(Duration::from_millis(numbers.below(40)));
        if has_ended(&mut child) {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        killed += 1;
    }
    batch.finish(output, flags);
    killed
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_is_not() {
    let batch = Batch::new(&requests(300));
    // Few at a time: so that there is a time to kill it.
    let flags = ["--ordered", "--max-num-seqs", "4"];
    batch.finish("whole.jsonl", &flags);
    let killed = run_with_kills(&batch, "killed.jsonl", &flags, 8, 12_000);
    assert!(killed >= 3, "it was killed {killed} times only");
    assert!(batch.text("killed.jsonl") == batch.text("whole.jsonl"), "the bytes differ");
    assert!(batch.text("killed.jsonl.errors.jsonl") == batch.text("whole.jsonl.errors.jsonl"));

    let killed = run_with_kills(&batch, "any.jsonl", &flags[1..], 8, 12_000);
    assert!(killed >= 3, "it was killed {killed} times only");
    assert!(batch.sorted("any.jsonl") == batch.text("whole.jsonl"), "lines are lost, doubled or others");
    assert!(batch.sorted("any.jsonl.errors.jsonl") == batch.text("whole.jsonl.errors.jsonl"));
}

/// What the short form above does, at the size that was promised: `cargo test --workspace --release --test batch -- --ignored`.
#[test]
#[ignore = "takes minutes"]
fn ten_thousand_requests_killed_twenty_times() {
    let batch = Batch::new(&requests(10_000));
    batch.finish("whole.jsonl", &["--ordered"]);
    let bytes = fs::metadata(batch.path("whole.jsonl")).unwrap().len();
    let killed = run_with_kills(&batch, "killed.jsonl", &["--ordered"], 20, bytes / 24);
    assert_eq!(killed, 20);
    assert!(batch.text("killed.jsonl") == batch.text("whole.jsonl"), "the bytes differ");
    assert!(batch.text("killed.jsonl.errors.jsonl") == batch.text("whole.jsonl.errors.jsonl"));
}

#[test]
fn a_torn_end_is_repaired_and_nothing_else_is_done_again() {
    let batch = Batch::new(&requests(60));
    batch.finish("out.jsonl", &["--ordered"]);
    let whole = batch.text("out.jsonl");
    let cut = whole.len() - 100;
    fs::write(batch.path("out.jsonl"), &whole[..cut]).unwrap();
    let left = whole[..cut].lines().count() - 1;
    let said = batch.finish("out.jsonl", &["--ordered"]);
    assert!(said.contains(&format!("{left} of 60 lines are done")), "{said}");
    assert!(said.contains(&format!("{} lines in", 60 - left)), "only the rest was worked on: {said}");
    assert!(batch.text("out.jsonl") == whole);
    let said = batch.finish("out.jsonl", &["--ordered"]);
    assert!(said.contains("60 lines are done") && said.contains("nothing to do"), "{said}");
}

#[test]
fn another_model_input_or_flag_is_refused_unless_forced() {
    let batch = Batch::new(&requests(20));
    batch.finish("out.jsonl", &["--ordered"]);
    let whole = batch.text("out.jsonl");
    let first_lines: String = whole.split_inclusive('\n').take(7).collect();
    fs::write(batch.path("out.jsonl"), &first_lines).unwrap();
    let other = batch.path("other");
    fs::create_dir(&other).unwrap();
    Qwen3Moe { layers: 1, hidden: 64, heads: 4, experts: 4, expert_width: 32, positions: 256 }.write(&other);
    let model = other.to_str().unwrap();
    for (flags, differs) in [
        (&["--ordered", "--model", model][..], "model was"),
        (&["--ordered", "--seed", "8"], "seed was 0 and is 8 now"),
        (&["--ordered", "--format", "q8_0"], "format was"),
        (&["--ordered", "--max-model-len", "100"], "max_model_len was 1024 and is 100 now"),
        (&[], "ordered was true and is false now"),
    ] {
        let run = batch.run("out.jsonl", flags);
        assert_eq!(run.code, Some(1), "{flags:?}");
        assert!(run.stderr.contains(differs) && run.stderr.contains("--force"), "{flags:?}: {}", run.stderr);
        assert_eq!(batch.text("out.jsonl"), first_lines, "nothing was changed");
    }
    let input = batch.text("in.jsonl");
    fs::write(batch.path("in.jsonl"), input.replace("garden 8", "garden 9")).unwrap();
    let run = batch.run("out.jsonl", &["--ordered"]);
    assert!(run.code == Some(1) && run.stderr.contains("input was"), "{}", run.stderr);

    fs::write(batch.path("in.jsonl"), input).unwrap();
    batch.finish("out.jsonl", &["--ordered", "--force", "--seed", "8"]);
    let forced = batch.text("out.jsonl");
    assert!(forced.starts_with(&first_lines) && forced.lines().count() == 20 && forced != whole);
}

#[test]
fn a_copy_of_the_model_is_the_same_model() {
    let batch = Batch::new(&requests(8));
    batch.finish("out.jsonl", &["--served-model-name", "m"]);
    let copy = batch.path("copy");
    fs::create_dir(&copy).unwrap();
    copy_embedded(&copy, &[]);
    let said = batch.finish("out.jsonl", &["--served-model-name", "m", "--model", copy.to_str().unwrap()]);
    assert!(said.contains("nothing to do"), "{said}");
}

#[test]
fn ctrl_c_leaves_whole_lines_and_says_how_to_go_on() {
    let batch = Batch::new(&requests(400));
    let flags = ["--max-num-seqs", "2"];
    let mut child = start(&batch, "out.jsonl", &flags);
    wait_for("a run to write", 60, || fs::metadata(batch.path("out.jsonl")).is_ok_and(|file| file.len() > 0));
    binary::signal(&child, "INT");
    wait_for("it to end", 60, || has_ended(&mut child));
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(130), "{said}");
    assert!(said.contains("the same command goes on"), "{said}");
    let text = batch.text("out.jsonl");
    let written = values(&text).len();
    assert!(text.ends_with('\n') && written < 400, "{written} lines");
    let said = batch.finish("out.jsonl", &flags);
    assert!(said.contains(&format!("{written} of 400 lines are done")), "{said}");
    batch.finish("whole.jsonl", &[]);
    assert!(batch.sorted("out.jsonl") == sorted(&batch.text("whole.jsonl")));
}

#[test]
fn two_runs_do_not_write_one_output() {
    let batch = Batch::new(&requests(2));
    let held = File::create(batch.path("out.jsonl")).unwrap();
    held.lock().unwrap();
    let run = batch.run("out.jsonl", &[]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("another process writes"), "{}", run.stderr);
    drop(held);
    batch.finish("out.jsonl", &[]);
}

#[test]
fn what_is_there_and_is_no_output_of_a_batch_stays() {
    let batch = Batch::new(&requests(2));
    fs::write(batch.path("notes.txt"), "my notes\n").unwrap();
    for flags in [&[][..], &["--force"]] {
        let run = batch.run("notes.txt", flags);
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        assert_eq!(batch.text("notes.txt"), "my notes\n");
    }
    let run = batch.run("in.jsonl", &[]);
    assert!(run.code == Some(1) && run.stderr.contains("would be written over the input"), "{}", run.stderr);
}
