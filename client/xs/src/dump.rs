//! `xs dump` and `xs restore`.
//!
//! The format: one JSON object per line, parents first, with `path`, `value` (escaped as by `xs read`) and
//! `perms` (`n0 r5`).

use std::io::{BufRead, Write};

use serde_json::{Value, json};
use xenstore_client::Error;
use xenstore_client::blocking::Client;

use crate::list::join;
use crate::output::{escape, perms, unescape};
use crate::{Doing, Failure};

/// Writes a node and all nodes below it, as a consistent snapshot.
pub(crate) fn dump(client: &Client, path: &str, out: &mut impl Write) -> Result<(), Failure> {
    let mut at = path.to_owned();
    let lines = client.transaction(0, |tx| {
        let mut lines = String::new();
        let mut stack = vec![path.to_owned()];
        while let Some(path) = stack.pop() {
            at.clone_from(&path);
            let value = escape(&tx.read(&path)?);
            let perms = perms(&tx.perms(&path)?);
            lines += &format!("{}\n", json!({ "path": path, "value": value, "perms": perms }));
            stack.extend(tx.list(&path)?.iter().rev().map(|name| join(&path, name)));
        }
        Ok(lines)
    });
    out.write_all(lines.doing("dump", &at)?.as_bytes()).doing("print", path)
}

/// Creates the nodes of a dump in one transaction.
pub(crate) fn restore(client: &Client) -> Result<(), Failure> {
    let lines: Result<Vec<String>, _> = std::io::stdin().lock().lines().collect();
    let mut nodes = Vec::new();
    for (number, line) in (1..).zip(lines.doing("read", "standard input")?) {
        let node = parse(&line)
            .ok_or_else(|| Error::Argument("invalid line: expected a line of xs dump".into()));
        nodes.push(node.doing("restore", &format!("line {number}"))?);
    }
    let mut at = String::new();
    let result = client.transaction(0, |tx| {
        for (path, value, perms) in &nodes {
            at.clone_from(path);
            tx.write(path, value)?;
            tx.set_perms(path, perms)?;
        }
        Ok(())
    });
    result.doing("restore", &at)
}

fn parse(line: &str) -> Option<(String, Vec<u8>, String)> {
    let node: Value = serde_json::from_str(line).ok()?;
    let text = |key| node.get(key)?.as_str();
    Some((text("path")?.to_owned(), unescape(text("value")?)?, text("perms")?.to_owned()))
}
