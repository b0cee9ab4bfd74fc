//! Unix sockets.

use std::fs::Permissions;
use std::future::poll_fn;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_io::{Async, Timer};
use futures_io::{AsyncRead, AsyncWrite};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use xenstore_sys::crash;

use crate::driver::{Driver, Source};
use crate::{Credentials, Failure, Peer, ResumePoint, Transport};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// How long a client waits before it tries a busy server again.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

fn is_busy(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::NotConnected | io::ErrorKind::WouldBlock)
}

/// A connected unix socket: close-on-exec and non-blocking.
#[derive(Debug)]
pub struct Socket {
    stream: Source<UnixStream>,
    peer: Peer,
}

impl Socket {
    /// Connects to a server, from any executor.
    pub async fn connect(path: impl AsRef<Path>) -> io::Result<Socket> {
        loop {
            match Async::<UnixStream>::connect(&path).await {
                Ok(stream) => return Socket::new(Source::from(stream)),
                // The server has no room for another that waits, which async-io tells like this.
                Err(error) if is_busy(error.kind()) => drop(Timer::after(BUSY_PAUSE).await),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes over a connected socket.
    pub fn adopt(socket: OwnedFd, driver: &Driver) -> io::Result<Socket> {
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        Socket::new(driver.source(stream)?)
    }

    fn new(stream: Source<UnixStream>) -> io::Result<Socket> {
        // Nothing depends on who it is, so a kernel that does not say is no reason to refuse.
        let credentials = rustix::net::sockopt::socket_peercred(&stream).ok();
        let credentials = credentials.map_or_else(Credentials::default, |ucred| Credentials {
            pid: Some(ucred.pid.as_raw_nonzero().get()),
            uid: Some(ucred.uid.as_raw()),
            gid: Some(ucred.gid.as_raw()),
        });
        Ok(Socket { stream, peer: Peer::Process(credentials) })
    }
}

impl Transport for Socket {
    fn peer(&self) -> Peer {
        self.peer
    }

    fn resume_point(&self) -> ResumePoint {
        ResumePoint::Descriptor(self.stream.as_fd().as_raw_fd())
    }

    fn poll_recover(&mut self, _: &mut Context<'_>, _: Failure) -> Poll<bool> {
        Poll::Ready(false)
    }

    fn restarts_at_zero(&mut self) -> bool {
        false
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        if !crash::point() {
            return Poll::Pending;
        }
        let count = ready!(self.stream.poll_read(cx, |mut stream| stream.read(buf)))?;
        if count < buf.len() {
            self.stream.drained();
        }
        Poll::Ready(Ok(count))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !crash::point() {
            return Poll::Ready(Ok(buf.len()));
        }
        self.stream.poll_write(cx, |stream| {
            Ok(rustix::net::send(stream, buf, rustix::net::SendFlags::NOSIGNAL)?)
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.stream.get().shutdown(Shutdown::Write))
    }
}

/// A listening unix socket. Its file is removed when it is dropped, if it was made here.
#[derive(Debug)]
pub struct Listener {
    listener: Source<UnixListener>,
    driver: Driver,
    /// The file to remove, and the inode that it had.
    file: Option<(PathBuf, u64)>,
}

impl Listener {
    /// Listens on `path`, readable and writable as `mode` says. A socket file that nobody listens
    /// on any more is replaced; one that somebody answers on is an error.
    pub fn bind(path: impl AsRef<Path>, mode: u32, driver: &Driver) -> io::Result<Listener> {
        let path = path.as_ref();
        if let Ok(metadata) = std::fs::symlink_metadata(path) {
            if !metadata.file_type().is_socket() {
                let text = format!("{} is there and is not a socket", path.display());
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
            }
            if answers(path)? {
                let text = format!("another server answers on {}", path.display());
                return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
            }
            std::fs::remove_file(path)?;
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        std::fs::set_permissions(path, Permissions::from_mode(mode))?;
        rustix::net::listen(&socket, BACKLOG)?;
        let mut listener = Listener::adopt(socket, driver)?;
        let inode = std::fs::metadata(path)?.ino();
        listener.file = Some((path.to_owned(), inode));
        Ok(listener)
    }

    /// Takes over a socket that listens already, for example one from systemd. Its file is left to
    /// whoever made it.
    pub fn adopt(socket: OwnedFd, driver: &Driver) -> io::Result<Listener> {
        let listener = UnixListener::from(socket);
        listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let (listener, driver) = (driver.source(listener)?, driver.clone());
        Ok(Listener { listener, driver, file: None })
    }

    /// Its file is removed when this is dropped, although it was not made here.
    pub fn owns_file(mut self) -> Listener {
        let inode = |path: &PathBuf| std::fs::metadata(path).ok().map(|m| m.ino());
        self.file = self.path().and_then(|path| Some((inode(&path)?, path))).map(|(i, p)| (p, i));
        self
    }

    /// The path that it listens on, if it has one.
    pub fn path(&self) -> Option<PathBuf> {
        Some(self.listener.get().local_addr().ok()?.as_pathname()?.to_owned())
    }

    /// Waits for the next client. An error is about that client, or says that the process has no
    /// descriptors left; the caller should wait a little before it tries again.
    pub async fn accept(&self) -> io::Result<Socket> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accept = |listener: &UnixListener| Ok(rustix::net::accept_with(listener, flags)?);
        let stream = poll_fn(|cx| self.listener.poll_read(cx, accept)).await?;
        Socket::new(self.driver.source(UnixStream::from(stream))?)
    }
}

/// Does anybody listen on this socket? One who is too busy does as well.
fn answers(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let refused = rustix::net::connect(&socket, &SocketAddrUnix::new(path)?);
    Ok(refused != Err(rustix::io::Errno::CONNREFUSED))
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, inode)) = &self.file {
            // Somebody else may have put another socket there.
            let ours = std::fs::symlink_metadata(path).is_ok_and(|m| m.ino() == *inode);
            if ours {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::{AsyncReadExt, AsyncWriteExt};

    // Fails if bytes, credentials, mode or the removal of the file go wrong.
    #[test]
    fn a_client_is_accepted_and_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let driver = Driver::new().unwrap();
        driver.block_on(async {
            let listener = Listener::bind(&path, 0o600, &driver).unwrap();
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let mut client = Socket::connect(&path).await.unwrap();
            let mut server = listener.accept().await.unwrap();
            let Peer::Process(peer) = server.peer() else { panic!("not a process") };
            assert_eq!(peer.pid, Some(i32::try_from(std::process::id()).unwrap()));
            client.write_all(b"hello").await.unwrap();
            drop(client);
            let mut text = String::new();
            server.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "hello");
        });
        assert!(!path.exists());
    }

    // Fails if a running server's socket, or a file that is none, is taken away.
    #[test]
    fn only_a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let driver = Driver::new().unwrap();
        driver.block_on(async {
            let running = Listener::bind(&path, 0o600, &driver).unwrap();
            let error = Listener::bind(&path, 0o600, &driver).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            drop(running);
            drop(UnixListener::bind(&path).unwrap()); // leaves its file behind
            let again = Listener::bind(&path, 0o600, &driver).unwrap();
            drop(again);
            std::fs::write(&path, b"").unwrap();
            let error = Listener::bind(&path, 0o600, &driver).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        });
    }
}
