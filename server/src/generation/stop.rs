//! Finds stop strings in text that arrives in pieces.
//!
//! Text that might be the beginning of a stop string is held back until it is known whether it is one, so
//! what is released never has to be taken back. The result is the same however the text is cut into pieces:
//! that of looking after each character.

use std::sync::Arc;

/// The search of one choice.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Arc<[String]>,
    include_stop: bool,
    held: String,
}

/// What a piece of text led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Text that is now certain.
    pub text: String,
    /// The stop string that was completed, if one was: nothing may follow `text`.
    pub stop: Option<String>,
}

impl StopMatcher {
    /// Looks for `stops`, which are not empty strings. `include_stop` keeps the stop string in the text.
    pub fn new(stops: Arc<[String]>, include_stop: bool) -> Self {
        Self { stops, include_stop, held: String::new() }
    }

    /// Takes the next piece. While not `armed`, stop strings may pass.
    pub fn push(&mut self, piece: &str, armed: bool) -> Found {
        if self.stops.is_empty() {
            return Found { text: piece.to_owned(), stop: None };
        }
        let new_from = self.held.len();
        self.held.push_str(piece);
        if armed && let Some((start, stop)) = self.first_match(new_from) {
            let end = if self.include_stop { start + stop.len() } else { start };
            self.held.truncate(end);
            return Found { text: std::mem::take(&mut self.held), stop: Some(stop) };
        }
        let certain = self.held.len() - self.longest_beginning();
        let rest = self.held.split_off(certain);
        Found { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// The text has ended: what was held back is no stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The match that is complete first, and of those the longest: its start, and the stop string.
    /// Nothing before `new_from` can complete one.
    fn first_match(&self, new_from: usize) -> Option<(usize, String)> {
        let ends = |stop: &String| {
            let from = ceil_char_boundary(&self.held, (new_from + 1).saturating_sub(stop.len()));
            self.held[from..].find(stop.as_str()).map(|start| (from + start + stop.len(), from + start, stop.clone()))
        };
        let first = self.stops.iter().filter_map(ends).min_by_key(|(end, start, _)| (*end, *start))?;
        Some((first.1, first.2))
    }

    /// The length of the longest end of the held text that is a proper beginning of a stop string.
    fn longest_beginning(&self) -> usize {
        let beginning = |stop: &String| {
            (1..stop.len().min(self.held.len() + 1))
                .rev()
                .find(|&length| stop.is_char_boundary(length) && self.held.ends_with(&stop[..length]))
        };
        self.stops.iter().filter_map(beginning).max().unwrap_or(0)
    }
}

fn ceil_char_boundary(text: &str, index: usize) -> usize {
    (index..text.len()).find(|&index| text.is_char_boundary(index)).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matcher(stops: &[&str], include_stop: bool) -> StopMatcher {
        StopMatcher::new(stops.iter().map(|&stop| stop.to_owned()).collect(), include_stop)
    }

    /// The definition: after each character, does the text end with a stop string?
    fn reference(text: &str, stops: &[String], include_stop: bool) -> (String, Option<String>) {
        for (index, letter) in text.char_indices() {
            let so_far = &text[..index + letter.len_utf8()];
            let complete = stops.iter().filter(|stop| so_far.ends_with(stop.as_str())).max_by_key(|stop| stop.len());
            if let Some(stop) = complete {
                let end = if include_stop { so_far.len() } else { so_far.len() - stop.len() };
                return (so_far[..end].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    fn run(pieces: &[String], stops: &[String], include_stop: bool) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.into(), include_stop);
        let mut text = String::new();
        for piece in pieces {
            let found = matcher.push(piece, true);
            text.push_str(&found.text);
            if found.stop.is_some() {
                return (text, found.stop);
            }
        }
        text.push_str(&matcher.finish());
        (text, None)
    }

    #[test]
    fn text_that_may_become_a_stop_string_is_held_back() {
        let mut matcher = matcher(&["</end>"], false);
        assert_eq!(matcher.push("so </en", true).text, "so ");
        assert_eq!(matcher.push("", true).text, "");
        assert_eq!(matcher.push("emy", true).text, "</enemy");
        assert_eq!(matcher.push("</end> more", true), Found { text: String::new(), stop: Some("</end>".to_owned()) });
    }

    #[test]
    fn held_text_comes_out_at_the_end() {
        let mut matcher = matcher(&["abc"], false);
        assert_eq!(matcher.push("xab", true).text, "x");
        assert_eq!(matcher.finish(), "ab");
    }

    #[test]
    fn included_when_asked_for() {
        let mut matcher = matcher(&["abc"], true);
        assert_eq!(matcher.push("xab", true).text, "x");
        assert_eq!(matcher.push("cd", true), Found { text: "abc".to_owned(), stop: Some("abc".to_owned()) });
    }

    #[test]
    fn unarmed_text_passes_but_may_begin_a_later_stop() {
        let mut matcher = matcher(&["aab"], false);
        assert_eq!(matcher.push("aab a", false), Found { text: "aab ".to_owned(), stop: None });
        assert_eq!(matcher.push("ab", true), Found { text: String::new(), stop: Some("aab".to_owned()) });
    }

    proptest! {
        /// Any text, any cuts, any stop strings: the same as looking after each character.
        #[test]
        fn independent_of_the_cuts(
            pieces in prop::collection::vec("[abé🙂]{0,4}", 0..12),
            stops in prop::collection::vec("[abé🙂]{1,4}", 0..4),
            include_stop: bool,
        ) {
            let whole = pieces.concat();
            prop_assert_eq!(run(&pieces, &stops, include_stop), reference(&whole, &stops, include_stop));
        }

        /// What is held back is never longer than the longest stop string lacks.
        #[test]
        fn holds_back_no_more_than_needed(
            pieces in prop::collection::vec("[ab]{0,4}", 0..12),
            stops in prop::collection::vec("[ab]{1,5}", 1..4),
        ) {
            let mut matcher = StopMatcher::new(stops.clone().into(), false);
            let longest = stops.iter().map(String::len).max().unwrap_or(0);
            for piece in &pieces {
                if matcher.push(piece, true).stop.is_some() {
                    break;
                }
                prop_assert!(matcher.held.len() < longest);
            }
        }
    }
}
