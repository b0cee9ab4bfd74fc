//! The `xs` command.
fn main() {}
