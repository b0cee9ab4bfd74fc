//! A XenStore in memory, for tests of programs that use one.
//!
//! ```
//! use xenstored::embedded::Store;
//!
//! let store = Store::start();
//! let guest = store.connect(5); // bytes of the protocol, as domain 5; it is introduced if need be
//! let dom0 = store.connect(0); // the same as dom0
//! # drop((guest, dom0));
//! ```
//!
//! Hand the ends to a client; that of `xenstore-client` takes them as they are.

use std::cell::Cell;
use std::thread::JoinHandle;

use smol::channel::{self, Sender};
use xenstore_protocol::{Errno, Operation};
use xenstore_store::{Config, Engine, Millis};
use xenstore_transport::Peer;
use xenstore_transport::memory::{Pipe, pair};

use crate::clock::Clock;
use crate::server::Server;
use crate::standalone::Standalone;
use crate::tasks::Tasks;

type Job = Box<dyn FnOnce(&Server<Standalone>) + Send>;

enum Command {
    Run(Job),
    Serve(Pipe),
}

/// A store on a thread of its own. It ends when this is dropped; connections then see the end of
/// their stream.
#[derive(Debug)]
pub struct Store {
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Starts a store with the defaults of the daemon.
    pub fn start() -> Store {
        Store::with_config(&Config::default())
    }

    /// Starts a store.
    pub fn with_config(config: &Config) -> Store {
        let (commands, inbox) = channel::unbounded();
        let config = *config;
        let run = move || {
            let clock = Clock::Manual(Cell::new(0));
            let server = Server::new(&config, Standalone::default(), clock);
            let tasks = Tasks::new();
            tasks.spawn(server.do_work());
            smol::block_on(tasks.run(async {
                while let Ok(command) = inbox.recv().await {
                    match command {
                        Command::Run(job) => job(&server),
                        Command::Serve(pipe) => tasks.spawn(server.serve(pipe)),
                    }
                }
            }));
        };
        let thread = std::thread::Builder::new().name("xenstore".into()).spawn(run);
        Store { commands: Some(commands), thread: Some(thread.expect("a thread can be started")) }
    }

    /// Connects as a domain; 0 is dom0, which may do everything. Any other domain is introduced
    /// if it is not yet. A domain may connect any number of times.
    pub fn connect(&self, domid: u16) -> Pipe {
        if domid != 0 && !self.is_introduced(domid) {
            self.introduce(domid).expect("an ordinary domain can be introduced");
        }
        let (client, server) = pair(Peer::Domain(domid), Peer::Domain(0));
        self.send(Command::Serve(server));
        client
    }

    /// Makes a domain known, as a toolstack does when it starts one (INTRODUCE).
    pub fn introduce(&self, domid: u16) -> Result<(), Errno> {
        self.request(Operation::Introduce, format!("{domid}\x001\x001\0"))
    }

    /// Takes a domain away: its connections end, its nodes are removed (RELEASE).
    pub fn release(&self, domid: u16) -> Result<(), Errno> {
        self.request(Operation::Release, format!("{domid}\0"))
    }

    /// The domain shuts down: `@releaseDomain` fires, and everything of it stays.
    pub fn shut_down(&self, domid: u16) {
        self.with(move |engine, host| {
            host.shut_down(domid);
            engine.domains_changed(host);
        });
    }

    /// The domain is destroyed, as by `xl destroy`.
    pub fn destroy(&self, domid: u16) {
        self.with(move |engine, host| {
            host.destroy(domid);
            engine.domains_changed(host);
        });
    }

    /// Sets the time, in milliseconds; it starts at 0 and stands still.
    pub fn set_time(&self, now: Millis) {
        self.run(move |server| {
            if let Clock::Manual(time) = server.clock() {
                time.set(now);
            }
        });
    }

    /// The next `count` transactions fail to commit, with EAGAIN.
    pub fn inject_eagain(&self, count: u32) {
        self.with(move |engine, _| engine.inject_eagain(count));
    }

    /// Checks that the store is sound; what is wrong otherwise.
    pub fn check(&self) -> Result<(), String> {
        self.with(|engine, _| engine.check().map_err(|violation| violation.to_string()))
    }

    fn is_introduced(&self, domid: u16) -> bool {
        let payload = format!("{domid}\0");
        self.run(move |server| {
            server.request(Operation::IsDomainIntroduced, payload.as_bytes()).1 == b"T\0"
        })
    }

    fn request(&self, op: Operation, payload: String) -> Result<(), Errno> {
        let (ty, reply) = self.run(move |server| server.request(op, payload.as_bytes()));
        if ty != Operation::Error.as_wire() {
            return Ok(());
        }
        let name = reply.strip_suffix(b"\0").and_then(Errno::parse);
        Err(name.unwrap_or(Errno::Einval))
    }

    fn with<R: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Engine, &mut Standalone) -> R + Send + 'static,
    ) -> R {
        self.run(move |server| server.with(change))
    }

    /// Runs something on the store's thread and waits for its result.
    fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce(&Server<Standalone>) -> R + Send + 'static,
    ) -> R {
        let (done, result) = std::sync::mpsc::sync_channel(1);
        self.send(Command::Run(Box::new(move |server| {
            let _ = done.send(job(server));
        })));
        result.recv().expect("the store runs until it is dropped")
    }

    fn send(&self, command: Command) {
        let commands = self.commands.as_ref().expect("there until drop");
        commands.try_send(command).expect("the store runs until it is dropped");
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
