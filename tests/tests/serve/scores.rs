//! `/v1/score` and `/v1/rerank`: label tokens behind prompts and pairs of texts.

use cadre_tests::server::{Server, ids, merge};
use serde_json::{Value, json};

const QUERY: &str = "What grows in the garden?";
const DOCUMENTS: [&str; 4] = ["Roses grow there.", "The sun is warm.", "Roses grow there, and apples.", "Nothing."];
const LABELS: [u32; 2] = [40, 41];

fn post(server: &Server, path: &str, body: Value) -> Value {
    server.client().post(path, &body).ok()
}

/// The scores of an answer of `/v1/score`.
fn scores(answer: &Value) -> Vec<f64> {
    let data = answer["data"].as_array().unwrap();
    assert!(data.iter().enumerate().all(|(index, one)| one["index"] == index && one["object"] == "score"), "{answer}");
    data.iter().map(|one| one["score"].as_f64().unwrap()).collect()
}

/// The log-probability of `next` behind `prompt`, as `/v1/completions` tells it.
fn logprob(server: &Server, prompt: &[u32], next: u32) -> f64 {
    let told = server.complete([prompt, &[next]].concat(), json!({"echo": true, "max_tokens": 0, "logprobs": 0})).ok();
    told["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().last().unwrap().as_f64().unwrap()
}

#[track_caller]
fn close(one: f64, other: f64) {
    assert!((one - other).abs() < 1e-6 * other.abs().max(1.0), "{one} {other}");
}

#[test]
fn a_score_is_the_probability_of_the_first_label() {
    let server = Server::start(&[]);
    let (query, item) = (server.tokens("Is the sun warm?"), server.tokens(" Yes"));
    let body = json!({"query": query, "items": [item, []], "label_token_ids": LABELS});
    let ask = |more: Value| scores(&post(&server, "/v1/score", merge(body.clone(), more)));
    for (place, prompt) in [[&query[..], &item].concat(), query.clone()].iter().enumerate() {
        let [first, second] = LABELS.map(|label| logprob(&server, prompt, label));
        close(ask(json!({}))[place], first.exp() / (first.exp() + second.exp()));
        close(ask(json!({"apply_softmax": false}))[place], first.exp());
        close(ask(json!({"use_activation": false}))[place], first - second);
    }
    let turned = [&item[..], &query].concat();
    close(ask(json!({"item_first": true, "apply_softmax": false}))[0], logprob(&server, &turned, LABELS[0]).exp());
    let answer = post(&server, "/score", body);
    assert_eq!((&answer["object"], &answer["usage"]["completion_tokens"]), (&json!("list"), &json!(0)));
    assert_eq!(answer["usage"]["prompt_tokens"], 2 * query.len() + item.len());
}

#[test]
fn a_pair_is_asked_about_by_the_chat_template() {
    let server = Server::start(&[]);
    let question = format!(
        "Does the document answer the query? Say yes or no, and nothing else.\n\nQuery: {QUERY}\n\nDocument: {}",
        DOCUMENTS[0]
    );
    let body = json!({"messages": [{"role": "user", "content": question}]});
    let prompt = ids(&server.client().post("/tokenize", &body).ok()["tokens"]);
    let whole = post(&server, "/score", json!({"query": prompt, "items": [[]], "label_token_ids": LABELS}));
    let pairs = |body: Value| scores(&post(&server, "/v1/score", merge(body, json!({"label_token_ids": LABELS}))));
    let all = pairs(json!({"text_1": QUERY, "text_2": DOCUMENTS}));
    assert_eq!(scores(&whole), all[..1], "whoever is beside it");
    for body in [
        json!({"queries": QUERY, "documents": DOCUMENTS}),
        json!({"queries": [QUERY, QUERY, QUERY, QUERY], "items": DOCUMENTS}),
        json!({"data_1": [QUERY], "data_2": DOCUMENTS}),
    ] {
        assert_eq!(pairs(body), all);
    }
    assert_eq!(pairs(json!({"text_1": QUERY, "text_2": DOCUMENTS[2]})), all[2..3]);
}

#[test]
fn documents_are_ranked_by_their_scores() {
    let server = Server::start(&[]);
    let labels = json!({"label_token_ids": LABELS});
    let pairs = json!({"text_1": QUERY, "text_2": DOCUMENTS});
    let scores = scores(&post(&server, "/v1/score", merge(pairs, labels.clone())));
    let body = merge(json!({"query": QUERY, "documents": DOCUMENTS}), labels);
    let ranked = post(&server, "/v1/rerank", body.clone());
    let results = ranked["results"].as_array().unwrap();
    assert_eq!(results.len(), DOCUMENTS.len());
    assert!(results.is_sorted_by(|one, other| one["relevance_score"].as_f64() >= other["relevance_score"].as_f64()));
    for result in results {
        let index = result["index"].as_u64().unwrap() as usize;
        assert_eq!(result["relevance_score"].as_f64().unwrap(), scores[index]);
        assert_eq!(result["document"], json!({"text": DOCUMENTS[index]}));
    }
    let objects: Vec<Value> = DOCUMENTS.iter().map(|text| json!({"text": text})).collect();
    let best =
        post(&server, "/rerank", merge(body, json!({"documents": objects, "top_n": 2, "return_documents": false})));
    let told: Vec<&Value> = best["results"].as_array().unwrap().iter().map(|result| &result["index"]).collect();
    assert_eq!(told, [&results[0]["index"], &results[1]["index"]]);
    assert_eq!(best["results"][0].get("document"), None);
}

#[test]
fn template_and_labels_may_be_the_server_s() {
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("pairs.jinja");
    let source = "{{ messages[0].role }}: {{ messages[0].content }}\n{{ messages[1].role }}: {{ messages[1].content }}\n{{ mood }}";
    std::fs::write(&template, source).unwrap();
    let server = Server::start(&["--score-template", template.to_str().unwrap(), "--score-labels", "Y,N"]);
    let labels: Vec<u32> = ["Y", "N"].iter().flat_map(|label| server.tokens(label)).collect();
    let told =
        scores(&post(&server, "/score", json!({"text_1": "a", "text_2": "b", "chat_template_kwargs": {"mood": "!"}})));
    let body = json!({"query": "query: a\ndocument: b\n!", "items": [""], "label_token_ids": labels});
    assert_eq!(told, scores(&post(&server, "/score", body)));
}

#[test]
fn what_can_not_be_scored_is_refused() {
    let server = Server::start(&[]);
    let long = "a ".repeat(2000);
    for (path, body, param, says) in [
        ("/score", json!({"text_1": "a", "text_2": "b"}), "label_token_ids", "--score-labels"),
        ("/score", json!({"label_token_ids": LABELS}), "text_1", "`queries` and `documents`"),
        ("/score", json!({"text_1": ["a", "b"], "text_2": ["c"], "label_token_ids": LABELS}), "text_1", "as many"),
        ("/score", json!({"text_1": "a", "text_2": ["b", 5], "label_token_ids": LABELS}), "text_2[1]", "a string"),
        ("/score", json!({"text_1": "a", "text_2": [], "label_token_ids": LABELS}), "text_2", "empty"),
        ("/score", json!({"text_1": "a", "text_2": ["b", long], "label_token_ids": LABELS}), "text_2[1]", "1024"),
        ("/score", json!({"query": "a", "items": ["b"], "label_token_ids": [7]}), "label_token_ids", "at least 2"),
        ("/score", json!({"query": "a", "items": ["b"], "label_token_ids": [7, 7]}), "label_token_ids", "twice"),
        (
            "/score",
            json!({"query": "a", "items": ["b"], "label_token_ids": [7, 70_000]}),
            "label_token_ids[1]",
            "below",
        ),
        ("/score", json!({"query": "", "items": [""], "label_token_ids": LABELS}), "items[0]", "no token"),
        ("/score", json!({"query": "a", "items": "b", "label_token_ids": LABELS}), "items", "an array"),
        (
            "/score",
            json!({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 9}),
            "truncate_prompt_tokens",
            "shorten",
        ),
        ("/rerank", json!({"documents": ["b"]}), "query", "required"),
        ("/rerank", json!({"query": "a"}), "documents", "required"),
        ("/rerank", json!({"query": "a", "documents": []}), "documents", "empty"),
        ("/rerank", json!({"query": "a", "documents": [{"image": "b"}]}), "documents[0]", "`text`"),
        ("/rerank", json!({"query": "a", "documents": ["b"], "top_n": -1}), "top_n", "at least 0"),
    ] {
        let answer = server.client().post(path, &body);
        let error = &answer.json()["error"];
        let message = error["message"].as_str().unwrap();
        assert!(answer.status == 400 && error["param"] == param && message.contains(says), "{body}: {error}");
    }
}
