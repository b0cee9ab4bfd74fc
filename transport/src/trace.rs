//! Tracing: a transport that reports the bytes that it transfers.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_io::{AsyncRead, AsyncWrite};

use crate::{Failure, Peer, ResumePoint, Transport};

/// The direction of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Read from the peer.
    In,
    /// Written to the peer.
    Out,
}

/// Wraps a transport; calls `sink` with the bytes of each read and write that succeeded. The end of the
/// stream is an empty read.
#[derive(Debug)]
pub struct Traced<T, S> {
    inner: T,
    sink: S,
}

impl<T: Transport, S: FnMut(Direction, &[u8])> Traced<T, S> {
    /// Wraps `inner`.
    pub fn new(inner: T, sink: S) -> Self {
        Traced { inner, sink }
    }
}

impl<T: Transport, S: FnMut(Direction, &[u8]) + Unpin> Transport for Traced<T, S> {
    fn peer(&self) -> Peer {
        self.inner.peer()
    }

    fn resume_point(&self) -> ResumePoint {
        self.inner.resume_point()
    }

    fn restarts_at_zero(&mut self) -> bool {
        self.inner.restarts_at_zero()
    }

    fn poll_recover(&mut self, cx: &mut Context<'_>, failure: Failure) -> Poll<bool> {
        self.inner.poll_recover(cx, failure)
    }
}

impl<T: Transport, S: FnMut(Direction, &[u8]) + Unpin> AsyncRead for Traced<T, S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_read(cx, buf);
        if let Poll::Ready(Ok(count)) = result {
            (self.sink)(Direction::In, &buf[..count]);
        }
        result
    }
}

impl<T: Transport, S: FnMut(Direction, &[u8]) + Unpin> AsyncWrite for Traced<T, S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, buf);
        if let Poll::Ready(Ok(count)) = result {
            (self.sink)(Direction::Out, &buf[..count]);
        }
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::pair;
    use futures_lite::{AsyncReadExt, AsyncWriteExt, future::block_on};
    use xenstore_protocol::DomId;

    // Fails if the reported bytes are not the transferred ones.
    #[test]
    fn transferred_bytes_are_reported() {
        let (a, mut b) = pair(Peer::Domain(DomId(0)), Peer::Domain(DomId(5)));
        let mut reported = Vec::new();
        let mut a =
            Traced::new(a, |direction, bytes: &[u8]| reported.push((direction, bytes.to_vec())));
        block_on(async {
            a.write_all(b"hello").await.unwrap();
            b.write_all(b"you").await.unwrap();
            drop(b);
            a.read_to_end(&mut Vec::new()).await.unwrap();
        });
        let _ = a;
        let expected =
            [(Direction::Out, &b"hello"[..]), (Direction::In, b"you"), (Direction::In, b"")];
        assert_eq!(reported, expected.map(|(direction, bytes)| (direction, bytes.to_vec())));
    }
}
