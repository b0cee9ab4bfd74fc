//! Connections held still: neither read nor written, with what each has under way.
//!
//! Before another program goes on with all connections, each must be between two steps. A connection
//! is held when its task gets its turn; what it then has under way is noted here and stays with it,
//! so that it can be let go as if nothing had happened.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::task::Waker;

use xenstore_store::{ConnId, ConnectionIo};
use xenstore_transport::ResumePoint;

/// Returns where a transport is, without the bytes of its connection.
pub(crate) fn position(point: ResumePoint) -> ConnectionIo {
    let mut io = ConnectionIo::default();
    match point {
        ResumePoint::Descriptor(number) => io.fd = Some(number),
        ResumePoint::Ring(indices) => io.indices = Some((indices.req_cons, indices.rsp_prod)),
        ResumePoint::None | ResumePoint::Closed => {}
    }
    io
}

/// Who is held.
#[derive(Debug, Default)]
pub(crate) struct Quiesce {
    all: Cell<bool>,
    /// Not those that have transactions open.
    patient: Cell<bool>,
    one: Cell<Option<ConnId>>,
    held: RefCell<BTreeMap<ConnId, ConnectionIo>>,
    /// What the one that was held is to write when it goes on.
    reply_on_resume: RefCell<Option<(ConnId, Vec<u8>)>>,
    /// Whoever waits until all are.
    waiter: RefCell<Option<Waker>>,
}

impl Quiesce {
    /// Is this connection to stand still? `busy` says whether it has transactions open.
    pub(crate) fn must_pause(&self, conn: ConnId, busy: impl FnOnce() -> bool) -> bool {
        self.one.get() == Some(conn) || self.all.get() && !(self.patient.get() && busy())
    }

    /// Are all to?
    pub(crate) fn is_active(&self) -> bool {
        self.all.get()
    }

    /// Holds one connection, even if the others go on.
    pub(crate) fn pause_one(&self, conn: ConnId) {
        self.one.set(Some(conn));
    }

    /// Lets that one go on, with these bytes to write first.
    pub(crate) fn resume_one(&self, conn: ConnId, bytes: Vec<u8>) {
        self.one.set(None);
        *self.reply_on_resume.borrow_mut() = Some((conn, bytes));
    }

    /// What this connection is to write now that it goes on.
    pub(crate) fn take_reply_on_resume(&self, conn: ConnId) -> Option<Vec<u8>> {
        let mut reply_on_resume = self.reply_on_resume.borrow_mut();
        reply_on_resume.take_if(|(of, _)| *of == conn).map(|(_, bytes)| bytes)
    }

    /// Holds all connections, or no longer; those with transactions open as soon as they have none
    /// if that is to be awaited.
    pub(crate) fn set_all(&self, all: bool, patient: bool) {
        self.all.set(all);
        self.patient.set(patient);
        self.held.borrow_mut().clear();
    }

    /// The task of a connection stands still.
    pub(crate) fn paused(&self, conn: ConnId, held: impl FnOnce() -> ConnectionIo) {
        if self.all.get() {
            self.held.borrow_mut().insert(conn, held());
            if let Some(waker) = self.waiter.borrow_mut().take() {
                waker.wake();
            }
        }
    }

    /// What all of these have under way, if all of them stand still; otherwise `waker` is woken
    /// when another one does.
    pub(crate) fn all_paused(
        &self,
        mut conns: impl Iterator<Item = ConnId>,
        waker: &Waker,
    ) -> Option<BTreeMap<ConnId, ConnectionIo>> {
        let all = {
            let held = self.held.borrow();
            conns.all(|conn| held.contains_key(&conn))
        };
        if !all {
            *self.waiter.borrow_mut() = Some(waker.clone());
            return None;
        }
        Some(self.held.take())
    }
}
