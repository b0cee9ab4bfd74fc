//! Runs daemons for tests: this project's, and Debian's packaged C xenstored and oxenstored on a
//! pretend Xen.
//!
//! The pretend Xen (`tests/peers/fakexen.c`) is loaded into the packaged daemons in place of the
//! Xen libraries; see `tests/peers/README.md`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::fdstore::FdStore;
use crate::raw::{Conn, op};

/// Directory of Debian's programs of Xen 4.17.
pub const XEN_BIN: &str = "/usr/lib/xen-4.17/bin";

/// Returns the path of a peer's program: in the directory that `XENSTORE_PEERS` names if that has it, or
/// else in [`XEN_BIN`].
pub fn peer(program: &str) -> PathBuf {
    let given = std::env::var_os("XENSTORE_PEERS").map(|dir| Path::new(&dir).join(program));
    given.filter(|path| path.exists()).unwrap_or_else(|| Path::new(XEN_BIN).join(program))
}

/// Returns true if C xenstored is Debian's of Xen 4.17, which only reads version 1 of the stream.
pub fn is_c_packaged() -> bool {
    peer("xenstored").starts_with(XEN_BIN)
}

/// A kind of daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Debian's C xenstored.
    C,
    /// Debian's oxenstored.
    Ocaml,
    /// The daemon of this project.
    Ours,
}

impl Kind {
    /// The name in reports, and in the name of its list of differences.
    pub fn name(self) -> &'static str {
        match self {
            Kind::C => "c-4.17",
            Kind::Ocaml => "oxenstored-4.17",
            Kind::Ours => "xenstored",
        }
    }
}

/// Whether quotas are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quotas {
    /// The defaults of the daemon.
    Default,
    /// No quotas, for load.
    Off,
}

/// A running daemon. It is killed on drop.
#[derive(Debug)]
pub struct Daemon {
    /// Its kind.
    pub kind: Kind,
    quotas: Quotas,
    /// Options for the next start.
    pub args: Vec<String>,
    child: Child,
    dir: TempDir,
    /// Stores its descriptors while it does not run.
    pub fdstore: Option<FdStore>,
}

/// Returns the reason if a daemon cannot run on this machine.
pub fn available(kind: Kind) -> Result<(), String> {
    let program = match kind {
        Kind::Ours => return Ok(()),
        Kind::C => "xenstored",
        Kind::Ocaml => "oxenstored",
    };
    let path = peer(program);
    if !path.exists() {
        return Err(format!("{} is missing (Debian package xen-utils-4.17)", path.display()));
    }
    if !Path::new("/usr/include/xenevtchn.h").exists() {
        return Err("headers of Xen are missing (Debian package libxen-dev)".into());
    }
    fake_xen().map(|_| ())
}

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the project")
}

/// Returns the library of the pretend Xen, which is built once.
pub fn fake_xen() -> Result<PathBuf, String> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let build = || {
        let source = project().join("tests/peers/fakexen.c");
        let dir = project().join("target/peers");
        fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        // Several test processes may build at the same time.
        let (temporary, library) =
            (dir.join(format!("fakexen.{}.so", std::process::id())), dir.join("fakexen.so"));
        let compiler = env::var_os("CC").unwrap_or_else(|| OsString::from("cc"));
        let flags =
            ["-O2", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-o"];
        let output = Command::new(&compiler)
            .args(flags)
            .arg(&temporary)
            .arg(source)
            .args(["-ldl", "-lpthread"])
            .output()
            .map_err(|e| format!("{}: {e} (Debian package gcc)", compiler.display()))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(format!("tests/peers/fakexen.c cannot be built: {text}"));
        }
        fs::rename(&temporary, &library).map_err(|e| e.to_string())?;
        Ok(library)
    };
    BUILT.get_or_init(build).clone()
}

/// Returns a program of this project, which is built with the profile of the caller if necessary.
pub fn program(name: &str) -> Result<PathBuf, String> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let build = || {
        let release = !cfg!(debug_assertions);
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(project()).args(["build", "--quiet", "-p", "xenstored"]);
        cargo
            .args(["-p", "xenstore-xs", "--features", "xenstored/test-doubles"])
            .args(release.then_some("--release"));
        let status = cargo.status().map_err(|e| format!("cargo: {e}"))?;
        if !status.success() {
            return Err("cargo build failed".into());
        }
        let target = env::var_os("CARGO_TARGET_DIR").map_or(project().join("target"), Into::into);
        Ok(target.join(if release { "release" } else { "debug" }))
    };
    BUILT.get_or_init(build).clone().map(|dir| dir.join(name))
}

/// Options that lift the limits of the packaged C daemon.
const C_UNLIMITED: &[&str] = &[
    "-E",
    "2000000000",
    "-S",
    "2000000000",
    "-W",
    "2000000000",
    "-t",
    "2000000000",
    "-A",
    "1000",
    "-Q",
    "transaction-nodes=2000000000",
    "-Q",
    "memory=2000000000",
    "-Q",
    "outstanding=2000000000",
];
/// The same for this project's daemon, where 0 means no limit.
const OUR_UNLIMITED: &[&str] = &[
    "-E",
    "0",
    "-S",
    "0",
    "-W",
    "0",
    "-t",
    "0",
    "-A",
    "0",
    "-Q",
    "transaction-nodes=0",
    "-Q",
    "memory=0",
    "-Q",
    "outstanding=0",
];
/// The same for oxenstored.
const OCAML_QUOTAS: &[&str] = &[
    "quota-maxwatch",
    "quota-transaction",
    "quota-maxentity",
    "quota-maxsize",
    "quota-maxrequests",
    "quota-maxoutstanding",
    "quota-maxwatchevents",
];

impl Daemon {
    /// Starts a daemon in a new directory and waits until it answers.
    pub fn start(kind: Kind, quotas: Quotas) -> Result<Daemon, String> {
        Daemon::start_in(kind, quotas, &[], |_| Ok(()))
    }

    /// The same with more options.
    pub fn start_with(kind: Kind, quotas: Quotas, args: &[&str]) -> Result<Daemon, String> {
        Daemon::start_in(kind, quotas, args, |_| Ok(()))
    }

    /// The same on a pretend Xen, after `prepare` has been called with its directory.
    pub fn start_in(
        kind: Kind,
        quotas: Quotas,
        args: &[&str],
        prepare: impl FnOnce(&Path) -> std::io::Result<()>,
    ) -> Result<Daemon, String> {
        available(kind)?;
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        lay_out(dir.path()).map_err(|e| e.to_string())?;
        prepare(&dir.path().join("xen")).map_err(|e| e.to_string())?;
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let mut daemon = Daemon::spawn_in(dir, &[], (kind, quotas), args, None)?;
        daemon.wait().map(|()| daemon)
    }

    /// Starts this project's daemon with a store for its descriptors.
    pub fn start_with_fdstore() -> Result<Daemon, String> {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        lay_out(dir.path()).map_err(|e| e.to_string())?;
        let fdstore = FdStore::new(dir.path()).map_err(|e| e.to_string())?;
        let ours = (Kind::Ours, Quotas::Default);
        let mut daemon = Daemon::spawn_in(dir, &[], ours, Vec::new(), Some(fdstore))?;
        daemon.wait().map(|()| daemon)
    }

    fn spawn_in(
        dir: TempDir,
        wrapper: &[String],
        (kind, quotas): (Kind, Quotas),
        args: Vec<String>,
        mut fdstore: Option<FdStore>,
    ) -> Result<Daemon, String> {
        let child = spawn(wrapper, (kind, quotas), &args, dir.path(), fdstore.as_mut());
        let child = child.map_err(|e| e.to_string())?;
        Ok(Daemon { kind, quotas, args, child, dir, fdstore })
    }

    /// Starts this project's daemon under another program, without waiting for it.
    pub fn start_under(wrapper: &[String]) -> Result<Daemon, String> {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        lay_out(dir.path()).map_err(|e| e.to_string())?;
        Daemon::spawn_in(dir, wrapper, (Kind::Ours, Quotas::Default), Vec::new(), None)
    }

    /// Waits until the process has ended.
    pub fn wait_for_end(&mut self) -> Result<(), String> {
        self.child.wait().map(drop).map_err(|e| e.to_string())
    }

    /// Starts the daemon again after its end, under `wrapper` unless that is empty.
    pub fn start_again(&mut self, wrapper: &[String]) -> Result<(), String> {
        let (how, fdstore) = ((self.kind, self.quotas), self.fdstore.as_mut());
        let child = spawn(wrapper, how, &self.args, self.dir.path(), fdstore);
        self.child = child.map_err(|e| e.to_string())?;
        Ok(())
    }

    /// Kills the daemon with SIGKILL, as the kernel does when memory is exhausted, and starts it
    /// again.
    pub fn crash(&mut self) -> Result<(), String> {
        self.crash_without_waiting()?;
        self.wait()
    }

    /// The same, without waiting until it answers.
    pub fn crash_without_waiting(&mut self) -> Result<(), String> {
        self.kill()?;
        self.start_again(&[])
    }

    /// The same, with a second kill at this time after the start.
    pub fn crash_twice(&mut self, after: Duration) -> Result<(), String> {
        self.kill()?;
        self.start_again(&[])?;
        std::thread::sleep(after);
        self.crash()
    }

    /// Stops the daemon with SIGTERM, and starts it again.
    pub fn restart(&mut self) -> Result<(), String> {
        self.stop()?;
        self.start_again(&[])?;
        self.wait()
    }

    /// Stops the daemon with SIGTERM, and waits for its end.
    pub fn stop(&mut self) -> Result<(), String> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)
            .map_err(|e| e.to_string())?;
        let status = self.child.wait().map_err(|e| e.to_string())?;
        if !status.success() {
            return Err(format!("it ended: {status}\n{}", self.log()));
        }
        Ok(())
    }

    /// Kills the daemon with SIGKILL.
    pub fn kill(&mut self) -> Result<(), String> {
        self.child.kill().and_then(|()| self.child.wait()).map(drop).map_err(|e| e.to_string())
    }

    /// Waits until the daemon answers. Only the socket shows that; a stored socket accepts clients
    /// also while no process answers.
    pub fn wait(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let answers = |path: &Path, keeps: bool| match keeps {
            false => UnixStream::connect(path).is_ok(),
            true => Conn::connect(path).is_ok_and(|mut conn| conn.ok(op::READ, "/|").is_ok()),
        };
        while !answers(&self.socket(), self.fdstore.is_some()) {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("{} ended: {status}\n{}", self.kind.name(), self.log()));
            }
            if Instant::now() > deadline {
                return Err(format!("{} does not answer\n{}", self.kind.name(), self.log()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Returns its socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("run/socket")
    }

    /// Returns its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the directory of its pretend Xen.
    pub fn xen(&self) -> PathBuf {
        self.dir.path().join("xen")
    }

    /// Writes a script that runs a daemon of this kind in the same environment, as the destination
    /// of a live update.
    pub fn stand_in(&self, kind: Kind) -> Result<PathBuf, String> {
        let (xen, run) = (self.xen(), self.dir.path().join("run"));
        let (xen, run) = (xen.display(), run.display());
        let text = match kind {
            Kind::Ours => format!(
                "#!/bin/sh\nunset LD_PRELOAD\nXENSTORED_RUNDIR={run} exec {} --pretend-xen {xen} \"$@\"\n",
                program("xenstored")?.display()
            ),
            Kind::C => format!(
                "#!/bin/sh\nexport XENSTORED_RUNDIR={run} FAKEXEN_DIR={xen} LD_PRELOAD={}\n\
                 exec {} \"$@\"\n",
                fake_xen()?.display(),
                peer("xenstored").display()
            ),
            Kind::Ocaml => return Err("nothing is handed to oxenstored".into()),
        };
        let path = self.xen().join(format!("run-{}", kind.name()));
        let written = fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)));
        written.map(|()| path).map_err(|error| error.to_string())
    }

    /// Returns the log. The thread that writes it has finished when it waits for more lines.
    pub fn log(&self) -> String {
        let tasks = format!("/proc/{}/task", self.child.id());
        let is_busy = || {
            let stats = fs::read_dir(&tasks).into_iter().flatten().flatten();
            let mut stats = stats.flat_map(|task| fs::read_to_string(task.path().join("stat")));
            stats.any(|stat| stat.contains(" (log) R"))
        };
        while is_busy() {
            std::thread::yield_now();
        }
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Returns true if the process runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Creates the directories of a daemon and of its pretend Xen: `run` and `xen`.
pub fn lay_out(dir: &Path) -> std::io::Result<()> {
    let xen = dir.join("xen");
    fs::create_dir_all(dir.join("run"))?;
    fs::create_dir_all(xen.join("0"))?;
    fs::File::create(xen.join("0/ring"))?.set_len(8192)?;
    fs::write(xen.join("0/port"), "1") // no newline: one reader is strict
}

fn spawn(
    wrapper: &[String],
    (kind, quotas): (Kind, Quotas),
    args: &[String],
    dir: &Path,
    fdstore: Option<&mut FdStore>,
) -> std::io::Result<Child> {
    let log = fs::File::options().create(true).append(true).open(dir.join("log"))?;
    let errors = log.try_clone()?;
    let mut command = under(wrapper, command(kind, quotas, dir)?);
    command.args(args).stdin(Stdio::null()).stdout(log);
    if let Some(fdstore) = fdstore {
        // Messages of the previous process.
        fdstore.messages()?;
        command = fdstore.run(&command)?;
    }
    command.stderr(errors).spawn()
}

/// Returns `command`, run by `wrapper` unless that is empty.
fn under(wrapper: &[String], command: Command) -> Command {
    let [program, args @ ..] = wrapper else { return command };
    let mut outer = Command::new(program);
    outer.args(args).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    outer
}

fn command(kind: Kind, quotas: Quotas, dir: &Path) -> std::io::Result<Command> {
    let (run, xen) = (dir.join("run"), dir.join("xen"));
    if kind == Kind::Ours {
        let mut command = Command::new(program("xenstored").map_err(std::io::Error::other)?);
        command.arg("-N").env("XENSTORED_RUNDIR", &run).env_remove("XENSTORED_PATH");
        // Removed with the directory, also if the daemon is not stopped.
        command.arg("--journal").arg(&run);
        command.arg("--pretend-xen").arg(xen);
        if quotas == Quotas::Off {
            command.args(OUR_UNLIMITED);
        }
        return Ok(command);
    }
    let mut command = match kind {
        Kind::Ocaml => {
            let mut conf = format!(
                "pid-file = {0}/oxenstored.pid\nmerge-activate = true\nperms-activate = true\n\
                 perms-watch-activate = true\nquota-activate = {1}\npersistent = false\n\
                 xenstored-log-file = {0}/oxenstored.log\naccess-log-file = {0}/access.log\n\
                 xenstored-kva = /proc/xen/xsd_kva\nxenstored-port = /proc/xen/xsd_port\n",
                dir.display(),
                quotas == Quotas::Default
            );
            if quotas == Quotas::Off {
                OCAML_QUOTAS.iter().for_each(|key| conf += &format!("{key} = 2000000000\n"));
            }
            let path = dir.join("oxenstored.conf");
            fs::write(&path, conf)?;
            let mut command = Command::new(peer("oxenstored"));
            command.args(["--no-fork", "--no-access-log", "--config-file"]).arg(path);
            command.env("FAKEXEN_RUNDIR", run);
            command
        }
        Kind::C | Kind::Ours => {
            let mut command = Command::new(peer("xenstored"));
            command.arg("-N").env("XENSTORED_RUNDIR", run);
            if quotas == Quotas::Off {
                command.args(C_UNLIMITED);
            }
            command
        }
    };
    command.env("FAKEXEN_DIR", xen).env("LD_PRELOAD", fake_xen().map_err(std::io::Error::other)?);
    Ok(command)
}
