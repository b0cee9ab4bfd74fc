//! Watch events.

use alloc::vec::Vec;

use crate::{HEADER_LEN, Header, Operation, PAYLOAD_MAX, RequestId, Strings, TxId};

/// "Something changed at `path`, which the watch with `token` is about."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchEvent<'a> {
    /// Spelled as the watch was: relative for a relative watch.
    pub path: &'a [u8],
    /// As given to WATCH.
    pub token: &'a [u8],
}

impl<'a> WatchEvent<'a> {
    /// Payload bytes.
    pub fn len(&self) -> usize {
        self.path.len() + self.token.len() + 2
    }

    /// Never: there are always two NULs.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Reads a payload: exactly two strings.
    pub fn parse(payload: &'a [u8]) -> Option<WatchEvent<'a>> {
        let mut strings = Strings::new(payload);
        let event = WatchEvent { path: strings.next()?, token: strings.next()? };
        strings.rest().is_empty().then_some(event)
    }

    /// Writes header and payload. Both ids are 0; Windows drivers insist. Writes nothing and says
    /// so if the event does not fit a message (XSA-324).
    pub fn emit(&self, out: &mut Vec<u8>) -> bool {
        if self.len() > PAYLOAD_MAX {
            return false;
        }
        #[allow(clippy::cast_possible_truncation)] // at most PAYLOAD_MAX
        let len = self.len() as u32;
        let header = Header {
            ty: Operation::WatchEvent.as_wire(),
            req_id: RequestId::EVENT,
            tx_id: TxId::NONE,
            len,
        };
        out.reserve(HEADER_LEN + self.len());
        out.extend_from_slice(&header.emit());
        for text in [self.path, self.token] {
            out.extend_from_slice(text);
            out.push(0);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if ids are not 0, a NUL is missing, or the limit of 4096 is off by one (XSA-324).
    #[test]
    fn events_are_two_strings_of_at_most_4096_bytes() {
        let mut out = Vec::new();
        assert!(WatchEvent { path: b"/a", token: b"t" }.emit(&mut out));
        assert_eq!(out, b"\x0f\0\0\0\0\0\0\0\0\0\0\0\x05\0\0\0/a\0t\0");
        let token = [b't'; 4092];
        assert!(WatchEvent { path: b"/a", token: &token }.emit(&mut Vec::new()));
        let mut none = Vec::new();
        assert!(!WatchEvent { path: b"/ab", token: &token }.emit(&mut none));
        assert!(none.is_empty());
        assert_eq!(WatchEvent::parse(b"/a\0t\0x"), None);
        assert_eq!(WatchEvent::parse(b"/a\0"), None);
    }
}
