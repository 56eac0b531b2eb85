//! Against what transformers renders, and the cases that it has no words for.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::*;

const EXPECTED: &str = include_str!("../../testdata/chat_templates/expected.json");
const TEMPLATES: [(&str, &str); 5] = [
    ("ling", include_str!("../../testdata/chat_templates/ling.jinja")),
    ("qwen3", include_str!("../../testdata/chat_templates/qwen3.jinja")),
    ("olmoe", include_str!("../../testdata/chat_templates/olmoe.jinja")),
    ("strict", include_str!("../../testdata/chat_templates/strict.jinja")),
    ("features", include_str!("../../testdata/chat_templates/features.jinja")),
];

#[derive(Deserialize)]
struct Expected {
    tokens: Value,
    conversations: BTreeMap<String, Vec<Value>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    options: Options,
    expected: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Options {
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    tools: Option<Vec<Value>>,
    #[serde(default)]
    kwargs: Map<String, Value>,
}

#[test]
fn renders_what_transformers_renders() {
    let golden: Expected = serde_json::from_str(EXPECTED).unwrap();
    let compiled: BTreeMap<_, _> = TEMPLATES
        .iter()
        .map(|(name, source)| (*name, ChatTemplate::from_source(name, source, &golden.tokens).unwrap()))
        .collect();
    for case in golden.cases {
        let options = RenderOptions {
            add_generation_prompt: case.options.add_generation_prompt,
            continue_final_message: case.options.continue_final_message,
            tools: case.options.tools,
            kwargs: case.options.kwargs,
        };
        let rendered = compiled[case.template.as_str()].render(&golden.conversations[&case.conversation], &options);
        let place = format!("{}: {}: {options:?}", case.template, case.conversation);
        match (case.expected, rendered) {
            (Some(expected), Ok(rendered)) => assert_eq!(rendered, expected, "{place}"),
            (Some(_), Err(error)) => panic!("{place}: {error}"),
            (None, Ok(rendered)) => panic!("{place}: expected {:?}, found {rendered:?}", case.error),
            (None, Err(_)) => {}
        }
    }
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::from_source("chat_template.jinja", source, &json!({"bos_token": "<s>"})).unwrap()
}

fn ask(text: &str) -> Vec<Value> {
    vec![json!({"role": "user", "content": text})]
}

fn refusal(template: &ChatTemplate, messages: &[Value], options: &RenderOptions) -> String {
    let error = template.render(messages, options).unwrap_err();
    assert!(error.is_callers_mistake());
    error.to_string()
}

#[test]
fn a_templates_own_words_reach_the_caller() {
    let template = template("{{ raise_exception('no ' + messages[0].role + ' here') }}");
    let error = template.render(&ask("x"), &RenderOptions::default()).unwrap_err();
    assert!(matches!(&error, Error::TemplateRefused { message } if message == "no user here"), "{error}");
}

#[test]
fn a_template_that_fails_names_the_place() {
    let template = template("a\n{{ messages[0].content.no.such.field }}");
    let error = template.render(&ask("x"), &RenderOptions::default()).unwrap_err();
    assert!(matches!(error, Error::TemplateFailed { .. }) && error.to_string().contains(":2"), "{error}");
}

#[test]
fn a_template_that_is_none_is_named() {
    let error = ChatTemplate::from_source("x/chat_template.jinja", "{% if %}", &json!({})).err().unwrap().to_string();
    assert!(error.starts_with("x/chat_template.jinja: the chat template cannot be compiled"), "{error}");
}

#[test]
fn impossible_options_are_refused() {
    let template = template("{% for m in messages %}{{ m.content | upper }}{% endfor %}");
    let plain = RenderOptions::default();
    let go_on = RenderOptions { continue_final_message: true, ..plain.clone() };
    assert!(refusal(&template, &[], &plain).contains("empty"));
    assert!(refusal(&template, &[json!("hello")], &plain).contains("not an object"));
    let both = RenderOptions { add_generation_prompt: true, ..go_on.clone() };
    assert!(refusal(&template, &ask("x"), &both).contains("exclude each other"));
    assert!(refusal(&template, &ask("x"), &go_on).contains("changes the last message"));
    assert!(refusal(&template, &[json!({"role": "assistant"})], &go_on).contains("no text"));
}

#[test]
fn the_tool_template_is_for_tools() {
    let config = json!({"chat_template": [
        {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]});
    let template = ChatTemplate::from_tokenizer_config("tokenizer_config.json", &config).unwrap().unwrap();
    assert_eq!(template.source(), "plain");
    let mut options = RenderOptions::default();
    assert_eq!(template.render(&ask("x"), &options).unwrap(), "plain");
    options.tools = Some(vec![json!({})]);
    assert_eq!(template.render(&ask("x"), &options).unwrap(), "tools 1");
}

#[test]
fn the_template_in_the_tokenizers_configuration_is_found() {
    let find = |config: Value| ChatTemplate::from_tokenizer_config("tokenizer_config.json", &config);
    assert!(find(json!({})).unwrap().is_none());
    assert!(find(json!({"chat_template": null})).unwrap().is_none());
    assert_eq!(find(json!({"chat_template": "x"})).unwrap().unwrap().source(), "x");
    assert_eq!(find(json!({"chat_template": {"default": "y"}})).unwrap().unwrap().source(), "y");
    for (config, words) in [
        (json!({"chat_template": [{"name": "rag", "template": "x"}]}), "expected one named `default`, found rag"),
        (json!({"chat_template": [1]}), "entries with a name"),
        (json!({"chat_template": 1}), "a template or a list"),
    ] {
        let error = find(config).err().unwrap().to_string();
        assert!(error.starts_with("tokenizer_config.json: chat_template: ") && error.contains(words), "{error}");
    }
}

#[test]
fn kwargs_override_all_but_the_messages() {
    let template = template("{{ bos_token }}{{ add_generation_prompt }}{{ messages | length }}");
    let kwargs = json!({"bos_token": "!", "add_generation_prompt": true, "messages": []});
    let options = RenderOptions { kwargs: kwargs.as_object().unwrap().clone(), ..RenderOptions::default() };
    assert_eq!(template.render(&ask("x"), &options).unwrap(), "!True1");
}

#[test]
fn the_date_is_todays() {
    let text = template("{{ strftime_now('%Y-%m-%d') }}").render(&ask("x"), &RenderOptions::default()).unwrap();
    assert!(text.len() == 10 && text.as_str() > "2025-01-01", "{text}");
}
