use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::mpsc,
};

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{
    LineSet,
    compression::Compression,
    input::{Input, MAX_LINE_BYTES, Scan},
    manifest::Manifest,
    output::{Finished, Output, Resumed, Told},
};

fn input(folder: &Path, bytes: &[u8]) -> Input {
    let path = folder.join("input");
    fs::write(&path, bytes).unwrap();
    Input::open(path.to_str().unwrap(), folder).unwrap()
}

fn texts(input: &Input) -> Vec<(u64, Result<String, String>)> {
    let scan = input.scan(|_| ()).unwrap();
    input.lines(&scan).unwrap().map(|line| line.unwrap()).map(|line| (line.number, line.text)).collect()
}

#[test]
fn lines_are_numbered_as_an_editor_numbers_them() {
    let folder = tempfile::tempdir().unwrap();
    let input = input(folder.path(), b"\xef\xbb\xbfone\r\n\n  \nfour\nno \xff text\nlast");
    let read = texts(&input);
    let numbers: Vec<u64> = read.iter().map(|(number, _)| *number).collect();
    assert_eq!(numbers, [1, 4, 5, 6]);
    assert_eq!((read[0].1.as_deref(), read[1].1.as_deref(), read[3].1.as_deref()), (Ok("one"), Ok("four"), Ok("last")));
    assert!(read[2].1.as_ref().is_err_and(|reason| reason.contains("UTF-8")), "{read:?}");
    let scan = input.scan(|_| {}).unwrap();
    assert_eq!((scan.lines, scan.blank.len()), (4, 2));
    assert!(scan.blank.contains(2) && scan.blank.contains(3) && scan.holds(6) && !scan.holds(7) && !scan.holds(0));
}

#[test]
fn a_mark_of_the_byte_order_alone_is_no_line() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(texts(&input(folder.path(), b"\xef\xbb\xbf\r\na\n")), [(2, Ok("a".to_owned()))]);
}

#[test]
fn a_line_without_end_costs_no_memory_but_its_own_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = vec![b'x'; MAX_LINE_BYTES + 1];
    bytes.extend_from_slice(b"\nnext\n");
    let read = texts(&input(folder.path(), &bytes));
    assert!(read[0].1.as_ref().is_err_and(|reason| reason.contains("64 MiB")));
    assert_eq!(read[1..], [(2, Ok("next".to_owned()))]);
}

#[test]
fn compressed_input_is_known_by_what_it_holds_and_may_have_several_parts() {
    let folder = tempfile::tempdir().unwrap();
    let plain = texts(&input(folder.path(), b"a\nb\n"));
    let identity = input(folder.path(), b"a\nb\n").scan(|_| {}).unwrap();
    for compression in [Compression::Gzip, Compression::Zstd] {
        let parts = [compression.encode(b"a\nb").unwrap(), compression.encode(b"\n").unwrap()].concat();
        let compressed = input(folder.path(), &parts);
        assert_eq!(texts(&compressed), plain, "{compression:?}");
        assert_eq!(compressed.scan(|_| {}).unwrap(), identity, "the same lines, however they lie");
        let torn = input(folder.path(), &parts[..parts.len() - 3]);
        let error = torn.scan(|_| {}).unwrap_err();
        assert!(format!("{error:#}").contains("line "), "{error:#}");
    }
}

#[test]
fn an_input_within_a_limit_is_not_unpacked_beyond_it() {
    let folder = tempfile::tempdir().unwrap();
    let zeros = Compression::Gzip.encode(&[b'\n'; 5000]).unwrap();
    let limited = |limit| input(folder.path(), &zeros).within(limit).scan(|_| {});
    assert_eq!(limited(5000).unwrap().bytes, 5000);
    assert!(format!("{:#}", limited(4999).unwrap_err()).contains("more than 4999 bytes"));
}

#[test]
fn a_window_is_bounded_by_lines_and_by_bytes_and_leaves_out_what_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let input = input(folder.path(), b"aaaa\nbbbb\ncccc\ndddd\neeee\n");
    let mut done = LineSet::default();
    done.insert(2);
    let mut lines = input.lines(&input.scan(|_| ()).unwrap()).unwrap();
    let mut window = |count, bytes| {
        lines.take_window(&done, count, bytes).unwrap().iter().map(|line| line.number).collect::<Vec<_>>()
    };
    assert_eq!(window(2, 100), [1, 3]);
    assert_eq!(window(9, 4), [4]);
    assert_eq!(window(9, 100), [5]);
    assert!(window(9, 100).is_empty());
}

/// An output whose lines are `<number> <ok or no>`.
struct Place {
    folder: TempDir,
    name: &'static str,
}

const LINES: u64 = 9;

impl Place {
    fn new(name: &'static str) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), name }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(self.name)
    }

    fn errors(&self) -> Option<String> {
        fs::read_to_string(self.folder.path().join(format!("{}.errors.jsonl", self.name))).ok()
    }

    fn open(&self) -> Output {
        Output::open(self.path().to_str().unwrap()).unwrap()
    }

    fn resume(&self, scan: &Scan) -> anyhow::Result<(Output, Resumed)> {
        let mut output = self.open();
        let resumed = output.resume(scan, told)?;
        Ok((output, resumed))
    }

    /// Goes on, in this order, with the lines that aren't done; those that three divides fail.
    fn run(&self, order: &[u64], ordered: bool) -> Resumed {
        let (output, resumed) = self.resume(&scan()).unwrap();
        let writer = output.begin(&manifest(json!({})), &resumed.done, ordered).unwrap();
        let (sender, lines) = mpsc::channel();
        for &number in order.iter().filter(|number| !resumed.done.contains(**number)) {
            sender.send(line(number)).unwrap();
        }
        drop(sender);
        writer.write_all(&lines, || ()).unwrap();
        resumed
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }

    /// Its lines, whatever they lie in.
    fn lines(&self) -> Vec<String> {
        let input = Input::open(self.path().to_str().unwrap(), self.folder.path()).unwrap();
        texts(&input).into_iter().map(|(_, text)| text.unwrap()).collect()
    }
}

fn scan() -> Scan {
    Scan { lines: LINES, ..Scan::default() }
}

fn line(number: u64) -> Finished {
    let failed = number.is_multiple_of(3);
    Finished { told: Told { number, failed }, text: format!("{number} {}", if failed { "no" } else { "ok" }) }
}

fn told(line: &[u8]) -> Option<Told> {
    let (number, outcome) = std::str::from_utf8(line).ok()?.trim_end().split_once(' ')?;
    Some(Told { number: number.parse().ok()?, failed: outcome == "no" })
}

fn manifest(deciding: Value) -> Manifest {
    let deciding: Map<String, Value> = serde_json::from_value(deciding).unwrap();
    Manifest::new(&scan(), deciding)
}

const ENDINGS: [&str; 3] = ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"];

#[test]
fn whatever_is_cut_off_the_end_is_done_again_and_nothing_else() {
    let all: Vec<u64> = (1..=LINES).collect();
    for name in ENDINGS {
        let place = Place::new(name);
        // Three runs, so that there are three parts at least.
        for some in [&all[..4], &all[..7], &all[..]] {
            place.run(some, true);
        }
        let (whole, lines, errors) = (place.bytes(), place.lines(), place.errors());
        assert_eq!(lines.len(), LINES as usize);
        assert_eq!(errors.as_deref(), Some("3 no\n6 no\n9 no\n"));
        for cut in 0..whole.len() {
            fs::write(place.path(), &whole[..cut]).unwrap();
            let resumed = place.run(&all, true);
            assert_eq!(place.lines(), lines, "{name} cut to {cut} bytes");
            assert_eq!(place.errors(), errors, "{name} cut to {cut} bytes");
            assert!(resumed.lines < LINES);
            if name == ENDINGS[0] {
                assert_eq!(place.bytes(), whole);
            }
        }
        assert_eq!(place.run(&all, true).lines, LINES, "all are done");
    }
}

#[test]
fn a_part_of_a_compressed_output_is_whole_for_any_reader() {
    for name in &ENDINGS[1..] {
        let place = Place::new(name);
        place.run(&[1, 2], false);
        place.run(&[5], false);
        assert_eq!(place.lines(), ["1 ok", "2 ok", "5 ok"]);
    }
}

proptest! {
    #[test]
    fn held_back_lines_come_in_the_order_of_the_input(
        order in Just((1..=LINES).collect::<Vec<_>>()).prop_shuffle(), first in 0..LINES as usize,
    ) {
        let place = Place::new(ENDINGS[0]);
        place.run(&order[..first], true);
        // What waited for a line that did not come is done again.
        place.run(&order, true);
        let expected: Vec<String> = (1..=LINES).map(|number| line(number).text).collect();
        prop_assert_eq!(place.lines(), expected);
        let unordered = Place::new(ENDINGS[0]);
        unordered.run(&order, false);
        let expected: Vec<String> = order.iter().map(|number| line(*number).text).collect();
        prop_assert_eq!(unordered.lines(), expected);
    }
}

#[test]
fn what_another_run_has_begun_is_not_gone_on_with_unless_forced() {
    let place = Place::new(ENDINGS[0]);
    let first = manifest(json!({"model": "a", "created": 7}));
    let lines = input(place.folder.path(), b"a\nb\n");
    let output = place.open();
    assert_eq!(output.check(&lines, &first, false).unwrap(), None, "nothing is there");
    output.begin(&first, &LineSet::default(), false).unwrap().write(line(1)).unwrap();

    let output = place.open();
    let before = output.check(&lines, &manifest(json!({"model": "a"})), false).unwrap().unwrap();
    assert_eq!(before.get("created"), Some(&7.into()), "what isn't decided anew is told");
    let other = manifest(json!({"model": "b"}));
    let error = output.check(&lines, &other, false).unwrap_err().to_string();
    assert!(error.contains("model was \"a\" and is \"b\" now") && error.contains("--force"), "{error}");
    assert!(output.check(&lines, &other, true).is_ok());
    let other_lines = Manifest::new(&Scan { lines: 3, ..Scan::default() }, Map::new());
    assert!(output.check(&lines, &other_lines, false).unwrap_err().to_string().contains("input was"));

    fs::remove_file(place.folder.path().join("out.jsonl.manifest.json")).unwrap();
    let error = output.check(&lines, &first, false).unwrap_err().to_string();
    assert!(error.contains("no manifest"), "{error}");
    assert_eq!(output.check(&lines, &first, true).unwrap(), None);
}

#[test]
fn files_beside_the_output_that_are_somebody_elses_stay() {
    let place = Place::new(ENDINGS[0]);
    let beside = |ending: &str| place.folder.path().join(format!("{}{ending}", place.name));
    let now = manifest(json!({}));
    for (ending, expected) in [(".errors.jsonl", "no manifest that tells"), (".manifest.json", "is no manifest")] {
        fs::write(beside(ending), "{\"precious\": 1}\n").unwrap();
        let error = place.open().check(&input(place.folder.path(), b""), &now, true).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(ending), "{error}");
        fs::remove_file(beside(ending)).unwrap();
    }
    fs::write(beside(".errors.jsonl"), "precious\n").unwrap();
    fs::write(place.path(), "3 no\nmy notes\n").unwrap();
    assert!(place.resume(&scan()).is_err());
    assert_eq!(place.errors().as_deref(), Some("precious\n"), "they are replaced only by those of an output");

    for ending in ["", ".errors.jsonl", ".manifest.json"] {
        let lines = beside(ending);
        fs::write(&lines, "").unwrap();
        assert!(Output::would_replace(place.path().to_str().unwrap(), lines.to_str().unwrap()), "{ending}");
    }
    let other = beside(".other");
    fs::write(&other, "").unwrap();
    assert!(!Output::would_replace(place.path().to_str().unwrap(), other.to_str().unwrap()));
}

#[test]
fn of_an_input_without_lines_a_compressed_output_is_whole_too() {
    for name in ENDINGS {
        let place = Place::new(name);
        for _ in 0..2 {
            place.resume(&Scan::default()).unwrap();
            assert_eq!(place.bytes().is_empty(), name == ENDINGS[0]);
            assert!(place.lines().is_empty());
        }
    }
}

#[test]
fn a_forced_run_goes_on_only_if_the_input_begins_with_the_lines_that_were_done() {
    let place = Place::new(ENDINGS[0]);
    let begun = |bytes: &[u8]| {
        let lines = input(place.folder.path(), bytes);
        let manifest = Manifest::new(&lines.scan(|_| ()).unwrap(), Map::new());
        (lines, manifest)
    };
    place.open().begin(&begun(b"a\nb\n").1, &LineSet::default(), false).unwrap().write(line(1)).unwrap();
    let (more, now) = begun(b"a\nb\nc\n");
    assert!(place.open().check(&more, &now, false).is_err());
    place.open().check(&more, &now, true).unwrap();
    for other in [&b"a\nB\nc\n"[..], b"a\n"] {
        let (other, now) = begun(other);
        let error = place.open().check(&other, &now, true).unwrap_err().to_string();
        assert!(error.contains("other lines"), "{error}");
    }
}

#[test]
fn an_input_that_changes_while_it_is_worked_on_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    for other in ["one\n", "one\ntwo\nthree\n", "one\nTWO\n"] {
        let input = input(folder.path(), b"one\ntwo\n");
        let scan = input.scan(|_| ()).unwrap();
        fs::write(folder.path().join("input"), other).unwrap();
        let last = input.lines(&scan).unwrap().last().unwrap();
        assert!(last.is_err_and(|error| error.to_string().contains("has changed")), "{other}");
    }
}

#[test]
fn two_do_not_write_one_output() {
    let place = Place::new(ENDINGS[0]);
    let first = place.open();
    let error = Output::open(place.path().to_str().unwrap()).err().unwrap().to_string();
    assert!(error.contains("another process"), "{error}");
    drop(first);
    place.open();
}

#[test]
fn what_is_no_result_is_not_written_over() {
    let place = Place::new(ENDINGS[0]);
    for (there, expected) in [
        ("1 ok\nmy notes\n2 ok\n", "line 2 is no result"),
        ("1 ok\n1 ok\n", "line 2 is a second result of the input's line 1"),
        ("1 ok\n77 ok\n", "line 77"),
        ("my notes", "holds no result"),
    ] {
        fs::write(place.path(), there).unwrap();
        let error = format!("{:#}", place.resume(&scan()).err().unwrap());
        assert!(error.contains(expected), "{error}");
        assert_eq!(place.bytes(), there.as_bytes());
    }
    let place = Place::new(ENDINGS[1]);
    place.run(&[1, 2], false);
    fs::File::options().append(true).open(place.path()).unwrap().write_all(b"no gzip, but text").unwrap();
    let error = format!("{:#}", place.resume(&scan()).err().unwrap());
    assert!(error.contains("is damaged after its first"), "{error}");
}

#[test]
fn a_full_disk_is_an_error() {
    let output = Output::open("/dev/full").unwrap();
    let error = output.begin(&manifest(json!({})), &LineSet::default(), false).unwrap().write(line(1)).unwrap_err();
    assert!(format!("{error:#}").contains("No space left"), "{error:#}");
}
