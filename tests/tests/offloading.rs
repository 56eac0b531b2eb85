//! Models larger than the memory that they may use: the same tokens, within the budget, and faults that stay with
//! those whom they concern.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use cadre_tests::{
    binary::{Run, command, output, run},
    checkpoint::Qwen3Moe,
    peak::peak_of,
    server::{MODEL, Server, ids},
};
use serde_json::{Value, json};

/// A checkpoint of about 85 MiB in bf16, not packed, in a directory.
fn source(directory: &Path) -> PathBuf {
    let source = directory.join("source");
    fs::create_dir(&source).unwrap();
    let sizes = Qwen3Moe { layers: 4, hidden: 512, heads: 8, experts: 48, expert_width: 128, positions: 512 };
    sizes.write(&source);
    source
}

/// A pack of it.
fn pack(directory: &Path) -> PathBuf {
    pack_as(directory, &[])
}

/// The same in other formats.
fn pack_as(directory: &Path, formats: &[&str]) -> PathBuf {
    let (source, pack) = (source(directory), directory.join("pack"));
    let args = ["pack", "--model", source.to_str().unwrap(), "--output", pack.to_str().unwrap()];
    output(&[&args, formats].concat());
    pack
}

fn generate<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let args = ["generate", "--raw", "--prompt", "What is it that a budget changes?", "--max-tokens", "16"];
    [&args[..], &["--temperature", "0", "--kv-memory", "4MiB", "--threads", "2", "--model", model], more].concat()
}

/// Within each budget, in MiB, the tokens are those of a run without one; returns what each run said.
fn within_budgets(model: &str, more: &[&str], budgets: &[u64]) -> Vec<String> {
    let expected = output(&generate(model, more));
    let run = |mebibytes: &u64| {
        let budget = format!("{mebibytes}MiB");
        let small = [more, &["--memory", &budget, "--max-num-batched-tokens", "64"]].concat();
        let args = generate(model, &small);
        let found = run(&args);
        assert_eq!(found.stdout, expected, "{budget}: {}", found.stderr);
        // What doesn't fit says so.
        for part in ["were in memory (by layer", "different ones a step", "made room", "were read in", "waited"] {
            assert!(found.stderr.contains(part), "{budget}: {part} is missing in {}", found.stderr);
        }
        let peak = peak_of(&args);
        println!("budget {mebibytes} MiB, peak {} MiB", peak >> 20);
        assert!(peak <= (mebibytes << 20) * 105 / 100, "budget {budget}, peak {peak}");
        found.stderr
    };
    budgets.iter().map(run).collect()
}

/// The ways of reading that this system has.
fn ways(pack: &str) -> Vec<&'static str> {
    let mut ways = vec!["pread", "io_uring"];
    ways.retain(|way| {
        let found = run_reading_by(way, &generate(pack, &["--memory", "110MiB"]));
        let refused = found.code != Some(0);
        if refused {
            assert!(*way == "io_uring" && found.stderr.contains("CADRE_IO asks for io_uring"), "{}", found.stderr);
            eprintln!("this system has no io_uring: not tested");
        }
        !refused
    });
    ways
}

fn run_reading_by(way: &str, args: &[&str]) -> Run {
    let output = command(args).env("CADRE_IO", way).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

#[test]
fn ways_of_reading_change_no_token() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let pack = pack.to_str().unwrap();
    let expected = output(&generate(pack, &[]));
    for way in ways(pack) {
        let found = run_reading_by(way, &generate(pack, &["--memory", "110MiB"]));
        assert_eq!(found.stdout, expected, "{way}");
    }
    let found = run_reading_by("mmap", &generate(pack, &[]));
    assert!(found.code != Some(0) && found.stderr.contains("CADRE_IO is `mmap`: expected"), "{}", found.stderr);
}

#[test]
fn a_budget_changes_the_memory_and_not_the_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let pack = pack.to_str().unwrap();
    for told in within_budgets(pack, &[], &[125, 110, 100]) {
        assert!(!told.contains("isn't packed"), "{told}");
    }
    within_budgets(pack, &["--predict-experts"], &[100]);
}

/// The least budget that a run would have, in MiB.
fn least_budget(args: &[&str]) -> u64 {
    let refused = run(&[args, &["--memory", "40MiB"]].concat());
    let least = refused.stderr.split("needs at least ").nth(1).and_then(|rest| rest.split(' ').next());
    // What a process takes besides differs from one to the next.
    least.and_then(|number| number.parse::<u64>().ok()).unwrap() + 1
}

#[test]
fn neither_budgets_nor_who_else_asks_change_a_token() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack_as(directory.path(), &["--format", "q8_0"]);
    let pack = pack.to_str().unwrap();
    let flags = [
        "--kv-memory",
        "12MiB",
        "--max-num-batched-tokens",
        "64",
        "--max-num-seqs",
        "32",
        "--threads",
        "2",
        "--model",
        pack,
    ];
    // The server holds some more than other subcommands.
    let least = least_budget(&[&["serve", "--port", "0"], &flags[..]].concat());
    let more = json!({"max_tokens": 6, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let ask = |server: &Server, number: usize| {
        let prompt: Vec<usize> = (0..5 + number % 4).map(|index| (number * 37 + index * 11) % 200).collect();
        ids(&server.complete(prompt, more.clone()).ok()["choices"][0]["token_ids"])
    };
    let told = |memory: Option<u64>| -> Vec<Vec<Vec<u32>>> {
        let memory = memory.map(|mebibytes| format!("{mebibytes}MiB"));
        let memory: Vec<&str> = memory.iter().flat_map(|memory| ["--memory", memory]).collect();
        let server = Server::start(&[&flags[..], &memory].concat());
        let together = |clients: usize| -> Vec<Vec<u32>> {
            std::thread::scope(|scope| {
                let server = &server;
                let clients: Vec<_> = (0..clients).map(|number| scope.spawn(move || ask(server, number))).collect();
                clients.into_iter().map(|client| client.join().unwrap()).collect()
            })
        };
        let all = [1, 8, 32].map(together).to_vec();
        if !memory.is_empty() {
            server.wait_until_idle();
            assert!(server.metrics().value("cadre_expert_evictions_total", &[("tier", "disk")]) > 0.0);
        }
        all
    };
    let expected = told(None);
    assert!(expected[2][..8] == expected[1] && expected[1][..1] == expected[0]);
    // An expert has 0.2 MiB, all have 40: below what one token uses, and about 12, 25 and 50 % of them.
    for beyond in [0, 4, 9, 19] {
        assert_eq!(told(Some(least + beyond)), expected, "{beyond} MiB beyond the least budget");
    }
}

#[test]
fn the_least_budget_holds_fewer_experts_than_a_token_uses_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let pack = pack.to_str().unwrap();
    let least = least_budget(&generate(pack, &["--max-num-batched-tokens", "64"]));
    for told in within_budgets(pack, &[], &[least]) {
        assert!(told.contains("a token uses 16 experts, more than there are slots"), "{told}");
    }
}

#[test]
fn a_checkpoint_that_is_not_packed_runs_within_a_budget_too() {
    let directory = tempfile::tempdir().unwrap();
    let source = source(directory.path());
    let source = source.to_str().unwrap();
    // An expert has 384 KiB of bf16, which is what it is packed as, or 111 KiB of q4_k; reads are of whole 4 KiB.
    for (more, budgets, packed) in [
        (&[][..], &[105, 74][..], "384 KiB and ready: run `cadre pack --model"),
        (&["--experts-format", "q4_k"], &[74, 68], "112 KiB and ready: run `cadre pack --model"),
    ] {
        for told in within_budgets(source, more, budgets) {
            for words in ["isn't packed: each expert that is needed takes 388 KiB", packed, "--output source-pack`"] {
                assert!(told.contains(words), "`{words}` is missing in {told}");
            }
            assert!(more.is_empty() || told.contains("--experts-format q4_k"), "{told}");
        }
    }
}

#[test]
fn a_budget_that_holds_all_costs_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let pack = pack.to_str().unwrap();
    let found = run(&generate(pack, &["--memory", "1GiB"]));
    assert!(found.code == Some(0) && !found.stderr.contains("experts"), "{}", found.stderr);
}

#[test]
fn budgets_that_cannot_be_kept_are_refused_with_what_would_do() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let found = run(&generate(pack.to_str().unwrap(), &["--memory", "40MiB"]));
    assert_ne!(found.code, Some(0));
    for word in ["(--memory) is 40 MiB", "needs at least", "--kv-memory"] {
        assert!(found.stderr.contains(word), "{word} is missing in {}", found.stderr);
    }
    assert!(!found.stderr.contains("convert"), "{}", found.stderr);
    let source = directory.path().join("source");
    let found = run(&generate(source.to_str().unwrap(), &["--memory", "40MiB"]));
    assert_ne!(found.code, Some(0));
    for word in ["(--memory) is 40 MiB", "needs at least", "2 MiB to convert them", "`cadre pack`"] {
        assert!(found.stderr.contains(word), "{word} is missing in {}", found.stderr);
    }
}

#[test]
fn a_damaged_expert_is_told_from_a_sound_one() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let ways = ways(pack.to_str().unwrap());
    // One bit in each half mebibyte of a layer's experts, which lie behind its header.
    let shard = pack.join("model-00002-of-00005.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    bytes.iter_mut().skip(64 << 10).step_by(100 << 10).for_each(|byte| *byte ^= 1);
    fs::write(&shard, bytes).unwrap();
    for way in ways {
        let found = run_reading_by(way, &generate(pack.to_str().unwrap(), &["--memory", "105MiB"]));
        assert_ne!(found.code, Some(0), "{way}");
        for word in ["could not be read", "checksum", "cadre pack", "model-00002-of-00005.safetensors"] {
            assert!(found.stderr.contains(word), "{way}: {word} is missing in {}", found.stderr);
        }
    }
}

#[test]
fn a_file_that_is_cut_off_fails_those_who_need_it_until_it_is_whole_again() {
    let directory = tempfile::tempdir().unwrap();
    pack(directory.path());
    let packed = directory.path().join("pack");
    for way in ways(packed.to_str().unwrap()) {
        cut_off_while_serving(&packed, way);
    }
    cut_off_while_serving(&directory.path().join("source"), "pread");
}

fn cut_off_while_serving(model: &Path, way: &str) {
    let path = model.to_str().unwrap();
    let args = ["--model", path, "--memory", "125MiB", "--kv-memory", "4MiB", "--threads", "2"];
    let args = [&["--served-model-name", MODEL], &args[..]].concat();
    let mut server = Server::spawn(&args, &[("CADRE_IO", way)]);
    server.wait_until_ready();
    let body = json!({"model": MODEL, "prompt": "Who reads this?", "max_tokens": 8, "temperature": 0});
    let expected = server.client().post("/v1/completions", &body).ok();
    let shards: Vec<PathBuf> = fs::read_dir(model).unwrap().map(|entry| entry.unwrap().path()).collect();
    let shards: Vec<_> =
        shards.into_iter().filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    let whole: Vec<Vec<u8>> = shards.iter().map(|path| fs::read(path).unwrap()).collect();
    for path in &shards {
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(4096).unwrap();
    }
    // A prompt of its own, so that other experts are needed and nothing is cached.
    let other: Vec<u32> = (0..200).map(|token| token * 7 % 250).collect();
    let other = json!({"model": MODEL, "prompt": other, "max_tokens": 8, "temperature": 0});
    let refused = server.client().post("/v1/completions", &other);
    assert_eq!(refused.status, 500, "{}", refused.json());
    let message = refused.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("expert") && message.contains("could not be read"), "{message}");
    let log = server.log();
    assert!(log.contains("cut off") && log.contains("/model") && log.contains(".safetensors"), "{log}");
    for (path, bytes) in shards.iter().zip(&whole) {
        // In place: the server has these files open.
        std::os::unix::fs::FileExt::write_all_at(&fs::OpenOptions::new().write(true).open(path).unwrap(), bytes, 0)
            .unwrap();
    }
    server.client().post("/v1/completions", &other).ok();
    let again = server.client().post("/v1/completions", &body).ok();
    assert_eq!(again["choices"], expected["choices"]);
    let metrics = server.metrics();
    let tier = [("tier", "disk")];
    assert!(metrics.value("cadre_expert_misses_total", &tier) > 0.0);
    assert!(metrics.value("cadre_expert_read_bytes_total", &tier) > 0.0);
    assert!(metrics.value("cadre_expert_read_seconds_count", &tier) > 0.0);
    assert!(metrics.value("cadre_experts_active_per_step_count", &tier) > 0.0);
    let layer = [("tier", "disk"), ("layer", "3")];
    assert!(metrics.has("cadre_expert_layer_hit_rate") && metrics.value("cadre_expert_layer_hit_rate", &layer) < 1.0);
}

#[test]
fn bench_tells_how_experts_fared_in_each_run() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let sizes = ["--prompt", "32", "--generate", "4", "--batch", "1", "--repetitions", "1", "--threads", "2"];
    let limits = ["--model", pack.to_str().unwrap(), "--memory", "100MiB", "--kv-memory", "4MiB"];
    let bench = [&["bench"], &sizes[..], &limits, &["--max-num-batched-tokens", "64"]].concat();
    let json = output(&[&bench[..], &["--json"]].concat());
    let lines: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (line, active) in lines.iter().zip([48.0, 16.0]) {
        let experts = &line["experts"];
        let number = |key: &str| experts[key].as_f64().unwrap();
        let rates: Vec<f64> = experts["layer_hit_rates"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
        assert_eq!(rates.len(), 4);
        assert!((number("hits") / (number("hits") + number("misses")) - number("hit_rate")).abs() < 1e-9, "{line}");
        assert!(number("misses") > 0.0 && number("read_seconds_mean") > 0.0, "{line}");
        assert!(number("read_bytes") >= number("misses"), "{line}");
        // Four layers, in which one token uses four experts, and 32 tokens most of them.
        assert!(number("active_per_step_mean") >= active, "{line}");
    }
    let table = output(&bench);
    for column in ["hits", "experts/step", "read GB", "ms/read", "stall s"] {
        assert!(table.contains(column), "{column} is missing in\n{table}");
    }
}

#[test]
fn a_routing_trace_has_a_line_a_step_whether_experts_are_stored_or_not() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let trace = |name: &str, more: &[&str]| {
        let path = directory.path().join(name);
        let flags = [&["--trace-routing", path.to_str().unwrap(), "--max-num-batched-tokens", "8"], more].concat();
        output(&generate(pack.to_str().unwrap(), &flags));
        fs::read_to_string(path).unwrap()
    };
    let resident = trace("resident", &[]);
    assert_eq!(trace("stored", &["--memory", "105MiB"]), resident);
    let steps: Vec<Value> = resident.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let tokens: Vec<u64> = steps.iter().map(|step| step["tokens"].as_u64().unwrap()).collect();
    assert!(tokens.len() > 16 && tokens[0] == 8 && tokens[tokens.len() - 15..] == [1; 15], "{tokens:?}");
    for step in steps {
        let layers: Vec<Vec<u64>> = serde_json::from_value(step["experts"].clone()).unwrap();
        let tokens = step["tokens"].as_u64().unwrap() as usize;
        let fine = |layer: &Vec<u64>| {
            (4..=4 * tokens).contains(&layer.len()) && layer.is_sorted_by(|a, b| a < b) && layer.iter().all(|&e| e < 48)
        };
        assert!(layers.len() == 4 && layers.iter().all(fine), "{step}");
    }
    let nowhere = run(&generate(pack.to_str().unwrap(), &["--trace-routing", "/nowhere/trace"]));
    assert!(nowhere.code != Some(0) && nowhere.stderr.contains("/nowhere/trace"), "{}", nowhere.stderr);
}

#[test]
fn the_routing_of_a_run_is_kept_for_the_next_one() {
    let directory = tempfile::tempdir().unwrap();
    let pack = pack(directory.path());
    let file = pack.join("routing_profile.json");
    let flags = ["--memory", "105MiB", "--kv-memory", "4MiB", "--threads", "2", "--model", pack.to_str().unwrap()];
    let serve = || {
        let mut server = Server::start(&flags);
        let answer = server.complete("Who reads this?", json!({"max_tokens": 8, "temperature": 0})).ok();
        server.terminate();
        assert_eq!(server.wait_for_exit(Duration::from_secs(5)).code(), Some(0));
        (answer["choices"].clone(), server.log())
    };
    let (expected, log) = serve();
    assert!(!log.contains("profile") && !log.contains("earlier runs"), "{log}");
    let profile: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let uses: Vec<Vec<u64>> = serde_json::from_value(profile["uses"].clone()).unwrap();
    assert!(
        uses.len() == 4 && uses.iter().all(|layer| layer.len() == 48 && layer.iter().sum::<u64>() > 0),
        "{profile}"
    );

    // What an earlier run used and this one doesn't is still known after it.
    let unused = uses[0].iter().position(|&uses| uses == 0).unwrap();
    let mut known = profile.clone();
    known["uses"][0][unused] = 40_000.into();
    fs::write(&file, known.to_string()).unwrap();
    let (found, log) = serve();
    assert!(found == expected && log.contains("earlier runs are known"), "{log}");
    let kept: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert!(kept["uses"][0][unused].as_u64().unwrap() > 0, "{kept}");

    // Of another pack, and damaged: said, ignored and replaced.
    for text in [known.to_string().replace("checkpoint ", "checkpoint 7"), "{\"version\"".to_owned()] {
        fs::write(&file, text).unwrap();
        let (found, log) = serve();
        assert!(found == expected && log.contains("the routing profile is ignored"), "{log}");
        let kept: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(kept, profile);
    }
    fs::remove_file(&file).unwrap();
    output(&generate(pack.to_str().unwrap(), &["--memory", "105MiB"]));
    assert!(file.exists(), "generate keeps it too");
}
