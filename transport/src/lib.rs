//! Byte transports of XenStore.
//!
//! ```text
//!  client ── unix socket ──► socket::Socket ─┐
//!  guest ─── ring page ────► ring::Ring ─────┼─ Transport ◄─► bytes ◄─► frames (xenstore-protocol)
//!  same process ───────────► memory::Pipe ───┘      ▲
//!                                                   │ wakes
//!  kernel ── epoll, event channels ────────► driver::Driver
//! ```
//!
//! A [`Transport`] reads and writes bytes and names its [`Peer`]. It does not interpret the bytes. All
//! transports work on any executor; a server with many descriptors on one thread runs the event loop of
//! [`driver`].
//!
//! * [`socket`]: unix sockets;
//! * [`ring`]: the page and doorbell that a guest shares with the server; [`xen`] has the devices;
//! * [`memory`]: a connection within one process;
//! * [`driver`]: waiting for descriptors;
//! * [`trace`]: a wrapper that reports the transferred bytes;
//! * `fault`, with the feature `test-doubles`: a wrapper that fails as planned.
//!
//! A function serves any transport by this trait:
//!
//! ```
//! use futures_lite::{AsyncReadExt, AsyncWriteExt, future::block_on};
//! use xenstore_protocol::DomId;
//! use xenstore_transport::{Peer, Transport, memory};
//!
//! /// Returns all bytes to the peer until it closes.
//! async fn echo(mut transport: impl Transport) -> std::io::Result<()> {
//!     let mut bytes = [0; 512];
//!     loop {
//!         match transport.read(&mut bytes).await? {
//!             0 => return Ok(()),
//!             count => transport.write_all(&bytes[..count]).await?,
//!         }
//!         // A ring notifies its guest when it is flushed.
//!         transport.flush().await?;
//!     }
//! }
//!
//! let (mut guest, server) = memory::pair(Peer::Domain(DomId(5)), Peer::Domain(DomId(0)));
//! assert_eq!(server.peer(), Peer::Domain(DomId(5)));
//! block_on(async {
//!     guest.write_all(b"hello").await?;
//!     guest.close().await?;
//!     echo(server).await?;
//!     let mut reply = Vec::new();
//!     guest.read_to_end(&mut reply).await?;
//!     assert_eq!(reply, b"hello");
//!     std::io::Result::Ok(())
//! })?;
//! # std::io::Result::Ok(())
//! ```

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

/// The other end of a transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process on this machine.
    Process(Credentials),
    /// A domain.
    Domain(DomId),
}

/// The credentials of a process when it connected, as far as the kernel reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Process id.
    pub pid: Option<i32>,
    /// Effective user id.
    pub uid: Option<u32>,
    /// Effective group id.
    pub gid: Option<u32>,
}

/// Why a connection cannot continue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Reading or writing failed.
    Transport,
    /// The peer has violated the protocol.
    Protocol,
}

/// Where the next process can resume a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumePoint {
    /// Nowhere: the connection lives in this process.
    None,
    /// With this descriptor.
    Descriptor(RawFd),
    /// At these indices of the ring.
    Ring(Indices),
    /// The connection has ended, which the next read or write reports. A new one may have started.
    Closed,
}

/// Bytes in both directions. Callers flush after reading and writing, before they wait: a ring notifies
/// its guest only then. No method has a default, so that a wrapper has to forward all of them.
pub trait Transport: AsyncRead + AsyncWrite + Unpin {
    /// The other end.
    fn peer(&self) -> Peer;

    /// Where the next process could resume the connection.
    fn resume_point(&self) -> ResumePoint;

    /// Returns true once after the guest has set the indices of a [`ring`] to 0: the transport continues
    /// there, without the rest of a message that was transferred in part. Until this is called, reads
    /// and writes return `Pending` and wake the task. Returns false for all other transports.
    fn restarts_at_zero(&mut self) -> bool;

    /// Reports the failure to the guest of a ring, if it can receive errors, and waits until the guest
    /// starts a new connection. Returns false if none can start: for all other transports, and if the
    /// domain is gone.
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

    /// A transport whose values differ from those of all others.
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

    // Fails if a wrapper does not forward a method: a socket without a resume point is lost in a live
    // update, and a ring that cannot recover is lost to its guest.
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
