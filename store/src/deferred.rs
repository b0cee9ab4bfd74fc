//! Work that is too much for one step.
//!
//! One thread serves everybody, so that no input may take long, whatever guests have prepared. An input
//! has a budget of [`BUDGET`] units, of which a node that is removed, an event that is queued, or four
//! levels of a path cost about one. What is left of the death of a domain, of the events of a change
//! and of a removal when the budget is used up is done in pieces by [`Engine::work`].
//!
//! A connection whose request has left work behind is served again when that is done. So what waits is
//! bounded by the number of connections, its own events come before its next reply, and what it has
//! removed is given back before it asks for more. The domid of a dead domain is not used again before
//! its nodes are gone.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;

use triomphe::Arc;

use crate::connection::ConnId;
use crate::engine::{Engine, Millis};
use crate::fanout::Fanout;
use crate::node::Node;
use crate::tree::Tree;

/// Units of work that one input may cause at once: some two milliseconds.
pub(crate) const BUDGET: u64 = 8192;

/// After how many milliseconds a request that waits for work is offered again at the latest.
const RETRY: Millis = 100;

/// Nodes that have been taken out of the tree, each with all below it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Removal {
    /// Those that may be in the index of owners.
    pub(crate) indexed: Vec<Arc<Node>>,
    /// Those that are charged to their owners.
    pub(crate) charged: Vec<Arc<Node>>,
    /// Those that may have no other use: their memory is given back.
    pub(crate) unused: Vec<Arc<Node>>,
    /// Bytes of those that have been freed, as they are charged.
    freed: i64,
}

impl Removal {
    /// Frees nodes, in pieces those that are not used elsewhere.
    pub(crate) fn free(&mut self, nodes: impl IntoIterator<Item = Arc<Node>>) {
        self.unused.extend(nodes.into_iter().filter(Arc::is_unique));
    }
}

/// Something that is done in pieces.
#[derive(Debug)]
enum Job {
    Removal(Removal),
    Fanout(Fanout),
}

/// What waits to be done.
#[derive(Debug, Default)]
pub(crate) struct Deferred {
    /// Units that the current input may still cause.
    budget: u64,
    /// Units that have ever been spent.
    spent: u64,
    /// Events, in the order of the changes; and who has caused them.
    fanouts: VecDeque<(Option<ConnId>, Fanout)>,
    removals: VecDeque<(Option<ConnId>, Removal)>,
    /// How many of these each connection has caused.
    causes: BTreeMap<ConnId, usize>,
    /// Connections whose request waits until something is done.
    waiting: BTreeSet<ConnId>,
    /// Bytes of nodes, as they are charged, that removals in pieces have freed since this was last worth
    /// giving back.
    freed: i64,
}

/// What has to be freed before memory is worth giving back, in bytes as they are charged: that takes a
/// millisecond then. At the end of a removal in pieces a part of it suffices.
const FREED: i64 = 8 << 20;
const FREED_AT_END: i64 = 1 << 20;

impl Deferred {
    /// Have nodes been freed since this last was true whose memory is worth giving back?
    pub(crate) fn has_freed(&mut self) -> bool {
        let removes = !self.removals.is_empty();
        let much = self.freed >= if removes { FREED } else { FREED_AT_END };
        if much {
            self.freed = 0;
        }
        much
    }

    /// An input begins that may cause so much work at once.
    pub(crate) fn begin(&mut self, budget: u64) {
        self.budget = budget;
    }

    /// The current input has caused so many units of work.
    pub(crate) fn spend(&mut self, units: usize) {
        let units = units as u64;
        self.spent += units;
        self.budget = self.budget.saturating_sub(units);
    }

    /// Units that the current input may still cause.
    pub(crate) fn budget(&self) -> u64 {
        self.budget
    }

    /// Do events of earlier changes wait to be queued?
    pub(crate) fn has_fanouts(&self) -> bool {
        !self.fanouts.is_empty()
    }

    fn defer(&mut self, conn: Option<ConnId>, job: Job) {
        if let Some(conn) = conn {
            *self.causes.entry(conn).or_default() += 1;
        }
        match job {
            Job::Removal(removal) => self.removals.push_back((conn, removal)),
            Job::Fanout(fanout) => self.fanouts.push_back((conn, fanout)),
        }
    }

    pub(crate) fn defer_fanout(&mut self, conn: Option<ConnId>, fanout: Fanout) {
        self.defer(conn, Job::Fanout(fanout));
    }

    /// Something is done that this connection had caused.
    fn finish(&mut self, conn: Option<ConnId>) {
        let Some(conn) = conn else { return };
        if let Some(count) = self.causes.get_mut(&conn) {
            *count -= 1;
            if *count == 0 {
                self.causes.remove(&conn);
            }
        }
    }

    /// Until when a request of a connection waits at the most that has caused work which is not done.
    pub(crate) fn delay(&mut self, conn: ConnId, now: Millis) -> Option<Millis> {
        let delays = !self.causes.is_empty() && self.causes.contains_key(&conn);
        delays.then(|| self.wait(conn, now))
    }

    /// A request of a connection waits until something is done, at most until this time.
    pub(crate) fn wait(&mut self, conn: ConnId, now: Millis) -> Millis {
        self.waiting.insert(conn);
        now + RETRY
    }
}

impl Engine {
    /// Returns true if something waits to be done by [`Engine::work`].
    pub fn has_work(&self) -> bool {
        let deferred = &self.deferred;
        !deferred.fanouts.is_empty()
            || !deferred.removals.is_empty()
            || !self.domains.dying.is_empty()
    }

    /// Units of work that have ever been done: one takes some hundred nanoseconds. A server can end the
    /// turn of a connection by it.
    pub fn cost(&self) -> u64 {
        self.deferred.spent
    }

    /// Does a piece of what waits, of about `budget` units. To be called between inputs while
    /// [`Engine::has_work`].
    pub fn work(&mut self, budget: u32) {
        // A third for each kind, and what is left of it for the next, so that none waits for another.
        let budget = u64::from(budget).max(3);
        self.deferred.begin(budget / 3);
        while self.deferred.budget > 0
            && let Some((conn, fanout)) = self.deferred.fanouts.pop_front()
        {
            match self.advance_fanout(fanout) {
                Some(rest) => self.deferred.fanouts.push_front((conn, rest)),
                None => self.deferred.finish(conn),
            }
        }
        self.deferred.budget += budget / 3;
        while self.deferred.budget > 0
            && let Some(domid) = self.domains.dying.keys().next().copied()
        {
            self.remove_nodes_of(domid);
        }
        self.deferred.budget += budget / 3;
        while self.deferred.budget > 0
            && let Some((conn, removal)) = self.deferred.removals.pop_front()
        {
            match self.advance_removal(removal) {
                Ok(freed) => {
                    self.deferred.freed += freed;
                    self.deferred.finish(conn);
                }
                Err(mut rest) => {
                    self.deferred.freed += core::mem::take(&mut rest.freed);
                    self.deferred.removals.push_front((conn, rest));
                }
            }
        }
        let waiting = core::mem::take(&mut self.deferred.waiting);
        self.ready.extend(waiting);
    }

    /// Does everything that waits.
    pub fn finish_work(&mut self) {
        while self.has_work() {
            self.work(u32::MAX);
        }
    }

    /// Frees an old tree.
    pub(crate) fn free_tree(&mut self, tree: Tree) {
        let mut removal = Removal::default();
        removal.free([tree.into_root()]);
        self.forget_nodes(None, removal);
    }

    /// Forgets nodes that have been taken out of the tree: now, as far as the budget goes.
    pub(crate) fn forget_nodes(&mut self, conn: Option<ConnId>, removal: Removal) {
        if let Err(rest) = self.advance_removal(removal) {
            self.deferred.defer(conn, Job::Removal(rest));
        }
    }

    /// Does as much of a removal as the budget allows. Bytes that have been freed, or what is left of it.
    fn advance_removal(&mut self, mut removal: Removal) -> Result<i64, Removal> {
        let mut returned = 0;
        loop {
            if self.deferred.budget == 0 {
                break;
            }
            if let Some(node) = removal.indexed.pop() {
                self.deferred.spend(1);
                if self.owners.unindex(&node) {
                    self.deferred.spend(node.children().len() / 4);
                    removal.indexed.extend(node.children().iter().cloned());
                }
            } else if let Some(node) = removal.charged.pop() {
                self.deferred.spend(1 + node.children().len() / 4);
                self.domains.charge(node.acl().owner(), -node.charge());
                returned += node.charge().bytes;
                removal.charged.extend(node.children().iter().cloned());
            } else if let Some(node) = removal.unused.pop() {
                // The last use of a node frees it, and only then what is below it.
                if let Ok(node) = Arc::try_unwrap(node) {
                    self.deferred.spend(1);
                    removal.freed += node.charge().bytes;
                    node.dismantle(&mut removal.unused);
                }
            } else {
                self.retire(returned);
                return Ok(removal.freed);
            }
        }
        self.retire(returned);
        Err(removal)
    }
}
