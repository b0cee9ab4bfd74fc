//! Byte transports of XenStore.
//!
//! A [`Transport`] moves bytes in both directions and knows who is at the other end. It knows
//! nothing of frames. Everything here works with any executor.
//!
//! * [`memory`]: a pair of pipes within one process;
//! * [`socket`]: a unix socket;
//! * [`fault`], [`trace`]: wrappers that fail on purpose, or tell what goes through.

pub mod fault;
pub mod memory;
pub mod socket;
pub mod trace;

use futures_io::{AsyncRead, AsyncWrite};

/// Who is at the other end of a transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process on this machine, as far as the kernel told.
    Process(Credentials),
    /// A domain, by its domid.
    Domain(u16),
}

/// What the kernel told about a process at the moment when it connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Process id.
    pub pid: Option<i32>,
    /// Effective user id.
    pub uid: Option<u32>,
    /// Effective group id.
    pub gid: Option<u32>,
}

/// Bytes in both directions, and who is at the other end.
pub trait Transport: AsyncRead + AsyncWrite + Unpin {
    /// Who is at the other end.
    fn peer(&self) -> Peer;
}

impl<T: Transport + ?Sized> Transport for Box<T> {
    fn peer(&self) -> Peer {
        (**self).peer()
    }
}
