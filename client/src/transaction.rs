//! Transactions.

use xenstore_protocol::{Request, TxId};

use crate::client::Client;
use crate::error::Error;
use crate::tree::Tree;

/// An open transaction. [`Tree`] has its requests on nodes. A transaction that is dropped is aborted.
#[derive(Debug)]
pub struct Transaction {
    client: Client,
    /// [`TxId::NONE`] once it has ended.
    id: TxId,
}

impl Transaction {
    pub(crate) fn new(client: Client, id: TxId) -> Transaction {
        Transaction { client, id }
    }

    /// Commits: makes all changes at once, or none.
    ///
    /// # Errors
    ///
    /// Fails with `EAGAIN` if the transaction conflicts with a change since its start; it can be retried.
    /// Fails with `ENOSPC` if the changes exceed a quota; see [`Error`].
    pub async fn commit(self) -> Result<(), Error> {
        self.end(true).await
    }

    /// Aborts: discards all changes.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn abort(self) -> Result<(), Error> {
        self.end(false).await
    }

    async fn end(mut self, commit: bool) -> Result<(), Error> {
        let id = std::mem::take(&mut self.id);
        self.client.done(id, Request::TransactionEnd { commit }).await
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if self.id != TxId::NONE {
            let end = Request::TransactionEnd { commit: false };
            self.client.shared.start_and_forget(self.id, &end);
        }
    }
}

impl Tree for Transaction {
    fn client(&self) -> &Client {
        &self.client
    }

    fn tx_id(&self) -> TxId {
        self.id
    }
}
