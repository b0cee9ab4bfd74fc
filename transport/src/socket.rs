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

/// The backlog of the listening socket.
const BACKLOG: i32 = 128;

/// The pause of a client before it connects to a busy server again.
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
    /// Connects to a server, on any executor. Retries while the backlog of the server is full.
    ///
    /// # Errors
    ///
    /// Fails if no server listens on the path, or its mode refuses this user.
    pub async fn connect(path: impl AsRef<Path>) -> io::Result<Socket> {
        loop {
            match Async::<UnixStream>::connect(&path).await {
                Ok(stream) => return Socket::new(Source::from(stream)),
                // The backlog is full; async-io reports it as one of these errors.
                Err(error) if is_busy(error.kind()) => drop(Timer::after(BUSY_PAUSE).await),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes over a connected socket.
    ///
    /// # Errors
    ///
    /// Fails like [`Driver::source`].
    ///
    /// # Errors
    ///
    /// Fails like [`Driver::source`].
    pub fn adopt(socket: OwnedFd, driver: &Driver) -> io::Result<Socket> {
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(true)?;
        Socket::new(driver.source(stream)?)
    }

    fn new(stream: Source<UnixStream>) -> io::Result<Socket> {
        // The credentials are for the log only: a connection without them is served.
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

/// A listening unix socket. Its file is removed when it is dropped, if the listener owns it.
#[derive(Debug)]
pub struct Listener {
    listener: Source<UnixListener>,
    driver: Driver,
    /// The file to remove, and the inode that it had.
    file: Option<(PathBuf, u64)>,
}

impl Listener {
    /// Listens on `path`, whose file gets the permissions `mode`. Replaces the file of a socket on which no
    /// process listens.
    ///
    /// # Errors
    ///
    /// Fails if another process listens on the path, the path is not a socket, or the socket cannot be
    /// created.
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

    /// Takes over a listening socket, for example one from systemd. Does not own its file.
    ///
    /// # Errors
    ///
    /// Fails if the descriptor is not a unix socket, or like [`Driver::source`].
    pub fn adopt(socket: OwnedFd, driver: &Driver) -> io::Result<Listener> {
        let listener = UnixListener::from(socket);
        listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let (listener, driver) = (driver.source(listener)?, driver.clone());
        Ok(Listener { listener, driver, file: None })
    }

    /// Makes the listener the owner of its file.
    pub fn owns_file(mut self) -> Listener {
        let inode = |path: &PathBuf| std::fs::metadata(path).ok().map(|m| m.ino());
        self.file = self.path().and_then(|path| Some((inode(&path)?, path))).map(|(i, p)| (p, i));
        self
    }

    /// The path of the socket, if it has one.
    pub fn path(&self) -> Option<PathBuf> {
        Some(self.listener.get().local_addr().ok()?.as_pathname()?.to_owned())
    }

    /// Waits for the next client.
    ///
    /// # Errors
    ///
    /// Fails if the client has disconnected, or the process has no descriptors left. The caller should
    /// pause before the next call.
    pub async fn accept(&self) -> io::Result<Socket> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let accept = |listener: &UnixListener| Ok(rustix::net::accept_with(listener, flags)?);
        let stream = poll_fn(|cx| self.listener.poll_read(cx, accept)).await?;
        Socket::new(self.driver.source(UnixStream::from(stream))?)
    }
}

/// Returns true if a process listens on this socket, even if its backlog is full.
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
            // Another process may have replaced it.
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

    // Fails if the bytes, the credentials, the mode or the removal of the file are wrong.
    #[test]
    fn accepted_client_has_credentials_and_sends_bytes() {
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

    // Fails if the socket of a running server, or another file, is removed.
    #[test]
    fn bind_replaces_only_a_stale_socket() {
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
