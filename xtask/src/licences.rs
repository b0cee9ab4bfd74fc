//! Licences of the libraries that are linked into the programs, which a package has to bring along.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use crate::cargo;
use crate::deb::output;

/// Names, and the licence texts as they came with the source.
pub fn of_libraries() -> Result<String, String> {
    let tree = ["tree", "--locked", "-p", "xenstored", "-p", "xenstore-xs", "--no-dedupe"];
    let format = ["-e", "normal,no-proc-macro", "--prefix", "none", "-f", "{p}|{l}"];
    let lines = output(cargo(&tree).args(format))?;
    // Our own are named with their folder.
    let others = lines.lines().filter(|line| !line.is_empty() && !line.contains(" ("));
    let others: BTreeSet<&str> = others.collect();
    let mut text = String::new();
    for line in others {
        let (library, licence) = line.split_once('|').unwrap_or((line, ""));
        text += &format!("==== {library}: {licence}\n\n{}\n", texts(&library.replace(" v", "-"))?);
    }
    Ok(text)
}

/// The licence files of a library's source: that of the MIT licence if it is one of several, which
/// is the one we chose, else all.
fn texts(folder: &str) -> Result<String, String> {
    let mut files = Vec::new();
    for registry in registries() {
        let entries = fs::read_dir(registry.join(folder)).into_iter().flatten().flatten();
        files.extend(entries.map(|entry| entry.path()).filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
            name.starts_with("LICENSE") || name.starts_with("COPYING")
        }));
    }
    files.sort();
    if let Some(mit) = files.iter().find(|path| path.to_string_lossy().ends_with("MIT")).cloned() {
        files = vec![mit];
    }
    let read = |path: &PathBuf| fs::read_to_string(path).map_err(|error| error.to_string());
    let texts: Vec<String> = files.iter().map(read).collect::<Result<_, _>>()?;
    match texts.is_empty() {
        true => Err(format!("no licence text of {folder}")),
        false => Ok(texts.join("\n")),
    }
}

/// The folder of Cargo's sources.
fn registries() -> Vec<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::home_dir().map(|dir| dir.join(".cargo")));
    let sources = home.map(|home| fs::read_dir(home.join("registry/src")));
    sources.into_iter().flatten().flatten().flatten().map(|entry| entry.path()).collect()
}
