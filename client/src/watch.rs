//! Watches.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_lite::Stream;
use xenstore_protocol::{Path, Request, TxId};

use crate::client::Client;
use crate::error::Error;

/// A watch: a stream of the paths that change. Equal events that are not read yet are merged. An event
/// means that the node may have changed, once or several times, and possibly back.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    path: String,
    token: Vec<u8>,
    /// The stream has returned an error and has ended.
    broken: bool,
}

impl Watch {
    pub(crate) async fn open(
        client: Client,
        path: Path<'_>,
        depth: Option<u32>,
    ) -> Result<Watch, Error> {
        let token = client.shared.open_mailbox(path.as_str().as_bytes());
        // From here on, dropping it ends the watch at the server, even if this future is dropped.
        let watch = Watch { client, path: path.as_str().into(), token, broken: false };
        watch.client.done(TxId::NONE, Request::Watch { path, token: &watch.token, depth }).await?;
        Ok(watch)
    }

    /// Waits for the next event and returns its path.
    ///
    /// # Errors
    ///
    /// Fails if the connection ends; see [`Error`].
    pub async fn next(&mut self) -> Result<String, Error> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<String, Error>> {
        let event = self.client.shared.poll_event(cx, &self.token);
        event.map_ok(|path| String::from_utf8_lossy(&path).into_owned())
    }
}

impl Stream for Watch {
    type Item = Result<String, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.broken {
            return Poll::Ready(None);
        }
        let event = std::task::ready!(self.poll(cx));
        self.broken = event.is_err();
        Poll::Ready(Some(event))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.client.shared.close_mailbox(&self.token);
        if let Some(path) = Path::parse(self.path.as_bytes()) {
            let request = Request::Unwatch { path, token: &self.token };
            self.client.shared.start_and_forget(TxId::NONE, &request);
        }
    }
}
