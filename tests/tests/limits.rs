//! The project's rules that a program can check.

use std::collections::{BTreeMap, BTreeSet};
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

// Fails if a file is too long to be read at once.
#[test]
fn no_file_is_over_600_lines() {
    for path in sources() {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 600, "{} has {lines} lines", path.display());
    }
}

/// Functions that may be longer: tables of cases and of record types.
const LONG: &[&str] = &["damage_is_noticed", "judge", "run", "take_record"];

/// The name of the function that begins at `line`, and the indentation of its end.
fn function(line: &str) -> Option<(&str, &str)> {
    let body = line.trim_start();
    let (before, after) = body.split_once("fn ").filter(|_| !body.starts_with("//"))?;
    let words = ["pub", "pub(crate)", "pub(super)", "const", "async", "extern", "\"C\""];
    let declares = before.split_whitespace().all(|word| words.contains(&word));
    let name = after.split(['(', '<']).next()?;
    declares.then_some((name, &line[..line.len() - body.len()]))
}

// Fails if a function is too long to be read at once.
#[test]
fn no_function_is_over_70_lines() {
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let Some((name, indent)) = function(line).filter(|(name, _)| !LONG.contains(name))
            else {
                continue;
            };
            let ends = |line: &&str| line.strip_prefix(indent).is_some_and(|l| l.starts_with('}'));
            let head = lines[at..].iter().find(|line| line.ends_with([';', '{', '}']));
            let has_body = head.is_some_and(|line| line.ends_with('{'));
            let count = lines[at..].iter().position(ends).filter(|_| has_body).unwrap_or(0) + 1;
            assert!(count <= 70, "{}:{}: {name} has {count} lines", path.display(), at + 1);
        }
    }
}

// Fails if unsafe code is outside of its module, or has no reason.
#[test]
fn unsafe_code_is_in_its_module_and_has_reasons() {
    let word = ["un", "safe"].concat();
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let starts_here = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            if !starts_here.into_iter().any(|w| w == word) {
                continue;
            }
            let place = format!("{}:{}", path.display(), at + 1);
            assert!(path.parent().unwrap().ends_with("transport/sys/src/raw"), "{place}");
            // A block or an impl states why it is sound, a function what its caller must ensure.
            let above =
                lines[..at].iter().rev().take(6).any(|l| l.to_lowercase().contains("safety"));
            let declares = code.contains("fn output_from_ptr");
            assert!(above || declares, "{place} has no reason");
        }
    }
}

/// The rooms of the store that the files of each room import: `crate::room::…`.
fn imports_of_rooms() -> BTreeMap<String, BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("store/src");
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in sources() {
        let Ok(inner) = path.strip_prefix(&root) else { continue };
        let first = inner.iter().next().unwrap().to_str().unwrap();
        let room = first.trim_end_matches(".rs").to_owned();
        if room == "lib" {
            continue;
        }
        let used = imports.entry(room.clone()).or_default();
        for line in fs::read_to_string(&path).unwrap().lines() {
            let code = line.split("//").next().unwrap_or_default();
            for after in code.split("crate::").skip(1) {
                let end = after.find(|c: char| !c.is_lowercase() && c != '_');
                used.insert(after[..end.unwrap_or(after.len())].to_owned());
            }
        }
        used.remove(&room);
        used.remove("");
    }
    imports
}

// Fails if two rooms of the store import each other, directly or through others.
#[test]
fn rooms_of_the_store_import_no_circle() {
    let mut imports = imports_of_rooms();
    assert!(imports.len() >= 8 && imports["engine"].len() >= 6, "{imports:?}");
    while !imports.is_empty() {
        let lowest: Vec<String> = imports
            .iter()
            .filter(|(_, used)| !used.iter().any(|room| imports.contains_key(room)))
            .map(|(room, _)| room.clone())
            .collect();
        assert!(!lowest.is_empty(), "circle among {imports:?}");
        for room in lowest {
            imports.remove(&room);
        }
    }
}
