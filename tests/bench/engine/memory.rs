//! Memory for each node, as the kernel counts it, in a separate process for each figure.

use std::process::Command;

use crate::store::Store;
use xenstore_tests::raw::op;

/// Makes this program report the memory of one store.
pub(crate) const ARGUMENT: &str = "--memory";

pub(crate) fn all(only: &str) {
    let name = "memory of a node";
    if !name.contains(only) {
        return;
    }
    let program = std::env::current_exe().expect("this program");
    for nodes in ["10000", "100000", "1000000"] {
        let status = Command::new(&program).args([ARGUMENT, nodes]).status();
        assert!(status.is_ok_and(|status| status.success()), "{nodes} nodes");
    }
}

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages = statm.split(' ').nth(1).and_then(|text| text.parse::<usize>().ok());
    pages.expect("a number") * rustix::param::page_size()
}

pub(crate) fn report(nodes: usize) {
    let mut store = Store::new();
    let before = resident();
    (0..nodes).for_each(|i| store.fill(i));
    let full = resident();
    store.ok(store.dom0, op::RM, 0, b"/n\0");
    if store.engine.has_shrunk() {
        xenstore_sys::trim_heap();
    }
    let after = resident();
    let each = (full - before) / nodes;
    let name = format!("memory of a node, {nodes} nodes");
    let (full, after) = ((full - before) >> 10, after.saturating_sub(before) >> 10);
    println!("{name:<72} {each:>12} bytes; {full} KiB in all, {after} KiB after their removal");
}
