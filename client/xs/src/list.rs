//! `xs ls`.

use std::io::Write;

use serde_json::{Map, Value, json};
use xenstore_client::Error;
use xenstore_client::blocking::Client;

use crate::output::{escape, perms};
use crate::{Doing, Failure};

/// The format of a listing.
#[derive(Clone, Copy)]
pub(crate) struct Style {
    pub(crate) perms: bool,
    pub(crate) full: bool,
    pub(crate) json: bool,
}

/// Returns the path of a child.
pub(crate) fn join(path: &str, name: &str) -> String {
    format!("{}/{name}", path.trim_end_matches('/'))
}

/// Prints a node and all nodes below it. Omits a node that is removed meanwhile.
pub(crate) fn list(
    client: &Client,
    path: &str,
    style: Style,
    out: &mut impl Write,
) -> Result<(), Failure> {
    if style.json {
        let tree = json(client, path)?;
        return writeln!(out, "{tree:#}").doing("print", path);
    }
    // Depth first, without recursion: the next node is the last of the stack.
    let mut stack = vec![(path.to_owned(), 0)];
    let mut first = true;
    while let Some((path, depth)) = stack.pop() {
        let names = match client.list(&path) {
            Err(Error::Store(_)) if !first => continue,
            names => names.doing("ls", &path)?,
        };
        if !(first && path == "/") {
            let name = if style.full { &path } else { path.rsplit('/').next().unwrap_or(&path) };
            let indent = if style.full { 0 } else { depth };
            let value = match client.read(&path) {
                Ok(value) => format!("\"{}\"", escape(&value)),
                Err(error) if first => return Err(error).doing("read", &path),
                Err(error) => format!("({error})"),
            };
            let entries = match style.perms.then(|| client.perms(&path)) {
                Some(Ok(entries)) => format!("   ({})", perms(&entries)),
                _ => String::new(),
            };
            writeln!(out, "{:indent$}{name} = {value}{entries}", "").doing("print", &path)?;
        }
        let depth = if first && path == "/" { depth } else { depth + 1 };
        first = false;
        stack.extend(names.iter().rev().map(|name| (join(&path, name), depth)));
    }
    Ok(())
}

/// Returns value, permissions and children of a node. A value that is not UTF-8 is escaped, as `bytes`.
fn json(client: &Client, path: &str) -> Result<Value, Failure> {
    let value = client.read(path).doing("read", path)?;
    let mut node = Map::new();
    match String::from_utf8(value) {
        Ok(text) => node.insert("value".into(), json!(text)),
        Err(error) => node.insert("bytes".into(), json!(escape(error.as_bytes()))),
    };
    if let Ok(entries) = client.perms(path) {
        let entries: Vec<String> = entries.iter().map(ToString::to_string).collect();
        node.insert("perms".into(), json!(entries));
    }
    let mut children = Map::new();
    for name in client.list(path).doing("ls", path)? {
        let below = join(path, &name);
        match json(client, &below) {
            Ok(child) => drop(children.insert(name, child)),
            Err(Failure { error: Error::Store(_), .. }) => {}
            Err(failure) => return Err(failure),
        }
    }
    if !children.is_empty() {
        node.insert("children".into(), Value::Object(children));
    }
    Ok(Value::Object(node))
}
