//! The client's end of a connection.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use futures_io::{AsyncRead, AsyncWrite};
use xenstore_store::ConnId;

use crate::state::{Shared, State};

/// A connection to a [`Store`](crate::Store): requests in, replies and events out. It works on any
/// executor. Dropping it ends its watches and transactions.
#[derive(Debug)]
pub struct Connection {
    state: Arc<Mutex<State>>,
    id: ConnId,
}

impl Connection {
    pub(crate) fn new(state: Arc<Mutex<State>>, id: ConnId) -> Connection {
        Connection { state, id }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.state.change(|state| state.poll_read(cx, self.id, buf)).map(Ok)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.state.change(|state| state.poll_write(cx, self.id, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.state.change(|state| state.close(self.id));
        Poll::Ready(Ok(()))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.state.change(|state| state.remove(self.id));
    }
}
