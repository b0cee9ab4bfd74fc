//! The part of systemd that keeps descriptors of a daemon while there is no process
//! (`FileDescriptorStoreMax` of `systemd.service(5)`, `FDSTORE` of `sd_notify(3)`).

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::fstat;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// How many it keeps, as the unit says.
const MAX: usize = 2;

/// What is told to it, and what it keeps.
#[derive(Debug)]
pub struct Keeper {
    path: PathBuf,
    notify: UnixDatagram,
    /// Names and descriptors, in the order in which they came.
    pub kept: Vec<(String, OwnedFd)>,
}

/// Do they refer to the same file?
fn is_same(a: &OwnedFd, b: &OwnedFd) -> bool {
    let what = |descriptor| fstat(descriptor).map(|s| (s.st_dev, s.st_ino)).ok();
    what(a) == what(b)
}

impl Keeper {
    /// One whose socket is in this directory.
    pub fn new(dir: &Path) -> io::Result<Keeper> {
        let path = dir.join("notify");
        Ok(Keeper { notify: UnixDatagram::bind(&path)?, path, kept: Vec::new() })
    }

    /// Waits for the next message, at most for so long; its text.
    pub fn message(&mut self, limit: Duration) -> io::Result<String> {
        self.notify.set_read_timeout(Some(limit))?;
        self.receive(RecvFlags::empty())
    }

    /// Takes all messages that are there; their texts.
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
            self.kept.retain(|(kept, _)| *kept != name);
        } else if let (Some("1"), Some(descriptor)) = (value("FDSTORE="), descriptor)
            && self.kept.len() < MAX
            && !self.kept.iter().any(|(_, kept)| is_same(kept, &descriptor))
        {
            self.kept.push((name, descriptor));
        }
        Ok(text)
    }

    /// Has a program be run with what is kept, as systemd does: from number 3 on, and with a variable
    /// that says for which process. Both of its outputs go where its standard error does.
    pub fn run(&self, command: &Command) -> io::Result<Command> {
        let names: Vec<&str> = self.kept.iter().map(|(name, _)| &**name).collect();
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
        let mut copies = self.kept.iter().map(|(_, kept)| kept.try_clone());
        let mut next =
            || copies.next().transpose().map(|copy| copy.map_or(Stdio::null(), Stdio::from));
        outer.stdin(next()?).stdout(next()?);
        Ok(outer)
    }

    /// The number here of what is kept by this name.
    pub fn number(&self, name: &str) -> Option<i32> {
        self.kept.iter().find(|(kept, _)| kept == name).map(|(_, kept)| kept.as_raw_fd())
    }
}
