//! A pair of pipes within one process: bytes, not messages.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures_io::{AsyncRead, AsyncWrite};

use crate::{Failure, Peer, ResumePoint, Transport};

/// Bytes that each direction holds before its writer has to wait.
pub const CAPACITY: usize = 64 * 1024;

/// Makes two connected ends. The first is held by `a` and sees `b` at its other end.
pub fn pair(a: Peer, b: Peer) -> (Pipe, Pipe) {
    let there = Arc::new(Mutex::new(Half::default()));
    let back = Arc::new(Mutex::new(Half::default()));
    let first = Pipe { peer: b, input: back.clone(), output: there.clone() };
    let second = Pipe { peer: a, input: there, output: back };
    (first, second)
}

/// One end of a pair. Dropping it is the end of the stream for the other.
#[derive(Debug)]
pub struct Pipe {
    peer: Peer,
    input: Arc<Mutex<Half>>,
    output: Arc<Mutex<Half>>,
}

/// One direction.
#[derive(Debug, Default)]
struct Half {
    bytes: VecDeque<u8>,
    closed: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Half {
    fn close(&mut self) {
        self.closed = true;
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

/// A half is whole after every change, so a panic elsewhere does not matter.
fn lock(half: &Mutex<Half>) -> MutexGuard<'_, Half> {
    half.lock().unwrap_or_else(PoisonError::into_inner)
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
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut half = lock(&self.input);
        if half.bytes.is_empty() && !half.closed && !buf.is_empty() {
            half.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = io::Read::read(&mut half.bytes, buf)?;
        if let Some(waker) = half.writer.take() {
            waker.wake();
        }
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut half = lock(&self.output);
        if half.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let count = buf.len().min(CAPACITY - half.bytes.len());
        if count == 0 && !buf.is_empty() {
            half.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        half.bytes.extend(&buf[..count]);
        if let Some(waker) = half.reader.take() {
            waker.wake();
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.output).close();
        Poll::Ready(Ok(()))
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        lock(&self.output).close();
        lock(&self.input).close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::{AsyncReadExt, AsyncWriteExt, future::block_on};

    fn two() -> (Pipe, Pipe) {
        pair(Peer::Domain(0), Peer::Domain(5))
    }

    // Fails if bytes are lost, reordered or kept when far more goes through than a pipe holds.
    #[test]
    fn bytes_arrive_in_order_through_a_full_pipe() {
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

    // Fails if an end that is gone leaves the other waiting.
    #[test]
    fn dropping_one_end_ends_the_other() {
        let (mut a, b) = two();
        assert_eq!((a.peer(), b.peer()), (Peer::Domain(5), Peer::Domain(0)));
        let waiting = std::thread::spawn(move || {
            let mut byte = [0];
            let count = block_on(a.read(&mut byte)).unwrap();
            (count, block_on(a.write(b"x")).map_err(|e| e.kind()))
        });
        drop(b);
        assert_eq!(waiting.join().unwrap(), (0, Err(io::ErrorKind::BrokenPipe)));
    }
}
