//! Requests behind each other in what was read from a connection, which the journal hears of at once.

use std::ops::Range;

use xenstore_store::{ConnId, Input, Millis};

use super::Journal;

/// Requests of a turn of a connection.
pub(crate) struct Run<'a> {
    conn: ConnId,
    now: Millis,
    read: &'a [u8],
    /// Those that were carried out and are not in the journal, with what only asks and lies between
    /// them.
    done: Range<usize>,
    /// The one that is being carried out, if it is to be in the journal and is not.
    begun: Range<usize>,
}

impl<'a> Run<'a> {
    /// Of requests in these bytes, at this time.
    pub(crate) fn new(conn: ConnId, now: Millis, read: &'a [u8]) -> Run<'a> {
        Run { conn, now, read, done: 0..0, begun: 0..0 }
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
    pub(crate) fn tell(&mut self, journal: &mut Journal) {
        let done = std::mem::take(&mut self.done);
        if !done.is_empty() {
            journal.input(&self.input(done));
            journal.done(&[]);
        }
    }

    /// The same, then of the one that is being carried out.
    pub(crate) fn tell_begun(&mut self, journal: &mut Journal) {
        self.tell(journal);
        let begun = std::mem::take(&mut self.begun);
        if !begun.is_empty() {
            journal.input(&self.input(begun));
        }
    }
}

/// An input that is executed, and how the journal learns of it.
pub(crate) enum Entry<'r, 'a> {
    /// Recorded by itself.
    Alone(Input<'a>),
    /// Recorded with the requests around it, if it must be `recorded` at all.
    Request {
        /// Where it is.
        run: &'r mut Run<'a>,
        /// At this position.
        at: Range<usize>,
        /// Otherwise it leaves everything as it is.
        recorded: bool,
    },
}

impl<'a> Entry<'_, 'a> {
    /// What is executed.
    pub(crate) fn input(&self) -> Input<'a> {
        match self {
            Entry::Alone(input) => *input,
            Entry::Request { run, at, .. } => run.input(at.clone()),
        }
    }

    /// Returns true if the journal must learn of it.
    pub(crate) fn is_recorded(&self) -> bool {
        !matches!(self, Entry::Request { recorded: false, .. })
    }

    /// It is about to be executed.
    pub(crate) fn begin(&mut self, journal: &mut Journal) {
        match self {
            Entry::Alone(input) => journal.input(input),
            Entry::Request { run, at, .. } => {
                run.begin(at.clone());
                if journal.looks_out() {
                    run.tell_begun(journal);
                }
            }
        }
    }

    /// It has been, with these answers of the machine.
    pub(crate) fn done(&mut self, journal: &mut Journal, answers: &[u8]) {
        if let Entry::Request { run, .. } = self {
            run.done();
            if !answers.is_empty() {
                run.tell(journal);
            }
        }
        journal.done(answers);
    }

    /// It was begun and has no result: from now on the journal has it as its last, if it must learn of
    /// it.
    pub(crate) fn open(&mut self, journal: &mut Journal) {
        if let Entry::Request { run, .. } = self {
            run.tell_begun(journal);
        }
    }
}
