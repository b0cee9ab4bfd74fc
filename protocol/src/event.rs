//! Watch events.

use alloc::vec::Vec;
use core::fmt;

use crate::header::Header;
use crate::ids::{RequestId, TxId};
use crate::limits::{HEADER_LEN, PAYLOAD_MAX};
use crate::operation::Operation;
use crate::strings::Strings;

/// The event that a node at or below a watched path has changed.
///
/// ```
/// use xenstore_protocol::WatchEvent;
///
/// let mut out = Vec::new();
/// WatchEvent { path: b"/a", token: b"t" }.emit(&mut out)?;
/// assert_eq!(WatchEvent::parse(&out[16..]), Some(WatchEvent { path: b"/a", token: b"t" }));
/// # Ok::<(), xenstore_protocol::EventTooLong>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchEvent<'a> {
    /// The changed path: relative if the path of the watch is relative.
    pub path: &'a [u8],
    /// The token of the watch.
    pub token: &'a [u8],
}

/// Path and token of an event exceed [`PAYLOAD_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventTooLong(
    /// The length of the payload, in bytes.
    pub usize,
);

impl fmt::Display for EventTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event of {} bytes, the limit is {PAYLOAD_MAX}", self.0)
    }
}

impl core::error::Error for EventTooLong {}

impl<'a> WatchEvent<'a> {
    /// Bytes of the payload: both strings with their NULs.
    pub fn payload_len(&self) -> usize {
        self.path.len() + self.token.len() + 2
    }

    /// Reads a payload. Returns `None` unless it is exactly two strings.
    pub fn parse(payload: &'a [u8]) -> Option<WatchEvent<'a>> {
        let mut strings = Strings::new(payload);
        let event = WatchEvent { path: strings.next()?, token: strings.next()? };
        strings.rest().is_empty().then_some(event)
    }

    /// Appends header and payload. Both ids are 0; drivers of Windows require it.
    ///
    /// # Errors
    ///
    /// Fails, and appends nothing, if the payload exceeds [`PAYLOAD_MAX`] (XSA-324).
    pub fn emit(&self, out: &mut Vec<u8>) -> Result<(), EventTooLong> {
        let len = self.payload_len();
        if len > PAYLOAD_MAX {
            return Err(EventTooLong(len));
        }
        out.reserve(HEADER_LEN + len);
        #[allow(clippy::cast_possible_truncation)] // at most PAYLOAD_MAX
        let len = len as u32;
        let ty = Operation::WatchEvent.as_wire();
        let header = Header { ty, req_id: RequestId::EVENT, tx_id: TxId::NONE, len };
        out.extend_from_slice(&header.emit());
        for text in [self.path, self.token] {
            out.extend_from_slice(text);
            out.push(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if an id is not 0, a NUL is missing, or the limit of 4,096 bytes is off by one (XSA-324).
    #[test]
    fn event_is_two_strings_of_at_most_4096_bytes() {
        let mut out = Vec::new();
        assert_eq!(WatchEvent { path: b"/a", token: b"t" }.emit(&mut out), Ok(()));
        assert_eq!(out, b"\x0f\0\0\0\0\0\0\0\0\0\0\0\x05\0\0\0/a\0t\0");
        let token = [b't'; 4092];
        assert_eq!(WatchEvent { path: b"/a", token: &token }.emit(&mut Vec::new()), Ok(()));
        let mut none = Vec::new();
        let error = WatchEvent { path: b"/ab", token: &token }.emit(&mut none);
        assert_eq!(error, Err(EventTooLong(4097)));
        assert!(none.is_empty());
        assert_eq!(WatchEvent::parse(b"/a\0t\0x"), None);
        assert_eq!(WatchEvent::parse(b"/a\0"), None);
    }
}
