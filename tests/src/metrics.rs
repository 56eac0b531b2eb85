//! What `/metrics` says.

/// A page in Prometheus' text format.
#[derive(Debug, Clone)]
pub struct Metrics {
    text: String,
}

impl Metrics {
    /// Of the page `text`.
    pub fn new(text: String) -> Self {
        Self { text }
    }

    /// The page.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The sum of the samples called `name` that have these labels; 0 if there are none.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let samples = self.text.lines().filter_map(|line| {
            let (sample, value) = line.rsplit_once(' ')?;
            let (found, rest) = sample.split_once('{').unwrap_or((sample, ""));
            let has = |(key, value): &(&str, &str)| rest.contains(&format!("{key}=\"{value}\""));
            (found == name && labels.iter().all(has)).then(|| value.parse::<f64>().ok())?
        });
        samples.sum()
    }

    /// Whether there is a sample called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.text.lines().any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_add_up_over_the_labels_not_named() {
        let page = "# TYPE a counter\na{x=\"1\",y=\"2\"} 3\na{x=\"2\",y=\"2\"} 4\nab 9\n";
        let metrics = Metrics::new(page.to_owned());
        assert_eq!(metrics.value("a", &[]), 7.0);
        assert_eq!(metrics.value("a", &[("x", "1")]), 3.0);
        assert_eq!(metrics.value("ab", &[]), 9.0);
        assert_eq!(metrics.value("b", &[]), 0.0);
        assert!(metrics.has("a") && !metrics.has("b"));
    }
}
