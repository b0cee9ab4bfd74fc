//! What a release needs: packages that build alone, free licences, known sources, a stable API.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use crate::deb::output;
use crate::steps::{Steps, Verdict, succeed};
use crate::{cargo, project};

/// Packages that are not published.
const INTERNAL: [&str; 3] = ["xenstore-tests", "xenstore-bench", "xtask"];

/// The registry that all dependencies come from.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Runs all checks.
pub fn steps(steps: &mut Steps) {
    steps.step("packages build from their archives", packages);
    steps.step("licences and sources of the dependencies", || match runs("deny") {
        true => succeed(&mut cargo(&["deny", "--all-features", "check", "licenses", "sources"])),
        false => dependencies().map_or_else(Verdict::Fail, |()| Verdict::Pass),
    });
    steps.step("API since the last release", || match last_tag() {
        None => Verdict::Skip("there is no release yet".into()),
        Some(_) if !runs("semver-checks") => {
            Verdict::Skip("missing: cargo install cargo-semver-checks".into())
        }
        Some(tag) => {
            let check = ["semver-checks", "--workspace", "--baseline-rev", tag.as_str()];
            succeed(cargo(&check).args(excluded()))
        }
    });
}

/// Builds every published package from its archive, in the order of the dependencies.
fn packages() -> Verdict {
    succeed(cargo(&["package", "--workspace", "--allow-dirty", "--quiet"]).args(excluded()))
}

fn excluded() -> impl Iterator<Item = &'static str> {
    INTERNAL.into_iter().flat_map(|package| ["--exclude", package])
}

/// Returns true if cargo has this subcommand.
fn runs(subcommand: &str) -> bool {
    let mut command = cargo(&[subcommand, "--version"]);
    let command = command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn last_tag() -> Option<String> {
    let mut git = Command::new("git");
    output(git.current_dir(project()).args(["describe", "--tags", "--abbrev=0"])).ok()
}

/// Checks licences and sources without cargo-deny.
///
/// # Errors
///
/// Names the first dependency whose licence is not in `.cargo/deny.toml`, or that is not from crates.io.
fn dependencies() -> Result<(), String> {
    let read = |name: &str| {
        fs::read_to_string(project().join(name)).map_err(|error| format!("{name}: {error}"))
    };
    let config = read(".cargo/deny.toml")?;
    let list = config.split_once("allow = [").and_then(|(_, rest)| rest.split_once(']'));
    let list = list.map_or("", |(list, _)| list);
    let allowed: BTreeSet<&str> = list.split('"').skip(1).step_by(2).collect();
    let tree = ["tree", "--workspace", "--all-features", "--locked", "--target", "all"];
    let format = ["-e", "normal,build,dev", "--prefix", "none", "-f", "{p}|{l}"];
    for line in output(cargo(&tree).args(format))?.lines() {
        let (package, licence) = line.split_once('|').unwrap_or((line, ""));
        let licence = licence.trim_end_matches(" (*)");
        if !line.is_empty() && !is_allowed(licence, &allowed) {
            return Err(format!("{package}: the licence {licence:?} is not in .cargo/deny.toml"));
        }
    }
    let sources = |text: &str| -> Vec<String> {
        let lines = text.lines().filter_map(|line| line.strip_prefix("source = "));
        lines.map(|source| source.trim_matches('"').to_owned()).collect()
    };
    match sources(&read("Cargo.lock")?).into_iter().find(|source| source != REGISTRY) {
        None => Ok(()),
        Some(source) => Err(format!("Cargo.lock: a dependency is from {source}")),
    }
}

/// Returns true if a licence expression can be met with licences of this list.
fn is_allowed(expression: &str, allowed: &BTreeSet<&str>) -> bool {
    let plain = expression.replace(['(', ')'], "").replace('/', " OR ");
    let is_listed = |name: &str| allowed.contains(name.trim());
    // In the expressions of our dependencies, AND joins what is in parentheses.
    plain.split(" AND ").all(|part| part.split(" OR ").any(is_listed))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a licence outside of the list is accepted, or a choice with a listed one refused.
    #[test]
    fn licence_is_allowed_if_each_part_has_a_listed_choice() {
        let allowed = BTreeSet::from(["MIT", "Unicode-3.0"]);
        for good in
            ["MIT", "GPL-3.0 OR MIT", "(Apache-2.0 OR MIT) AND Unicode-3.0", "MIT/Apache-2.0"]
        {
            assert!(is_allowed(good, &allowed), "{good}");
        }
        for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "Apache-2.0 WITH LLVM-exception"] {
            assert!(!is_allowed(bad, &allowed), "{bad}");
        }
    }

    // Fails if a dependency has another licence or source than deny.toml allows.
    #[test]
    fn dependencies_have_allowed_licences_and_sources() {
        dependencies().unwrap();
    }

    // Fails if a published package lacks what people look for first.
    #[test]
    fn published_packages_have_readme_licences_and_metadata() {
        let manifest = fs::read_to_string(project().join("Cargo.toml")).unwrap();
        let members = manifest.split_once("members = [").unwrap().1.split_once(']').unwrap().0;
        let members: Vec<&str> = members.split('"').filter(|text| !text.contains(',')).collect();
        assert!(members.len() > 8);
        for member in members.into_iter().filter(|member| !member.trim().is_empty()) {
            let dir = project().join(member);
            let text = fs::read_to_string(dir.join("Cargo.toml")).unwrap();
            if text.contains("publish = false") {
                continue;
            }
            for key in ["description", "repository", "readme", "keywords", "categories"] {
                assert!(text.contains(&format!("\n{key}")), "{member}: {key}");
            }
            for file in ["README.md", "LICENSE-MIT", "LICENSE-APACHE"] {
                assert!(fs::read_to_string(dir.join(file)).is_ok(), "{member}: {file}");
            }
        }
    }
}
