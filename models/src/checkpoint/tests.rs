//! Opening: what is found, what falls back to what, and what is refused.

use std::fs;

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::{
    summary::Part,
    testing::{tiny, write_checkpoint},
    tokenizer::tests::byte_level_json,
};

/// A whole checkpoint of a tiny model.
fn checkpoint() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (config, tensors) = tiny("qwen3_moe");
    write_checkpoint(directory.path(), &config, &tensors);
    write(&directory, "tokenizer.json", &byte_level_json());
    let tokenizer_config =
        json!({"eos_token": {"content": "<|end|>"}, "chat_template": "from the config {{ eos_token }}"});
    write(&directory, "tokenizer_config.json", &tokenizer_config);
    directory
}

fn write(directory: &TempDir, file: &str, content: &Value) {
    fs::write(directory.path().join(file), content.to_string()).unwrap();
}

fn open_it(directory: &TempDir) -> Result<Checkpoint> {
    open(Some(directory.path().to_str().unwrap()), &|_| {})
}

fn rendered(directory: &TempDir) -> String {
    let template = open_it(directory).unwrap().chat_template().unwrap().unwrap();
    template.render(&[json!({"role": "user", "content": "x"})], &crate::RenderOptions::default()).unwrap()
}

fn refused(directory: &TempDir, words: &[&str]) {
    let error = open_it(directory).err().unwrap().to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn a_directory_is_a_checkpoint() {
    let directory = checkpoint();
    let checkpoint = open_it(&directory).unwrap();
    assert_eq!(checkpoint.architecture(), "qwen3_moe");
    assert_eq!(checkpoint.name(), directory.path().file_name().unwrap().to_str().unwrap());
    assert_eq!(checkpoint.tokenizer().unwrap().vocab_size(), 260);
    let summary = checkpoint.summary().unwrap();
    assert_eq!((summary.layers, summary.experts, summary.experts_per_token), (Some(2), Some(4), Some(2)));
    assert!(summary.parts.iter().any(|part| part.part == Part::Experts && part.tensors == 24));
}

#[test]
fn a_fingerprint_is_of_the_weights_and_of_what_is_made_of_them() {
    let (first, second) = (checkpoint(), checkpoint());
    let of = |directory: &TempDir| open_it(directory).unwrap().fingerprint().unwrap();
    assert_eq!(of(&first), of(&second));
    let weights = second.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let changed = of(&second);
    assert_ne!(of(&first), changed);
    let mut config = tiny("qwen3_moe").0;
    config["rope_theta"] = json!(12345.0);
    write(&second, "config.json", &config);
    assert!(of(&second) != changed && of(&second) != of(&first));
}

#[test]
fn the_embedded_checkpoint_opens() {
    let checkpoint = open(None, &|_| {}).unwrap();
    assert_eq!(checkpoint.architecture(), "bailing_moe_v2");
    assert!(!checkpoint.generation_config().eos_token_ids.is_empty());
    let tokenizer = checkpoint.tokenizer().unwrap();
    let text = "What is 2 + 3? Grüße 漢";
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    let template = checkpoint.chat_template().unwrap().unwrap();
    let options = crate::RenderOptions { add_generation_prompt: true, ..Default::default() };
    assert_eq!(template.file(), "embedded chat_template.jinja");
    let prompt = template.render(&[json!({"role": "user", "content": "Hi"})], &options).unwrap();
    assert_eq!(prompt, "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>");
    assert!(checkpoint.summary().unwrap().active_parameters > 0);
}

#[test]
fn end_of_sequence_comes_from_the_first_that_names_it() {
    let directory = checkpoint();
    let eos = || open_it(&directory).unwrap().generation_config().eos_token_ids.clone();
    write(&directory, "generation_config.json", &json!({"eos_token_id": [7, 8], "temperature": 0.5}));
    assert_eq!(eos(), [7, 8]);
    assert_eq!(open_it(&directory).unwrap().generation_config().temperature, Some(0.5));
    write(&directory, "generation_config.json", &json!({}));
    assert_eq!(eos(), [2]);
    let mut config = tiny("qwen3_moe").0;
    config["eos_token_id"] = Value::Null;
    write(&directory, "config.json", &config);
    assert_eq!(eos(), [257]);
    write(&directory, "tokenizer_config.json", &json!({}));
    assert_eq!(eos(), [0_u32; 0]);
    write(&directory, "special_tokens_map.json", &json!({"eos_token": "<|pad|>"}));
    assert_eq!(eos(), [258]);
}

#[test]
fn the_templates_own_file_comes_first() {
    let directory = checkpoint();
    assert_eq!(rendered(&directory), "from the config <|end|>");
    fs::write(directory.path().join("chat_template.jinja"), "from the file {{ eos_token }}").unwrap();
    assert_eq!(rendered(&directory), "from the file <|end|>");
    fs::write(directory.path().join("chat_template.jinja"), b"\xff").unwrap();
    let error = open_it(&directory).unwrap().chat_template().err().unwrap().to_string();
    assert!(error.contains("chat_template.jinja") && error.contains("UTF-8"), "{error}");
    fs::remove_file(directory.path().join("chat_template.jinja")).unwrap();
    write(&directory, "tokenizer_config.json", &json!({}));
    assert!(open_it(&directory).unwrap().chat_template().unwrap().is_none());
}

#[test]
fn what_is_no_checkpoint_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    refused(&directory, &["has no config.json", "Hugging Face layout"]);
    let file = directory.path().join("model.gguf");
    fs::write(&file, "x").unwrap();
    let error = open(Some(file.to_str().unwrap()), &|_| {}).err().unwrap().to_string();
    assert!(error.contains("model.gguf` is a file: give the directory"), "{error}");
    for name in ["no-such-directory", "./no/such/directory", "/no/such", "a b/c"] {
        let error = open(Some(name), &|_| {}).err().unwrap().to_string();
        assert!(error.contains(name) && error.contains("neither a directory here nor a hub id"), "{error}");
    }
}

#[test]
fn an_unknown_architecture_lists_the_known() {
    let directory = checkpoint();
    write(&directory, "config.json", &json!({"model_type": "llama"}));
    refused(&directory, &["config.json", "`llama`", "bailing_moe, bailing_moe_v2, olmoe, qwen3_moe"]);
    write(&directory, "config.json", &json!({"model_type": 3}));
    refused(&directory, &["config.json: model_type", "found 3"]);
}

#[test]
fn damaged_text_files_are_named() {
    let directory = checkpoint();
    fs::write(directory.path().join("config.json"), "{\"model_type\": \"olmoe\",\n\"rms_norm_eps\": NaN}").unwrap();
    refused(&directory, &["config.json is not valid JSON", "line 2", "NaN"]);
    let directory = checkpoint();
    fs::write(directory.path().join("generation_config.json"), "{\"top_p\": Infinity}").unwrap();
    refused(&directory, &["generation_config.json", "line 1", "Infinity"]);
    let directory = checkpoint();
    fs::write(directory.path().join("tokenizer.json"), "[]").unwrap();
    let error = open_it(&directory).unwrap().tokenizer().err().unwrap().to_string();
    assert!(error.contains("tokenizer.json: "), "{error}");
    fs::remove_file(directory.path().join("tokenizer.json")).unwrap();
    let error = open_it(&directory).unwrap().tokenizer().err().unwrap().to_string();
    assert!(error.contains("has no tokenizer.json: expected"), "{error}");
    fs::write(directory.path().join("tokenizer_config.json"), "{").unwrap();
    let error = open_it(&directory).unwrap().chat_template().err().unwrap().to_string();
    assert!(error.contains("tokenizer_config.json is not valid JSON"), "{error}");
}
