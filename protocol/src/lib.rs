//! The XenStore wire protocol, without I/O.
//!
//! Bytes go in and typed requests come out; typed replies go in and bytes come out. Nothing here
//! reads a clock, opens a file or keeps a tree, so everything can be run by a unit test or a
//! fuzzer from bytes alone.
//!
//! ```text
//!  bytes ─► Deframer ─► Frame ─► admit() ─► Request        (server side: server::Connection)
//!  bytes ◄─ Reply::emit(), WatchEvent::emit() ◄─ typed     (client side: client::Connection)
//! ```
//!
//! The protocol is specified by `docs/misc/xenstore.txt` and `xen/include/public/io/xs_wire.h` of
//! the Xen sources; where those are silent, by what C xenstored of Xen 4.22 does.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod admit;
pub mod client;
mod deframe;
mod errno;
mod event;
mod features;
mod header;
mod ids;
mod operation;
mod path;
mod perm;
mod quota;
mod reply;
mod request;
pub mod ring;
pub mod server;
pub mod stream;
mod text;

pub use admit::admit;
pub use deframe::{Deframer, Frame, FrameTooLong};
pub use errno::Errno;
pub use event::WatchEvent;
pub use features::Features;
pub use header::Header;
pub use ids::{DomId, EvtchnPort, Gfn, RequestId, TxId};
pub use operation::{Facet, Operation};
pub use path::{AbsPath, Path, PathKind, domain_prefix_len};
pub use perm::{Access, Perm, Perms};
pub use quota::Quota;
pub use reply::{MalformedReply, Reply};
pub use request::{Control, Request};
pub use text::{Strings, decimal};

/// Bytes of a frame before its payload.
pub const HEADER_LEN: usize = 16;
/// Largest payload of a frame in either direction, in bytes (`XENSTORE_PAYLOAD_MAX`).
pub const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path, in bytes (`XENSTORE_ABS_PATH_MAX`).
pub const ABS_PATH_MAX: usize = 3072;
/// Longest path below a domain's own `/local/domain/N/`, in bytes (`XENSTORE_REL_PATH_MAX`).
pub const REL_PATH_MAX: usize = 2048;

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
