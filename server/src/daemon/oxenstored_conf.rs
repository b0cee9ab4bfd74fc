//! The configuration file of oxenstored: `key = value` lines and `#` comments.

use std::path::PathBuf;

use xenstore_protocol::Quota;
use xenstore_store::Quotas;

/// The contents of a file.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct File {
    pub(crate) quotas: Quotas,
    pub(crate) pid_file: Option<PathBuf>,
    /// Keys that oxenstored does not have either, one line each.
    pub(crate) unknown: Vec<String>,
}

/// Keys that set a quota. −1 means no limit.
const QUOTAS: [(&str, Quota); 7] = [
    ("quota-maxentity", Quota::Nodes),
    ("quota-maxsize", Quota::NodeSize),
    ("quota-maxwatch", Quota::Watches),
    ("quota-transaction", Quota::Transactions),
    ("quota-maxrequests", Quota::TransactionNodes),
    ("quota-maxoutstanding", Quota::Outstanding),
    ("quota-path-max", Quota::PathMax),
];

/// Keys of oxenstored for its internals, or for logs that are configured elsewhere here.
const UNUSED: &[&str] = &[
    "merge-activate",
    "conflict-burst-limit",
    "conflict-max-history-seconds",
    "conflict-rate-limit-is-aggregate",
    "perms-activate",
    "perms-watch-activate",
    "quota-maxwatchevents",
    "gc-max-overhead",
    "test-eagain",
    "persistent",
    "xenstored-log-file",
    "xenstored-log-level",
    "xenstored-log-nb-files",
    "xenstored-log-nb-lines",
    "xenstored-log-nb-chars",
    "access-log-file",
    "access-log-nb-files",
    "access-log-nb-lines",
    "access-log-nb-chars",
    "access-log-read-ops",
    "access-log-transactions-ops",
    "access-log-special-ops",
    "allow-debug",
    "ring-scan-interval",
    "xenstored-kva",
    "xenstored-port",
];

/// Reads a file; `name` is for messages. An error is one line with file, line and key.
pub(crate) fn parse(name: &str, text: &str) -> Result<File, String> {
    let mut file = File::default();
    let mut quotas_on = true;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let place = format!("{name}:{number}");
        let Some((key, value)) = line.split_once('=') else {
            return Err(format!("{place}: {line}: expected key = value"));
        };
        let (key, value) = (key.trim(), value.trim());
        if let Some((_, quota)) = QUOTAS.iter().find(|(name, _)| *name == key) {
            let limit = match value {
                "-1" => Some(0),
                _ => value.parse().ok(),
            };
            let limit = limit.ok_or_else(|| format!("{place}: {key} = {value}: not a number"))?;
            // oxenstored limits the value alone, this daemon also the names of the children:
            // existing directories would be refused. Quotas on nodes, memory and messages limit
            // both.
            let limit = if *quota == Quota::NodeSize { 0 } else { limit };
            file.quotas.set(*quota, limit);
        } else if key == "quota-activate" {
            quotas_on = value
                .parse()
                .map_err(|_| format!("{place}: {key} = {value}: neither true nor false"))?;
        } else if key == "pid-file" {
            file.pid_file = Some(value.into());
        } else if !UNUSED.contains(&key) {
            file.unknown.push(format!("{place}: {key}: no such key"));
        }
    }
    if !quotas_on {
        file.quotas = Quotas::unlimited();
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a key that oxenstored.conf has is unknown or means another quota.
    #[test]
    fn the_keys_of_oxenstored_are_known() {
        let text = "# comment\n pid-file = /run/x.pid # more\nquota-maxentity=7\n\
                    quota-maxrequests = -1\npersistent = false\nquota-activate = true\n";
        let file = parse("f", text).unwrap();
        assert_eq!(file.quotas.get(Quota::Nodes), 7);
        assert_eq!(file.quotas.get(Quota::TransactionNodes), 0);
        assert_eq!(file.pid_file, Some("/run/x.pid".into()));
        assert!(file.unknown.is_empty());
        assert_eq!(parse("f", "quota-activate=false").unwrap().quotas, Quotas::unlimited());
    }

    // Fails if a size that oxenstored applies to values refuses directories that it accepted.
    #[test]
    fn the_size_of_a_value_does_not_limit_names() {
        let file = parse("f", "quota-maxsize = 2048\n").unwrap();
        assert_eq!(file.quotas.get(Quota::NodeSize), 0);
        assert!(parse("f", "quota-maxsize = much").is_err());
    }

    // Fails if an invalid line is ignored, or is reported without file, line and key.
    #[test]
    fn mistakes_name_file_line_and_key() {
        let error = |text| parse("f", text).unwrap_err();
        assert_eq!(error("\nquota-maxwatch = lots"), "f:2: quota-maxwatch = lots: not a number");
        assert_eq!(error("quota-activate = 1"), "f:1: quota-activate = 1: neither true nor false");
        assert_eq!(error("nonsense"), "f:1: nonsense: expected key = value");
        assert_eq!(parse("f", "bogus = 1").unwrap().unknown, ["f:1: bogus: no such key"]);
    }
}
