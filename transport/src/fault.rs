//! Fault injection: a transport that fails as planned.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_io::{AsyncRead, AsyncWrite};

use crate::{Failure, Peer, ResumePoint, Transport};

/// The fault of one read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// None.
    None,
    /// At most this many bytes are transferred, at least 1.
    Short(usize),
    /// The call returns `Pending` and wakes its task at once.
    Pending,
    /// This call and all later ones fail.
    Error(io::ErrorKind),
}

/// Wraps a transport; calls `plan` before each read and write.
#[derive(Debug)]
pub struct Faulty<T, P> {
    inner: T,
    plan: P,
    broken: Option<io::ErrorKind>,
}

impl<T, P: FnMut() -> Fault> Faulty<T, P> {
    /// Wraps `inner`. The plan is a function: a script, a fuzzer, or a generator with a seed.
    pub fn new(inner: T, plan: P) -> Self {
        Faulty { inner, plan, broken: None }
    }

    /// The number of bytes, of `len`, that this call may transfer.
    fn allow(&mut self, cx: &mut Context<'_>, len: usize) -> Poll<io::Result<usize>> {
        if let Some(kind) = self.broken {
            return Poll::Ready(Err(kind.into()));
        }
        match (self.plan)() {
            Fault::None => Poll::Ready(Ok(len)),
            Fault::Short(most) => Poll::Ready(Ok(len.min(most.max(1)))),
            Fault::Pending => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Fault::Error(kind) => {
                self.broken = Some(kind);
                Poll::Ready(Err(kind.into()))
            }
        }
    }
}

/// A plan of short reads and writes and of retries, from a seed. It loses no bytes.
pub fn rough(seed: u64) -> impl FnMut() -> Fault {
    let mut state = seed | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        match state % 4 {
            0 => Fault::Pending,
            1 => Fault::None,
            _ => Fault::Short(usize::try_from(state >> 59).unwrap_or(1)),
        }
    }
}

impl<T: Transport, P: FnMut() -> Fault + Unpin> Transport for Faulty<T, P> {
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

impl<T: AsyncRead + Unpin, P: FnMut() -> Fault + Unpin> AsyncRead for Faulty<T, P> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        match self.allow(cx, buf.len()) {
            Poll::Ready(Ok(len)) => Pin::new(&mut self.inner).poll_read(cx, &mut buf[..len]),
            other => other,
        }
    }
}

impl<T: AsyncWrite + Unpin, P: FnMut() -> Fault + Unpin> AsyncWrite for Faulty<T, P> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.allow(cx, buf.len()) {
            Poll::Ready(Ok(len)) => Pin::new(&mut self.inner).poll_write(cx, &buf[..len]),
            other => other,
        }
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

    // Fails if bytes are lost or changed.
    #[test]
    fn short_transfers_lose_no_bytes() {
        for seed in 1..50 {
            let (a, b) = pair(Peer::Domain(DomId(0)), Peer::Domain(DomId(5)));
            let (mut a, mut b) = (Faulty::new(a, rough(seed)), Faulty::new(b, rough(seed + 100)));
            let sent: Vec<u8> = (0..=255).cycle().take(3000).collect();
            let received = block_on(async {
                a.write_all(&sent).await.unwrap();
                drop(a);
                let mut received = Vec::new();
                b.read_to_end(&mut received).await.unwrap();
                received
            });
            assert_eq!(received, sent, "seed {seed}");
        }
    }

    // Fails if the error is not where the plan has it, or later calls succeed.
    #[test]
    fn planned_error_is_permanent() {
        let (a, _b) = pair(Peer::Domain(DomId(0)), Peer::Domain(DomId(5)));
        let mut left = 2;
        let mut a = Faulty::new(a, || {
            left -= 1;
            if left < 0 { Fault::Error(io::ErrorKind::ConnectionReset) } else { Fault::Short(1) }
        });
        assert_eq!(block_on(a.write(b"xy")).unwrap(), 1);
        assert_eq!(block_on(a.write(b"xy")).unwrap(), 1);
        for _ in 0..2 {
            let error = block_on(a.write(b"xy")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
    }
}
