//! Paused connections: they neither read nor write.
//!
//! Before another program continues with a connection, the connection must be between two requests. Its
//! task pauses at its next turn and reports where it is. The task keeps that too, so that it can resume as
//! if nothing had happened.

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

/// Which connections pause.
#[derive(Debug, Default)]
pub(crate) struct Quiesce {
    all: Cell<bool>,
    /// Connections with open transactions do not pause until these have ended.
    awaits_transactions: Cell<bool>,
    one: Cell<Option<ConnId>>,
    paused: RefCell<BTreeMap<ConnId, ConnectionIo>>,
    /// What the connection that was paused alone sends when it resumes.
    reply_on_resume: RefCell<Option<(ConnId, Vec<u8>)>>,
    /// The task that waits until all connections are paused.
    waiter: RefCell<Option<Waker>>,
}

impl Quiesce {
    /// Returns true if this connection must pause. `in_transaction` returns true if it has open
    /// transactions.
    pub(crate) fn must_pause(&self, conn: ConnId, in_transaction: impl FnOnce() -> bool) -> bool {
        self.one.get() == Some(conn)
            || self.all.get() && !(self.awaits_transactions.get() && in_transaction())
    }

    /// Returns true if all connections must pause.
    pub(crate) fn is_active(&self) -> bool {
        self.all.get()
    }

    /// Pauses one connection.
    pub(crate) fn pause_one(&self, conn: ConnId) {
        self.one.set(Some(conn));
    }

    /// Resumes that connection, which sends `reply` first.
    pub(crate) fn resume_one(&self, conn: ConnId, reply: Vec<u8>) {
        self.one.set(None);
        *self.reply_on_resume.borrow_mut() = Some((conn, reply));
    }

    /// Returns the reply that this connection must send as it resumes.
    pub(crate) fn take_reply_on_resume(&self, conn: ConnId) -> Option<Vec<u8>> {
        let mut reply = self.reply_on_resume.borrow_mut();
        reply.take_if(|(of, _)| *of == conn).map(|(_, bytes)| bytes)
    }

    /// Pauses or resumes all connections. Those with open transactions pause when these have ended, if
    /// `awaits_transactions` is set.
    pub(crate) fn set_all(&self, all: bool, awaits_transactions: bool) {
        self.all.set(all);
        self.awaits_transactions.set(awaits_transactions);
        self.paused.borrow_mut().clear();
    }

    /// Must be called by the task of a connection that pauses.
    pub(crate) fn paused(&self, conn: ConnId, io: impl FnOnce() -> ConnectionIo) {
        if self.all.get() {
            self.paused.borrow_mut().insert(conn, io());
            if let Some(waker) = self.waiter.borrow_mut().take() {
                waker.wake();
            }
        }
    }

    /// Returns where all paused connections are, once all of `conns` are paused. Until then, returns
    /// `None` and wakes `waker` when another connection pauses.
    pub(crate) fn all_paused(
        &self,
        mut conns: impl Iterator<Item = ConnId>,
        waker: &Waker,
    ) -> Option<BTreeMap<ConnId, ConnectionIo>> {
        let all = {
            let paused = self.paused.borrow();
            conns.all(|conn| paused.contains_key(&conn))
        };
        if !all {
            *self.waiter.borrow_mut() = Some(waker.clone());
            return None;
        }
        Some(self.paused.take())
    }
}
