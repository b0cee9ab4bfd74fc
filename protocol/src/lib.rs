//! The XenStore wire protocol, without I/O.
//!
//! The crate turns bytes into typed messages and typed messages into bytes. It reads no clock, opens
//! no file and keeps no tree, so that a unit test or a fuzzer can run all of it.
//!
//! ```text
//!                 ┌─────────────────────── ServerConnection ────────────────────────┐
//!  requests       │                                                                 │
//!  ──── bytes ──► │ Deframer ──► Frame ──► admit() ──► Request ──► ┌──────────────┐ │
//!                 │                                                │ the server's │ │
//!  ◄─── bytes ─── │ queue ◄── Reply::emit(), WatchEvent::emit() ◄─ │ store        │ │
//!  replies,       │                                                └──────────────┘ │
//!  events         └─────────────────────────────────────────────────────────────────┘
//!
//!                 ┌─────────────────────── ClientConnection ────────────────────────┐
//!  ◄─── bytes ─── │ queue ◄── Request::emit() ◄── Request, with a new RequestId     │
//!  ──── bytes ──► │ Deframer ──► Frame ──► ServerMessage: a reply (Reply::parse()   │
//!                 │                        reads its payload) or a WatchEvent       │
//!                 └─────────────────────────────────────────────────────────────────┘
//! ```
//!
//! [`ring`] has the layout of the page that a guest shares with the server, and [`stream`] the format
//! in which one daemon passes its state to another.
//!
//! # A server: parse and emit
//!
//! ```
//! use xenstore_protocol::{Errno, Reply, Request, ServerConnection, admit};
//!
//! let received = *b"\x02\0\0\0\x07\0\0\0\0\0\0\0\x03\0\0\0/a\0"; // READ /a, request id 7
//! let mut connection = ServerConnection::default();
//! let mut input = &received[..];
//! while let Some((frame, out)) = connection.receive(&mut input)? {
//!     let reply = match admit(&frame, false, |_transaction| false) {
//!         Ok(Request::Read(path)) if path.as_str() == "/a" => Reply::Bytes(b"value"[..].into()),
//!         Ok(_) => Reply::Error(Errno::Enoent),
//!         Err(errno) => Reply::Error(errno),
//!     };
//!     reply.emit(&frame.header, out);
//! }
//! assert!(connection.unsent().ends_with(b"value"));
//! # Ok::<(), xenstore_protocol::FrameTooLong>(())
//! ```
//!
//! # A client
//!
//! ```
//! use xenstore_protocol::{ClientConnection, Path, Reply, Request, ServerMessage, TxId};
//!
//! let mut connection = ClientConnection::default();
//! let path = Path::parse(b"/a").expect("a valid path");
//! let id = connection.request(TxId::NONE, &Request::Read(path))?;
//! assert_eq!(connection.unsent().len(), 19);
//!
//! let received = *b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x05\0\0\0value";
//! match connection.receive(&mut &received[..])? {
//!     Some(ServerMessage::Reply { req_id, op, is_error, payload }) => {
//!         assert_eq!(req_id, id);
//!         assert_eq!(Reply::parse(op, is_error, payload)?, Reply::Bytes(b"value"[..].into()));
//!     }
//!     other => panic!("{other:?}"),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Without the standard library
//!
//! The crate is `no_std`, needs `alloc`, has no dependencies and no features. It works where there is
//! no operating system, for example in the kernel of a guest:
//!
//! ```
//! extern crate alloc;
//!
//! use alloc::vec::Vec;
//! use xenstore_protocol::ring::{Side, stretches};
//! use xenstore_protocol::{ClientConnection, TxId, Path, Request};
//!
//! /// Copies a request into the ring of the page from index `producer` on. Returns the new index.
//! fn send(page: &mut [u8; 4096], producer: u32, request: &Request<'_>) -> Option<u32> {
//!     let mut connection = ClientConnection::default();
//!     connection.request(TxId::NONE, request).ok()?;
//!     let bytes: Vec<u8> = connection.unsent().to_vec();
//!     let len = u32::try_from(bytes.len()).ok()?;
//!     let mut rest = &bytes[..];
//!     for part in stretches(producer, len) {
//!         let (now, later) = rest.split_at(part.len());
//!         page[Side::Requests.offset()..][part].copy_from_slice(now);
//!         rest = later;
//!     }
//!     Some(producer.wrapping_add(len))
//! }
//! # let path = Path::parse(b"/a").unwrap();
//! # assert_eq!(send(&mut [0; 4096], 1020, &Request::Read(path)), Some(1039));
//! ```
//!
//! # Specification
//!
//! `docs/misc/xenstore.txt`, `docs/misc/xenstore-ring.txt` and `xen/include/public/io/xs_wire.h` of the
//! Xen sources specify the protocol. Where they are silent, this crate does what C xenstored of Xen
//! 4.22 does.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod admit;
mod client;
mod errno;
mod event;
mod features;
mod frame;
mod header;
mod ids;
mod limits;
mod operation;
mod path;
mod perm;
mod quota;
mod reply;
mod request;
pub mod ring;
mod server;
pub mod stream;
mod strings;

pub use admit::admit;
pub use client::{ClientConnection, ProtocolError, RequestTooLong, ServerMessage};
pub use errno::Errno;
pub use event::{EventTooLong, WatchEvent};
pub use features::Features;
pub use frame::{Deframer, Frame, FrameTooLong};
pub use header::Header;
pub use ids::{DomId, EvtchnPort, Gfn, RequestId, TxId};
pub use limits::{ABS_PATH_MAX, HEADER_LEN, PAYLOAD_MAX, REL_PATH_MAX};
pub use operation::{Facet, Operation};
pub use path::{AbsPath, Path, PathKind, domain_prefix_len};
pub use perm::{Access, Perm, Perms};
pub use quota::Quota;
pub use reply::{MalformedReply, Reply};
pub use request::{Control, Request};
pub use server::ServerConnection;
pub use strings::{Strings, decimal};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
