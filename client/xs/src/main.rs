//! The `xs` command: XenStore for people and scripts.
#![allow(clippy::print_stdout, clippy::print_stderr)] // it is a command

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
/// Exit status: 0 success, 1 another error, 2 invalid command line, 3 no such node, 4 permission
/// denied, 5 conflict in every try, 6 no daemon answers.
#[derive(Parser)]
#[command(name = "xs", version, verbatim_doc_comment)]
struct Args {
    /// The daemon's socket. Otherwise $XENSTORED_PATH, $XENSTORED_RUNDIR/socket, or where a daemon
    /// of this host puts it.
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a node and all below it.
    Ls {
        /// Where to start.
        #[arg(default_value = "/")]
        path: String,
        /// Show permissions.
        #[arg(short)]
        perms: bool,
        /// Show whole paths instead of a tree.
        #[arg(short)]
        full: bool,
        /// One JSON object: name, value, permissions and children of each node.
        #[arg(long)]
        json: bool,
    },
    /// Print values, one a line; bytes that cannot be shown as \x00.
    Read {
        /// Which nodes.
        #[arg(required = true)]
        paths: Vec<String>,
        /// Print the bytes as they are, without line ends.
        #[arg(long)]
        raw: bool,
    },
    /// Set the value of a node.
    Write {
        /// Which node.
        path: String,
        /// The value; - takes it from standard input, byte for byte.
        value: String,
    },
    /// Remove nodes and all below them.
    Rm {
        /// Which nodes.
        #[arg(required = true)]
        paths: Vec<String>,
    },
    /// Create nodes.
    Mkdir {
        /// Which nodes.
        #[arg(required = true)]
        paths: Vec<String>,
    },
    /// Show or set the permission list of a node.
    Perms {
        /// Which node.
        path: String,
        /// Owner and what others may do, then what domains may do: n0 r5 b7.
        perms: Vec<String>,
    },
    /// Print the path of each change at or below a node; the first is the node itself.
    Watch {
        /// Which node, or @introduceDomain or @releaseDomain.
        path: String,
        /// End after this many.
        #[arg(short = 'n', value_name = "COUNT")]
        count: Option<u64>,
        /// Levels below the node; 0 is the node alone.
        #[arg(long)]
        depth: Option<u32>,
    },
    /// Run commands from standard input, one a line, in one transaction: read, write, rm, mkdir,
    /// perms. All take effect or none; retried after a conflict.
    Tx {
        /// How often to try; 0 is without end.
        #[arg(long, default_value_t = 100)]
        tries: u32,
    },
    /// Write a node and all below it to standard output, for `xs restore`: a JSON object a line.
    Dump {
        /// Where to start.
        #[arg(default_value = "/")]
        path: String,
    },
    /// Create what `xs dump` wrote, from standard input, in one transaction.
    Restore,
    /// Replace the program of the running daemon (live update).
    LiveUpdate {
        /// The program: this daemon in another version, or C xenstored.
        program: String,
        /// Only say how long it would take and what is in the way.
        #[arg(long)]
        dry_run: bool,
        /// Options for the program, instead of those that the daemon has.
        #[arg(long, value_name = "OPTIONS", allow_hyphen_values = true)]
        options: Option<String>,
        /// Version of the migration stream for C xenstored, 1 or 2, instead of the newest that it reads.
        #[arg(long, value_name = "VERSION")]
        stream_version: Option<u32>,
        /// Seconds to wait for transactions that the program cannot continue.
        #[arg(long, default_value_t = 60, value_name = "SECONDS")]
        timeout: u32,
        /// Then end them.
        #[arg(long)]
        force: bool,
    },
    /// Send a command to the daemon, such as `help` or `check`.
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
            eprintln!("xs: no daemon answers: {error}");
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

/// What could not be done, and why.
struct Failure {
    what: String,
    error: Error,
}

/// Names what is being done, should it fail.
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
