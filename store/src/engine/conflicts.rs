//! Recent changes, so that a conflict can be reported with its path and the connection that caused it.

use alloc::collections::VecDeque;
use alloc::string::String;

use crate::ids::{ConnId, Millis};

/// Changes and conflicts that are remembered.
const PAST_MAX: usize = 256;
const PAST_BYTES_MAX: usize = 32 * 1024;
const CONFLICTS_MAX: usize = 32;

/// A change of the committed tree.
#[derive(Clone, Debug)]
pub(crate) struct RecentChange {
    pub(crate) path: String,
    /// `None` if the domain of the connection is gone.
    pub(crate) conn: Option<ConnId>,
    /// The engine's stamp after it. Writing a value leaves that as it is.
    pub(crate) stamp: u64,
}

/// A transaction that has failed with EAGAIN, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Whose transaction it was.
    pub conn: ConnId,
    /// The first place where a request would now be answered differently.
    pub path: String,
    /// Who last changed something there, if that is still known.
    pub by: Option<ConnId>,
    /// When.
    pub at: Millis,
}

/// What is remembered; the oldest is forgotten.
#[derive(Debug, Default)]
pub(crate) struct ConflictLog {
    past: VecDeque<RecentChange>,
    /// Bytes of their paths.
    past_bytes: usize,
    conflicts: VecDeque<Conflict>,
    /// When one was told last.
    pub(crate) told: Option<Millis>,
    /// How many there have been.
    pub(crate) conflict_count: u64,
}

impl ConflictLog {
    pub(crate) fn changed(&mut self, past: RecentChange) {
        self.past_bytes += past.path.len();
        self.past.push_back(past);
        while self.past.len() > PAST_MAX || self.past_bytes > PAST_BYTES_MAX {
            let Some(oldest) = self.past.pop_front() else { break };
            self.past_bytes -= oldest.path.len();
        }
    }

    /// Returns the connection, other than `conn`, that last changed something at, above or below `path`
    /// since a transaction began. `since` is the stamp that only its start has given: changes before it
    /// have a lower one.
    pub(crate) fn who(&self, path: &str, conn: ConnId, since: u64) -> Option<ConnId> {
        let recent = self.past.iter().rev().take_while(|past| past.stamp >= since);
        let mut others = recent.filter(|past| past.conn != Some(conn));
        others.find(|past| is_on_way(&past.path, path) || is_on_way(path, &past.path))?.conn
    }

    pub(crate) fn conflict(&mut self, conflict: Conflict) {
        self.conflict_count += 1;
        if self.conflicts.len() == CONFLICTS_MAX {
            self.conflicts.pop_front();
        }
        self.conflicts.push_back(conflict);
    }

    /// The latest first.
    pub(crate) fn conflicts(&self) -> impl Iterator<Item = &Conflict> {
        self.conflicts.iter().rev()
    }
}

/// Is `above` the path itself or on the way to it?
fn is_on_way(above: &str, path: &str) -> bool {
    let rest = path.strip_prefix(above.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a conflict is reported with an unrelated change, an old one, or one of the transaction's
    // own client.
    #[test]
    fn the_last_who_changed_something_there_is_found() {
        let mut conflicts = ConflictLog::default();
        let changes = [("/a", 1, 10), ("/a/b", 2, 11), ("/ab", 3, 12), ("/a/b/c", 4, 13)];
        for (path, conn, stamp) in changes {
            conflicts.changed(RecentChange { path: path.into(), conn: Some(ConnId(conn)), stamp });
        }
        let who = |path, conn, since| conflicts.who(path, ConnId(conn), since).map(|conn| conn.0);
        assert_eq!(who("/a/b", 9, 0), Some(4), "a child of it");
        assert_eq!(who("/a/b", 4, 0), Some(2), "itself");
        assert_eq!(who("/a/x", 9, 0), Some(1), "above it");
        assert_eq!(who("/a/x", 9, 11), None, "before the transaction");
        assert_eq!(who("/a/x", 9, 10), Some(1), "a value was written after its start");
        assert_eq!(who("/x", 9, 0), None);
        assert_eq!(who("/", 9, 0), Some(4));
    }
}
