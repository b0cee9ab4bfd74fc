//! Who is measured, and on which cores.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use xenstore_tests::peers::{Daemon, Kind, Quotas};
use xenstore_tests::raw::op;

use crate::echo::Echo;
use crate::meter::Result;
use crate::wire::Client;

/// A daemon to be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Ours,
    C,
    Ocaml,
    /// The bare echo server.
    Floor,
    /// Ours without its journal.
    Unjournaled,
}

impl Who {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Who::Ours => "ours",
            Who::C => "C",
            Who::Ocaml => "O",
            Who::Floor => "floor",
            Who::Unjournaled => "no journal",
        }
    }
}

/// Do client and daemon share a core?
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Cores {
    /// Both on the last core.
    Same,
    /// The daemon on the last core, the client on the one before.
    Split,
}

/// Where client and daemon run.
#[derive(Clone, Copy)]
pub(crate) struct Pins {
    client: usize,
    daemon: usize,
}

impl Pins {
    /// Chosen among the cores that this process may use.
    pub(crate) fn choose(cores: Cores) -> Result<Pins> {
        let allowed = sched_getaffinity(None)?;
        let mut last = (0..CpuSet::MAX_CPU).rev().filter(|core| allowed.is_set(*core));
        let daemon = last.next().ok_or("no core to run on")?;
        let client = match cores {
            Cores::Same => daemon,
            Cores::Split => last.next().ok_or("there is only one core")?,
        };
        Ok(Pins { client, daemon })
    }

    /// This thread, and what it starts, runs where the client belongs.
    pub(crate) fn pin_client(&self) -> Result<()> {
        pin(self.client)
    }
}

fn pin(core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

/// Thousands of connections need as many descriptors.
pub(crate) fn raise_descriptor_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// One of them, running until this is dropped.
pub(crate) struct Subject(Who, Server);

enum Server {
    Daemon(Daemon),
    Echo(Echo),
}

impl Subject {
    pub(crate) fn start(who: Who, pins: Pins) -> Result<Subject> {
        pin(pins.daemon)?;
        let start = |kind| Daemon::start(kind, Quotas::Off).map(Server::Daemon);
        let server = match who {
            Who::Ours => start(Kind::Ours),
            Who::C => start(Kind::C),
            Who::Ocaml => start(Kind::Ocaml),
            Who::Floor => Echo::start().map(Server::Echo),
            Who::Unjournaled => Daemon::start_with(Kind::Ours, Quotas::Off, &["--journal", "none"])
                .map(Server::Daemon),
        };
        pins.pin_client()?;
        Ok(Subject(who, server?))
    }

    pub(crate) fn who(&self) -> Who {
        self.0
    }

    pub(crate) fn socket(&self) -> PathBuf {
        match &self.1 {
            Server::Daemon(daemon) => daemon.socket(),
            Server::Echo(echo) => echo.socket(),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        match &self.1 {
            Server::Daemon(daemon) => daemon.pid(),
            Server::Echo(echo) => echo.pid(),
        }
    }

    /// The directory of its pretend Xen.
    pub(crate) fn xen_directory(&self) -> PathBuf {
        match &self.1 {
            Server::Daemon(daemon) => daemon.xen(),
            Server::Echo(echo) => echo.socket().with_file_name("xen"),
        }
    }

    /// The same, if it serves rings there: then it makes its event channel, though perhaps not before
    /// it answers on its socket.
    pub(crate) fn xen(&self) -> Result<PathBuf> {
        let (xen, start) = (self.xen_directory(), Instant::now());
        while !xen.join("events").exists() {
            if start.elapsed() > Duration::from_secs(1) {
                return Err("no rings".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(xen)
    }

    /// A connection that may do everything.
    pub(crate) fn connect(&self) -> Result<Client> {
        Client::connect(&self.socket())
    }

    /// The same, and there is `/bench/value`.
    pub(crate) fn connect_with_value(&self) -> Result<Client> {
        let mut client = self.connect()?;
        client.ok(op::WRITE, "/bench/value|some text")?;
        Ok(client)
    }
}
