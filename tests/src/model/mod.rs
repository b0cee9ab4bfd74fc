//! A naive model of a XenStore, which the fuzz targets compare the engine with.
//!
//! The tree is a map from paths to nodes. A transaction copies the map. A commit runs the requests of
//! the transaction again, one after the other, and compares the replies. The model shares no code with
//! the `protocol` and `store` crates.
//!
//! The engine must agree in the type and payload of every reply (except for the generation in
//! DIRECTORY_PART, which is opaque), and in the events of every connection and their order. Where the
//! protocol allows several results, the model chooses:
//!
//! * a change fires the watches of a connection in order of registration;
//! * a removal first fires watches on the nodes below, deepest first, siblings in order of creation;
//! * a commit fires watches once for each changed path, in order of first change;
//! * equal events of one watch that have not been fetched are one event;
//! * the quotas `memory` and `outstanding` are not modelled.

mod domains;
mod events;
mod parse;
mod requests;
mod transactions;

use std::collections::BTreeMap;

/// The payload of a reply, or the name of an error.
type Outcome = Result<Vec<u8>, &'static str>;

/// A permission entry: letter, domid, and whether the domid named no domain.
type Entry = (u8, u16, bool);

#[derive(Clone, Debug)]
struct Node {
    value: Vec<u8>,
    perms: Vec<Entry>,
    created: u64,
}

/// Nodes by path; special nodes by name.
type Tree = BTreeMap<String, Node>;

#[derive(Clone, Debug)]
struct Domain {
    introduced: bool,
    shutdown: bool,
    target: Option<u16>,
    features: u32,
    quotas: BTreeMap<&'static str, u32>,
}

#[derive(Clone, Debug)]
struct Watch {
    /// The path as the client wrote it.
    spelled: String,
    path: String,
    token: Vec<u8>,
    depth: Option<u64>,
}

#[derive(Clone, Debug)]
struct Transaction {
    snapshot: Tree,
    tree: Tree,
    changes: Vec<(String, bool)>,
    log: Vec<(u32, Vec<u8>, Outcome)>,
    doomed: bool,
}

/// A change of one path by a request, with the trees before and after the request.
struct Step {
    path: String,
    removed: bool,
    before: Tree,
    after: Tree,
}

#[derive(Debug, Default)]
struct Conn {
    /// `None` for a socket.
    domid: Option<u16>,
    watches: Vec<Watch>,
    transactions: BTreeMap<u32, Transaction>,
    last_transaction: u32,
    events: Vec<(String, Vec<u8>)>,
}

/// The model.
#[derive(Debug)]
pub struct Model {
    tree: Tree,
    conns: BTreeMap<u32, Conn>,
    last_conn: u32,
    domains: BTreeMap<u16, Domain>,
    defaults: BTreeMap<&'static str, u32>,
    /// The domains that exist, and whether each has shut down.
    alive: BTreeMap<u16, bool>,
    clock: u64,
    /// A planted bug that a comparison must detect: blind writes conflict.
    has_bug: bool,
}

const QUOTAS: [(&str, u32); 10] = [
    ("nodes", 1000),
    ("watches", 128),
    ("outstanding", 20),
    ("memory", 2_621_440),
    ("soft-memory", 2_097_152),
    ("transactions", 10),
    ("transaction-nodes", 1024),
    ("node-permissions", 5),
    ("path-max", 2048),
    ("node-size", 2048),
];

impl Model {
    /// A model with these quotas instead of the defaults.
    pub fn new(quotas: &[(&'static str, u32)]) -> Model {
        let mut defaults: BTreeMap<&'static str, u32> = QUOTAS.into_iter().collect();
        defaults.extend(quotas.iter().copied());
        let private = vec![(b'n', 0, false)];
        let node =
            |perms: &[Entry], created| Node { value: Vec::new(), perms: perms.to_vec(), created };
        let tree = [
            ("/", node(&private, 0)),
            ("/tool", node(&private, 1)),
            ("/tool/xenstored", node(&private, 2)),
            ("@introduceDomain", node(&private, 0)),
            ("@releaseDomain", node(&[private[0], (b'r', 32757, false)], 0)),
        ];
        let dom0 = Domain {
            introduced: true,
            shutdown: false,
            target: None,
            features: 15,
            quotas: QUOTAS.iter().map(|(name, _)| (*name, 0)).collect(),
        };
        Model {
            tree: tree.into_iter().map(|(path, node)| (path.into(), node)).collect(),
            conns: BTreeMap::new(),
            last_conn: 0,
            domains: BTreeMap::from([(0, dom0)]),
            defaults,
            alive: BTreeMap::from([(0, false)]),
            clock: 2,
            has_bug: false,
        }
    }

    /// Gives the model a bug, which a comparison must find.
    pub fn plant_bug(&mut self) {
        self.has_bug = true;
    }

    /// Opens a connection of a domain, or of a socket if `domid` is `None`.
    pub fn connect(&mut self, domid: Option<u16>) -> u32 {
        self.last_conn += 1;
        self.conns.insert(self.last_conn, Conn { domid, ..Conn::default() });
        self.last_conn
    }

    /// Ends a connection.
    pub fn disconnect(&mut self, conn: u32) {
        self.conns.remove(&conn);
    }

    /// The connection restarts.
    pub fn restart(&mut self, conn: u32) {
        self.reset(conn);
    }

    /// Returns true if the connection is open. It ends with its domain.
    pub fn is_connected(&self, conn: u32) -> bool {
        self.conns.contains_key(&conn)
    }

    /// Adds a domain.
    pub fn domain_created(&mut self, domid: u16) {
        self.alive.insert(domid, false);
    }

    /// Returns true if the domain is introduced.
    pub fn is_introduced(&self, domid: u16) -> bool {
        self.domains.get(&domid).is_some_and(|domain| domain.introduced)
    }

    /// Takes the queued events of a connection.
    pub fn take_events(&mut self, conn: u32) -> Vec<(String, Vec<u8>)> {
        self.conns.get_mut(&conn).map(|conn| std::mem::take(&mut conn.events)).unwrap_or_default()
    }

    /// Executes a request. Returns type and payload of the reply. The first event of a new watch, which
    /// follows the reply, is not queued.
    pub fn request(&mut self, conn: u32, ty: u32, tx: u32, payload: &[u8]) -> (u32, Vec<u8>) {
        let outcome = self.checked(conn, ty, tx, payload);
        match outcome {
            Ok(bytes) if bytes.len() <= 4096 => (ty, bytes),
            Ok(_) => (16, b"E2BIG\0".to_vec()),
            Err(name) => (16, format!("{name}\0").into_bytes()),
        }
    }

    /// Checks a request in the order of C xenstored, then executes it.
    fn checked(&mut self, conn: u32, ty: u32, tx: u32, payload: &[u8]) -> Outcome {
        if ty > 26 || [15, 16, 20].contains(&ty) {
            return Err("ENOSYS");
        }
        if [0, 8, 9, 17, 18, 19, 24, 25, 26].contains(&ty) && !self.privileged(conn) {
            return Err("EACCES");
        }
        let is_watch = ty == 4 || ty == 5;
        if tx != 0 && !is_watch && !self.conns[&conn].transactions.contains_key(&tx) {
            return Err("ENOENT");
        }
        match ty {
            1 | 2 | 3 | 11 | 12 | 13 | 14 | 22 if tx != 0 => {
                self.in_transaction(conn, tx, ty, payload)
            }
            1 | 2 | 3 | 11 | 12 | 13 | 14 | 22 => self.outside_transaction(conn, ty, payload),
            4 => self.watch(conn, payload),
            5 => self.unwatch(conn, payload),
            6 if tx != 0 => Err("EBUSY"),
            6 => self.start(conn),
            7 => self.end(conn, tx, payload),
            21 => {
                self.reset(conn);
                Ok(b"OK\0".to_vec())
            }
            _ => self.domain_request(conn, ty, payload),
        }
    }

    fn domid(&self, conn: u32) -> u16 {
        self.conns.get(&conn).and_then(|conn| conn.domid).unwrap_or(0)
    }

    fn privileged(&self, conn: u32) -> bool {
        self.domid(conn) == 0
    }

    fn features(&self, conn: u32) -> u32 {
        let domid = self.conns.get(&conn).and_then(|conn| conn.domid);
        domid.and_then(|domid| self.domains.get(&domid)).map_or(15, |domain| domain.features)
    }

    /// Returns true if the amount exceeds the quota of the connection's domain.
    fn exceeds(&self, conn: u32, quota: &str, amount: usize) -> bool {
        let quotas = self.domains.get(&self.domid(conn)).map_or(&self.defaults, |d| &d.quotas);
        let limit = quotas[quota] as usize;
        !self.privileged(conn) && limit != 0 && amount > limit
    }

    /// Returns true if a domain exists. The model knows the domain from then on.
    fn find(&mut self, domid: u16) -> bool {
        if self.domains.contains_key(&domid) {
            return true;
        }
        if domid >= 0x7ff0 || !self.alive.contains_key(&domid) {
            return false;
        }
        let domain = Domain {
            introduced: false,
            shutdown: false,
            target: None,
            features: 15,
            quotas: self.defaults.clone(),
        };
        self.domains.insert(domid, domain);
        true
    }

    /// Returns true if a permission list grants `conn` this access (`r` or `w`).
    fn allowed(&self, conn: u32, perms: &[Entry], what: u8) -> bool {
        let domid = self.domid(conn);
        let target = self.domains.get(&domid).and_then(|domain| domain.target);
        let may = |id: u16| {
            if perms[0].1 == id {
                return true;
            }
            let entry = perms[1..].iter().find(|e| !e.2 && (e.1 == id || e.1 == 32757));
            let letter = entry.unwrap_or(&perms[0]).0;
            letter == b'b' || letter == what
        };
        domid == 0 || may(domid) || target.is_some_and(may)
    }

    fn owns(&self, conn: u32, perms: &[Entry]) -> bool {
        let domid = self.domid(conn);
        let target = self.domains.get(&domid).and_then(|domain| domain.target);
        domid == 0 || perms[0].1 == domid || target == Some(perms[0].1)
    }
}

/// The path of the parent; that of a special node is the root.
fn parent(path: &str) -> String {
    match path.rfind('/') {
        None | Some(0) => "/".into(),
        Some(at) => path[..at].into(),
    }
}

/// The paths of the children of a node, in order of creation.
fn children(tree: &Tree, path: &str) -> Vec<String> {
    let mut found: Vec<(&u64, &String)> = tree
        .iter()
        .filter(|(p, _)| *p != "/" && p.starts_with('/') && parent(p) == path)
        .map(|(p, node)| (&node.created, p))
        .collect();
    found.sort();
    found.into_iter().map(|(_, path)| path.clone()).collect()
}

/// Returns true if `path` is strictly below `above`.
fn is_below(path: &str, above: &str) -> bool {
    let prefix = if above == "/" { "/".into() } else { format!("{above}/") };
    path != above && path.starts_with(&prefix)
}
