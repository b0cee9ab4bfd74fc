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

/// A connection to a XenStore. Clones share it. The requests on nodes are in [`Tree`].
#[derive(Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// Discards the reply of a request whose future is dropped.
struct Waiting<'a> {
    shared: &'a Shared,
    id: RequestId,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.forget(self.id);
    }
}

impl Client {
    /// Makes a client that speaks over a connected stream of bytes: a socket, or an end of a pipe in
    /// memory.
    pub fn new(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Client {
        Client { shared: Arc::new(Shared::new(stream)) }
    }

    /// Connects to the daemon of this host; see [`socket_path`].
    pub async fn connect() -> Result<Client, Error> {
        Client::connect_to(socket_path()).await
    }

    /// Connects to a socket.
    pub async fn connect_to(path: impl AsRef<Path>) -> Result<Client, Error> {
        let path = path.as_ref();
        match Socket::connect(path).await {
            Ok(socket) => Ok(Client::new(socket)),
            Err(error) => Err(Error::Io(error.kind(), format!("{}: {error}", path.display()))),
        }
    }

    /// Sends a request, in transaction `tx_id` or in none (0), and waits for the answer.
    pub(crate) async fn answer(&self, tx_id: TxId, request: &Request<'_>) -> Result<Answer, Error> {
        let id = self.shared.start(tx_id, request)?;
        let _waiting = Waiting { shared: &self.shared, id };
        poll_fn(|cx| self.shared.poll_answer(cx, id)).await
    }

    async fn number(&self, request: Request<'_>) -> Result<u32, Error> {
        let answer = self.answer(TxId::NONE, &request).await?;
        match reply(request.operation(), &answer)? {
            Reply::Number(number) => Ok(number),
            _ => Err(Error::Protocol("a list where a number belongs".into())),
        }
    }

    pub(crate) async fn done(&self, tx_id: TxId, request: Request<'_>) -> Result<(), Error> {
        let answer = self.answer(tx_id, &request).await?;
        reply(request.operation(), &answer).map(|_| ())
    }

    /// Watches a node and all below it, or as many levels as `depth` says. The first event comes at
    /// once. The watch ends when it is dropped.
    pub async fn watch(&self, text: &str, depth: Option<u32>) -> Result<Watch, Error> {
        Watch::open(self.clone(), path(text)?, depth).await
    }

    /// Ends all watches and transactions of this connection.
    pub async fn reset_watches(&self) -> Result<(), Error> {
        self.done(TxId::NONE, Request::ResetWatches).await
    }

    /// Opens a transaction. Mostly [`Client::transaction`] is what is wanted.
    pub async fn begin(&self) -> Result<Transaction, Error> {
        let answer = self.answer(TxId::NONE, &Request::TransactionStart).await?;
        match reply(Operation::TransactionStart, &answer)? {
            Reply::Transaction(id) => Ok(Transaction::new(self.clone(), id)),
            _ => Err(Error::Protocol("no transaction id".into())),
        }
    }

    /// Runs `body` in a transaction and commits it. It is retried after a conflict
    /// (EAGAIN), at most `tries` times; 0 means without limit. An error from `body` ends the
    /// transaction without a change.
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
            let conflict = result.as_ref().err().and_then(Error::name) == Some(Errno::Eagain);
            if !conflict || left == 1 {
                return result;
            }
            left = left.saturating_sub(1);
        }
    }

    /// Where the nodes of a domain are.
    pub async fn domain_path(&self, domid: DomId) -> Result<String, Error> {
        let answer = self.answer(TxId::NONE, &Request::GetDomainPath(domid)).await?;
        match reply(Operation::GetDomainPath, &answer)? {
            Reply::DomainPath(path) => Ok(path),
            _ => Err(Error::Protocol("no path".into())),
        }
    }

    /// Is a domain introduced?
    pub async fn is_introduced(&self, domid: DomId) -> Result<bool, Error> {
        let answer = self.answer(TxId::NONE, &Request::IsDomainIntroduced(domid)).await?;
        Ok(reply(Operation::IsDomainIntroduced, &answer)? == Reply::Introduced(true))
    }

    /// Connects a domain: its ring page is its frame `gfn`, its event channel port is `port`.
    pub async fn introduce(&self, domid: DomId, gfn: Gfn, port: EvtchnPort) -> Result<(), Error> {
        self.done(TxId::NONE, Request::Introduce { domid, gfn, port }).await
    }

    /// Disconnects a domain and removes what it owns.
    pub async fn release(&self, domid: DomId) -> Result<(), Error> {
        self.done(TxId::NONE, Request::Release(domid)).await
    }

    /// A domain runs again after it was suspended.
    pub async fn resume(&self, domid: DomId) -> Result<(), Error> {
        self.done(TxId::NONE, Request::Resume(domid)).await
    }

    /// Gives `domid` the rights of `target` as well.
    pub async fn set_target(&self, domid: DomId, target: DomId) -> Result<(), Error> {
        self.done(TxId::NONE, Request::SetTarget { domid, target }).await
    }

    /// Feature bits that a domain, or this connection, is offered.
    pub async fn features(&self, domid: Option<DomId>) -> Result<Features, Error> {
        let answer = self.answer(TxId::NONE, &Request::GetFeature(domid)).await?;
        match reply(Operation::GetFeature, &answer)? {
            Reply::Features(features) => Ok(features),
            _ => Err(Error::Protocol("no features".into())),
        }
    }

    /// Chooses the feature bits of a domain before it is introduced.
    pub async fn set_features(&self, domid: DomId, features: Features) -> Result<(), Error> {
        self.done(TxId::NONE, Request::SetFeature { domid, features }).await
    }

    /// Names of the quotas that the server has.
    pub async fn quota_names(&self) -> Result<Vec<String>, Error> {
        let request = Request::GetQuota { domid: None, quota: None };
        let answer = self.answer(TxId::NONE, &request).await?;
        match reply(Operation::GetQuota, &answer)? {
            Reply::QuotaNames(names) => Ok(names.split(' ').map(String::from).collect()),
            _ => Err(Error::Protocol("no names of quotas".into())),
        }
    }

    /// A quota of a domain, or what new domains start with.
    pub async fn quota(&self, domid: Option<DomId>, quota: Quota) -> Result<u32, Error> {
        self.number(Request::GetQuota { domid, quota: Some(quota) }).await
    }

    /// Sets a quota of a domain, or what new domains start with; 0 is no limit.
    pub async fn set_quota(
        &self,
        domid: Option<DomId>,
        quota: Quota,
        value: u32,
    ) -> Result<(), Error> {
        self.done(TxId::NONE, Request::SetQuota { domid, quota, value }).await
    }

    /// Gives the server a command; its output.
    pub async fn control(&self, command: &str, args: &[&str]) -> Result<Vec<u8>, Error> {
        let words = std::iter::once(&command).chain(args);
        if words.clone().any(|word| word.contains('\0')) {
            return Err(Error::Argument("a command with a NUL in it".into()));
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
