//! The `xs` command: XenStore for people and scripts.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a command-line program

mod dump;
mod list;
mod live_update;
mod output;
mod tx;

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xenstore_client::blocking::Client;
use xenstore_client::{Errno, Error, socket_path};

/// Read, change and watch a XenStore.
///
/// Exit status: 0 success, 1 other error, 2 invalid argument, 3 node does not exist, 4 permission denied,
/// 5 conflict after all tries, 6 cannot connect to a daemon.
#[derive(Parser)]
#[command(name = "xs", version, verbatim_doc_comment)]
struct Args {
    /// The daemon's socket. Default: $XENSTORED_PATH, else $XENSTORED_RUNDIR/socket, else the socket of
    /// this host's daemon.
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a node and all nodes below it.
    Ls {
        /// The node.
        #[arg(default_value = "/")]
        path: String,
        /// Show permissions.
        #[arg(short)]
        perms: bool,
        /// Show full paths instead of a tree.
        #[arg(short)]
        full: bool,
        /// Show one JSON object: value, permissions and children of each node.
        #[arg(long)]
        json: bool,
    },
    /// Print values, one per line. Bytes that are not text are printed as \xHH.
    Read {
        /// The nodes.
        #[arg(required = true)]
        paths: Vec<String>,
        /// Print the bytes unchanged, without line ends.
        #[arg(long)]
        raw: bool,
    },
    /// Set the value of a node.
    Write {
        /// The node.
        path: String,
        /// The value. - reads it from standard input, byte by byte.
        value: String,
    },
    /// Remove nodes and all nodes below them.
    Rm {
        /// The nodes.
        #[arg(required = true)]
        paths: Vec<String>,
    },
    /// Create nodes.
    Mkdir {
        /// The nodes.
        #[arg(required = true)]
        paths: Vec<String>,
    },
    /// Show or set the permission list of a node.
    Perms {
        /// The node.
        path: String,
        /// The owner with the permission of all other domains, then the permissions of single domains,
        /// for example: n0 r5 b7 (none, read, both).
        perms: Vec<String>,
    },
    /// Print the path of each change at or below a node, first the node itself.
    Watch {
        /// The node, or @introduceDomain or @releaseDomain.
        path: String,
        /// End after this number of events.
        #[arg(short = 'n', value_name = "COUNT")]
        count: Option<u64>,
        /// Number of levels below the node to watch; 0 is the node alone.
        #[arg(long)]
        depth: Option<u32>,
    },
    /// Run commands from standard input, one per line, in one transaction: read, write, rm, mkdir,
    /// perms. All take effect or none; retried after a conflict.
    Tx {
        /// Number of tries; 0 means without limit.
        #[arg(long, default_value_t = 100)]
        tries: u32,
    },
    /// Write a node and all nodes below it to standard output for `xs restore`: one JSON object per line.
    Dump {
        /// The node.
        #[arg(default_value = "/")]
        path: String,
    },
    /// Create the nodes that `xs dump` wrote, from standard input, in one transaction.
    Restore,
    /// Replace the daemon by another program. Connections, transactions and watches stay open.
    LiveUpdate {
        /// The program: another version of this daemon, or C xenstored.
        program: String,
        /// Report the expected pause and the obstacles, and change nothing.
        #[arg(long)]
        dry_run: bool,
        /// Options of the program. Default: the options of the running daemon.
        #[arg(long, value_name = "OPTIONS", allow_hyphen_values = true)]
        options: Option<String>,
        /// Version of the migration stream for C xenstored, 1 or 2. Default: the newest that it reads.
        #[arg(long, value_name = "VERSION")]
        stream_version: Option<u32>,
        /// Seconds to wait for transactions that the program cannot continue.
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        timeout: u32,
        /// Abort these transactions when the time is up.
        #[arg(long)]
        force: bool,
    },
    /// Send the daemon a CONTROL command, such as `help` or `check`.
    Control {
        /// The command.
        command: String,
        /// Its arguments, such as `-r` for `refusals`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let path = args.socket.unwrap_or_else(socket_path);
    let client = match Client::connect_to(&path) {
        Ok(client) => client,
        Err(error) => {
            eprintln!("xs: cannot connect to a daemon: {error}");
            return ExitCode::from(6);
        }
    };
    match run(&client, args.command) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of the output has closed it.
        Err(Failure { error: Error::Io(std::io::ErrorKind::BrokenPipe, _), .. }) => {
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("xs: {}: {}", failure.what, failure.error);
            ExitCode::from(match failure.error.errno() {
                Some(Errno::Enoent) => 3,
                Some(Errno::Eacces | Errno::Eperm) => 4,
                Some(Errno::Eagain) => 5,
                None if matches!(failure.error, Error::Argument(_)) => 2,
                _ => 1,
            })
        }
    }
}

/// An error, and the operation that failed.
struct Failure {
    what: String,
    error: Error,
}

/// Adds the operation to an error.
trait Doing<T> {
    fn doing(self, what: &str, path: &str) -> Result<T, Failure>;
}

impl<T, E: Into<Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: &str, path: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure { what: format!("{what} {path}"), error: error.into() })
    }
}

fn run(client: &Client, command: Command) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match command {
        Command::Ls { path, perms, full, json } => {
            let style = list::Style { perms, full, json };
            list::list(client, &path, style, &mut out)
        }
        Command::Read { paths, raw } => paths.iter().try_for_each(|path| {
            let value = client.read(path).doing("read", path)?;
            let written = match raw {
                true => out.write_all(&value),
                false => writeln!(out, "{}", output::escape(&value)),
            };
            written.doing("print", path)
        }),
        Command::Write { path, value } => {
            let value = match value.as_str() {
                "-" => {
                    let mut bytes = Vec::new();
                    std::io::stdin().read_to_end(&mut bytes).doing("read", "standard input")?;
                    bytes
                }
                _ => value.into_bytes(),
            };
            client.write(&path, value).doing("write", &path)
        }
        Command::Rm { paths } => {
            paths.iter().try_for_each(|path| client.rm(path).doing("rm", path))
        }
        Command::Mkdir { paths } => {
            paths.iter().try_for_each(|path| client.mkdir(path).doing("mkdir", path))
        }
        Command::Perms { path, perms } if perms.is_empty() => {
            let perms = client.perms(&path).doing("perms", &path)?;
            writeln!(out, "{}", output::perms(&perms)).doing("print", &path)
        }
        Command::Perms { path, perms } => {
            client.set_perms(&path, &perms.join(" ")).doing("perms", &path)
        }
        Command::Watch { path, count, depth } => watch(client, &path, count, depth, &mut out),
        Command::Tx { tries } => tx::run(client, tries, &mut out),
        Command::Dump { path } => dump::dump(client, &path, &mut out),
        Command::Restore => dump::restore(client),
        Command::LiveUpdate { program, dry_run, options, stream_version, timeout, force } => {
            let wanted =
                live_update::Wanted { program, options, dry_run, stream_version, timeout, force };
            live_update::run(client, &wanted, &mut out)
        }
        Command::Control { command, args } => {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            let text = client.control(&command, &args).doing("control", &command)?;
            let text = text.strip_suffix(b"\0").unwrap_or(&text);
            let text = text.strip_suffix(b"\n").unwrap_or(text);
            out.write_all(text).and_then(|()| out.write_all(b"\n")).doing("print", &command)
        }
    }
}

fn watch(
    client: &Client,
    path: &str,
    count: Option<u64>,
    depth: Option<u32>,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let events = client.watch(path, depth).doing("watch", path)?;
    let count = count.map_or(usize::MAX, |count| usize::try_from(count).unwrap_or(usize::MAX));
    for event in events.take(count) {
        let event = event.doing("watch", path)?;
        writeln!(out, "{event}").and_then(|()| out.flush()).doing("print", path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if an argument of a CONTROL command is taken for an option of `xs`.
    #[test]
    fn control_passes_arguments_with_a_hyphen() {
        let args = Args::try_parse_from(["xs", "control", "refusals", "-r"]).unwrap();
        let Command::Control { command, args } = args.command else { panic!("no CONTROL") };
        assert_eq!((&*command, &*args), ("refusals", &["-r".to_owned()][..]));
    }
}
