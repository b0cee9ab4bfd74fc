//! Tests the benchmark: it measures and writes its page. No figure is checked.

use std::path::Path;
use std::process::Command;

use xenstore_tests::peers::{Kind, available};
use xenstore_tests::skip;

/// Measures a row briefly. Returns the operations per second of one of the daemons.
fn rate(dir: &Path, row: &str, who: &str) -> f64 {
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["--rounds", "1", "--seconds", "0.3", "--limit", "20", "--only", row, "--page"])
        .arg(dir)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let mut lines = text.lines().skip_while(|line| *line != row);
    let line = lines.find_map(|line| line.trim_start().strip_prefix(who)).unwrap_or_default();
    let rate = line.split_whitespace().next().unwrap_or_default().replace(',', "");
    rate.parse().unwrap_or_else(|_| panic!("{text}"))
}

// Fails if a row cannot be measured on this project's daemon, or the page is not written.
#[test]
fn benchmark_measures_and_writes_a_page() {
    let dir = tempfile::tempdir().unwrap();
    for (row, plot) in [
        ("READ, 16 connections", "sockets.svg"),
        ("WRITE that fires 1,000 watches on 100 connections", "watches.svg"),
        ("VM start transactions, 8 clients", "transactions.svg"),
        ("DIRECTORY_PART, all of 10,000 children", "tree.svg"),
        ("memory for each of 10,000 nodes", "memory.svg"),
    ] {
        assert!(rate(dir.path(), row, "ours ") > 0.0);
        assert!(std::fs::read_to_string(dir.path().join("results.md")).unwrap().contains(row));
        assert!(dir.path().join(plot).exists());
    }
}

// Fails if the benchmark cannot use guests on the pretend Xen.
#[test]
fn benchmark_measures_over_rings() {
    if let Err(why) = available(Kind::C) {
        return skip("the benchmark over rings", &why);
    }
    let dir = tempfile::tempdir().unwrap();
    for row in ["ring READ, 16 guests", "ring transactions of 3 WRITEs, 128 guests"] {
        assert!(rate(dir.path(), row, "C ") > 0.0);
    }
}
