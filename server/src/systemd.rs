//! What systemd gives to the daemon, is told by it and keeps for it.

use std::os::fd::{BorrowedFd, OwnedFd};

use sd_notify::NotifyState;
use tracing::{debug, warn};
use xenstore_transport::inherit;

/// What systemd calls the listening socket that it keeps, so that clients who come while there is no
/// process wait instead of being refused. Event channels are not kept: they are bound anew to the same
/// ports without losing an event, and would be taken from any other XenStore as long as systemd had
/// them.
const KEPT: &str = "xenstored-listener";

/// A listening socket from systemd.
pub(crate) enum Given {
    /// Opened by it, of a socket unit.
    Activated(OwnedFd),
    /// Opened by a process of ours, which has ended.
    Kept(OwnedFd),
}

/// The names of all descriptors that it gives, which are those from 3 on. The variables stay, also for
/// another program in the place of this one: it is the same process.
fn names() -> Vec<String> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let for_us = variable("LISTEN_PID").parse() == Ok(std::process::id());
    let count = variable("LISTEN_FDS").parse().unwrap_or(0);
    let names = variable("LISTEN_FDNAMES");
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat_with(String::new));
    names.take(if for_us { count } else { 0 }).collect()
}

/// Is the listening socket that of a socket unit, which stays when we end?
pub(crate) fn is_activated() -> bool {
    names().iter().any(|name| name != KEPT)
}

/// The listening socket that it gives, if it does. An error is one line.
pub(crate) fn given() -> Result<Option<Given>, String> {
    let (mut activated, mut kept) = (Vec::new(), None);
    for (number, name) in (3..).zip(names()) {
        let is_ours = name == KEPT;
        match inherit::socket(number, true) {
            Ok(socket) if is_ours => kept = Some(socket),
            Ok(socket) => activated.push(socket),
            Err(error) if is_ours => warn!(%error, "systemd has not kept the socket"),
            Err(error) => return Err(format!("socket from systemd: {error}")),
        }
    }
    if activated.len() > 1 {
        return Err(format!("systemd gave {} sockets, one is wanted", activated.len()));
    }
    Ok(activated.pop().map(Given::Activated).or(kept.map(Given::Kept)))
}

/// Has it keep the listening socket, if it keeps anything (`FileDescriptorStoreMax`) and has not
/// opened it.
pub(crate) fn keep(listener: BorrowedFd<'_>) {
    let state = [NotifyState::FdStore, NotifyState::FdName(KEPT), NotifyState::Custom("FDPOLL=0")];
    if !is_activated()
        && let Err(error) = sd_notify::notify_with_fds(&state, &[listener])
    {
        debug!(%error, "systemd does not keep the socket");
    }
}

/// It is not to keep the socket any more.
pub(crate) fn forget() {
    let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(KEPT)]);
}
