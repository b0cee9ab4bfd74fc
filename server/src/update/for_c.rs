//! What C xenstored takes: its stream and its options, which are less than ours.

use std::ffi::OsString;

use xenstore_protocol::stream::{Reader, StreamError, Writer, kind};

/// The stream as C xenstored of Xen 4.17 reads it, from one of ours: version 1, and of it only what
/// that version has. Newer ones read it as well. A watch with a depth becomes one without, which
/// hears more.
pub(super) fn stream(ours: &[u8], version: u32) -> Result<Vec<u8>, StreamError> {
    let mut writer = Writer::new(version);
    let mut reader = Reader::new(ours)?;
    while let Some(mut record) = reader.next_record()? {
        match record.kind {
            kind::GLOBAL_DATA | kind::CONNECTION_DATA | kind::WATCH_DATA | kind::NODE_DATA => {
                let body = record.body.rest();
                // Nodes of transactions have a connection.
                if record.kind != kind::NODE_DATA || body.starts_with(&[0; 4]) {
                    writer.record(record.kind, body);
                }
            }
            kind::WATCH_DATA_EXTENDED => {
                let ids = record.body.take(8)?;
                record.body.take(4)?;
                writer.record(kind::WATCH_DATA, &[ids, record.body.rest()].concat());
            }
            kind::GLOBAL_QUOTA_DATA | kind::DOMAIN_DATA if version > 1 => {
                writer.record(record.kind, record.body.rest());
            }
            _ => {}
        }
    }
    Ok(writer.finish())
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
        let ours = "-N --pretend-xen /x -E 0 -S3 --socket=/s --watch-nb=5 -Q nodes=9 -Q memory=0 \
                    --require-xen --quota outstanding=7 --config-file /c -F /run/pid -t 4";
        let ours: Vec<OsString> = ours.split_ascii_whitespace().map(OsString::from).collect();
        let theirs = "--no-fork --entry-nb 2000000000 --entry-size 3 --watch-nb 5 --quota \
                      memory=2000000000 --quota outstanding=7 --pid-file /run/pid --transaction 4 -U";
        let theirs: Vec<OsString> = theirs.split_ascii_whitespace().map(OsString::from).collect();
        assert_eq!(options(&ours), theirs);
    }

    // Fails if a record is left that version 1 does not have, or a depth in front of a path.
    #[test]
    fn a_stream_for_c_has_what_version_1_has() {
        let mut ours = Writer::default();
        ours.record(kind::GLOBAL_DATA, &[1; 8]);
        ours.record(kind::GLOBAL_QUOTA_DATA, &[0; 4]);
        ours.record(0x8000_0002, b"ours");
        ours.record(kind::WATCH_DATA_EXTENDED, b"\x01\0\0\0\x03\0\x02\0\x05\0\0\0/a\0t\0");
        ours.record(kind::NODE_DATA, b"\x01\0\0\0of a transaction");
        ours.record(kind::NODE_DATA, b"\0\0\0\0committed");
        let mut theirs = Writer::new(1);
        theirs.record(kind::GLOBAL_DATA, &[1; 8]);
        theirs.record(kind::WATCH_DATA, b"\x01\0\0\0\x03\0\x02\0/a\0t\0\0\0\0\0");
        theirs.record(kind::NODE_DATA, b"\0\0\0\0committed");
        let (ours, theirs) = (ours.finish(), theirs.finish());
        // What pads our record is inside theirs.
        assert_eq!(stream(&ours, 1).unwrap(), theirs);
    }
}
