//! Requests behind each other in what was read from a connection, which the journal hears of at once.

use std::ops::Range;

use xenstore_store::{ConnId, Input, Millis};

use super::Journal;

/// Requests of a turn of a connection.
pub(crate) struct RequestBatch<'a> {
    conn: ConnId,
    now: Millis,
    read: &'a [u8],
    /// Those that were carried out and are not in the journal, with what only asks and lies between
    /// them.
    done: Range<usize>,
    /// The one that is being carried out, if it is to be in the journal and is not.
    begun: Range<usize>,
}

impl<'a> RequestBatch<'a> {
    /// Of requests in these bytes, at this time.
    pub(crate) fn new(conn: ConnId, now: Millis, read: &'a [u8]) -> RequestBatch<'a> {
        RequestBatch { conn, now, read, done: 0..0, begun: 0..0 }
    }

    /// Who asks.
    pub(crate) fn conn(&self) -> ConnId {
        self.conn
    }

    /// When.
    pub(crate) fn now(&self) -> Millis {
        self.now
    }

    /// The request at this place is about to be carried out.
    pub(crate) fn begin(&mut self, at: Range<usize>) {
        self.begun = at;
    }

    /// It has been.
    pub(crate) fn done(&mut self) {
        let begun = std::mem::take(&mut self.begun);
        if self.done.is_empty() {
            self.done = begun;
        } else if !begun.is_empty() {
            self.done.end = begun.end;
        }
    }

    /// All that was read.
    pub(crate) fn read(&self) -> &'a [u8] {
        self.read
    }

    fn input(&self, at: Range<usize>) -> Input<'a> {
        Input::Requests { conn: self.conn, now: self.now, frames: &self.read[at] }
    }

    /// Tells the journal of all that were carried out.
    pub(crate) fn flush(&mut self, journal: &mut Journal) {
        let done = std::mem::take(&mut self.done);
        if !done.is_empty() {
            journal.input(&self.input(done));
            journal.done(&[]);
        }
    }

    /// The same, then of the one that is being carried out.
    pub(crate) fn flush_begun(&mut self, journal: &mut Journal) {
        self.flush(journal);
        let begun = std::mem::take(&mut self.begun);
        if !begun.is_empty() {
            journal.input(&self.input(begun));
        }
    }
}

/// An input that is executed, and how it is recorded in the journal.
pub(crate) enum Entry<'r, 'a> {
    /// Recorded by itself.
    Alone(Input<'a>),
    /// Recorded with the requests around it, if it must be `recorded` at all.
    Request {
        /// The requests that it belongs to.
        run: &'r mut RequestBatch<'a>,
        /// Its position in them.
        at: Range<usize>,
        /// False if the request changes nothing.
        recorded: bool,
    },
}

impl<'a> Entry<'_, 'a> {
    /// The input itself.
    pub(crate) fn input(&self) -> Input<'a> {
        match self {
            Entry::Alone(input) => *input,
            Entry::Request { run, at, .. } => run.input(at.clone()),
        }
    }

    /// Returns true if the input must be in the journal.
    pub(crate) fn is_recorded(&self) -> bool {
        !matches!(self, Entry::Request { recorded: false, .. })
    }

    /// To be called before the input is executed.
    pub(crate) fn begin(&mut self, journal: &mut Journal) {
        match self {
            Entry::Alone(input) => journal.input(input),
            Entry::Request { run, at, .. } => {
                run.begin(at.clone());
                if journal.is_write_ahead() {
                    run.flush_begun(journal);
                }
            }
        }
    }

    /// To be called after it was executed. `answers` are the replies of the hypervisor.
    pub(crate) fn done(&mut self, journal: &mut Journal, answers: &[u8]) {
        if let Entry::Request { run, .. } = self {
            run.done();
            if !answers.is_empty() {
                run.flush(journal);
            }
        }
        journal.done(answers);
    }

    /// Makes an input that was begun and has no result the last one of the journal, if it must be in the
    /// journal.
    pub(crate) fn open(&mut self, journal: &mut Journal) {
        if let Entry::Request { run, .. } = self {
            run.flush_begun(journal);
        }
    }
}
