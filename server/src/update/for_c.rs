//! The options that C xenstored takes, which are less than ours.

use std::ffi::OsString;

/// Options of C xenstored 4.17 that take a value.
const VALUES: [(char, &str); 13] = [
    ('F', "pid-file"),
    ('T', "trace-file"),
    ('E', "entry-nb"),
    ('S', "entry-size"),
    ('W', "watch-nb"),
    ('t', "transaction"),
    ('A', "perm-nb"),
    ('M', "path-max"),
    ('Q', "quota"),
    ('q', "quota-soft"),
    ('w', "timeout"),
    ('m', "master-domid"),
    ('p', "priv-domid"),
];
/// And those that do not.
const FLAGS: [(char, &str); 5] = [
    ('D', "no-domain-init"),
    ('K', "keep-orphans"),
    ('N', "no-fork"),
    ('R', "no-recovery"),
    ('V', "verbose"),
];
/// Quotas that it can be told to have; others end it.
const QUOTAS: [&str; 3] = ["memory", "outstanding", "transaction-nodes"];
/// In place of 0, which is no limit to us and one of nothing to it.
const NO_LIMIT: &str = "2000000000";

/// Of our options those that C xenstored has: with any other it would not start.
pub(super) fn options(ours: &[OsString]) -> Vec<OsString> {
    let mut theirs: Vec<OsString> = Vec::new();
    let mut ours = ours.iter().map(|arg| arg.to_string_lossy().into_owned());
    while let Some(arg) = ours.next() {
        let (name, mut value) = match arg.strip_prefix("--") {
            Some(long) => match long.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (long.to_owned(), None),
            },
            None if !arg.starts_with('-') => continue,
            None => {
                let rest = arg.get(2..).filter(|rest| !rest.is_empty());
                (arg.get(1..2).unwrap_or_default().to_owned(), rest.map(str::to_owned))
            }
        };
        let is = |(short, long): &&(char, &str)| name == *long || name == short.to_string();
        if let Some((_, flag)) = FLAGS.iter().find(is) {
            theirs.push(format!("--{flag}").into());
        } else if let Some((_, option)) = VALUES.iter().find(is) {
            value = value.or_else(|| ours.next());
            if let Some(value) = value.and_then(|value| limit(option, &value)) {
                theirs.extend([format!("--{option}").into(), value.into()]);
            }
        }
    }
    theirs.push("-U".into());
    theirs
}

/// A value as C xenstored means it; nothing if it does not know what it is of.
fn limit(option: &str, value: &str) -> Option<String> {
    let unlimited = |value: &str| if value == "0" { NO_LIMIT } else { value }.to_owned();
    match option {
        "quota" | "quota-soft" => {
            let (name, value) = value.split_once('=')?;
            QUOTAS.contains(&name).then(|| format!("{name}={}", unlimited(value)))
        }
        "pid-file" | "trace-file" | "timeout" | "master-domid" | "priv-domid" => Some(value.into()),
        _ => Some(unlimited(value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if C xenstored is given an option that ends it, or loses one that it has.
    #[test]
    fn only_options_of_c_xenstored_are_given_to_it() {
        let ours = "-N --pretend-xen /tmp -E 0 -S3 --socket=/s --watch-nb=5 -Q nodes=9 -Q memory=0 \
                    --require-xen --quota outstanding=7 --config-file /c -F /run/pid -t 4";
        let ours: Vec<OsString> = ours.split_ascii_whitespace().map(OsString::from).collect();
        let theirs = "--no-fork --entry-nb 2000000000 --entry-size 3 --watch-nb 5 --quota \
                      memory=2000000000 --quota outstanding=7 --pid-file /run/pid --transaction 4 -U";
        let theirs: Vec<OsString> = theirs.split_ascii_whitespace().map(OsString::from).collect();
        assert_eq!(options(&ours), theirs);
    }
}
