//! The ring of a domain: a page that the guest shares with the server, and a doorbell.
//!
//! The guest can write anything to the page at any time. The server reads each index of the guest once
//! and checks it, takes its own indices from its memory instead of the page, and copies bytes before it
//! interprets them (XSA-38). The protocol is `docs/misc/xenstore-ring.txt` of Xen.
//!
//! There is one exception. Boot firmware, crash kernels and the first driver of OpenBSD set all four
//! indices of an idle ring to 0 and continue from there. C xenstored and oxenstored serve them, because
//! they read all four indices from the page each time. So a page in which the indices of the server have
//! become 0 restarts both rings at 0 ([`Transport::restarts_at_zero`]). The connection, its watches and
//! its transactions remain. If a guest does this while requests or replies are in the ring, the server
//! reads requests again or skips them, as if the guest had sent others.

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

/// The ordering of reads of words: what the guest wrote before a word is visible.
pub(crate) const READ: Ordering = Ordering::Acquire;
/// The ordering of writes of words: what the server wrote before is visible to a reader of the word.
pub(crate) const WRITE: Ordering = Ordering::Release;

/// The shared page. Words are read with acquire and written with release ordering; bytes have no
/// ordering among themselves.
pub trait Page {
    /// Reads a word, once.
    fn load(&self, word: Word) -> u32;
    /// Writes a word.
    fn store(&self, word: Word, value: u32);
    /// Copies bytes out of a ring, from its byte `at` on.
    fn read(&self, side: Side, at: usize, bytes: &mut [u8]);
    /// Copies bytes into a ring, from its byte `at` on.
    fn write(&self, side: Side, at: usize, bytes: &[u8]);
}

/// The means to notify the guest of changes in its page.
pub trait Doorbell {
    /// Notifies the guest. Errors are ignored: they mean that the guest is gone.
    fn notify(&self);
}

/// The indices of both ends differ by more than a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidIndices;

/// The position of the server in the two rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Indices {
    /// Bytes of requests that have been read.
    pub req_cons: u32,
    /// Bytes of replies that have been written.
    pub rsp_prod: u32,
}

impl Indices {
    /// Reads the position from the page, for a server that has not recorded it.
    pub fn of(page: &impl Page) -> Indices {
        Indices { req_cons: page.load(Word::ReqCons), rsp_prod: page.load(Word::RspProd) }
    }

    /// Reads requests; returns 0 if there are none. The space becomes free with
    /// [`Indices::publish_req_cons`].
    ///
    /// # Errors
    ///
    /// Fails if the index of the guest is invalid.
    pub fn read(&mut self, page: &impl Page, bytes: &mut [u8]) -> Result<usize, InvalidIndices> {
        let used = filled(page.load(Word::ReqProd), self.req_cons).ok_or(InvalidIndices)?;
        let count = used.min(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        let [first, second] = stretches(self.req_cons, count);
        let (head, tail) = bytes[..count as usize].split_at_mut(first.len());
        page.read(Side::Requests, first.start, head);
        if !tail.is_empty() {
            page.read(Side::Requests, second.start, tail);
        }
        self.req_cons = self.req_cons.wrapping_add(count);
        Ok(count as usize)
    }

    /// Writes the index of read requests to the page: the guest can reuse the space.
    pub fn publish_req_cons(&self, page: &impl Page) {
        page.store(Word::ReqCons, self.req_cons);
    }

    /// Writes replies, as many bytes as there is space for.
    ///
    /// # Errors
    ///
    /// Fails if the index of the guest is invalid.
    pub fn write(&mut self, page: &impl Page, bytes: &[u8]) -> Result<usize, InvalidIndices> {
        let used = filled(self.rsp_prod, page.load(Word::RspCons)).ok_or(InvalidIndices)?;
        let count = (SIZE - used).min(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        let [first, second] = stretches(self.rsp_prod, count);
        let (head, tail) = bytes[..count as usize].split_at(first.len());
        page.write(Side::Replies, first.start, head);
        if !tail.is_empty() {
            page.write(Side::Replies, second.start, tail);
        }
        if count > 0 {
            self.rsp_prod = self.rsp_prod.wrapping_add(count);
            page.store(Word::RspProd, self.rsp_prod);
            // Linux notifies when it reads from a ring that it finds full. With this fence it finds
            // these bytes, or the server finds the freed space at its next attempt.
            fence(Ordering::SeqCst);
        }
        Ok(count as usize)
    }
}

/// The page and doorbell of a ring, for the owner of the devices: passes events and restarts the ring.
#[derive(Debug)]
pub struct RingChannel<P, D> {
    page: P,
    doorbell: D,
    /// The guest was offered the `error` word.
    reports_errors: bool,
    /// The number of restarts. A restart ends the connection before it.
    starts: AtomicU32,
    closed: AtomicBool,
    waker: AtomicWaker,
}

impl<P: Page, D: Doorbell> RingChannel<P, D> {
    /// Takes a page from the domain builder: empties the rings and offers features to the guest.
    pub fn new(page: P, doorbell: D, features: Features) -> Arc<Self> {
        let channel = RingChannel::resume(page, doorbell, features);
        channel.start();
        channel
    }

    /// Takes a page from another server, without a restart.
    pub fn resume(page: P, doorbell: D, features: Features) -> Arc<Self> {
        page.store(Word::ServerFeatures, features.bits());
        let reports_errors = features.contains(Features::ERROR);
        let (starts, closed, waker) = (0.into(), false.into(), AtomicWaker::new());
        Arc::new(RingChannel { page, doorbell, reports_errors, starts, closed, waker })
    }

    /// The page.
    pub fn page(&self) -> &P {
        &self.page
    }

    /// The doorbell.
    pub fn doorbell(&self) -> &D {
        &self.doorbell
    }

    /// Wakes the task that serves the ring, after an event of the guest.
    pub fn notify(&self) {
        self.waker.wake();
    }

    /// Restarts the ring: discards all bytes, and ends the error state of the connection.
    pub fn start(&self) {
        for index in [Word::ReqCons, Word::ReqProd, Word::RspCons, Word::RspProd, Word::Error] {
            self.page.store(index, 0);
        }
        self.starts.fetch_add(1, Ordering::Release);
        if self.page.load(Word::Connection) == connection::RECONNECT {
            // The guest waits for this word; all others must be written before.
            self.page.store(Word::Connection, connection::CONNECTED);
            self.doorbell.notify();
        }
        self.waker.wake();
    }

    /// Ends the ring when its domain is gone: reads and writes fail, without access to the page.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// A ring as a transport. A flush frees the space of read requests and notifies the guest. Until then
/// the requests are in the ring, where the next process finds them if this one dies.
#[derive(Debug)]
pub struct Ring<P, D> {
    channel: Arc<RingChannel<P, D>>,
    domid: DomId,
    indices: Indices,
    /// The position in the page, unless the guest has changed it.
    published: Indices,
    /// The restart that the indices belong to.
    start: u32,
    /// The indices have moved since the last notification of the guest.
    moved: bool,
}

impl<P: Page, D: Doorbell> Ring<P, D> {
    /// The server's end of a channel. There must be at most one.
    pub fn new(channel: Arc<RingChannel<P, D>>, domid: DomId) -> Self {
        Ring::resume(channel, domid, Indices::default())
    }

    /// The same, at the position of another server, which has written it to the page.
    pub fn resume(channel: Arc<RingChannel<P, D>>, domid: DomId, indices: Indices) -> Self {
        let start = channel.starts.load(Ordering::Acquire);
        Ring { channel, domid, indices, published: indices, start, moved: false }
    }

    /// Makes the first flush notify the guest: the previous process may have moved an index without a
    /// notification.
    pub fn notify_on_flush(self) -> Self {
        Ring { moved: true, ..self }
    }

    /// Returns true if the guest has set the indices of the server in the page to 0, and its own index of
    /// replies.
    fn is_zeroed(&self) -> bool {
        let zero = Indices::default();
        let page = &self.channel.page;
        self.published != zero && Indices::of(page) == zero && page.load(Word::RspCons) == 0
    }

    /// Returns true if the guest has set an index of the server to 0. Until its notification it may be
    /// setting the others, so that its indices can be inconsistent.
    fn is_being_zeroed(&self) -> bool {
        let Indices { req_cons, rsp_prod } = Indices::of(&self.channel.page);
        req_cons == 0 && self.published.req_cons != 0
            || rsp_prod == 0 && self.published.rsp_prod != 0
    }

    /// Calls `copy`, unless the ring restarts; waits if nothing is copied.
    fn transfer(
        &mut self,
        cx: &mut Context<'_>,
        mut copy: impl FnMut(&mut Indices, &P) -> Result<usize, InvalidIndices>,
    ) -> Poll<io::Result<usize>> {
        let done = self.attempt(&mut copy);
        if done.is_ready() {
            return done;
        }
        // An event after the registration wakes the task; the second attempt finds what came before.
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
        // The restart happens in `poll_recover`: the server records the end of the connection before the
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
            self.published.rsp_prod = self.indices.rsp_prod;
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
            (self.indices, self.published, self.moved) = Default::default();
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
            (self.indices, self.published) = Default::default();
            return Poll::Ready(true);
        }
        let error = match failure {
            Failure::Transport => RingError::Indices,
            Failure::Protocol => RingError::Protocol,
        };
        if self.channel.reports_errors && self.channel.page.load(Word::Error) != error.as_wire() {
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

    /// Publishes what was read since the last flush, and notifies the guest if an index has moved.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let over = self.resume_point() == ResumePoint::Closed
            || self.channel.closed.load(Ordering::Acquire);
        if std::mem::take(&mut self.moved) && !over {
            if self.is_zeroed() {
                // The guest has reset the indices, which must not be written until the ring restarts.
                cx.waker().wake_by_ref();
                return Poll::Ready(Ok(()));
            }
            self.indices.publish_req_cons(&self.channel.page);
            self.published.req_cons = self.indices.req_cons;
            self.channel.doorbell.notify();
            // Linux does not notify while it finds unread requests in the ring. Requests that it has
            // added since the last attempt, before it could see the index above, have no event.
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
