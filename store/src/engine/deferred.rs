//! Deferred work: work that exceeds the budget of one input.
//!
//! One thread serves all connections, so no input may take long, whatever guests have prepared. An input
//! has a budget of [`BUDGET`] units. One unit is about the cost of removing a node, of queuing an event,
//! or of four levels of a path. If the budget is used up, [`Input::Work`](crate::Input::Work) does the
//! rest of a domain's death, of the events of a change, or of a removal in pieces.
//!
//! A connection whose request has deferred work is served again when that work is done. So the deferred
//! work is bounded by the number of connections, the connection gets its own events before its next
//! reply, and the charges of the nodes it has removed are released before its next request. The domid of
//! a dead domain is not used again before its nodes are removed.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};

use triomphe::Arc;

use crate::engine::Engine;
use crate::engine::fanout::Fanout;
use crate::ids::{ConnId, Millis};
use crate::tree::Tree;
use crate::tree::removal::Removal;

/// Units of work that one input may cause at once: about two milliseconds.
pub(crate) const BUDGET: u64 = 8192;

/// Milliseconds after which a request that waits for deferred work is retried at the latest.
const RETRY: Millis = 100;

/// The queues of deferred work.
#[derive(Debug, Default)]
pub(crate) struct Deferred {
    /// Units that the current input may still cause.
    budget: u64,
    /// Units spent since the start.
    spent: u64,
    /// Events to be queued, in the order of the changes, with the connection that caused them.
    fanouts: VecDeque<(Option<ConnId>, Fanout)>,
    removals: VecDeque<(Option<ConnId>, Removal)>,
    /// The number of pending jobs that each connection has caused.
    causes: BTreeMap<ConnId, usize>,
    /// Connections whose request waits until a job is done.
    waiting: BTreeSet<ConnId>,
    /// Charged bytes that deferred removals have freed since memory was last returned to the system.
    freed: i64,
}

/// Charged bytes that must be freed before memory is returned to the system, which takes about a
/// millisecond. At the end of a deferred removal a part of it suffices.
const FREED: i64 = 8 << 20;
const FREED_AT_END: i64 = 1 << 20;

impl Deferred {
    /// Returns true once enough memory has been freed, since this last returned true, to return it to the
    /// system.
    pub(crate) fn has_freed(&mut self) -> bool {
        let removes = !self.removals.is_empty();
        let much = self.freed >= if removes { FREED } else { FREED_AT_END };
        if much {
            self.freed = 0;
        }
        much
    }

    /// Begins an input, which may cause this much work at once.
    pub(crate) fn begin(&mut self, budget: u64) {
        self.budget = budget;
    }

    /// Counts units of work that the current input has caused.
    pub(crate) fn spend(&mut self, units: usize) {
        let units = units as u64;
        self.spent += units;
        self.budget = self.budget.saturating_sub(units);
    }

    /// Units that the current input may still cause.
    pub(crate) fn budget(&self) -> u64 {
        self.budget
    }

    /// Returns true if events of earlier changes are still to be queued.
    pub(crate) fn has_fanouts(&self) -> bool {
        !self.fanouts.is_empty()
    }

    /// This connection has caused a job that is deferred.
    fn blame(&mut self, conn: Option<ConnId>) {
        if let Some(conn) = conn {
            *self.causes.entry(conn).or_default() += 1;
        }
    }

    pub(crate) fn defer_fanout(&mut self, conn: Option<ConnId>, fanout: Fanout) {
        self.blame(conn);
        self.fanouts.push_back((conn, fanout));
    }

    fn defer_removal(&mut self, conn: Option<ConnId>, removal: Removal) {
        self.blame(conn);
        self.removals.push_back((conn, removal));
    }

    /// A job that this connection had caused is done.
    fn finish(&mut self, conn: Option<ConnId>) {
        let Some(conn) = conn else { return };
        if let Some(count) = self.causes.get_mut(&conn) {
            *count -= 1;
            if *count == 0 {
                self.causes.remove(&conn);
            }
        }
    }

    /// Until when a request of this connection waits at most. `None` if no work that the connection has
    /// caused is pending.
    pub(crate) fn delay(&mut self, conn: ConnId, now: Millis) -> Option<Millis> {
        let delays = !self.causes.is_empty() && self.causes.contains_key(&conn);
        delays.then(|| self.wait(conn, now))
    }

    /// Makes a request of this connection wait until a job is done, at most until the returned time.
    pub(crate) fn wait(&mut self, conn: ConnId, now: Millis) -> Millis {
        self.waiting.insert(conn);
        now + RETRY
    }
}

impl Engine {
    /// Returns true if there is deferred work for [`Input::Work`](crate::Input::Work).
    pub fn has_work(&self) -> bool {
        let deferred = &self.deferred;
        !deferred.fanouts.is_empty()
            || !deferred.removals.is_empty()
            || !self.domains.dying.is_empty()
    }

    /// Units of work done since the start; one takes a few hundred nanoseconds. A server can end the turn
    /// of a connection after a number of units.
    pub fn cost(&self) -> u64 {
        self.deferred.spent
    }

    /// Does about `budget` units of the deferred work.
    pub(crate) fn advance_work(&mut self, budget: u32) {
        // Each kind gets a third, and the rest of the kind before it, so that no kind blocks another.
        let budget = u64::from(budget).max(3);
        self.deferred.budget = budget / 3;
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
        // A connection whose own job is pending would only be deferred again.
        let Deferred { waiting, causes, .. } = &mut self.deferred;
        self.ready.extend(waiting.iter().filter(|conn| !causes.contains_key(conn)));
        waiting.retain(|conn| causes.contains_key(conn));
    }

    /// Frees an old tree.
    pub(crate) fn free_tree(&mut self, tree: Tree) {
        let root = tree.into_root();
        if root.is_unique() {
            self.forget_nodes(None, Removal { unused: alloc::vec![root], ..Removal::default() });
        }
    }

    /// Forgets removed nodes as far as the budget allows, and defers the rest.
    pub(crate) fn forget_nodes(&mut self, conn: Option<ConnId>, removal: Removal) {
        if !removal.is_empty()
            && let Err(rest) = self.advance_removal(removal)
        {
            self.deferred.defer_removal(conn, rest);
        }
    }

    /// Does as much of a removal as the budget allows. Returns the charged bytes that have been freed, or
    /// the rest of the removal.
    fn advance_removal(&mut self, mut removal: Removal) -> Result<i64, Removal> {
        let mut returned = 0;
        loop {
            if self.deferred.budget == 0 {
                break;
            }
            if let Some(node) = removal.indexed.pop() {
                self.deferred.spend(1);
                if self.owner_index.unindex(&node) {
                    self.deferred.spend(node.children().len() / 4);
                    removal.indexed.extend(node.children().iter().cloned());
                }
            } else if let Some(node) = removal.charged.pop() {
                self.deferred.spend(1 + node.children().len() / 4);
                self.domains.charge(node.acl().owner(), -node.charge());
                returned += node.charge().bytes;
                removal.charged.extend(node.children().iter().cloned());
            } else if let Some(node) = removal.unused.pop() {
                // Only the last reference frees a node, and only then its children.
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
