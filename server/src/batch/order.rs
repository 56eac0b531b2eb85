//! In which order a window's requests go to the engine.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::lines::input::Line;

/// From so many equal bytes at their beginning on, prompts are kept together: less would be less than a block of the KV cache.
const SHARED_BYTES: usize = 128;
/// Bytes that a token to generate counts as much as.
const TOKEN_BYTES: u64 = 4;

/// What of a request tells which others it goes with.
#[derive(Deserialize, Default)]
struct Request<'a> {
    #[serde(borrow)]
    body: Option<Body<'a>>,
}

#[derive(Deserialize, Default)]
struct Body<'a> {
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    max_tokens: Option<&'a RawValue>,
    #[serde(borrow)]
    max_completion_tokens: Option<&'a RawValue>,
}

impl<'a> Body<'a> {
    fn of(line: &'a Line) -> Self {
        let request = line.text.as_deref().ok().and_then(|text| serde_json::from_str::<Request<'_>>(text).ok());
        request.unwrap_or_default().body.unwrap_or_default()
    }

    fn model(&self) -> &'a str {
        self.model.map_or("", RawValue::get)
    }

    fn prompt(&self) -> &'a str {
        self.messages.or(self.prompt).map_or("", RawValue::get)
    }

    /// How long it may get.
    fn length(&self) -> u64 {
        let most = self.max_completion_tokens.or(self.max_tokens).and_then(|most| most.get().parse::<u64>().ok());
        (self.prompt().len() as u64).saturating_add(most.unwrap_or(0).saturating_mul(TOKEN_BYTES))
    }
}

/// Sorts requests: those whose prompts begin alike stand together, so that the keys and values of that beginning are computed
/// once; and what may get long comes first, so that the engine isn't left with one long request at the end.
pub fn sorted(lines: Vec<Line>) -> Vec<Line> {
    let bodies: Vec<Body<'_>> = lines.iter().map(Body::of).collect();
    let mut places: Vec<usize> = (0..lines.len()).collect();
    places.sort_by_key(|&place| (bodies[place].model(), bodies[place].prompt(), place));
    let alike = |a: &usize, b: &usize| {
        let (a, b) = (&bodies[*a], &bodies[*b]);
        let equal = a.prompt().bytes().zip(b.prompt().bytes()).take(SHARED_BYTES).take_while(|(a, b)| a == b).count();
        a.model() == b.model() && equal == SHARED_BYTES
    };
    let mut groups: Vec<&[usize]> = places.chunk_by(alike).collect();
    let longest = |group: &[usize]| group.iter().map(|&place| bodies[place].length()).max();
    groups.sort_by_key(|group| std::cmp::Reverse(longest(group)));
    let order: Vec<usize> = groups.concat();
    drop(bodies);
    let mut lines: Vec<Option<Line>> = lines.into_iter().map(Some).collect();
    order.into_iter().filter_map(|place| lines[place].take()).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(number: u64, prompt: &str, max_tokens: u64) -> Line {
        let body = json!({"model": "m", "prompt": prompt, "max_tokens": max_tokens});
        Line { number, text: Ok(json!({"custom_id": number.to_string(), "body": body}).to_string()) }
    }

    #[test]
    fn prompts_that_begin_alike_meet_and_long_ones_come_first() {
        let shared = "The same beginning. ".repeat(20);
        let lines = vec![
            line(1, "short", 1),
            line(2, &format!("{shared} a"), 1),
            line(3, "short too, but it may get long", 1000),
            line(4, &format!("{shared} b"), 1),
            Line { number: 5, text: Err("no text".to_owned()) },
            line(6, "longer than short", 1),
            line(7, &shared, 1),
        ];
        let order: Vec<u64> = sorted(lines).iter().map(|line| line.number).collect();
        assert_eq!(order, [3, 2, 4, 7, 6, 1, 5]);
    }

    #[test]
    fn models_are_kept_apart() {
        let shared = "The same beginning. ".repeat(20);
        let with = |number, model: &str| {
            let text = json!({"custom_id": "x", "body": {"model": model, "prompt": shared}}).to_string();
            Line { number, text: Ok(text) }
        };
        let lines = vec![with(1, "a"), with(2, "b"), with(3, "a"), with(4, "b")];
        let order: Vec<u64> = sorted(lines).iter().map(|line| line.number).collect();
        assert_eq!(order, [1, 3, 2, 4]);
    }
}
