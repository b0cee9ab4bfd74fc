//! Requests on nodes, in a transaction or outside.

use xenstore_protocol::{Errno, Operation, Path, Perm, Perms, Reply, Request, TxId};

use crate::client::Client;
use crate::error::Error;
use crate::io::reply;

pub(crate) fn path(text: &str) -> Result<Path<'_>, Error> {
    Path::parse(text.as_bytes()).ok_or_else(|| {
        Error::Argument(format!(
            "invalid path {text:?}: names of A-Z a-z 0-9 - _ @ between single /"
        ))
    })
}

/// Requests on nodes. [`Client`] executes each separately, [`crate::Transaction`] all together.
///
/// A path starts with `/`, or is relative to the caller's `/local/domain/N`. A value has at most 4,096
/// bytes together with its path.
#[allow(async_fn_in_trait)] // implemented in this crate only, with futures that are Send
pub trait Tree {
    /// The connection.
    #[doc(hidden)]
    fn client(&self) -> &Client;

    /// The transaction, or [`TxId::NONE`].
    #[doc(hidden)]
    fn tx_id(&self) -> TxId;

    /// Returns the value of a node.
    ///
    /// # Errors
    ///
    /// Fails with `ENOENT` if the node does not exist, `EACCES` if it may not be read; see [`Error`].
    async fn read(&self, text: &str) -> Result<Vec<u8>, Error> {
        let answer = self.client().answer(self.tx_id(), &Request::Read(path(text)?)).await?;
        reply(Operation::Read, &answer)?;
        Ok(answer.payload)
    }

    /// Sets the value of a node. Creates the node and its parents if they do not exist.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` if the node may not be written, `ENOSPC` at a quota; see [`Error`].
    async fn write(&self, text: &str, value: impl AsRef<[u8]>) -> Result<(), Error> {
        let request = Request::Write { path: path(text)?, value: value.as_ref() };
        self.client().done(self.tx_id(), request).await
    }

    /// Creates a node and its parents if they do not exist.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` if the parent may not be written, `ENOSPC` at a quota; see [`Error`].
    async fn mkdir(&self, text: &str) -> Result<(), Error> {
        self.client().done(self.tx_id(), Request::Mkdir(path(text)?)).await
    }

    /// Removes a node and all nodes below it. Succeeds if only the node itself does not exist.
    ///
    /// # Errors
    ///
    /// Fails with `ENOENT` if the parent does not exist either, `EACCES` if the node may not be written;
    /// see [`Error`].
    async fn rm(&self, text: &str) -> Result<(), Error> {
        self.client().done(self.tx_id(), Request::Rm(path(text)?)).await
    }

    /// Returns true if the node exists.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` if the node may not be read; see [`Error`].
    async fn exists(&self, text: &str) -> Result<bool, Error> {
        match self.read(text).await {
            Ok(_) => Ok(true),
            Err(Error::Store(Errno::Enoent)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns the names of all children of a node, in order of creation.
    ///
    /// # Errors
    ///
    /// Fails with `ENOENT` if the node does not exist, `EACCES` if it may not be read, `E2BIG` if the list
    /// exceeds one reply and the server has no DIRECTORY_PART; see [`Error`].
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

    /// Returns the permission list of a node; the first entry names the owner.
    ///
    /// # Errors
    ///
    /// Fails with `ENOENT` if the node does not exist, `EACCES` if it may not be read; see [`Error`].
    async fn perms(&self, text: &str) -> Result<Vec<Perm>, Error> {
        let answer = self.client().answer(self.tx_id(), &Request::GetPerms(path(text)?)).await?;
        match reply(Operation::GetPerms, &answer)? {
            Reply::Perms(perms) => Ok(perms.0),
            _ => Err(Error::Protocol("the reply has no permissions".into())),
        }
    }

    /// Sets the permission list of a node, for example `n0 r5 b7`. The first entry has the owner and the
    /// permission of all other domains, each further entry the permission of one domain: `r`ead, `w`rite,
    /// `b`oth or `n`one.
    ///
    /// # Errors
    ///
    /// Fails with `EACCES` if the caller does not own the node, `ENOENT` if it does not exist; see [`Error`].
    async fn set_perms(&self, text: &str, perms: &str) -> Result<(), Error> {
        let entry = |text: &str| {
            Perm::parse(text.as_bytes()).ok_or_else(|| {
                Error::Argument(format!(
                    "invalid permission {text:?}: expected a letter n, r, w or b and a domid"
                ))
            })
        };
        let perms: Vec<Perm> = perms.split_whitespace().map(entry).collect::<Result<_, _>>()?;
        if perms.is_empty() {
            return Err(Error::Argument(
                "the permission list is empty: the first entry names the owner".into(),
            ));
        }
        let request = Request::SetPerms { path: path(text)?, perms: Perms(perms) };
        self.client().done(self.tx_id(), request).await
    }
}

/// Reads a list that exceeds one reply. Starts again if the list changes meanwhile.
async fn list_in_parts<T: Tree + ?Sized>(tree: &T, path: Path<'_>) -> Result<Vec<u8>, Error> {
    let mut list: Vec<u8> = Vec::new();
    let mut seen = None;
    loop {
        let request = Request::DirectoryPart { path, offset: list.len() as u64 };
        let answer = tree.client().answer(tree.tx_id(), &request).await?;
        let (generation, names, last) = match reply(Operation::DirectoryPart, &answer) {
            Ok(Reply::Part { generation, names, last }) => (generation, names, last),
            // An old server has no DIRECTORY_PART: its first error stands.
            Err(Error::Store(Errno::Enosys)) => return Err(Error::Store(Errno::E2big)),
            Err(error) => return Err(error),
            Ok(_) => return Err(Error::Protocol("the reply has no part of a list".into())),
        };
        if seen.is_some_and(|before| before != generation) {
            list.clear();
            seen = None;
            continue;
        }
        if names.is_empty() && !last {
            return Err(Error::Protocol(
                "the reply has an empty part before the end of a list".into(),
            ));
        }
        seen = Some(generation);
        list.extend_from_slice(&names);
        if last {
            return Ok(list);
        }
    }
}
