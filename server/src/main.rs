//! The `xenstored` program.

fn main() -> std::process::ExitCode {
    xenstored::daemon::main()
}
