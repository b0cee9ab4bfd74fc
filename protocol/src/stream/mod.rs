//! The migration stream: the format in which one daemon passes its state to another.
//!
//! The format is version 2 of `docs/designs/xenstore-migration.md` in the Xen sources: a header, then
//! records. A record has a type, a length, and a body that is padded to a multiple of 8 bytes.
//! [`Reader`] reads bodies in either byte order; [`Writer`] writes little-endian.
//!
//! ```
//! use xenstore_protocol::stream::{Reader, VERSION, Writer, kind};
//!
//! let mut writer = Writer::new(VERSION, 0);
//! writer.begin(kind::DOMAIN_DATA);
//! writer.u16(5);
//! let bytes = writer.finish();
//!
//! let mut reader = Reader::new(&bytes)?;
//! let mut record = reader.next_record()?.expect("a record before END");
//! assert_eq!((record.kind, record.body.u16()?), (kind::DOMAIN_DATA, 5));
//! assert!(reader.next_record()?.is_none());
//! # Ok::<(), xenstore_protocol::stream::StreamError>(())
//! ```

mod cursor;
mod format;
mod reader;
#[cfg(test)]
mod tests;
mod watch_length;
mod writer;

pub use cursor::Cursor;
pub use format::{StreamError, StreamErrorKind, VERSION, kind};
pub use reader::{Reader, StreamRecord};
pub use writer::{Sink, Writer, put_varint};
