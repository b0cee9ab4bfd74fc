//! Transactions.

use xenstore_protocol::{Request, TxId};

use crate::client::Client;
use crate::error::Error;
use crate::tree::Tree;

/// An open transaction. Its requests on nodes are in [`Tree`]. Dropped without
/// [`Transaction::commit`] it changes nothing.
#[derive(Debug)]
pub struct Transaction {
    client: Client,
    /// 0 once it has ended.
    id: TxId,
}

impl Transaction {
    pub(crate) fn new(client: Client, id: TxId) -> Transaction {
        Transaction { client, id }
    }

    /// Makes all changes at once, or none of them. After `EAGAIN`, the usual error, try the transaction
    /// again.
    pub async fn commit(self) -> Result<(), Error> {
        self.end(true).await
    }

    /// Drops all changes.
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
