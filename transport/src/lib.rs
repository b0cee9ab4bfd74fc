//! Byte transports of XenStore.
//!
//! A [`Transport`] moves bytes in both directions and knows who is at the other end. It knows
//! nothing of frames. Everything here works with any executor.
//!
//! * [`memory`]: a pair of pipes within one process;
//! * [`socket`]: a unix socket;
//! * [`ring`]: a page shared with a domain and a doorbell; [`xen`] has the devices for it;
//! * [`driver`]: who waits for descriptors, async-io or a loop of our own;
//! * [`fault`], [`trace`]: wrappers that fail on purpose, or tell what goes through.

pub mod driver;
#[cfg(any(test, feature = "test-doubles"))]
pub mod fault;
pub mod memory;
pub mod ring;
mod sleep;
pub mod socket;
pub mod trace;
pub mod xen;

use std::os::fd::RawFd;
use std::task::{Context, Poll};

use futures_io::{AsyncRead, AsyncWrite};

use xenstore_protocol::DomId;

use crate::ring::Indices;

/// Who is at the other end of a transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process on this machine, as far as the kernel told.
    Process(Credentials),
    /// A domain.
    Domain(DomId),
}

/// What the kernel told about a process at the moment when it connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Process id.
    pub pid: Option<i32>,
    /// Effective user id.
    pub uid: Option<u32>,
    /// Effective group id.
    pub gid: Option<u32>,
}

/// Why a connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Reading or writing failed.
    Transport,
    /// What was read breaks the protocol.
    Protocol,
}

/// Where another server can go on with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumePoint {
    /// Nowhere: it lives in this process.
    None,
    /// At this descriptor.
    Descriptor(RawFd),
    /// At these indices of the ring of the domain.
    Ring(Indices),
    /// The connection is over, which reading or writing will tell; a new one may have started.
    Closed,
}

/// Bytes in both directions, and who is at the other end. Whoever has read or written flushes
/// before waiting: some transports tell the other end only then. No method has a default, so that a
/// wrapper cannot forget to forward one.
pub trait Transport: AsyncRead + AsyncWrite + Unpin {
    /// Who is at the other end.
    fn peer(&self) -> Peer;

    /// Where another server could go on.
    fn resume_point(&self) -> ResumePoint;

    /// Returns true once after the other end has set its indices to 0 ([`ring`]): the transport continues
    /// there, without the rest of a message that was read or written in part. Until this is called,
    /// reading and writing wait, and wake the task. Only rings have indices.
    fn restarts_at_zero(&mut self) -> bool;

    /// Tells the other end that the connection has failed, if it can be told, and waits until a new
    /// one starts on this transport. False if that cannot be, as with everything but a ring.
    fn poll_recover(&mut self, cx: &mut Context<'_>, failure: Failure) -> Poll<bool>;
}

impl<T: Transport + ?Sized> Transport for Box<T> {
    fn peer(&self) -> Peer {
        (**self).peer()
    }

    fn resume_point(&self) -> ResumePoint {
        (**self).resume_point()
    }

    fn restarts_at_zero(&mut self) -> bool {
        (**self).restarts_at_zero()
    }

    fn poll_recover(&mut self, cx: &mut Context<'_>, failure: Failure) -> Poll<bool> {
        (**self).poll_recover(cx, failure)
    }
}

impl<T: Transport + ?Sized> Transport for &mut T {
    fn peer(&self) -> Peer {
        (**self).peer()
    }

    fn resume_point(&self) -> ResumePoint {
        (**self).resume_point()
    }

    fn restarts_at_zero(&mut self) -> bool {
        (**self).restarts_at_zero()
    }

    fn poll_recover(&mut self, cx: &mut Context<'_>, failure: Failure) -> Poll<bool> {
        (**self).poll_recover(cx, failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Fault, Faulty};
    use crate::trace::{Direction, Traced};
    use std::io;
    use std::pin::Pin;
    use std::task::Waker;

    /// A transport whose methods return values that differ from the defaults.
    struct Other;

    impl Transport for Other {
        fn peer(&self) -> Peer {
            Peer::Domain(DomId(5))
        }
        fn resume_point(&self) -> ResumePoint {
            ResumePoint::Descriptor(7)
        }
        fn restarts_at_zero(&mut self) -> bool {
            true
        }
        fn poll_recover(&mut self, _: &mut Context<'_>, _: Failure) -> Poll<bool> {
            Poll::Ready(true)
        }
    }

    impl AsyncRead for Other {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Other {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    // Fails if a wrapper answers for itself what it should forward: a wrapped socket whose place is
    // not known is lost at a live update, and a ring that cannot recover is lost to its guest.
    #[test]
    fn wrappers_forward_every_method() {
        fn forwards(mut wrapped: impl Transport) {
            let mut cx = Context::from_waker(Waker::noop());
            assert!(matches!(wrapped.peer(), Peer::Domain(DomId(5))));
            assert!(matches!(wrapped.resume_point(), ResumePoint::Descriptor(7)));
            assert!(wrapped.restarts_at_zero());
            let recovers = wrapped.poll_recover(&mut cx, Failure::Protocol);
            assert_eq!(recovers, Poll::Ready(true));
        }
        forwards(&mut Other);
        forwards(Box::new(Other));
        forwards(Faulty::new(Other, || Fault::None));
        forwards(Traced::new(Other, |_: Direction, _: &[u8]| ()));
    }
}

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
