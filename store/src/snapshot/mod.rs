//! Everything that a store is, as a value: what a live update, a takeover and the recovery from a
//! crash hand over.
//!
//! An engine that is made from a state answers every later request, and tells every later event,
//! exactly as the one that the state was taken of. Not carried: who caused past conflicts
//! (`engine/conflicts.rs`), lists of children that are being fetched in parts, which are only a cache, and
//! connections that have ended and that the server has not been told about.
//!
//! Taking a state costs what there is of domains, connections and watches, but not of nodes: the
//! tree is a snapshot. It may be encoded by another thread.
//!
//! A stream may be followed by a second one ([`State::encode_since`]), which has everything but the
//! nodes, and of these what has changed: then little is left to be written at the moment that counts.
//! It is how a live update gets on with a large store.
//!
//! | file | |
//! |---|---|
//! | `encode.rs`, `decode.rs` | the migration stream |
//! | `for_c.rs` | the migration stream that C xenstored reads, and what is lost by it |
//! | `compact.rs`, `nodes.rs` | the tree in it, for ourselves and for others |
//! | `difference.rs`, `transactions.rs` | trees as what differs from others; open transactions |
//! | `ocaml.rs` | what oxenstored writes instead |

mod compact;
mod connection_io;
mod decode;
mod difference;
mod encode;
mod for_c;
mod nodes;
mod ocaml;
mod transactions;

pub use connection_io::ConnectionIo;
pub use for_c::CFormat;

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use xenstore_protocol::{DomId, Features, Perms, TxId};

use crate::domain::quotas::Quotas;
use crate::domain::registry::{Largest, Usage};
use crate::ids::{Caller, ConnId, Millis};
use crate::transaction::Transaction;
use crate::transaction::retention::Retention;
use crate::tree::Tree;
use crate::tree::acl::Era;
use crate::watch::index::WatchId;

/// In place of a target that is not there (`DOMID_INVALID`).
const NO_TARGET: u16 = 0x7ff4;
/// In place of a depth that is not there.
const NO_DEPTH: u16 = 0xffff;

/// In place of a time that is not there.
const NEVER: u64 = u64::MAX;

/// A domain that the store knows.
#[derive(Clone, Debug)]
pub struct DomainState {
    /// Its domid.
    pub domid: DomId,
    /// Tells it from others with the same domid.
    pub unique_id: u64,
    /// Is it connected?
    pub introduced: bool,
    /// Has its shutdown been told?
    pub shutdown: bool,
    /// The domain whose rights it has as well.
    pub target: Option<DomId>,
    /// Feature bits that it is offered.
    pub features: Features,
    /// Its quotas; if they are not known, those of a new domain.
    pub quotas: Option<Quotas>,
    pub(crate) peak: Usage,
    pub(crate) largest: Largest,
}

/// A watch.
#[derive(Clone, Debug)]
pub struct WatchState {
    pub(crate) id: WatchId,
    /// The path, and where in it begins what the client wrote: taking a state copies neither.
    pub(crate) path: Arc<str>,
    pub(crate) prefix: usize,
    /// As the client gave it.
    pub token: Arc<[u8]>,
    /// Levels below the path; all if absent.
    pub depth: Option<u32>,
    /// One event waits instead of all that happened.
    pub(crate) collapsed: bool,
}

impl WatchState {
    /// As the client wrote it: a relative path stays relative.
    pub fn path(&self) -> &str {
        &self.path[self.prefix..]
    }
}

/// An event that waits to be fetched.
#[derive(Clone, Debug)]
pub(crate) struct EventState {
    /// Which of the connection's watches it belongs to.
    pub(crate) watch: WatchId,
    /// Resolved.
    pub(crate) path: Arc<str>,
}

/// What belongs to the server as a whole. The engine leaves it alone, as [`ConnectionIo`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerIo {
    /// Descriptor of the listening socket.
    pub listener: Option<i32>,
    /// Descriptor of the event channel device.
    pub evtchn: Option<i32>,
    /// The local port on which `VIRQ_DOM_EXC` is bound.
    pub virq_port: Option<u32>,
    /// Whatever else a server wants to find again; only it knows what it means.
    pub other: Vec<u8>,
}

/// A connection.
#[derive(Clone, Debug)]
pub struct ConnectionState {
    /// Its number, which it keeps.
    pub id: ConnId,
    /// Who is at the other end.
    pub caller: Caller,
    /// What the server keeps for it.
    pub io: ConnectionIo,
    /// Its watches, in order of registration.
    pub watches: Vec<WatchState>,
    /// The domain whose relative paths it means; unknown if another daemon wrote the state.
    pub(crate) domid: Option<DomId>,
    pub(crate) last_transaction: TxId,
    /// A bit for each of the last commits; see `Connection`.
    pub(crate) failures: u16,
    /// The end of the deferral of its request, if one is deferred; see `engine/fairness.rs`.
    pub(crate) held: Option<Millis>,
    /// In the order in which they go out.
    pub(crate) events: Vec<EventState>,
    /// By number.
    pub(crate) transactions: Vec<(TxId, triomphe::Arc<Transaction>)>,
    /// Which of them are protected, and until when.
    pub(crate) protected: Vec<(TxId, Millis)>,
}

impl ConnectionState {
    /// A connection with nothing open.
    pub fn new(id: ConnId, caller: Caller) -> ConnectionState {
        ConnectionState {
            id,
            caller,
            io: ConnectionIo::default(),
            watches: Vec::new(),
            domid: None,
            last_transaction: TxId::NONE,
            failures: 0,
            held: None,
            events: Vec::new(),
            transactions: Vec::new(),
            protected: Vec::new(),
        }
    }

    /// Numbers of its open transactions.
    pub fn transactions(&self) -> impl Iterator<Item = TxId> {
        self.transactions.iter().map(|(id, _)| *id)
    }

    /// How many events wait to be fetched.
    pub fn events(&self) -> usize {
        self.events.len()
    }
}

/// Counters of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) stamp: u64,
    pub(crate) epoch: u64,
    pub(crate) last_conn: u64,
    pub(crate) last_watch: u64,
    pub(crate) injected_eagain: u32,
    pub(crate) protected: u64,
    pub(crate) held: u64,
}

/// Everything that is carried; see `store/src/snapshot/mod.rs`.
#[derive(Clone, Debug)]
pub struct State {
    /// What new domains start with; if that is not known, what the configuration says.
    pub quotas: Option<Quotas>,
    /// In order of domids.
    pub domains: Vec<DomainState>,
    /// In order of connection.
    pub connections: Vec<ConnectionState>,
    /// What belongs to the server.
    pub io: ServerIo,
    /// What a stream that was read could not carry, or has in it that we do not know, to be told to
    /// the operator. Not written.
    pub lost: Vec<String>,
    pub(crate) counters: Counters,
    pub(crate) retention: Retention,
    /// How many domains with each domid have died.
    pub(crate) eras: BTreeMap<DomId, Era>,
    pub(crate) tree: Tree,
}

/// The nodes of a state that has been written. Another can be written as what has changed since.
#[derive(Clone, Debug)]
pub struct Base(Tree);

impl State {
    /// What is to be kept of a state so that another can follow it in its stream; see
    /// [`State::encode_since`].
    pub fn into_base(self) -> Base {
        Base(self.tree)
    }

    /// Calls `visit` with path, value and permissions of every node: parents first, siblings in order
    /// of creation, then the special nodes.
    pub fn visit_nodes(&self, mut visit: impl FnMut(&str, &[u8], &Perms)) {
        nodes::walk(&self.tree, |path, node| {
            let path = core::str::from_utf8(path).expect("it is made of names");
            let era_of = |domid| self.eras.get(&domid).copied().unwrap_or(0);
            let acl = node.acl().without_stale(era_of);
            visit(path, node.value(), &acl.as_ref().unwrap_or(node.acl()).perms());
        });
    }
}

/// States are the same if they are written the same.
impl PartialEq for State {
    fn eq(&self, other: &State) -> bool {
        self.encode() == other.encode()
    }
}

impl Eq for State {}
