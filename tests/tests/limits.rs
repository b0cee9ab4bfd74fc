//! The project's own rules that a program can check.

use std::fs;
use std::path::{Path, PathBuf};

fn sources() -> Vec<PathBuf> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = Vec::new();
    let folders = ["protocol", "store", "transport", "server", "client", "tests", "xtask", "fuzz"];
    let mut stack: Vec<PathBuf> = folders.iter().map(|name| project.join(name)).collect();
    while let Some(dir) = stack.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                stack.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }
    assert!(found.len() > 50);
    found
}

// Fails if a file has outgrown what can be taken in at once.
#[test]
fn no_file_is_over_600_lines() {
    for path in sources() {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 600, "{} has {lines} lines", path.display());
    }
}

// Fails if unsafe code appears; there is no module for it yet.
#[test]
fn no_unsafe_code() {
    let word = ["un", "safe"].concat();
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        let found = text.lines().any(|line| {
            line.split("//").next().unwrap_or_default().split_whitespace().any(|w| w == word)
        });
        assert!(!found, "{}", path.display());
    }
}
