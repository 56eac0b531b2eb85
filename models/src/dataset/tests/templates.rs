//! What is found in the texts that templates make.

use std::fs;

use proptest::prelude::*;

use super::*;

fn named(name: &str) -> ChatTemplate {
    let path = format!("{}/testdata/chat_templates/{name}.jinja", env!("CARGO_MANIFEST_DIR"));
    template(&fs::read_to_string(path).unwrap())
}

fn call(name: &str, arguments: Value) -> Value {
    json!({"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}})
}

fn several_turns() -> Value {
    chat(json!([
        {"role": "system", "content": "You help."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nOne."},
        {"role": "user", "content": "  Two?  "},
        {"role": "assistant", "content": " Two. ", "reasoning": "Easy."},
        {"role": "user", "content": "Three?\n"},
        {"role": "assistant", "content": "Drei: é漢\u{1f600}"},
    ]))
}

fn tools() -> Value {
    json!({"tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}], "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [call("get_weather", json!("{\"place\": \"北京\"}"))]},
        {"role": "tool", "content": "20", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "Warm."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Bye", "tool_calls": [call("end", json!({})), call("end", json!({"n": 2}))]},
    ]})
}

#[test]
fn ling() {
    let ling = named("ling");
    assert_eq!(
        shown_row(several_turns(), &ling, &ALL),
        "<role>SYSTEM</role>You help.\ndetailed thinking off<|role_end|><role>HUMAN</role>One?<|role_end|>\
        <role>ASSISTANT</role>⟦One.<|role_end|>⟧<role>HUMAN</role>  Two?  <|role_end|>\
        <role>ASSISTANT</role>⟦ Two. <|role_end|>⟧<role>HUMAN</role>Three?\n<|role_end|>\
        <role>ASSISTANT</role>⟦Drei: é漢\u{1f600}<|role_end|>⟧"
    );
    let whole = shown_row(tools(), &ling, &ALL);
    let (_, talk) = whole.split_once("<role>HUMAN").unwrap();
    assert_eq!(
        talk,
        "</role>Weather?<|role_end|><role>ASSISTANT</role>⟦<tool_call>\n{\"name\": \"get_weather\", \
        \"arguments\": {\"place\": \"北京\"}}\n</tool_call><|role_end|>⟧<role>OBSERVATION</role>\n<tool_response>\n20\n\
        </tool_response><|role_end|><role>ASSISTANT</role>⟦Warm.<|role_end|>⟧<role>HUMAN</role>Thanks<|role_end|>\
        <role>ASSISTANT</role>⟦Bye\n<tool_call>\n{\"name\": \"end\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n\
        {\"name\": \"end\", \"arguments\": {\"n\": 2}}\n</tool_call><|role_end|>⟧"
    );
}

/// Reasoning is written in the last answer, and in earlier ones that have it in a field of its own.
#[test]
fn qwen3() {
    let qwen3 = named("qwen3");
    assert_eq!(
        shown_row(several_turns(), &qwen3, &ALL),
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n\
        <|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nOne.<|im_end|>⟧\n<|im_start|>user\n  Two?  <|im_end|>\n\
        <|im_start|>assistant\n⟦<think>\nEasy.\n</think>\n\n Two. <|im_end|>⟧\n<|im_start|>user\nThree?\n<|im_end|>\n\
        <|im_start|>assistant\n⟦<think>\n\n</think>\n\nDrei: é漢\u{1f600}<|im_end|>⟧\n"
    );
    let whole = shown_row(tools(), &qwen3, &ALL);
    let (_, talk) = whole.split_once("<|im_start|>user").unwrap();
    assert_eq!(
        talk,
        "\nWeather?<|im_end|>\n<|im_start|>assistant\n⟦\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": \
        {\"place\": \"北京\"}}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n20\n</tool_response><|im_end|>\n\
        <|im_start|>assistant\n⟦Warm.<|im_end|>⟧\n<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n\
        ⟦<think>\n\n</think>\n\nBye\n<tool_call>\n{\"name\": \"end\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n\
        {\"name\": \"end\", \"arguments\": {\"n\": 2}}\n</tool_call><|im_end|>⟧\n"
    );
}

/// The header isn't learnt, although the template has it inside of its `{% generation %}` block.
#[test]
fn olmoe() {
    assert_eq!(
        shown_row(several_turns(), &named("olmoe"), &ALL),
        "<s><|system|>\nYou help.\n\n<|user|>\nOne?\n\n<|assistant|>\n⟦<think>\nhm\n</think>\n\nOne.</s>⟧\n\
        <|user|>\n  Two?  \n\n<|assistant|>\n⟦ Two. </s>⟧\n<|user|>\nThree?\n\n\n<|assistant|>\n⟦Drei: é漢\u{1f600}</s>⟧\n"
    );
}

/// It trims answers, and moves tools to the last question: the prompt of an earlier answer isn't in the text.
#[test]
fn strict() {
    let turns = json!([
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "\n One. "},
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Two."},
    ]);
    let plain = "<s>[INST] One?[/INST]⟦ One.</s>⟧[INST] Two?[/INST]⟦ Two.</s>⟧";
    assert_eq!(shown_row(chat(turns.clone()), &named("strict"), &ALL), plain);
    let with_tools = json!({"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]});
    let dataset = read_rows(std::slice::from_ref(&with_tools), &named("strict"), &ALL).unwrap();
    assert_eq!(dataset.rewritten_answers, 1);
    assert_eq!(
        shown_with(&dataset.examples[0], &byte_level()),
        "<s>[INST] One?[/INST]⟦ One.</s>⟧[AVAILABLE_TOOLS] [{\"type\": \"function\", \"function\": {\"name\": \"f\"}}]\
        [/AVAILABLE_TOOLS][INST] Two?[/INST]⟦ Two.</s>⟧"
    );
    let calls = json!({"tools": with_tools["tools"], "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "tool_calls": [call("f", json!({"x": "y"})), call("f", json!({}))]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "Good."},
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Two."}]});
    let whole = shown_row(calls, &named("strict"), &ALL);
    assert!(
        whole.starts_with(
            "<s>[INST] One?[/INST]⟦[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"x\": \"y\"}, \"id\": \"abcdefghi\"}, \
            {\"name\": \"f\", \"arguments\": {}, \"id\": \"abcdefghi\"}]</s>⟧[TOOL_RESULTS] {\"content\": 1}[/TOOL_RESULTS]\
            ⟦ Good.</s>⟧[AVAILABLE_TOOLS]"
        ),
        "{whole}"
    );
}

/// Not a template for conversations: its prompt has no header, and each message says whether it is the first or last.
#[test]
fn features() {
    let messages = json!([
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, {"role": "assistant", "content": "c"}]);
    assert!(refused(chat(messages), &named("features"), &ALL).contains("can't be told where this one begins"));
    let messages = json!([{"role": "assistant", "content": "line\nline"}, {"role": "user", "content": "c"}]);
    let whole = shown_row(chat(messages), &named("features"), &ALL);
    assert!(whole.contains("odd ASSISTANT: \"⟦line line\"\nfirst⟧\n2/2"), "{whole}");
}

const OPENED: &str = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<end>\n{% endfor %}";

/// Phi's way: a further token at the end of all.
#[test]
fn what_comes_behind_the_last_answer_only_is_not_looked_for_behind_others() {
    let source = OPENED.to_owned() + "{% if add_generation_prompt %}<assistant>\n{% else %}{{ eos_token }}{% endif %}";
    let turn = |user: &str, answer: &str| {
        [json!({"role": "user", "content": user}), json!({"role": "assistant", "content": answer})]
    };
    let row = chat([turn("a", "b"), turn("c", "d")].concat().into());
    let shown = shown_row(row, &template(&source), &ALL);
    assert_eq!(shown, "<user>\na<end>\n<assistant>\n⟦b<end>⟧\n<user>\nc<end>\n<assistant>\n⟦d<end>\n</s>⟧");
}

/// The ways in which a template can write and rewrite `u1 a1 u2 a2`, and what is found then.
#[test]
fn templates_that_rewrite_earlier_turns() {
    const LOOP: &str = "{% for m in messages %}{% set c = m.content %}{% if m.role == 'user' %}<u>{{ c }}{% else %}";
    const END: &str = "{% endif %}{% endfor %}";
    for (before, answer, prompt, expected) in [
        // A prompt that opens the thinking, which earlier answers don't have.
        (
            "",
            "<a>\n{% if loop.last %}<think>\nhm</think>{% endif %}{{ c.split('</think>')[-1] }}<e>",
            "<a>\n<think>\n",
            "<u>u1<a>\n⟦a1<e>⟧<u>u2<a>\n<think>\n⟦hm</think>a2<e>⟧",
        ),
        // The same, where besides no prompt is the text's beginning.
        (
            "{{ messages | length }}",
            "<a>\n{% if loop.last %}<think>\nhm</think>{% endif %}{{ c }}<e>",
            "<a>\n<think>\n",
            "4<u>u1<a>\n⟦a1<e>⟧<u>u2<a>\n<think>\n⟦hm</think>a2<e>⟧",
        ),
        // A prompt with another end of the line than the text.
        ("", "<a>\n{{ c }}<e>", "<a> ", "<u>u1<a>⟦\na1<e>⟧<u>u2<a>⟦\na2<e>⟧"),
        // No end of a turn.
        ("", "{{ '\\n' + c }}\n", "{{ '\\n' }}", "<u>u1\n⟦a1⟧\n<u>u2\n⟦a2⟧\n"),
    ] {
        let prompt = format!("{{% if add_generation_prompt %}}{prompt}{{% endif %}}");
        let source = format!("{before}{LOOP}{answer}{END}{prompt}");
        let row = chat(json!([
            {"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"},
            {"role": "user", "content": "u2"}, {"role": "assistant", "content": "a2"}]));
        assert_eq!(shown_row(row, &template(&source), &ALL), expected, "{source}");
    }
}

#[test]
fn templates_that_hide_an_answer_are_named() {
    let row = || {
        chat(json!([
            {"role": "user", "content": "u1"}, {"role": "assistant", "content": "a1"},
            {"role": "user", "content": "u2"}, {"role": "assistant", "content": "a2"}]))
    };
    let by_answer = |answer: &str| {
        template(&format!(
            "{{% for m in messages %}}{{% if m.role == 'user' %}}<u>{{{{ m.content }}}}{{% else %}}{answer}{{% endif %}}\
            {{% endfor %}}{{% if add_generation_prompt %}}<a>{{% endif %}}"
        ))
    };
    for (answer, words) in [
        (
            "<a>{{ m.content }}{{ '<end>' if loop.last else '<next>' }}",
            "with \"<end>\" when it is the last one, and goes on with \"<next>",
        ),
        ("<a>{{ m.content | upper }}{{ '<end>' if loop.last else '<next>' }}", "writes nothing of this message"),
        (
            "<a>{{ m.content | length }}{{ m.content }}{{ '<end>' if loop.last else '<next>' }}",
            "changes this message's text",
        ),
        ("<a>{{ m.content * 2 }}{{ '<end>' if loop.last else '<next>' }}", "more than once"),
        (
            "{% if messages | length == 2 %}{{ raise_exception('more') }}{% endif %}<a>{{ m.content }}<e>",
            "that ends with this message (the chat template refuses this conversation: more)",
        ),
    ] {
        let template = by_answer(answer);
        let error = refused(row(), &template, &ALL);
        assert!(error.starts_with("messages[1]: ") && error.contains(words), "{error}");
        assert!(shown_row(row(), &template, &LAST).contains("<a>⟦"), "{answer}");
    }
    let numbered = template(
        "{% for m in messages %}{{ loop.length }}<{{ m.role }}>{{ m.content | length }}{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}",
    );
    assert!(refused(row(), &numbered, &ALL).contains("can't be told where this one begins"));
    assert!(refused(row(), &template("{{ raise_exception('never') }}"), &ALL).ends_with("conversation: never"));
}

/// Contents that look like the templates' own words, like marks and like thinking.
fn content() -> impl Strategy<Value = String> {
    let words = [
        "a",
        "é漢",
        "</s>",
        "[/INST]",
        "[INST] ",
        "<think>",
        "</think>",
        "cadremark",
        "<role>ASSISTANT</role>",
        "<|role_end|>",
        "{{",
        " ",
        "\n",
        "\u{a0}",
    ];
    let part = prop::sample::select(words.to_vec());
    let content = prop::collection::vec(part, 1..6).prop_map(|parts| parts.concat());
    content.prop_filter("not blank", |content| !content.trim().is_empty())
}

fn conversation(contents: &[(String, String)]) -> Vec<Value> {
    let turn = |(question, answer): &(String, String)| {
        [json!({"role": "user", "content": question}), json!({"role": "assistant", "content": answer})]
    };
    contents.iter().flat_map(turn).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// By the prompts alone.
    #[test]
    fn the_embedded_template_learns_answers_and_their_ends(
        contents in prop::collection::vec((content(), content()), 1..4),
    ) {
        let source = include_str!("../../../embedded/chat_template.jinja");
        let expected: String = contents.iter().map(|(question, answer)| format!(
            "<role>HUMAN</role>{question}<|role_end|><role>ASSISTANT</role>⟦{answer}<|role_end|>⟧"
        )).collect();
        let row = chat(conversation(&contents).into());
        prop_assert_eq!(shown_row(row, &template(source), &ALL), expected);
    }

    /// By marks, as the tools are in the last question.
    #[test]
    fn a_template_that_trims_and_moves_learns_answers_and_their_ends(
        contents in prop::collection::vec((content(), content()), 1..4),
    ) {
        let tools = "[AVAILABLE_TOOLS] [{\"type\": \"function\", \"function\": {\"name\": \"f\"}}][/AVAILABLE_TOOLS]";
        let last = &contents[contents.len() - 1].0;
        let expected: String = contents.iter().map(|(question, answer)| {
            // They stand before each question that equals the last one.
            let tools = if question == last { tools } else { "" };
            format!("{tools}[INST] {question}[/INST]⟦ {}</s>⟧", answer.trim())
        }).collect();
        let messages = conversation(&contents);
        let row = json!({"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]});
        prop_assert_eq!(shown_row(row, &named("strict"), &ALL), "<s>".to_owned() + &expected);
    }
}

/// With the tokenizer of a real model, whose tokens are longer than a byte.
#[test]
fn the_embedded_model() {
    let checkpoint = crate::open(None, &|_| {}).unwrap();
    let (tokenizer, template) = (checkpoint.tokenizer().unwrap(), checkpoint.chat_template().unwrap().unwrap());
    let row = chat(json!([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 7 + 23?"},
        {"role": "assistant", "content": "7 + 23 = 30."}, {"role": "user", "content": "Grüße, 漢\u{1f600}"},
        {"role": "assistant", "content": "Hello there, 漢!"}]));
    let (_directory, path) = file("data.jsonl", lines(std::slice::from_ref(&row)));
    let dataset = read(&[path], &tokenizer, Some(&template), &ALL).unwrap();
    let example = &dataset.examples[0];
    let text = template.render(row["messages"].as_array().unwrap(), &crate::RenderOptions::default()).unwrap();
    assert_eq!(example.tokens, tokenizer.encode(&text, false).unwrap());
    assert_eq!(
        shown_with(example, &tokenizer),
        "<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>What is 7 + 23?<|role_end|>\
        <role>ASSISTANT</role>⟦7 + 23 = 30.<|role_end|>⟧<role>HUMAN</role>Grüße, 漢\u{1f600}<|role_end|>\
        <role>ASSISTANT</role>⟦Hello there, 漢!<|role_end|>⟧"
    );
    assert!(example.tokens.len() < text.len() / 2, "tokens of single bytes");
    let pieces = example.pieces(&tokenizer);
    let targets: String = pieces.iter().filter(|piece| piece.is_target).map(|piece| piece.text.as_str()).collect();
    assert_eq!(targets, "7 + 23 = 30.<|role_end|>Hello there, \\xe6\\xbc\\xa2!<|role_end|>");
    assert_eq!((pieces.len(), pieces[0].token, pieces[0].text.as_str()), (example.tokens.len(), 3, "<role>"));
}
