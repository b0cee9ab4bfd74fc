//! systemd: socket activation, notifications, and stored descriptors.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use sd_notify::NotifyState;
use tracing::{debug, warn};
use xenstore_sys::inherit;

/// A descriptor that systemd stores while no process runs (`FileDescriptorStoreMax`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keep {
    /// The listening socket, so that clients wait during a restart instead of being refused.
    Listener,
    /// The event channels. While systemd stores them, no other XenStore can bind them.
    Evtchn,
}

impl Keep {
    /// The name under which it is stored.
    fn name(self) -> &'static str {
        match self {
            Keep::Listener => "xenstored-listener",
            Keep::Evtchn => "xenstored-evtchn",
        }
    }

    fn named(name: &str) -> Option<Keep> {
        [Keep::Listener, Keep::Evtchn].into_iter().find(|keep| keep.name() == name)
    }
}

/// The descriptors that systemd passes.
#[derive(Default)]
pub(crate) struct Given {
    pub(crate) listener: Option<Listener>,
    /// Stored by an earlier process of this daemon; not checked yet.
    pub(crate) evtchn: Option<OwnedFd>,
}

/// A listening socket from systemd.
pub(crate) enum Listener {
    /// Opened by systemd, for a socket unit.
    Activated(OwnedFd),
    /// Stored by an earlier process of this daemon.
    Kept(OwnedFd),
}

/// The names of all passed descriptors, which are numbered from 3. The variables remain for the next
/// program of a live update: it is the same process.
fn names() -> Vec<String> {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let for_us = variable("LISTEN_PID").parse() == Ok(std::process::id());
    let count = variable("LISTEN_FDS").parse().unwrap_or(0);
    let names = variable("LISTEN_FDNAMES");
    let names = names.split(':').map(str::to_owned).chain(std::iter::repeat_with(String::new));
    names.take(if for_us { count } else { 0 }).collect()
}

/// Returns true if the listening socket is that of a socket unit, which remains when the daemon ends.
pub(crate) fn is_activated() -> bool {
    names().iter().any(|name| !is_ours(name))
}

/// Returns true if an earlier process of this daemon has stored the descriptor.
fn is_ours(name: &str) -> bool {
    name.starts_with("xenstored-")
}

/// Adopts the passed descriptors. An error is one line.
pub(crate) fn given() -> Result<Given, String> {
    let (mut activated, mut given) = (Vec::new(), Given::default());
    for (number, name) in (3..).zip(names()) {
        match Keep::named(&name) {
            // Of another version.
            None if is_ours(&name) => {
                let _ = inherit::adopt(number);
                forget_named(&name);
            }
            None => {
                let socket = inherit::adopt_socket(number, true);
                activated.push(socket.map_err(|error| format!("socket from systemd: {error}"))?);
            }
            Some(keep) => given.take(keep, number),
        }
    }
    if activated.len() > 1 {
        return Err(format!("systemd gave {} sockets, one is wanted", activated.len()));
    }
    if let Some(socket) = activated.pop() {
        given.listener = Some(Listener::Activated(socket));
    }
    Ok(given)
}

impl Given {
    fn take(&mut self, keep: Keep, number: RawFd) {
        let taken = match keep {
            Keep::Listener => inherit::adopt_socket(number, true)
                .map(|socket| self.listener = Some(Listener::Kept(socket))),
            Keep::Evtchn => inherit::adopt(number).map(|evtchn| self.evtchn = Some(evtchn)),
        };
        if let Err(error) = taken {
            warn!(%error, "systemd has not stored the {}", keep.name());
            forget(&[keep]);
        }
    }
}

/// Stores a descriptor in systemd. systemd does not poll it, so an error on it does not remove it.
/// A socket that systemd has opened is stored anyway.
pub(crate) fn keep(keep: Keep, descriptor: BorrowedFd<'_>) {
    let state =
        [NotifyState::FdStore, NotifyState::FdName(keep.name()), NotifyState::Custom("FDPOLL=0")];
    if (keep != Keep::Listener || !is_activated())
        && let Err(error) = sd_notify::notify_with_fds(&state, &[descriptor])
    {
        debug!(%error, "systemd does not keep the {}", keep.name());
    }
}

/// Removes descriptors from systemd.
pub(crate) fn forget(these: &[Keep]) {
    these.iter().for_each(|keep| forget_named(keep.name()));
}

/// Notifies systemd that the daemon serves requests.
pub(crate) fn is_ready() {
    let _ = sd_notify::notify(&[NotifyState::Ready]);
}

/// Notifies systemd that this process is the daemon, and serves requests.
pub(crate) fn serves(pid: u32) {
    let _ = sd_notify::notify(&[NotifyState::MainPid(pid), NotifyState::Ready]);
}

/// Notifies systemd that this process is the daemon until another one serves.
pub(crate) fn is_to_be_replaced(pid: u32) {
    let _ = sd_notify::notify(&[NotifyState::MainPid(pid), NotifyState::Reloading]);
}

/// Notifies systemd regularly that the main thread runs tasks, if the unit has `WatchdogSec`.
pub(crate) async fn keep_watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    set_watchdog(true);
    loop {
        let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        smol::Timer::after(limit / 4).await;
    }
}

/// Turns the watchdog of systemd on, as the unit configures it, or off: C xenstored does not notify it.
pub(crate) fn set_watchdog(on: bool) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let limit = if on { u32::try_from(limit.as_micros()).unwrap_or(u32::MAX) } else { 0 };
    let _ = sd_notify::notify(&[NotifyState::WatchdogUsec(limit)]);
}

/// Waits until systemd has processed all notifications, at most 5 s: it cannot attribute a notification
/// to a unit after the sending process has ended (`sd_notify_barrier(3)`).
pub(crate) fn wait_until_heard() {
    const LIMIT: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
    let Ok((closed, open)) = std::io::pipe() else { return };
    let sent = sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[open.as_fd()]);
    drop(open);
    if sent.is_ok() {
        let mut ends = [PollFd::new(&closed, PollFlags::empty())];
        let _ = poll(&mut ends, Some(&LIMIT));
    }
}

fn forget_named(name: &str) {
    let _ = sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}
