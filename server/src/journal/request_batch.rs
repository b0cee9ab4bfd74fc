//! Consecutive requests that a connection has sent, which the journal records as one input.

use std::ops::Range;

use xenstore_store::{ConnId, Input, Millis};

use super::Journal;

/// The requests of one turn of a connection.
pub(crate) struct RequestBatch<'a> {
    conn: ConnId,
    now: Millis,
    bytes: &'a [u8],
    /// Requests that were executed and are not in the journal yet, and the ones between them that only
    /// read.
    executed: Range<usize>,
    /// The request that is being executed, if it must be in the journal and is not.
    current: Range<usize>,
}

impl<'a> RequestBatch<'a> {
    /// Makes a batch of the requests in `bytes`, which connection `conn` has sent.
    pub(crate) fn new(conn: ConnId, now: Millis, bytes: &'a [u8]) -> RequestBatch<'a> {
        RequestBatch { conn, now, bytes, executed: 0..0, current: 0..0 }
    }

    /// Returns the connection that has sent the requests.
    pub(crate) fn conn(&self) -> ConnId {
        self.conn
    }

    /// Returns the time at which the requests are executed.
    pub(crate) fn now(&self) -> Millis {
        self.now
    }

    /// Returns all bytes of the batch.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Notes that the current request was executed.
    fn end(&mut self) {
        let current = std::mem::take(&mut self.current);
        if self.executed.is_empty() {
            self.executed = current;
        } else if !current.is_empty() {
            self.executed.end = current.end;
        }
    }

    fn input(&self, range: Range<usize>) -> Input<'a> {
        Input::Requests { conn: self.conn, now: self.now, frames: &self.bytes[range] }
    }

    /// Records the requests that were executed.
    pub(crate) fn flush(&mut self, journal: &mut Journal) {
        let executed = std::mem::take(&mut self.executed);
        if !executed.is_empty() {
            journal.begin_input(&self.input(executed));
            journal.end_input(&[]);
        }
    }

    /// Records the requests that were executed, then the current one.
    fn flush_current(&mut self, journal: &mut Journal) {
        self.flush(journal);
        let current = std::mem::take(&mut self.current);
        if !current.is_empty() {
            journal.begin_input(&self.input(current));
        }
    }
}

/// An input that is executed, and how the journal records it.
pub(crate) enum Entry<'r, 'a> {
    /// Recorded separately.
    Alone(Input<'a>),
    /// Recorded with the requests around it, unless it only reads.
    Request {
        /// The requests that it belongs to.
        batch: &'r mut RequestBatch<'a>,
        /// Its position in them.
        range: Range<usize>,
        /// False if the request changes nothing.
        recorded: bool,
    },
}

impl<'a> Entry<'_, 'a> {
    /// Returns the input.
    pub(crate) fn input(&self) -> Input<'a> {
        match self {
            Entry::Alone(input) => *input,
            Entry::Request { batch, range, .. } => batch.input(range.clone()),
        }
    }

    /// Returns true if the input must be in the journal.
    pub(crate) fn is_recorded(&self) -> bool {
        !matches!(self, Entry::Request { recorded: false, .. })
    }

    /// Must be called before the input is executed.
    pub(crate) fn begin(&mut self, journal: &mut Journal) {
        match self {
            Entry::Alone(input) => journal.begin_input(input),
            Entry::Request { batch, range, .. } => {
                batch.current = range.clone();
                if journal.is_write_ahead() {
                    batch.flush_current(journal);
                }
            }
        }
    }

    /// Must be called after the input was executed. `replies` are those of the hypervisor.
    pub(crate) fn end(&mut self, journal: &mut Journal, replies: &[u8]) {
        if let Entry::Request { batch, .. } = self {
            batch.end();
            if !replies.is_empty() {
                batch.flush(journal);
            }
        }
        journal.end_input(replies);
    }

    /// Makes an input that was begun and has no result the last one of the journal, if it must be in the
    /// journal.
    pub(crate) fn leave_open(&mut self, journal: &mut Journal) {
        if let Entry::Request { batch, .. } = self {
            batch.flush_current(journal);
        }
    }
}
