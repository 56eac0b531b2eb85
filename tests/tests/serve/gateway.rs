//! What the Kubernetes Gateway API inference extension needs of a server, and the manifest in `docs/scale-out`.

use cadre_tests::{
    adapter::{Adapts, write},
    binary::output,
    server::{MODEL, Server},
    source::read,
};
use serde_json::json;

#[test]
fn metrics_of_the_inference_extension_are_gauges_under_vllms_names() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), Adapts::Attention, 1);
    let server = Server::start(&["--adapter", &format!("mine={}", folder.path().display())]);
    server.complete("The garden", json!({"model": "mine", "max_tokens": 2})).ok();
    let metrics = server.metrics();
    let document = read("docs/scale-out.md");
    for (name, labels) in [
        ("vllm:num_requests_waiting", &["model_name"][..]),
        ("vllm:num_requests_running", &["model_name"]),
        ("vllm:kv_cache_usage_perc", &["model_name"]),
        ("vllm:cache_config_info", &["block_size", "num_gpu_blocks"]),
        ("vllm:lora_requests_info", &["max_lora", "running_lora_adapters", "waiting_lora_adapters"]),
    ] {
        assert!(metrics.text().contains(&format!("# TYPE {name} gauge\n")), "{name} is no gauge:\n{}", metrics.text());
        let sample = metrics.text().lines().find(|line| line.starts_with(&format!("{name}{{"))).unwrap();
        for label in labels {
            assert!(sample.contains(&format!("{label}=\"")), "{sample} has no {label}");
        }
        assert!(document.contains(&format!("`{name}`")), "docs/scale-out.md doesn't name {name}");
    }
    let usage = metrics.value("vllm:kv_cache_usage_perc", &[("model_name", MODEL)]);
    assert!((0.0..=1.0).contains(&usage), "{usage}");
    for label in ["block_size", "num_gpu_blocks"] {
        let (_, rest) = metrics.text().split_once(&format!("{label}=\"")).unwrap();
        assert!(rest.split_once('"').unwrap().0.parse::<u64>().unwrap() > 0, "{label}");
    }
}

#[test]
fn the_manifests_flags_and_probes_are_the_servers() {
    let manifest = read("docs/scale-out/inference-pool.yaml");
    let help = output(&["serve", "--help"]);
    let flags: Vec<&str> =
        manifest.lines().filter_map(|line| line.trim().strip_prefix("- --")?.split('=').next()).collect();
    assert!(flags.len() >= 4, "{flags:?}");
    for flag in flags {
        assert!(help.contains(&format!("--{flag} ")), "cadre serve has no --{flag}");
    }
    let server = Server::start(&[]);
    let mut probes = manifest.split("path: ").skip(1).map(|rest| rest.split(',').next().unwrap());
    assert!(probes.clone().count() == 3 && probes.all(|path| server.client().get(path).status == 200));
}
