//! A connection between two ends in one process, for tests and for programs that serve themselves.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_io::{AsyncRead, AsyncWrite};
use piper::{Reader, Writer};

use crate::{Failure, Peer, ResumePoint, Transport};

/// Bytes that each direction buffers before its writer has to wait.
pub const CAPACITY: usize = 64 * 1024;

/// Creates two connected ends: the end of `a`, whose peer is `b`, and the end of `b`.
pub fn pair(a: Peer, b: Peer) -> (Pipe, Pipe) {
    let (from_b, to_a) = piper::pipe(CAPACITY);
    let (from_a, to_b) = piper::pipe(CAPACITY);
    let end_of_a = Pipe { peer: b, input: from_b, output: to_b };
    let end_of_b = Pipe { peer: a, input: from_a, output: to_a };
    (end_of_a, end_of_b)
}

/// One end of a pair. When it is dropped, the other end reads what is buffered, then the end of the
/// stream, and its writes fail with `BrokenPipe`.
pub struct Pipe {
    peer: Peer,
    input: Reader,
    output: Writer,
}

impl fmt::Debug for Pipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let buffered = (self.input.len(), self.output.len());
        f.debug_struct("Pipe").field("peer", &self.peer).field("buffered", &buffered).finish()
    }
}

impl Transport for Pipe {
    fn peer(&self) -> Peer {
        self.peer
    }

    fn resume_point(&self) -> ResumePoint {
        ResumePoint::None
    }

    fn poll_recover(&mut self, _: &mut Context<'_>, _: Failure) -> Poll<bool> {
        Poll::Ready(false)
    }

    fn restarts_at_zero(&mut self) -> bool {
        false
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        // The polling call returns `Pending` at random even if there are bytes.
        match self.input.try_drain(buf) {
            0 => Pin::new(&mut self.input).poll_read(cx, buf),
            count => Poll::Ready(Ok(count)),
        }
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        // The polling call returns `Pending` at random even if there is room.
        let count = match self.output.try_fill(buf) {
            0 => ready!(Pin::new(&mut self.output).poll_write(cx, buf))?,
            count => count,
        };
        // piper accepts 0 bytes if the reader is gone.
        let closed = count == 0 && !buf.is_empty();
        Poll::Ready(if closed { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(count) })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.output).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::{AsyncReadExt, AsyncWriteExt, future::block_on};
    use xenstore_protocol::DomId;

    fn two() -> (Pipe, Pipe) {
        pair(Peer::Domain(DomId(0)), Peer::Domain(DomId(5)))
    }

    // Fails if bytes are lost, reordered or retained when more is sent than a pipe buffers.
    #[test]
    fn bytes_arrive_in_order_when_the_pipe_is_full() {
        let (mut a, mut b) = two();
        let sent: Vec<u8> = (0..251_u8).cycle().take(CAPACITY * 3 + 17).collect();
        let expected = sent.clone();
        let writer = std::thread::spawn(move || {
            block_on(async {
                a.write_all(&sent).await.unwrap();
            });
        });
        let mut received = Vec::new();
        block_on(b.read_to_end(&mut received)).unwrap();
        writer.join().unwrap();
        assert_eq!(received, expected);
    }

    // Fails if the other end waits forever.
    #[test]
    fn dropping_one_end_ends_reads_and_writes_of_the_other() {
        let (mut a, b) = two();
        assert_eq!((a.peer(), b.peer()), (Peer::Domain(DomId(5)), Peer::Domain(DomId(0))));
        let waiting = std::thread::spawn(move || {
            let mut byte = [0];
            let count = block_on(a.read(&mut byte)).unwrap();
            (count, block_on(a.write(b"x")).map_err(|e| e.kind()))
        });
        drop(b);
        assert_eq!(waiting.join().unwrap(), (0, Err(io::ErrorKind::BrokenPipe)));
    }
}
