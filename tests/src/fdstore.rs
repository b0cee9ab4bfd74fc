//! A test double for the descriptor store of systemd (`FileDescriptorStoreMax` of `systemd.service(5)`,
//! `FDSTORE` of `sd_notify(3)`).

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::fstat;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// `FileDescriptorStoreMax` of the unit.
const MAX: usize = 2;

/// A notification socket and the stored descriptors.
#[derive(Debug)]
pub struct FdStore {
    path: PathBuf,
    notify: UnixDatagram,
    /// Names and descriptors, in the order of their arrival.
    pub stored: Vec<(String, OwnedFd)>,
}

/// Returns true if both refer to the same file.
fn is_same(a: &OwnedFd, b: &OwnedFd) -> bool {
    let inode = |descriptor| fstat(descriptor).map(|s| (s.st_dev, s.st_ino)).ok();
    inode(a) == inode(b)
}

impl FdStore {
    /// Creates a store whose notification socket is in `dir`.
    pub fn new(dir: &Path) -> io::Result<FdStore> {
        let path = dir.join("notify");
        Ok(FdStore { notify: UnixDatagram::bind(&path)?, path, stored: Vec::new() })
    }

    /// Waits at most `limit` for the next message, and returns its text.
    pub fn message(&mut self, limit: Duration) -> io::Result<String> {
        self.notify.set_read_timeout(Some(limit))?;
        self.receive(RecvFlags::empty())
    }

    /// Receives all queued messages, and returns their texts.
    pub fn messages(&mut self) -> io::Result<Vec<String>> {
        let mut texts = Vec::new();
        loop {
            match self.receive(RecvFlags::DONTWAIT) {
                Ok(text) => texts.push(text),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(texts),
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&mut self, flags: RecvFlags) -> io::Result<String> {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let count = recvmsg(&self.notify, &mut parts, &mut control, flags)?.bytes;
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
        let value = |name| text.lines().find_map(|line| line.strip_prefix(name));
        let name = value("FDNAME=").unwrap_or("stored").to_owned();
        if value("FDSTOREREMOVE=") == Some("1") {
            self.stored.retain(|(stored, _)| *stored != name);
        } else if let (Some("1"), Some(descriptor)) = (value("FDSTORE="), descriptor)
            && self.stored.len() < MAX
            && !self.stored.iter().any(|(_, stored)| is_same(stored, &descriptor))
        {
            self.stored.push((name, descriptor));
        }
        Ok(text)
    }

    /// Returns a command that runs `command` with the stored descriptors, as systemd does: numbered from
    /// 3, with `LISTEN_PID`. Its standard output goes to its standard error.
    pub fn run(&self, command: &Command) -> io::Result<Command> {
        let names: Vec<&str> = self.stored.iter().map(|(name, _)| &**name).collect();
        // The shell's redirections take single digits only.
        let moves = ["", "3<&0", "3<&0 4<&1"][names.len()];
        let (count, names) = (names.len(), names.join(":"));
        let mut outer = Command::new("/bin/sh");
        outer.arg("-c").arg(format!(
            "exec {moves} 0</dev/null 1>&2; LISTEN_FDS={count} LISTEN_FDNAMES={names} LISTEN_PID=$$ exec \"$@\""
        ));
        outer.arg("sh").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => outer.env(name, value),
                None => outer.env_remove(name),
            };
        }
        outer.env("NOTIFY_SOCKET", &self.path);
        let mut copies = self.stored.iter().map(|(_, stored)| stored.try_clone());
        let mut next =
            || copies.next().transpose().map(|copy| copy.map_or(Stdio::null(), Stdio::from));
        outer.stdin(next()?).stdout(next()?);
        Ok(outer)
    }

    /// Returns the number in this process of the descriptor with this name.
    pub fn number(&self, name: &str) -> Option<i32> {
        self.stored.iter().find(|(stored, _)| stored == name).map(|(_, stored)| stored.as_raw_fd())
    }
}
