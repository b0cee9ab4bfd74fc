//! Requests on nodes, inside and outside of transactions.

use xenstore_protocol::{Errno, Operation, Path, Perm, Perms, Reply, Request, TxId};

use crate::client::Client;
use crate::error::Error;
use crate::io::reply;

pub(crate) fn path(text: &str) -> Result<Path<'_>, Error> {
    Path::parse(text.as_bytes()).ok_or_else(|| {
        Error::Argument(format!("not a path: {text:?} (A-Z a-z 0-9 - _ @, names between single /)"))
    })
}

/// Requests on nodes. [`Client`] runs each by itself, [`crate::Transaction`] all together.
///
/// Paths start with `/`, or are relative to the caller's `/local/domain/N`.
#[allow(async_fn_in_trait)] // implemented here alone; whether a future is Send is seen from its use
pub trait Tree {
    /// The connection.
    #[doc(hidden)]
    fn client(&self) -> &Client;

    /// The transaction, or 0.
    #[doc(hidden)]
    fn tx_id(&self) -> TxId;

    /// The value of a node.
    async fn read(&self, text: &str) -> Result<Vec<u8>, Error> {
        let answer = self.client().answer(self.tx_id(), &Request::Read(path(text)?)).await?;
        reply(Operation::Read, &answer)?;
        Ok(answer.payload)
    }

    /// Sets the value of a node; creates it, and its parents, if need be.
    async fn write(&self, text: &str, value: impl AsRef<[u8]>) -> Result<(), Error> {
        let request = Request::Write { path: path(text)?, value: value.as_ref() };
        self.client().done(self.tx_id(), request).await
    }

    /// Creates a node, and its parents, if need be.
    async fn mkdir(&self, text: &str) -> Result<(), Error> {
        self.client().done(self.tx_id(), Request::Mkdir(path(text)?)).await
    }

    /// Removes a node and all below it. That it is not there is an error only if its parent is not
    /// there either.
    async fn rm(&self, text: &str) -> Result<(), Error> {
        self.client().done(self.tx_id(), Request::Rm(path(text)?)).await
    }

    /// Is there such a node?
    async fn exists(&self, text: &str) -> Result<bool, Error> {
        match self.read(text).await {
            Ok(_) => Ok(true),
            Err(Error::Store(Errno::Enoent)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Names of the children of a node, however many they are, in order of creation.
    async fn list(&self, text: &str) -> Result<Vec<String>, Error> {
        let path = path(text)?;
        let answer = self.client().answer(self.tx_id(), &Request::Directory(path)).await?;
        let names = match reply(Operation::Directory, &answer) {
            Ok(_) => answer.payload,
            Err(Error::Store(Errno::E2big)) => list_in_parts(self, path).await?,
            Err(error) => return Err(error),
        };
        let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
        Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
    }

    /// The permission list of a node; the first entry names the owner.
    async fn perms(&self, text: &str) -> Result<Vec<Perm>, Error> {
        let answer = self.client().answer(self.tx_id(), &Request::GetPerms(path(text)?)).await?;
        match reply(Operation::GetPerms, &answer)? {
            Reply::Perms(perms) => Ok(perms.0),
            _ => Err(Error::Protocol("no permissions".into())),
        }
    }

    /// Sets the permission list of a node, written as `n0 r5 b7`: owner and what others may do,
    /// then what a domain may do (`r`ead, `w`rite, `b`oth, `n`one).
    async fn set_perms(&self, text: &str, perms: &str) -> Result<(), Error> {
        let entry = |text: &str| {
            Perm::parse(text.as_bytes()).ok_or_else(|| {
                Error::Argument(format!("not a permission: {text:?} (as in n0, r5)"))
            })
        };
        let perms: Vec<Perm> = perms.split_whitespace().map(entry).collect::<Result<_, _>>()?;
        if perms.is_empty() {
            return Err(Error::Argument("no permissions: the first is the owner's".into()));
        }
        let request = Request::SetPerms { path: path(text)?, perms: Perms(perms) };
        self.client().done(self.tx_id(), request).await
    }
}

/// Reads a list that is too long for one answer. Starts again when it changes in between.
async fn list_in_parts<T: Tree + ?Sized>(tree: &T, path: Path<'_>) -> Result<Vec<u8>, Error> {
    let mut list: Vec<u8> = Vec::new();
    let mut seen = None;
    loop {
        let request = Request::DirectoryPart { path, offset: list.len() as u64 };
        let answer = tree.client().answer(tree.tx_id(), &request).await?;
        let (generation, names, last) = match reply(Operation::DirectoryPart, &answer) {
            Ok(Reply::Part { generation, names, last }) => (generation, names, last),
            // The server is too old for long lists, so that one is too long remains true.
            Err(Error::Store(Errno::Enosys)) => return Err(Error::Store(Errno::E2big)),
            Err(error) => return Err(error),
            Ok(_) => return Err(Error::Protocol("no part of a list".into())),
        };
        if seen.is_some_and(|before| before != generation) {
            list.clear();
            seen = None;
            continue;
        }
        if names.is_empty() && !last {
            return Err(Error::Protocol("an empty part of an incomplete list".into()));
        }
        seen = Some(generation);
        list.extend_from_slice(&names);
        if last {
            return Ok(list);
        }
    }
}
