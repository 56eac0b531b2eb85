//! The workspace's own files.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The workspace's directory.
pub fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the package lies in the workspace").to_owned()
}

/// The text of the file at `path` from the workspace's directory.
///
/// # Panics
/// When it can't be read.
#[track_caller]
pub fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// One file of source code.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its path from the workspace's directory, with slashes.
    pub path: String,
    /// Its text.
    pub text: String,
}

/// All files under `folder` whose names end in one of `endings`, in order.
///
/// # Panics
/// When they can't be read.
pub fn files(folder: &str, endings: &[&str]) -> Vec<Source> {
    let mut found = Vec::new();
    collect(&root(), &root().join(folder), endings, &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn collect(root: &Path, folder: &Path, endings: &[&str], found: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if !name.starts_with('.') && !["target", "venv", "__pycache__"].contains(&name.as_str()) {
                collect(root, &path, endings, found);
            }
        } else if endings.iter().any(|ending| name.ends_with(ending)) {
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let path = path.strip_prefix(root).expect("it lies in the workspace");
            found.push(Source { path: path.to_string_lossy().replace('\\', "/"), text });
        }
    }
}

/// All Rust files under `folder`.
pub fn rust(folder: &str) -> Vec<Source> {
    files(folder, &[".rs"])
}

impl Source {
    /// Whether the file as a whole belongs to tests.
    pub fn is_test(&self) -> bool {
        let file = self.path.rsplit('/').next().unwrap_or_default();
        let test_files = ["tests.rs", "testing.rs", "test_support.rs", "check.rs"];
        self.path.split('/').any(|part| part == "tests" || part == "benches") || test_files.contains(&file)
    }

    /// The code that ships: no comments, no text in quotes, no tests at the file's end.
    pub fn code(&self) -> String {
        without_comments_and_text(self.shipped())
    }

    /// The file without the tests at its end.
    pub fn shipped(&self) -> &str {
        self.text.find("#[cfg(test)]\nmod tests {").map_or(&self.text, |end| &self.text[..end])
    }
}

/// Blanks out comments, strings and characters; good enough for code that rustfmt has seen.
fn without_comments_and_text(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(hashes) = raw_string(rest) {
            let close = format!("\"{}", "#".repeat(hashes));
            let body = hashes + 2;
            rest[body..].find(&close).map_or(rest.len(), |end| body + end + close.len())
        } else if first == '"' {
            string_length(rest)
        } else if first == '\'' {
            character_length(rest)
        } else {
            0
        };
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..skipped].chars().filter(|&c| c == '\n'));
            code.push(' ');
            rest = &rest[skipped..];
        }
    }
    code
}

/// The number of hashes of a raw string that begins here.
fn raw_string(text: &str) -> Option<usize> {
    let after = text.strip_prefix('r')?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then_some(hashes)
}

fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (index, letter) in text.char_indices().skip(1) {
        match letter {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return index + 1,
            _ => {}
        }
    }
    text.len()
}

/// Of a character literal; 0 for a lifetime.
fn character_length(text: &str) -> usize {
    let mut letters = text.char_indices().skip(1);
    match letters.next() {
        Some((_, '\\')) => text[2..].find('\'').map_or(0, |end| if end == 0 { 4 } else { end + 3 }),
        Some(_) => letters.next().filter(|(_, letter)| *letter == '\'').map_or(0, |(index, _)| index + 1),
        None => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_left() {
        let text = "let a = \"unsafe \\\" b\"; // unsafe\nlet c = r#\"unsafe\"#; let d = '\"'; let e: &'a str = f('\\'', '\\n');";
        let code = without_comments_and_text(text);
        assert!(!code.contains("unsafe"), "{code}");
        assert!(code.contains("let c =") && code.contains("let e: &'a str = f("), "{code}");
        assert_eq!(code.lines().count(), text.lines().count());
    }

    #[test]
    fn tests_do_not_ship() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\n".to_owned();
        let source = Source { path: "engine/src/a.rs".to_owned(), text };
        assert!(source.code().contains("fn a") && !source.code().contains("fn b"));
        assert!(!source.is_test());
    }
}
