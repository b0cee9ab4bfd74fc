//! The daemon's server over memory, in this process.

use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

use async_channel::Sender;
use futures_lite::{AsyncReadExt, AsyncWriteExt, future};
use xenstore_protocol::{DomId, Operation};
use xenstore_store::Config;
use xenstore_transport::Peer;
use xenstore_transport::memory::{Pipe, pair};
use xenstored::{Clock, Server, Standalone, Tasks};

use crate::raw::Link;

/// A stream in memory as a link.
macro_rules! link {
    ($stream:ty) => {
        impl Link for $stream {
            fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
                future::block_on(self.write_all(bytes))
            }

            fn receive(&mut self, buffer: &mut [u8], limit: Duration) -> io::Result<usize> {
                future::block_on(future::or(self.read(buffer), async {
                    async_io::Timer::after(limit).await;
                    Err(io::ErrorKind::TimedOut.into())
                }))
            }
        }
    };
}

link!(Pipe);
link!(xenstore_embedded::Connection);

type Job = Box<dyn FnOnce(&Server<Standalone>) + Send>;

enum Command {
    Run(Job),
    Serve(Pipe),
}

/// A server on its own thread. It ends when this is dropped; its connections end with it.
#[derive(Debug)]
pub struct Store {
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Starts a server with an empty store. Its clock stands at 0.
    pub fn start() -> Store {
        let (commands, inbox) = async_channel::unbounded();
        let run = move || {
            let clock = Clock::Manual(0.into());
            let server = Server::new(&Config::default(), Standalone::default(), clock);
            let tasks = Tasks::new();
            tasks.spawn(server.do_work());
            future::block_on(tasks.run(async {
                while let Ok(command) = inbox.recv().await {
                    match command {
                        Command::Run(job) => job(&server),
                        Command::Serve(pipe) => tasks.spawn(server.serve(pipe)),
                    }
                }
            }));
        };
        Store { commands: Some(commands), thread: Some(std::thread::spawn(run)) }
    }

    /// Introduces a domain, unless it is dom0, and connects as that domain.
    pub fn connect(&self, domid: u16) -> Pipe {
        if domid != 0 {
            self.request(Operation::Introduce, format!("{domid}\x001\x001\0"));
        }
        let (client, server) = pair(Peer::Domain(DomId(domid)), Peer::Domain(DomId(0)));
        self.send(Command::Serve(server));
        client
    }

    /// Releases a domain.
    pub fn release(&self, domid: u16) {
        self.request(Operation::Release, format!("{domid}\0"));
    }

    /// Checks the invariants of the store. Returns the one that does not hold.
    pub fn check(&self) -> Result<(), String> {
        self.run(|server| {
            server.with(|engine, _| engine.check().map_err(|error| error.to_string()))
        })
    }

    fn request(&self, op: Operation, payload: String) {
        let (ty, _) = self.run(move |server| server.request(op, payload.as_bytes()));
        assert_eq!(ty, op.as_wire(), "{op:?} fails");
    }

    /// Runs a job on the thread of the server and waits for its result.
    fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce(&Server<Standalone>) -> R + Send + 'static,
    ) -> R {
        let (done, result) = std::sync::mpsc::sync_channel(1);
        self.send(Command::Run(Box::new(move |server| {
            let _ = done.send(job(server));
        })));
        result.recv().expect("the server runs until it is dropped")
    }

    fn send(&self, command: Command) {
        let commands = self.commands.as_ref().expect("there until drop");
        commands.try_send(command).expect("the server runs until it is dropped");
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
