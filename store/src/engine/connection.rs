//! Connections: who is at the other end, and what they have open.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};

use xenstore_protocol::TxId;

use crate::ids::Caller;
use crate::transaction::Transaction;
use crate::watch::index::{Queued, WatchId};

/// A watch by what makes it one: resolved path and token.
pub(crate) type WatchKey = (Box<str>, Box<[u8]>);

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) caller: Caller,
    /// Shared with states that are being written: each request takes its own out and puts it back.
    pub(crate) transactions: BTreeMap<TxId, triomphe::Arc<Transaction>>,
    pub(crate) last_transaction: TxId,
    /// A bit for each of the last commits, set for those that failed with EAGAIN.
    pub(crate) failures: u16,
    pub(crate) watches: BTreeMap<WatchKey, WatchId>,
    pub(crate) events: VecDeque<Queued>,
    /// How many of them are stale.
    pub(crate) stale: usize,
}

impl Connection {
    pub(crate) fn new(caller: Caller) -> Connection {
        Connection {
            caller,
            transactions: BTreeMap::new(),
            last_transaction: TxId::NONE,
            failures: 0,
            watches: BTreeMap::new(),
            events: VecDeque::new(),
            stale: 0,
        }
    }

    /// Events that wait to be fetched.
    pub(crate) fn waiting(&self) -> usize {
        self.events.len() - self.stale
    }

    /// So many more events are stale. They are taken out when they are the larger part, so that this
    /// costs a constant for each event that was ever queued. `is_live` says which are not.
    pub(crate) fn make_stale(&mut self, count: usize, is_live: impl Fn(&Queued) -> bool) {
        self.stale += count;
        if self.stale == self.events.len() {
            self.events.clear();
            self.stale = 0;
        } else if self.stale > self.waiting().max(32) {
            self.events.retain(is_live);
            self.stale = 0;
        }
    }

    /// An id for a new transaction: never 0, and none that is open.
    pub(crate) fn next_transaction(&mut self) -> TxId {
        loop {
            self.last_transaction.0 = self.last_transaction.0.wrapping_add(1);
            let id = self.last_transaction;
            if id != TxId::NONE && !self.transactions.contains_key(&id) {
                return id;
            }
        }
    }
}
