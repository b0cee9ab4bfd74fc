//! What unprivileged guests with default quotas can do to delay other guests: on any daemon on the
//! pretend Xen, and on the engine in this process.
//!
//! An attack has two parts: the preparation, in which each request is cheap, and the strike, a
//! request or a death whose cost has been prepared.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fake_guest::{FakeGuest, PORT, set_state};
use crate::raw::{Conn, op};

/// Limit for a reply.
const PATIENCE: Duration = Duration::from_secs(60);

/// The payload of a reply, or the name of an error.
pub type Answer = Result<String, String>;

/// The system under attack. `|` stands for NUL; domain 0 is the toolstack.
pub trait Arena {
    /// Creates and introduces a domain with a home.
    fn introduce(&mut self, domid: u16) -> Result<(), String>;

    /// Sends a request of a domain and waits for its reply. Drops events.
    fn ask(&mut self, domid: u16, tx: u32, ty: u32, payload: &str) -> Result<Answer, String>;

    /// Destroys a domain. Returns when its death has been processed.
    fn die(&mut self, domid: u16) -> Result<(), String>;
}

/// An attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// Each guest names a domain in the permissions of a node, and creates a chain of 980 nodes
    /// below it, which inherit them. The domain dies.
    Death,
    /// Each guest has 128 watches on a node of the first one, which commits a transaction with 960
    /// writes below it.
    FanOut,
    /// A transaction of the toolstack is protected and has 1,000 requests. Guests make 1,000
    /// unrelated writes.
    Protected,
}

/// Levels of a chain, watches of a guest, writes of a transaction, unrelated requests.
const LEVELS: usize = 980;
const WATCHES: usize = 128;
const WRITES: usize = 960;
const REQUESTS: usize = 1000;
/// Commits of the toolstack that fail before the next transaction is protected.
const FAILURES: usize = 2;

impl Attack {
    /// All attacks.
    pub const ALL: [Attack; 3] = [Attack::Death, Attack::FanOut, Attack::Protected];

    /// The domain that dies.
    fn victim(guests: u16) -> u16 {
        guests + 1
    }

    /// Executes all steps but the last.
    pub fn prepare(self, arena: &mut dyn Arena, guests: u16) -> Result<Prepared, String> {
        for domid in 1..=Attack::victim(guests) {
            arena.introduce(domid)?;
        }
        let mut tx = 0;
        match self {
            Attack::Death => {
                let (chain, victim) = ("/x".repeat(LEVELS), Attack::victim(guests));
                for domid in 1..=guests {
                    must(arena, domid, 0, op::WRITE, "a|")?;
                    must(arena, domid, 0, op::SET_PERMS, &format!("a|n{domid}|r{victim}|"))?;
                    must(arena, domid, 0, op::WRITE, &format!("a{chain}|"))?;
                }
            }
            Attack::FanOut => {
                must(arena, 1, 0, op::WRITE, "w|")?;
                must(arena, 1, 0, op::SET_PERMS, "w|r1|")?;
                for domid in 2..=guests {
                    for token in 0..WATCHES {
                        let watch = format!("/local/domain/1/w|{token}|");
                        must(arena, domid, 0, op::WATCH, &watch)?;
                    }
                }
                tx = begin(arena, 1)?;
                // The names of more children would exceed the size of a node.
                for write in 0..WRITES {
                    must(arena, 1, tx, op::WRITE, &format!("w/{}/{}|", write % 30, write / 30))?;
                }
            }
            Attack::Protected => {
                for failure in 0..FAILURES {
                    let tx = begin(arena, 0)?;
                    let _ = arena.ask(0, tx, op::READ, "/local/domain/1/key|")?;
                    must(arena, 1, 0, op::WRITE, &format!("key|{failure}"))?;
                    must(arena, 0, tx, op::WRITE, "/local/domain/1/reply|")?;
                    let _ = arena.ask(0, tx, op::TRANSACTION_END, "T|")?;
                }
                // What the strike overwrites.
                for domid in 1..=guests {
                    must(arena, domid, 0, op::WRITE, "other|")?;
                }
                tx = begin(arena, 0)?;
                for request in 0..REQUESTS {
                    let domid = 1 + request % usize::from(guests);
                    let _ = arena.ask(0, tx, op::READ, &format!("/local/domain/{domid}|"))?;
                }
            }
        }
        Ok(Prepared { attack: self, guests, tx })
    }
}

/// A prepared attack, ready for the strike.
#[derive(Clone, Copy, Debug)]
pub struct Prepared {
    attack: Attack,
    guests: u16,
    tx: u32,
}

impl Prepared {
    /// Executes the last step.
    pub fn strike(self, arena: &mut dyn Arena) -> Result<(), String> {
        match self.attack {
            Attack::Death => arena.die(Attack::victim(self.guests)),
            Attack::FanOut => must(arena, 1, self.tx, op::TRANSACTION_END, "T|"),
            Attack::Protected => (0..REQUESTS).try_for_each(|request| {
                let domid = u16::try_from(request).unwrap_or(0) % self.guests + 1;
                must(arena, domid, 0, op::WRITE, &format!("other|{request}"))
            }),
        }
    }
}

fn must(arena: &mut dyn Arena, domid: u16, tx: u32, ty: u32, payload: &str) -> Result<(), String> {
    match arena.ask(domid, tx, ty, payload)? {
        Ok(_) => Ok(()),
        Err(name) => Err(format!("type {ty} of domain {domid}, {payload:.40}: {name}")),
    }
}

fn begin(arena: &mut dyn Arena, domid: u16) -> Result<u32, String> {
    let id = arena.ask(domid, 0, op::TRANSACTION_START, "|")?;
    let id = id.map_err(|name| format!("TRANSACTION_START of domain {domid}: {name}"))?;
    id.trim_end_matches('|').parse().map_err(|_| format!("no transaction: {id}"))
}

/// A daemon on the pretend Xen, whose guests use rings.
pub struct Running {
    socket: PathBuf,
    xen: PathBuf,
    conns: BTreeMap<u16, Conn>,
}

impl Running {
    /// Connects to the daemon with this socket and this directory of a pretend Xen.
    pub fn new(socket: &Path, xen: &Path) -> Result<Running, String> {
        let conns = BTreeMap::from([(0, connect(socket)?)]);
        Ok(Running { socket: socket.into(), xen: xen.into(), conns })
    }

    fn dom0(&mut self) -> Result<&mut Conn, String> {
        self.conns.get_mut(&0).ok_or_else(|| "no connection of the toolstack".into())
    }
}

fn patient(mut conn: Conn) -> Conn {
    conn.patience = PATIENCE;
    conn
}

fn connect(socket: &Path) -> Result<Conn, String> {
    let conn = Conn::connect(socket).map_err(|error| format!("{}: {error}", socket.display()));
    conn.map(patient)
}

impl Arena for Running {
    fn introduce(&mut self, domid: u16) -> Result<(), String> {
        let guest = FakeGuest::create(&self.xen, domid).map_err(|error| error.to_string())?;
        let dom0 = self.dom0()?;
        dom0.ok(op::INTRODUCE, &format!("{domid}|1|{PORT}|"))?;
        dom0.ok(op::WRITE, &format!("/local/domain/{domid}|"))?;
        dom0.ok(op::SET_PERMS, &format!("/local/domain/{domid}|n{domid}|"))?;
        self.conns.insert(domid, patient(Conn::new(guest)));
        Ok(())
    }

    fn ask(&mut self, domid: u16, tx: u32, ty: u32, payload: &str) -> Result<Answer, String> {
        let conn = self.conns.get_mut(&domid).ok_or_else(|| format!("no domain {domid}"))?;
        let answer = conn.tx(tx, ty, payload);
        conn.events.clear();
        answer
    }

    fn die(&mut self, domid: u16) -> Result<(), String> {
        let mut watcher = connect(&self.socket)?;
        watcher.watch("@releaseDomain|death|")?;
        set_state(&self.xen, domid, "gone").map_err(|error| error.to_string())?;
        watcher.event("@releaseDomain|death|")
    }
}
