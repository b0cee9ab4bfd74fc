//! The connection to the daemon's unix socket.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_io::{Async, Timer};
use futures_lite::{AsyncRead, AsyncWrite};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

/// Delay before `connect` is retried while the daemon's queue of connections is full.
const RETRY: Duration = Duration::from_millis(10);

/// A connected unix socket. A write to a closed one returns `EPIPE` and raises no `SIGPIPE`.
pub(crate) struct Socket(Async<UnixStream>);

impl Socket {
    /// Connects, and waits while the daemon's queue of connections is full.
    ///
    /// # Errors
    ///
    /// Fails if the socket does not exist, refuses, or may not be used.
    pub(crate) async fn connect(path: &Path) -> io::Result<Socket> {
        loop {
            match Async::<UnixStream>::connect(path).await {
                Ok(stream) => return Ok(Socket(stream)),
                // async-io reports a full queue as one of these.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotConnected | io::ErrorKind::WouldBlock
                    ) =>
                {
                    Timer::after(RETRY).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            match send(&self.0, buf, SendFlags::NOSIGNAL) {
                Err(Errno::AGAIN) => ready!(self.0.poll_writable(cx))?,
                Err(Errno::INTR) => {}
                result => return Poll::Ready(Ok(result?)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.get_ref().shutdown(Shutdown::Write))
    }
}
