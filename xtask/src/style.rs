//! `cargo xtask style`: checks text against `docs/style.md`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::project;
use crate::steps::{Steps, Verdict, succeed};

/// Type names with one meaning in several places, such as an async and a blocking form.
const SAME_CONCEPT: &[&str] =
    &["Client", "Connection", "Domains", "Readme", "Transaction", "Tree", "Watch"];

/// Type names with several meanings. New ones may not be added.
const NOT_YET_UNIQUE: &[&str] =
    &["Access", "Entry", "Failure", "Listener", "Queue", "Shared", "Socket", "Source", "State"];

/// Folders at the top level. A path in backticks that begins with one of them must exist.
const FOLDERS: &[&str] =
    &["protocol", "store", "transport", "server", "client", "tests", "fuzz", "xtask", "docs"];

/// Folders of the Xen sources that begin like ours.
const OF_XEN: &[&str] = &["docs/misc/", "docs/designs/"];

/// Characters in a line of text. Tables and lines with an address may be longer.
const LINE: usize = 120;

/// Runs the check, and the spelling checker if it is installed.
pub fn steps(steps: &mut Steps) {
    steps.step("style", check);
    steps.step("spelling", || match Command::new("typos").arg("--version").output() {
        Ok(_) => succeed(Command::new("typos").current_dir(project())),
        Err(_) => Verdict::Skip("typos is not installed: cargo install typos-cli".into()),
    });
}

/// `cargo xtask style`.
pub fn run() -> ExitCode {
    let mut all = Steps::default();
    steps(&mut all);
    all.summary()
}

/// Checks all sources and pages, and prints `FILE:LINE: reason` for each finding.
pub fn check() -> Verdict {
    let forbidden = match forbidden() {
        Ok(forbidden) => forbidden,
        Err(error) => return Verdict::Fail(format!("docs/style-forbidden.txt: {error}")),
    };
    let mut findings = Vec::new();
    for path in files(project()) {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let name = path.strip_prefix(project()).unwrap_or(&path).to_path_buf();
        let file = File { name, page: path.extension().is_some_and(|end| end == "md"), text };
        file.check(&forbidden, &mut findings);
    }
    log_lines(&mut findings);
    type_names(&mut findings);
    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => Verdict::Pass,
        count => Verdict::Fail(format!("{count} findings; docs/style.md has the rules")),
    }
}

/// Reports the lines in the tables "Log lines" of the pages that no source of the daemon contains.
fn log_lines(findings: &mut Vec<String>) {
    let sources = ["server/src", "store/src", "transport"].map(|dir| files(&project().join(dir)));
    let texts = sources.iter().flatten().filter_map(|path| fs::read_to_string(path).ok());
    let joined: Vec<String> = texts.map(|text| text.replace("\\\n", " ")).collect();
    let source = words(&joined.join(" "));
    for page in ["docs/operating.md", "docs/live-update.md"] {
        let text = fs::read_to_string(project().join(page)).unwrap_or_default();
        let lines = text.lines().enumerate().skip_while(|(_, line)| *line != "## Log lines");
        for (at, row) in lines.filter(|(_, line)| line.starts_with("| `")) {
            let cell = row.split(" | ").next().unwrap_or(row);
            for fragment in cell.split('`').skip(1).step_by(2).flat_map(fragments) {
                if !source.contains(&fragment) {
                    findings.push(format!("{page}:{}: no such log line: {fragment}", at + 1));
                }
            }
        }
    }
}

/// Reports type names that are defined in several places of the released crates.
fn type_names(findings: &mut Vec<String>) {
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for dir in ["protocol", "store", "transport", "server", "client"] {
        for path in files(&project().join(dir)) {
            let name = path.strip_prefix(project()).unwrap_or(&path).display().to_string();
            let tests =
                ["/tests", "/simulation/", "/model.rs"].iter().any(|part| name.contains(part));
            if tests || !name.contains("/src/") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap_or_default();
            for (at, line) in text.lines().enumerate() {
                if let Some(defined) = defined_type(line) {
                    let place = format!("{name}:{}", at + 1);
                    places.entry(defined.into()).or_default().push(place);
                }
            }
        }
    }
    let known = |name: &str| SAME_CONCEPT.contains(&name) || NOT_YET_UNIQUE.contains(&name);
    for (name, places) in places {
        if places.len() > 1 && !known(&name) {
            findings.push(format!("{}: type {name} is also defined at {}", places[0], places[1]));
        }
    }
}

/// The type that a line defines at the top level of a module.
fn defined_type(line: &str) -> Option<&str> {
    let mut words = line.split([' ', '<', '(', ';', '{', ':']).filter(|word| !word.is_empty());
    let mut word = words.next().filter(|_| !line.starts_with(' '))?;
    while word.starts_with("pub") || ["crate)", "super)"].contains(&word) {
        word = words.next()?;
    }
    ["struct", "enum", "trait"].contains(&word).then(|| words.next())?
}

/// The fixed parts of a log line as a page shows it: `N`, `M`, `PATH` and `…` stand for values.
fn fragments(line: &str) -> Vec<String> {
    let marked = line
        .split(' ')
        .map(|word| if ["N", "M", "PATH", "conn"].contains(&word) { "…" } else { word });
    let marked = marked.collect::<Vec<_>>().join(" ");
    marked.split(['…', '"', '=', '/', ':']).map(words).filter(|part| part.len() > 4).collect()
}

/// `text` with single spaces.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The forbidden phrases, each with advice.
fn forbidden() -> std::io::Result<Vec<(String, String)>> {
    let text = fs::read_to_string(project().join("docs/style-forbidden.txt"))?;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let pairs = lines.filter_map(|line| line.split_once("=>"));
    Ok(pairs.map(|(phrase, advice)| (phrase.trim().into(), advice.trim().into())).collect())
}

/// All `*.rs` and `*.md` files below `dir`, sorted.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut stack = vec![dir.to_path_buf()];
    while let Some(dir) = stack.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name();
            let hidden = name.to_string_lossy().starts_with('.');
            if path.is_dir() {
                if !hidden && name != "target" && !path.is_symlink() {
                    stack.push(path);
                }
            } else if path.extension().is_some_and(|end| end == "rs" || end == "md") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A source file or a page.
struct File {
    name: PathBuf,
    page: bool,
    text: String,
}

impl File {
    fn check(&self, forbidden: &[(String, String)], findings: &mut Vec<String>) {
        let mut report = |line: usize, what: String| {
            findings.push(format!("{}:{line}: {what}", self.name.display()));
        };
        for (at, line) in self.text.lines().enumerate() {
            let prose = self.page || line.trim_start().starts_with("//");
            let free = line.starts_with('|') || line.contains("://");
            if prose && !free && line.chars().count() > LINE {
                report(at + 1, format!("more than {LINE} characters"));
            }
            if prose {
                for path in missing_paths(line) {
                    report(at + 1, format!("no such file or directory: {path}"));
                }
            }
            if self.page {
                for command in missing_commands(line) {
                    report(at + 1, format!("no such command or test: {command}"));
                }
                for target in broken_links(&project().join(&self.name), line) {
                    report(at + 1, format!("no such page or heading: {target}"));
                }
            }
        }
        for paragraph in paragraphs(&self.text, self.page) {
            for (phrase, advice) in forbidden {
                for line in paragraph.find(phrase) {
                    report(line, format!("\"{phrase}\": {advice}"));
                }
            }
        }
    }
}

/// Text that belongs together, in lower case, with single spaces, and the line of each byte.
#[derive(Default)]
struct Paragraph {
    text: String,
    lines: Vec<usize>,
}

impl Paragraph {
    fn push(&mut self, line: &str, number: usize) {
        for c in line.chars().flat_map(char::to_lowercase).chain([' ']) {
            let c = if c.is_whitespace() || c == '_' { ' ' } else { c };
            if c != ' ' || !self.text.ends_with(' ') {
                self.text.push(c);
                self.lines.resize(self.text.len(), number);
            }
        }
    }

    /// The lines at which `phrase` begins, as whole words.
    fn find(&self, phrase: &str) -> Vec<usize> {
        let word = |c: char| c.is_alphanumeric() || c == '-';
        let whole = |at: usize| {
            !self.text[..at].ends_with(word) && !self.text[at + phrase.len()..].starts_with(word)
        };
        let found = self.text.match_indices(phrase).filter(|(at, _)| whole(*at));
        found.map(|(at, _)| self.lines[at]).collect()
    }
}

/// Splits a file: the lines of a comment are one paragraph, as are those of a continued string and
/// those between two empty lines of a page. Leaves out what is between `<!-- style: off -->` and
/// `<!-- style: on -->`.
fn paragraphs(text: &str, page: bool) -> Vec<Paragraph> {
    let mut all = vec![Paragraph::default()];
    let (mut was_comment, mut continued, mut off) = (false, false, false);
    for (at, line) in text.lines().enumerate() {
        if page && line.contains("<!-- style:") {
            off = line.contains("off");
        }
        let trimmed = line.trim();
        let comment = trimmed.starts_with("//");
        let body = if comment { trimmed.trim_start_matches(['/', '!']) } else { trimmed };
        let joined = if page { !body.is_empty() } else { comment && was_comment || continued };
        if !joined {
            all.push(Paragraph::default());
        }
        continued = !page && !comment && body.ends_with('\\');
        was_comment = comment;
        if let Some(paragraph) = all.last_mut().filter(|_| !off) {
            paragraph.push(body.trim_end_matches('\\'), at + 1);
        }
    }
    all
}

/// The paths in backticks that begin with a folder of the project and do not exist.
fn missing_paths(line: &str) -> Vec<String> {
    let spans = line.split('`').skip(1).step_by(2);
    let paths = spans.filter_map(|span| {
        let path = span.split([' ', '*', '{', '<', ':', '#', '…']).next()?;
        let (folder, _) = path.split_once('/')?;
        let ours = FOLDERS.contains(&folder) && !OF_XEN.iter().any(|xen| path.starts_with(xen));
        (ours && !project().join(path).exists()).then(|| path.to_owned())
    });
    paths.collect()
}

/// The commands of `cargo xtask`, and the tests, that a line names and that do not exist.
fn missing_commands(line: &str) -> Vec<String> {
    let word = |rest: &str| {
        rest.split(|c: char| !c.is_alphanumeric() && c != '-').next().map(str::to_owned)
    };
    let known = |name: &str| include_str!("main.rs").contains(&format!("Some(\"{name}\""));
    let xtask = line.split("cargo xtask ").skip(1).filter_map(word);
    let xtask = xtask.filter(|name| name.starts_with(|c: char| c.is_lowercase()) && !known(name));
    let dirs = ["protocol", "store", "transport", "server", "server/embedded", "client", "tests"];
    let exists = |name: &str| {
        let dirs = dirs.iter().map(|dir| project().join(dir).join("tests").join(name));
        dirs.into_iter()
            .any(|path| path.join("main.rs").exists() || path.with_extension("rs").exists())
    };
    let tests = line.split("--test ").skip(1).filter_map(word).filter(|name| !exists(name));
    xtask
        .map(|name| format!("cargo xtask {name}"))
        .chain(tests.map(|name| format!("--test {name}")))
        .collect()
}

/// The targets of links in `line` of the page `page` that do not exist.
fn broken_links(page: &Path, line: &str) -> Vec<String> {
    let targets = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let broken = targets.filter(|target| {
        if target.contains("://") {
            return false;
        }
        let (path, heading) = target.split_once('#').unwrap_or((target, ""));
        let path = if path.is_empty() {
            page.to_path_buf()
        } else {
            page.parent().unwrap_or(page).join(path)
        };
        let has = |text: String| text.lines().any(|line| slug(line) == Some(heading.into()));
        !path.exists() || !heading.is_empty() && !fs::read_to_string(&path).is_ok_and(has)
    });
    broken.map(str::to_owned).collect()
}

/// The name by which links refer to a heading; `None` if `line` is none.
fn slug(line: &str) -> Option<String> {
    let title = line.strip_prefix('#')?.trim_start_matches('#').trim();
    let kept = title.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
    Some(kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str, page: bool, phrase: &str) -> Vec<usize> {
        paragraphs(text, page).iter().flat_map(|paragraph| paragraph.find(phrase)).collect()
    }

    #[test]
    fn phrase_matches_across_lines_of_a_comment() {
        assert_eq!(found("let a;\n/// x left\n/// over\n", false, "left over"), [2]);
        assert_eq!(found("\"x left \\\n   over\"", false, "left over"), [1]);
        assert_eq!(found("It left\nover.\n", true, "left over"), [1]);
    }

    #[test]
    fn phrase_matches_whole_words_and_identifiers() {
        assert_eq!(found("fn is_left_over() {}", false, "left over"), [1]);
        assert!(found("// reheated heated-x", false, "heated").is_empty());
        assert!(found("left\n\nover", true, "left over").is_empty());
        assert!(
            found("<!-- style: off -->\nheated\n<!-- style: on -->", true, "heated").is_empty()
        );
    }

    #[test]
    fn missing_commands_are_found() {
        assert!(missing_commands("`cargo xtask test`, `cargo test --test limits`").is_empty());
        let missing = missing_commands("`cargo xtask nothing`, `--test nothing`, `cargo xtask`");
        assert_eq!(missing, ["cargo xtask nothing", "--test nothing"]);
    }

    #[test]
    fn type_definitions_are_found() {
        assert_eq!(defined_type("pub(crate) struct Open<'a> {"), Some("Open"));
        assert_eq!(defined_type("enum Kind {"), Some("Kind"));
        assert_eq!(defined_type("    struct Inner;"), None);
    }

    #[test]
    fn fixed_parts_of_a_log_line_are_found() {
        let parts = ["domain", "has reached its quota"];
        assert_eq!(fragments("domain N has reached its quota …"), parts);
    }

    #[test]
    fn missing_path_and_heading_are_found() {
        assert!(missing_paths("`xtask/src/style.rs`, `store/src/*`, `docs/misc/x`").is_empty());
        assert_eq!(missing_paths("see `xtask/no.rs`"), ["xtask/no.rs"]);
        assert_eq!(slug("## Log lines, `a`"), Some("log-lines-a".into()));
        let page = project().join("README.md");
        assert_eq!(
            broken_links(&page, "[a](docs/no.md) [b](https://a.b) [c](#map)"),
            ["docs/no.md"]
        );
    }
}
