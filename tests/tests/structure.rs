//! The invariants of `docs/architecture.md`, each one test. What a rule forbids is looked for in the shipped code:
//! comments, quoted text and tests don't count unless a rule says so.
#![allow(clippy::unwrap_used, reason = "integration tests: a failed unwrap is a failed test")]

use std::{collections::BTreeSet, process::Command};

use cadre_tests::source::{Source, files, read, root, rust};
use serde_json::Value;

const MEMBERS: &[&str] = &["engine/kernels", "engine", "models", "server", "tests", "benches"];

#[track_caller]
fn assert_none(what: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}

/// `path:line: text` of every line of code in `sources` in which one of `words` stands as a word.
fn code_with(sources: &[Source], words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|source| !source.is_test()) {
        for (index, line) in source.code().lines().enumerate() {
            if words.iter().any(|word| has_word(line, word)) {
                found.push(format!("{}:{}: {}", source.path, index + 1, line.trim()));
            }
        }
    }
    found
}

fn has_word(line: &str, word: &str) -> bool {
    let part_of_a_name = |letter: char| letter.is_alphanumeric() || letter == '_';
    line.match_indices(word).any(|(start, _)| {
        let end = start + word.len();
        let before = word.starts_with(part_of_a_name) && line[..start].ends_with(part_of_a_name);
        let after = word.ends_with(part_of_a_name) && line[end..].starts_with(part_of_a_name);
        !before && !after
    })
}

fn all_rust() -> Vec<Source> {
    ["engine", "models", "server", "tests", "benches"].iter().flat_map(|member| rust(member)).collect()
}

/// What cargo knows of the packages: name, dependencies that ship, and all of them.
struct Package {
    name: String,
    ships: BTreeSet<String>,
    all: BTreeSet<String>,
}

fn packages() -> Vec<Package> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["metadata", "--no-deps", "--format-version", "1", "--offline"]).current_dir(root());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let package = |package: &Value| {
        let dependencies = package["dependencies"].as_array().unwrap();
        let all = dependencies.iter().map(|dependency| text(&dependency["name"])).collect();
        let ships = dependencies.iter().filter(|dependency| dependency["kind"] != "dev");
        Package { name: text(&package["name"]), ships: ships.map(|one| text(&one["name"])).collect(), all }
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

#[test]
fn dependencies_point_one_way() {
    let may_know: &[(&str, &[&str])] = &[
        ("cadre-kernels", &[]),
        ("cadre-engine", &["cadre-kernels"]),
        ("cadre-models", &["cadre-engine"]),
        ("cadre", &["cadre-engine", "cadre-models"]),
    ];
    let packages = packages();
    let ours: BTreeSet<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    for (name, may_know) in may_know {
        let package = packages.iter().find(|package| package.name == *name).unwrap();
        let known: Vec<&String> = package.all.iter().filter(|name| ours.contains(name.as_str())).collect();
        let extra: Vec<_> = known.into_iter().filter(|known| !may_know.contains(&known.as_str())).collect();
        assert!(extra.is_empty(), "{name} may depend on {may_know:?} only, found {extra:?}");
    }
}

#[test]
fn each_crate_depends_only_on_what_its_job_needs() {
    let packages = packages();
    let ships = |name: &str| packages.iter().find(|package| package.name == name).unwrap().ships.clone();
    let only = |name: &str, allowed: &[&str]| {
        let extra: Vec<_> = ships(name).into_iter().filter(|found| !allowed.contains(&found.as_str())).collect();
        assert!(extra.is_empty(), "{name} depends on {extra:?}: argue for it in docs/architecture.md");
    };
    // No tensors in the kernels; no HTTP, async runtime, file format or tokenizer in the engine.
    only("cadre-kernels", &["half", "libc", "thiserror"]);
    only("cadre-engine", &["cadre-kernels", "candle-core", "half", "rand_chacha", "thiserror", "tracing"]);
    // No tensors and no kernels in the server; no candle and no HTTP server in the models.
    for (name, forbidden) in [
        ("cadre", &["candle", "half", "safetensors", "tokenizers", "minijinja", "hf-hub"][..]),
        ("cadre-models", &["candle", "axum", "tokio", "clap", "metrics"]),
    ] {
        let found: Vec<_> =
            ships(name).into_iter().filter(|d| forbidden.iter().any(|word| d.starts_with(word))).collect();
        assert!(found.is_empty(), "{name} depends on {found:?}");
    }
}

/// Not even in a comment.
#[test]
fn the_engine_names_no_architecture() {
    let mut names: BTreeSet<String> = cadre_models::architectures().map(str::to_owned).collect();
    assert!(names.len() >= 4, "{names:?}");
    let families: Vec<String> = names.iter().filter_map(|name| name.split('_').next()).map(str::to_owned).collect();
    names.extend(families);
    let mut found = Vec::new();
    for source in rust("engine") {
        let text = source.text.to_lowercase();
        found.extend(names.iter().filter(|name| text.contains(*name)).map(|name| format!("{}: {name}", source.path)));
    }
    assert_none("architectures named in the engine", found);
}

#[test]
fn the_engine_knows_no_http() {
    let engine: Vec<Source> = rust("engine/src").into_iter().filter(|source| !source.is_test()).collect();
    let found = code_with(&engine, &["http", "Http", "hyper", "axum", "tokio", "serde_json", "TcpListener", "openai"]);
    assert_none("HTTP in the engine", found);
}

#[test]
fn the_scheduler_decides_purely() {
    let pure = ["engine/src/scheduler", "engine/src/sequence", "engine/src/kv/blocks", "engine/src/experts/cache"];
    let of_it = |source: &Source| pure.iter().any(|part| source.path.starts_with(part));
    let sources: Vec<Source> = rust("engine/src").into_iter().filter(of_it).collect();
    assert!(sources.iter().filter(|source| !source.is_test()).count() >= 4, "the scheduler has moved");
    let forbidden = [
        "std::time",
        "time::Instant",
        "Instant",
        "SystemTime",
        "Duration",
        "std::fs",
        "std::net",
        "std::io",
        "std::env",
        "std::thread",
        "Mutex",
        "File",
        "Tensor",
        "candle_core",
        "KvCache",
        "Model",
        "println",
        "rand",
        "tracing",
        "unwrap",
        "expect",
        "panic",
    ];
    assert_none("clocks, tensors, I/O or panics in the scheduler", code_with(&sources, &forbidden));
}

#[test]
fn unsafe_code_is_in_the_kernels_only() {
    let allowed = [("models/src/stored_experts/uring.rs", "gives the kernel a buffer to write into while others work")];
    let outside = |source: &Source| !source.path.starts_with("engine/kernels/");
    let excepted = |source: &Source| allowed.iter().any(|(path, _reason)| source.path == *path);
    let sources: Vec<Source> = all_rust().into_iter().filter(|source| outside(source) && !excepted(source)).collect();
    assert_none("unsafe outside of the kernels", code_with(&sources, &["unsafe"]));
}

#[test]
fn candle_is_named_in_ops_only() {
    let allowed = |source: &Source| {
        let path = source.path.as_str();
        path.starts_with("engine/src/ops/") || ["engine/src/lib.rs", "engine/src/error.rs"].contains(&path)
    };
    let sources: Vec<Source> = all_rust().into_iter().filter(|source| !allowed(source)).collect();
    let words = ["candle", "candle_core", "candle_nn", "candle_transformers"];
    assert_none("candle outside of engine::ops", code_with(&sources, &words));
}

/// A tensor is candle's, and so are its methods: what computes goes through `engine::ops`.
#[test]
fn model_code_calls_no_tensor_method() {
    const METHODS: &[&str] = &[
        "matmul",
        "broadcast_add",
        "broadcast_mul",
        "broadcast_sub",
        "broadcast_div",
        "reshape",
        "narrow",
        "permute",
        "unsqueeze",
        "squeeze",
        "flatten_all",
        "flatten_from",
        "index_select",
        "index_add",
        "gather",
        "scatter_add",
        "to_dtype",
        "to_device",
        "to_vec1",
        "to_vec2",
        "contiguous",
        "affine",
        "sqr",
        "sum_keepdim",
        "mean_keepdim",
        "softmax",
        "silu",
        "gelu",
        "relu",
        "where_cond",
        "storage_and_layout",
        "apply_op1",
        "apply_op2",
        "apply_op3",
        "backward",
        "detach",
        "arg_sort_last_dim",
    ];
    let folders = ["engine/src/nn", "models/src"];
    let sources: Vec<Source> = folders.iter().flat_map(|folder| rust(folder)).collect();
    let calls: Vec<String> = METHODS.iter().map(|method| format!(".{method}(")).collect();
    let calls: Vec<&str> = calls.iter().map(String::as_str).collect();
    assert_none("tensor methods in model code", code_with(&sources, &calls));
}

#[test]
fn an_architecture_is_one_page() {
    for name in cadre_models::architectures() {
        let path = format!("models/src/{name}.rs");
        let source = Source { text: read(&path), path };
        let lines = source.shipped().lines().count();
        assert!(lines <= 100, "{} has {lines} lines: what several architectures need is a block", source.path);
    }
}

#[test]
fn code_lies_in_the_members_only() {
    let manifest = read("Cargo.toml");
    for member in MEMBERS {
        assert!(manifest.contains(&format!("\"{member}\"")), "{member} is not a member");
    }
    let folders: BTreeSet<String> = std::fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.') && name != "target" && name != "shared")
        .collect();
    let expected = ["benches", "docs", "engine", "models", "server", "tests"].map(str::to_owned);
    assert_eq!(folders, BTreeSet::from(expected));
    let code = [".rs", ".py", ".sh", ".js", ".c"];
    let at_the_top = std::fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name());
    let at_the_top = at_the_top.map(|name| name.to_string_lossy().into_owned());
    let loose: Vec<String> = at_the_top.filter(|name| code.iter().any(|ending| name.ends_with(ending))).collect();
    assert_none("code at the top level", loose);
    assert_none("code in docs", files("docs", &code).into_iter().map(|source| source.path).collect());
}

#[test]
fn files_are_short_enough_to_read() {
    let long = |source: Source| {
        let lines = source.text.lines().count();
        (lines >= 800).then(|| format!("{}: {lines} lines", source.path))
    };
    let code = [".rs", ".py", ".sh", ".html", ".js", ".css"];
    let sources = ["engine", "models", "server", "tests", "benches"].iter().flat_map(|member| files(member, &code));
    assert_none("files of 800 lines and more", sources.filter_map(long).collect());
}

#[test]
fn every_member_has_the_workspaces_lints() {
    for member in MEMBERS {
        let manifest = read(&format!("{member}/Cargo.toml"));
        assert!(manifest.contains("[lints]\nworkspace = true"), "{member}");
    }
    let mut found = Vec::new();
    for source in all_rust() {
        let code = &source.text;
        for (start, _) in
            code.match_indices("#[allow(").chain(code.match_indices("#![allow(")).chain(code.match_indices("[expect("))
        {
            let attribute = code[start..].split_once(")]").map_or(&code[start..], |(attribute, _)| attribute);
            if !attribute.contains("reason = ") && !source.path.ends_with("structure.rs") {
                found.push(format!("{}: {attribute}", source.path));
            }
        }
    }
    assert_none("exceptions from lints without a reason", found);
}

/// The table in the document and the tests here are the same list.
#[test]
fn the_document_names_every_test_here() {
    let document = read("docs/architecture.md");
    let here = read("tests/tests/structure.rs");
    let tests = here.split("#[test]\nfn ").skip(1).filter_map(|rest| rest.split_once('(')).map(|(name, _)| name);
    for name in tests {
        assert!(document.contains(&format!("`structure::{name}`")), "docs/architecture.md does not name {name}");
    }
    for (start, _) in document.match_indices("`structure::") {
        let name = document[start + 12..].split('`').next().unwrap();
        assert!(here.contains(&format!("fn {name}()")), "docs/architecture.md names {name}, which is no test");
    }
}

/// The words in quotes of `const <name>: … = &[…];`.
fn list(text: &str, name: &str) -> Vec<String> {
    let (_, rest) = text.split_once(&format!("const {name}: ")).unwrap_or_else(|| unreachable!("no {name}"));
    let (_, rest) = rest.split_once('=').and_then(|(_, rest)| rest.split_once("&[")).unwrap();
    let (body, _) = rest.split_once("];").unwrap();
    body.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The names of refused parameters: the first words in quotes of each `refuse(`.
fn refused(text: &str, name: &str) -> Vec<String> {
    let (_, rest) = text.split_once(&format!("const {name}: ")).unwrap_or_else(|| unreachable!("no {name}"));
    let (body, _) = rest.split_once("];").unwrap();
    body.split("refuse(\"").skip(1).filter_map(|row| row.split('"').next()).map(str::to_owned).collect()
}

/// The section of a Markdown text under this heading.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let (_, rest) = text.split_once(heading).unwrap_or_else(|| unreachable!("no heading {heading:?}"));
    rest.split("\n## ").next().unwrap().split("\n### ").next().unwrap()
}

#[test]
fn the_http_document_is_true_to_the_code() {
    let document = read("docs/http.md");
    let params = read("server/src/http/params.rs");
    for (heading, lists) in [
        ("### Honoured", &["HONOURED", "HONOURED_CHAT", "HONOURED_COMPLETIONS"][..]),
        ("### Accepted without effect", &["WITHOUT_EFFECT"]),
        ("## Batches", &["HONOURED_BATCHES"]),
        ("## Scores", &["HONOURED_PAIRS", "HONOURED_SCORE", "HONOURED_RERANK"]),
    ] {
        let section = section(&document, heading);
        let missing =
            lists.iter().flat_map(|name| list(&params, name)).filter(|name| !section.contains(&format!("`{name}`")));
        assert_none(heading, missing.collect());
    }
    let names = ["REFUSED", "REFUSED_CHAT", "REFUSED_COMPLETIONS"].iter().flat_map(|name| refused(&params, name));
    let section_refused = section(&document, "### Refused");
    let of_pairs = refused(&params, "REFUSED_PAIRS").into_iter();
    let section_scores = section(&document, "## Scores");
    assert_none("## Scores", of_pairs.filter(|name| !section_scores.contains(&format!("`{name}`"))).collect());
    assert_none("### Refused", names.filter(|name| !section_refused.contains(&format!("`{name}`"))).collect());

    let routes = list(&read("server/src/http/mod.rs"), "EXACT");
    assert_none("routes", routes.into_iter().filter(|route| !document.contains(&format!("{route}`"))).collect());
    let errors = read("server/src/http/error.rs");
    let codes = errors.split("Some(\"").skip(1).filter_map(|rest| rest.split('"').next());
    assert_none(
        "error codes",
        codes.filter(|code| !document.contains(&format!("`{code}`"))).map(str::to_owned).collect(),
    );
    let metrics = Source { path: String::new(), text: read("server/src/metrics.rs") };
    let names = metrics.shipped().split('"').filter(|text| text.starts_with("vllm:") || text.starts_with("cadre_"));
    let metrics_section = section(&document, "## Metrics");
    let missing = names.filter(|name| !metrics_section.contains(&format!("`{name}`")));
    assert_none("metrics", missing.map(str::to_owned).collect());
}
