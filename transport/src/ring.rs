//! The ring of a domain: a page that it shares with the server, and a doorbell.
//!
//! The guest may write anything to the page at any time. Each index of its is read once and
//! checked, ours are kept here and only written to the page, and bytes are copied out before anybody
//! looks at them (XSA-38). `docs/misc/xenstore-ring.txt` is the protocol.
//!
//! There is one exception. Boot firmware, crash kernels and OpenBSD's first driver set all four
//! indices of an idle ring to 0 and continue from there, which C xenstored and oxenstored serve
//! because they read all four indices from the page each time. So a page in which our indices have
//! become 0 restarts both rings at 0 ([`Transport::restarts_at_zero`]); the connection, its
//! watches and its transactions stay. A guest that does this while requests or replies are in the ring
//! makes the server read that guest's requests again or skip them, as if it had sent others.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
#[cfg(not(all(test, xenstore_loom)))]
use std::sync::atomic::fence;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll};

use atomic_waker::AtomicWaker;
use futures_io::{AsyncRead, AsyncWrite};
#[cfg(all(test, xenstore_loom))]
use loom::sync::atomic::fence;
use xenstore_protocol::ring::{RingError, SIZE, Side, Word, connection, filled, stretches};
use xenstore_protocol::{DomId, Features};

use crate::{Failure, Peer, ResumePoint, Transport};

/// How words of the page are read: what the guest did before it wrote one has been done.
pub(crate) const READ: Ordering = Ordering::Acquire;
/// How words of the page are written: what we did before has been done for whoever reads it.
pub(crate) const WRITE: Ordering = Ordering::Release;

/// The shared page. Words are read with acquire and written with release ordering; bytes have no
/// order of their own.
pub trait Page {
    /// Reads a word, once.
    fn load(&self, word: Word) -> u32;
    /// Writes a word.
    fn store(&self, word: Word, value: u32);
    /// Copies bytes out of a ring, from byte `at` of it on.
    fn read(&self, side: Side, at: usize, bytes: &mut [u8]);
    /// Copies bytes into a ring, from byte `at` of it on.
    fn write(&self, side: Side, at: usize, bytes: &[u8]);
}

/// What makes the guest look at its page.
pub trait Doorbell {
    /// Rings it. Cannot fail in a way that anything could be done about.
    fn notify(&self);
}

/// Both ends' indices differ by more than a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidIndices;

/// Our end of the two rings, without waiting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Indices {
    /// Bytes of requests that have been taken.
    pub req_cons: u32,
    /// Bytes of answers that have been put down.
    pub rsp_prod: u32,
}

impl Indices {
    /// What the page says of our end, for whoever has not kept it.
    pub fn of(page: &impl Page) -> Indices {
        Indices { req_cons: page.load(Word::ReqCons), rsp_prod: page.load(Word::RspProd) }
    }

    /// Takes requests; 0 if there are none. The guest is not told yet.
    pub fn read(&mut self, page: &impl Page, bytes: &mut [u8]) -> Result<usize, InvalidIndices> {
        let there = filled(page.load(Word::ReqProd), self.req_cons).ok_or(InvalidIndices)?;
        let count = there.min(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        let [first, second] = stretches(self.req_cons, count);
        let (head, tail) = bytes[..count as usize].split_at_mut(first.len());
        page.read(Side::Requests, first.start, head);
        if !tail.is_empty() {
            page.read(Side::Requests, second.start, tail);
        }
        self.req_cons = self.req_cons.wrapping_add(count);
        Ok(count as usize)
    }

    /// Tells the guest what has been taken, whose room is its own again from then on.
    pub fn publish_req_cons(&self, page: &impl Page) {
        page.store(Word::ReqCons, self.req_cons);
    }

    /// Puts down answers, as many as there is room for.
    pub fn write(&mut self, page: &impl Page, bytes: &[u8]) -> Result<usize, InvalidIndices> {
        let there = filled(self.rsp_prod, page.load(Word::RspCons)).ok_or(InvalidIndices)?;
        let count = (SIZE - there).min(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        let [first, second] = stretches(self.rsp_prod, count);
        let (head, tail) = bytes[..count as usize].split_at(first.len());
        page.write(Side::Replies, first.start, head);
        if !tail.is_empty() {
            page.write(Side::Replies, second.start, tail);
        }
        if count > 0 {
            self.rsp_prod = self.rsp_prod.wrapping_add(count);
            page.store(Word::RspProd, self.rsp_prod);
            // Linux rings when it takes from a ring that it sees to be full. So either it sees these,
            // or we see what it has taken when we next look for room.
            fence(Ordering::SeqCst);
        }
        Ok(count as usize)
    }
}

/// A ring as whoever owns the devices sees it: tells of events, and starts it anew.
#[derive(Debug)]
pub struct RingChannel<P, D> {
    page: P,
    doorbell: D,
    /// The `error` word is offered to this guest.
    tells_errors: bool,
    /// Grows whenever the rings start anew. What was under way before is over.
    starts: AtomicU32,
    closed: AtomicBool,
    waker: AtomicWaker,
}

impl<P: Page, D: Doorbell> RingChannel<P, D> {
    /// A page as a domain builder leaves it, with empty rings and the features that the guest is
    /// offered.
    pub fn new(page: P, doorbell: D, features: Features) -> Arc<Self> {
        let channel = RingChannel::resume(page, doorbell, features);
        channel.start();
        channel
    }

    /// A page that another server has served so far, as it is.
    pub fn resume(page: P, doorbell: D, features: Features) -> Arc<Self> {
        page.store(Word::ServerFeatures, features.bits());
        let tells_errors = features.contains(Features::ERROR);
        let (starts, closed, waker) = (0.into(), false.into(), AtomicWaker::new());
        Arc::new(RingChannel { page, doorbell, tells_errors, starts, closed, waker })
    }

    /// What is shared with the guest.
    pub fn page(&self) -> &P {
        &self.page
    }

    /// How to ring for the guest.
    pub fn doorbell(&self) -> &D {
        &self.doorbell
    }

    /// The guest has rung.
    pub fn notify(&self) {
        self.waker.wake();
    }

    /// Empties the rings: all that was under way is dropped, and a connection that was in error is
    /// not any more.
    pub fn start(&self) {
        for index in [Word::ReqCons, Word::ReqProd, Word::RspCons, Word::RspProd, Word::Error] {
            self.page.store(index, 0);
        }
        self.starts.fetch_add(1, Ordering::Release);
        if self.page.load(Word::Connection) == connection::RECONNECT {
            // What the guest waits for, after all of the above.
            self.page.store(Word::Connection, connection::CONNECTED);
            self.doorbell.notify();
        }
        self.waker.wake();
    }

    /// The domain is gone: whoever serves the ring lets it go, and does not look at the page again.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// A ring as a transport. What has been taken is the guest's again, and the guest is rung for, when it
/// is flushed: until then it can still be found in the ring by whoever comes after us.
#[derive(Debug)]
pub struct Ring<P, D> {
    channel: Arc<RingChannel<P, D>>,
    domid: DomId,
    indices: Indices,
    /// What the page says of our end, unless the guest has changed it.
    told: Indices,
    /// Of which start the indices are.
    start: u32,
    /// The guest has something to look at that it has not been told of.
    moved: bool,
}

impl<P: Page, D: Doorbell> Ring<P, D> {
    /// The server's end of a channel. There must be one at a time.
    pub fn new(channel: Arc<RingChannel<P, D>>, domid: DomId) -> Self {
        Ring::resume(channel, domid, Indices::default())
    }

    /// The same, from where another server was, which has written these indices to the page.
    pub fn resume(channel: Arc<RingChannel<P, D>>, domid: DomId, indices: Indices) -> Self {
        let start = channel.starts.load(Ordering::Acquire);
        Ring { channel, domid, indices, told: indices, start, moved: false }
    }

    /// The same ring, which notifies its guest at the first flush: the previous process may have moved an
    /// index without notifying.
    pub fn notify_on_flush(self) -> Self {
        Ring { moved: true, ..self }
    }

    /// Returns true if the guest has set our indices in the page to 0, and its own of replies, of which
    /// there are none there.
    fn is_zeroed(&self) -> bool {
        let zero = Indices::default();
        let page = &self.channel.page;
        self.told != zero && Indices::of(page) == zero && page.load(Word::RspCons) == 0
    }

    /// Returns true if the guest has set one of our indices to 0: until it rings it may be setting the
    /// others, and its indices may be inconsistent.
    fn is_being_zeroed(&self) -> bool {
        let Indices { req_cons, rsp_prod } = Indices::of(&self.channel.page);
        req_cons == 0 && self.told.req_cons != 0 || rsp_prod == 0 && self.told.rsp_prod != 0
    }

    /// Does what `copy` does, unless the rings start anew; waits if there is nothing.
    fn transfer(
        &mut self,
        cx: &mut Context<'_>,
        mut copy: impl FnMut(&mut Indices, &P) -> Result<usize, InvalidIndices>,
    ) -> Poll<io::Result<usize>> {
        let done = self.attempt(&mut copy);
        if done.is_ready() {
            return done;
        }
        // What comes from here on wakes us; what came before that is seen now.
        self.channel.waker.register(cx.waker());
        let done = self.attempt(copy);
        if done.is_pending() && self.is_zeroed() {
            cx.waker().wake_by_ref();
        }
        done
    }

    fn attempt(
        &mut self,
        mut copy: impl FnMut(&mut Indices, &P) -> Result<usize, InvalidIndices>,
    ) -> Poll<io::Result<usize>> {
        if self.channel.closed.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        // The rings restart in `poll_recover`: the server records the end of the connection before the
        // page shows it.
        let reconnects = self.channel.page.load(Word::Connection) == connection::RECONNECT;
        if reconnects || self.channel.starts.load(Ordering::Acquire) != self.start {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if self.is_zeroed() {
            return Poll::Pending;
        }
        let copied = copy(&mut self.indices, &self.channel.page);
        if let Ok(1..) = copied {
            self.moved = true;
            self.told.rsp_prod = self.indices.rsp_prod;
        }
        match copied {
            Ok(0) => Poll::Pending,
            Ok(count) => Poll::Ready(Ok(count)),
            Err(InvalidIndices) if self.is_being_zeroed() => Poll::Pending,
            Err(InvalidIndices) => Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
        }
    }
}

impl<P: Page + Unpin, D: Doorbell + Unpin> Transport for Ring<P, D> {
    fn peer(&self) -> Peer {
        Peer::Domain(self.domid)
    }

    fn resume_point(&self) -> ResumePoint {
        match self.channel.starts.load(Ordering::Acquire) == self.start {
            true => ResumePoint::Ring(self.indices),
            false => ResumePoint::Closed,
        }
    }

    fn restarts_at_zero(&mut self) -> bool {
        let over = self.resume_point() == ResumePoint::Closed
            || self.channel.closed.load(Ordering::Acquire);
        let zeroed = !over && self.is_zeroed();
        if zeroed {
            (self.indices, self.told, self.moved) = Default::default();
        }
        zeroed
    }

    fn poll_recover(&mut self, cx: &mut Context<'_>, failure: Failure) -> Poll<bool> {
        self.channel.waker.register(cx.waker());
        if self.channel.closed.load(Ordering::Acquire) {
            return Poll::Ready(false);
        }
        if self.channel.page.load(Word::Connection) == connection::RECONNECT {
            self.channel.start();
        }
        let start = self.channel.starts.load(Ordering::Acquire);
        if start != self.start {
            (self.start, self.moved) = (start, false);
            (self.indices, self.told) = Default::default();
            return Poll::Ready(true);
        }
        let error = match failure {
            Failure::Transport => RingError::Indices,
            Failure::Protocol => RingError::Protocol,
        };
        if self.channel.tells_errors && self.channel.page.load(Word::Error) != error.as_wire() {
            self.channel.page.store(Word::Error, error.as_wire());
            self.channel.doorbell.notify();
        }
        Poll::Pending
    }
}

impl<P: Page + Unpin, D: Doorbell + Unpin> AsyncRead for Ring<P, D> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.transfer(cx, |indices, page| indices.read(page, bytes))
    }
}

impl<P: Page + Unpin, D: Doorbell + Unpin> AsyncWrite for Ring<P, D> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.transfer(cx, |indices, page| indices.write(page, bytes))
    }

    /// Tells the guest, once, of all that has been read and written since the last time.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let over = self.resume_point() == ResumePoint::Closed
            || self.channel.closed.load(Ordering::Acquire);
        if std::mem::take(&mut self.moved) && !over {
            if self.is_zeroed() {
                // The guest has reset the indices: they must not be written before both rings restart.
                cx.waker().wake_by_ref();
                return Poll::Ready(Ok(()));
            }
            self.indices.publish_req_cons(&self.channel.page);
            self.told.req_cons = self.indices.req_cons;
            self.channel.doorbell.notify();
            // Linux does not ring while the page says that there are requests to be taken. Those
            // that it has put down since we last looked, and before it could see the above, are to
            // be found without.
            fence(Ordering::SeqCst);
            if self.channel.page.load(Word::ReqProd) != self.indices.req_cons {
                cx.waker().wake_by_ref();
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_flush(cx)
    }
}

#[cfg(all(test, xenstore_loom))]
mod model;
#[cfg(test)]
mod tests;
