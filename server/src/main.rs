//! The `xenstored` program.
fn main() {}
