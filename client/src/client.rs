//! The async client.

use std::future::poll_fn;
use std::path::Path;
use std::sync::Arc;

use futures_lite::{AsyncRead, AsyncWrite};
use xenstore_protocol::{
    Control, DomId, Errno, EvtchnPort, Features, Gfn, Operation, Quota, Reply, Request, RequestId,
    TxId,
};

use crate::error::Error;
use crate::io::{Answer, Shared, reply};
use crate::path::socket_path;
use crate::socket::Socket;
use crate::transaction::Transaction;
use crate::tree::{Tree, path};
use crate::watch::Watch;

/// A connection to a XenStore. Clones share it. [`Tree`] has the requests on nodes.
#[derive(Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// Discards the reply to a request if the future that waits for it is dropped.
struct ReplyGuard<'a> {
    shared: &'a Shared,
    id: RequestId,
}

impl Drop for ReplyGuard<'_> {
    fn drop(&mut self) {
        self.shared.forget(self.id);
    }
}

impl Client {
    /// Creates a client of a connected stream of bytes: a socket, or one end of a pipe in memory.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Client {
        Client { shared: Arc::new(Shared::new(stream)) }
    }

    /// Connects to the daemon of this host, at [`socket_path`].
    ///
    /// # Errors
    ///
    /// Fails with [`Error::Io`] if no daemon listens there, or this user may not connect.
    pub async fn connect() -> Result<Client, Error> {
        Client::connect_to(socket_path()).await
    }

    /// Connects to a socket.
    ///
    /// # Errors
    ///
    /// Fails with [`Error::Io`] if no daemon listens there, or this user may not connect.
    pub async fn connect_to(path: impl AsRef<Path>) -> Result<Client, Error> {
        let path = path.as_ref();
        match Socket::connect(path).await {
            Ok(socket) => Ok(Client::new(socket)),
            Err(error) => Err(Error::Io(error.kind(), format!("{}: {error}", path.display()))),
        }
    }

    /// Sends a request in a transaction, or in none, and waits for its reply.
    pub(crate) async fn answer(&self, tx_id: TxId, request: &Request<'_>) -> Result<Answer, Error> {
        let id = self.shared.start(tx_id, request)?;
        let _guard = ReplyGuard { shared: &self.shared, id };
        poll_fn(|cx| self.shared.poll_answer(cx, id)).await
    }

    async fn number(&self, request: Request<'_>) -> Result<u32, Error> {
        let answer = self.answer(TxId::NONE, &request).await?;
        match reply(request.operation(), &answer)? {
            Reply::Number(number) => Ok(number),
            _ => Err(Error::Protocol("the reply has no number".into())),
        }
    }

    pub(crate) async fn done(&self, tx_id: TxId, request: Request<'_>) -> Result<(), Error> {
        let answer = self.answer(tx_id, &request).await?;
        reply(request.operation(), &answer).map(|_| ())
    }

    /// Watches a node and the nodes below it, down to `depth` levels if that is set; 0 is the node alone.
    /// The first event names the node itself and arrives at once. Dropping the watch ends it.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` if the watch is outside of what the connection may watch, `ENOSPC` at the quota
    /// `watches`, `EINVAL` if the server has no `depth`; see [`Error`].
    pub async fn watch(&self, text: &str, depth: Option<u32>) -> Result<Watch, Error> {
        Watch::open(self.clone(), path(text)?, depth).await
    }

    /// Ends all watches and transactions of this connection.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn reset_watches(&self) -> Result<(), Error> {
        self.done(TxId::NONE, Request::ResetWatches).await
    }

    /// Starts a transaction. [`Client::transaction`] also commits and retries it.
    ///
    /// # Errors
    ///
    /// Fails with `ENOSPC` at the quota `transactions`; see [`Error`].
    pub async fn begin(&self) -> Result<Transaction, Error> {
        let answer = self.answer(TxId::NONE, &Request::TransactionStart).await?;
        match reply(Operation::TransactionStart, &answer)? {
            Reply::Transaction(id) => Ok(Transaction::new(self.clone(), id)),
            _ => Err(Error::Protocol("the reply has no transaction id".into())),
        }
    }

    /// Runs `body` in a transaction and commits it. After a conflict (`EAGAIN`) it runs `body` again in a
    /// new transaction, `tries` times in all; 0 means without limit. An error from `body` aborts the
    /// transaction.
    ///
    /// # Errors
    ///
    /// Fails with the error of `body`, and with `EAGAIN` if the last try conflicts; see [`Error`].
    pub async fn transaction<R>(
        &self,
        tries: u32,
        mut body: impl AsyncFnMut(&Transaction) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut left = tries;
        loop {
            let transaction = self.begin().await?;
            let result = match body(&transaction).await {
                Ok(result) => transaction.commit().await.map(|()| result),
                Err(error) => {
                    transaction.abort().await?;
                    Err(error)
                }
            };
            let conflict = result.as_ref().err().and_then(Error::errno) == Some(Errno::Eagain);
            if !conflict || left == 1 {
                return result;
            }
            left = left.saturating_sub(1);
        }
    }

    /// Returns the path of a domain, `/local/domain/N`.
    ///
    /// # Errors
    ///
    /// See [`Error`].
    pub async fn domain_path(&self, domid: DomId) -> Result<String, Error> {
        let answer = self.answer(TxId::NONE, &Request::GetDomainPath(domid)).await?;
        match reply(Operation::GetDomainPath, &answer)? {
            Reply::DomainPath(path) => Ok(path),
            _ => Err(Error::Protocol("the reply has no path".into())),
        }
    }

    /// Returns true if a domain is introduced.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` without privileges; see [`Error`].
    pub async fn is_introduced(&self, domid: DomId) -> Result<bool, Error> {
        let answer = self.answer(TxId::NONE, &Request::IsDomainIntroduced(domid)).await?;
        Ok(reply(Operation::IsDomainIntroduced, &answer)? == Reply::Introduced(true))
    }

    /// Introduces a domain, whose ring page is the frame `gfn` and whose event channel port is `port`.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` without privileges, `EINVAL` if the domain or its ring page cannot be used; see
    /// [`Error`].
    pub async fn introduce(&self, domid: DomId, gfn: Gfn, port: EvtchnPort) -> Result<(), Error> {
        self.done(TxId::NONE, Request::Introduce { domid, gfn, port }).await
    }

    /// Releases a domain: its connection ends and its nodes are removed.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` without privileges, `ENOENT` if the domain is not introduced; see [`Error`].
    pub async fn release(&self, domid: DomId) -> Result<(), Error> {
        self.done(TxId::NONE, Request::Release(domid)).await
    }

    /// Marks a domain as running after a suspend.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` without privileges, `ENOENT` if the domain is not introduced; see [`Error`].
    pub async fn resume(&self, domid: DomId) -> Result<(), Error> {
        self.done(TxId::NONE, Request::Resume(domid)).await
    }

    /// Grants `domid` the rights of `target` in addition to its own.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` without privileges, `ENOENT` if a domain is not introduced; see [`Error`].
    pub async fn set_target(&self, domid: DomId, target: DomId) -> Result<(), Error> {
        self.done(TxId::NONE, Request::SetTarget { domid, target }).await
    }

    /// Returns the features that the server offers to a domain, or to this connection.
    ///
    /// # Errors
    ///
    /// Fails with `ENOSYS` if the server has no features; see [`Error`].
    pub async fn features(&self, domid: Option<DomId>) -> Result<Features, Error> {
        let answer = self.answer(TxId::NONE, &Request::GetFeature(domid)).await?;
        match reply(Operation::GetFeature, &answer)? {
            Reply::Features(features) => Ok(features),
            _ => Err(Error::Protocol("the reply has no features".into())),
        }
    }

    /// Sets the features offered to a domain, before it is introduced.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` without privileges, `EBUSY` if the domain is introduced; see [`Error`].
    pub async fn set_features(&self, domid: DomId, features: Features) -> Result<(), Error> {
        self.done(TxId::NONE, Request::SetFeature { domid, features }).await
    }

    /// Returns the names of the server's quotas.
    ///
    /// # Errors
    ///
    /// Fails with `ENOSYS` if the server has no such request; see [`Error`].
    pub async fn quota_names(&self) -> Result<Vec<String>, Error> {
        let request = Request::GetQuota { domid: None, quota: None };
        let answer = self.answer(TxId::NONE, &request).await?;
        match reply(Operation::GetQuota, &answer)? {
            Reply::QuotaNames(names) => Ok(names.split(' ').map(String::from).collect()),
            _ => Err(Error::Protocol("the reply has no names of quotas".into())),
        }
    }

    /// Returns a quota of a domain, or the default of new domains. 0 means no limit.
    ///
    /// # Errors
    ///
    /// Fails with `EINVAL` if the server does not know the quota, `ENOENT` if it does not know the domain;
    /// see [`Error`].
    pub async fn quota(&self, domid: Option<DomId>, quota: Quota) -> Result<u32, Error> {
        self.number(Request::GetQuota { domid, quota: Some(quota) }).await
    }

    /// Sets a quota of a domain, or the default of new domains. 0 means no limit.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` without privileges, `EINVAL` if the server does not know the quota; see [`Error`].
    pub async fn set_quota(
        &self,
        domid: Option<DomId>,
        quota: Quota,
        value: u32,
    ) -> Result<(), Error> {
        self.done(TxId::NONE, Request::SetQuota { domid, quota, value }).await
    }

    /// Executes a CONTROL command and returns its output.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` without privileges, `EINVAL` if there is no such command; see [`Error`].
    pub async fn control(&self, command: &str, args: &[&str]) -> Result<Vec<u8>, Error> {
        let words = std::iter::once(&command).chain(args);
        if words.clone().any(|word| word.contains('\0')) {
            return Err(Error::Argument(
                "a CONTROL command or argument contains a NUL byte".into(),
            ));
        }
        let strings = words.fold(String::new(), |text, word| text + word + "\0");
        let control = Control::new(strings.as_bytes()).expect("at least one string");
        let answer = self.answer(TxId::NONE, &Request::Control(control)).await?;
        reply(Operation::Control, &answer)?;
        Ok(answer.payload)
    }
}

impl Tree for Client {
    fn client(&self) -> &Client {
        self
    }

    fn tx_id(&self) -> TxId {
        TxId::NONE
    }
}
