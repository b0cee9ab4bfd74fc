//! C xenstored as the destination: its options and the version of its migration stream.

use std::ffi::OsString;
use std::path::Path;

use xenstore_store::CFormat;

use super::error::ProgramError;

/// In the help of C xenstored since Xen 4.21, the first to read version 2 of the stream.
const XEN_4_21: &str = "--master-domid";
/// The name of a request that C xenstored has since Xen 4.22, in its table of these.
const XEN_4_22: &[u8] = b"SET_QUOTA\0";

/// A C xenstored, and the version of the stream for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) format: CFormat,
    pub(super) version: u32,
}

impl Target {
    /// Returns the format that the program in this file, with this help, reads. `wanted` is the version
    /// that the requester selects; by default it is the newest that the program reads.
    ///
    /// # Errors
    ///
    /// Fails if the program does not read version `wanted`: it would exit.
    pub(super) fn of(file: &Path, help: &str, wanted: Option<u32>) -> Result<Target, ProgramError> {
        let format = match help.contains(XEN_4_21) {
            true if has(file, XEN_4_22) => CFormat::XEN_4_22,
            true => CFormat::XEN_4_21,
            false => CFormat::XEN_4_20,
        };
        let newest = format.version;
        match wanted {
            Some(wanted) if wanted > newest => Err(ProgramError::StreamVersion { wanted, newest }),
            wanted => Ok(Target { format, version: wanted.unwrap_or(newest) }),
        }
    }
}

/// Returns true if a program contains this name: the file or, if it is a script, a file whose path is a
/// word of it. A path that the script computes is not found.
fn has(file: &Path, name: &[u8]) -> bool {
    let Ok(bytes) = std::fs::read(file) else { return false };
    let contains = |bytes: &[u8]| bytes.windows(name.len()).any(|window| window == name);
    let script = bytes.strip_prefix(b"#!").map(String::from_utf8_lossy);
    match script {
        None => contains(&bytes),
        Some(script) => script
            .split(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '='))
            .filter(|word| word.starts_with('/') && Path::new(word).is_file())
            .any(|word| std::fs::read(word).is_ok_and(|bytes| contains(&bytes))),
    }
}

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
/// Options without a value.
const FLAGS: [(char, &str); 5] = [
    ('D', "no-domain-init"),
    ('K', "keep-orphans"),
    ('N', "no-fork"),
    ('R', "no-recovery"),
    ('V', "verbose"),
];
/// Quotas that it knows; it exits at others.
const QUOTAS: [&str; 3] = ["memory", "outstanding", "transaction-nodes"];
/// In place of 0, which means no limit to this daemon and a limit of 0 to C xenstored.
const NO_LIMIT: &str = "2000000000";

/// Returns the options of this daemon that C xenstored has: with any other it would not start.
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

/// Returns a value in the meaning of C xenstored, or `None` if that does not know the quota.
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

    // Fails if a program gets a stream that is newer than what it reads, which would end it, or a version
    // other than the selected one; or if a script hides the program.
    #[test]
    fn the_stream_has_a_version_that_the_program_reads() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let old = write("old", "RESET_WATCHES\0");
        let new = write("new", "GET_QUOTA\0SET_QUOTA\0");
        let text = format!("#!/bin/sh\nA=/x exec \"{}\" \"$@\"\n", new.display());
        let script = write("script", &text);
        let (help, newer_help) = ("xenstored <options>", "-m, --master-domid");
        let of = |file: &Path, help, wanted| {
            let target = Target::of(file, help, wanted);
            target.map(|target| (target.format, target.version)).ok()
        };
        assert_eq!(of(&old, help, None), Some((CFormat::XEN_4_20, 1)));
        assert_eq!(of(&old, newer_help, None), Some((CFormat::XEN_4_21, 2)));
        assert_eq!(of(&new, newer_help, None), Some((CFormat::XEN_4_22, 2)));
        assert_eq!(of(&script, newer_help, None), Some((CFormat::XEN_4_22, 2)));
        assert_eq!(of(&new, newer_help, Some(1)), Some((CFormat::XEN_4_22, 1)));
        let refused = Target::of(&old, help, Some(2)).unwrap_err().to_string();
        assert!(refused.contains("--stream-version 1"), "{refused}");
    }

    // Fails if C xenstored gets an option that ends it, or loses one that it has.
    #[test]
    fn c_xenstored_gets_only_its_own_options() {
        let ours = "-N --pretend-xen /tmp -E 0 -S3 --socket=/s --watch-nb=5 -Q nodes=9 -Q memory=0 \
                    --require-xen --quota outstanding=7 --config-file /c -F /run/pid -t 4";
        let ours: Vec<OsString> = ours.split_ascii_whitespace().map(OsString::from).collect();
        let theirs = "--no-fork --entry-nb 2000000000 --entry-size 3 --watch-nb 5 --quota \
                      memory=2000000000 --quota outstanding=7 --pid-file /run/pid --transaction 4 -U";
        let theirs: Vec<OsString> = theirs.split_ascii_whitespace().map(OsString::from).collect();
        assert_eq!(options(&ours), theirs);
    }
}
