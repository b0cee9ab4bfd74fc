//! The header of a frame.

use crate::ids::{RequestId, TxId};
use crate::limits::HEADER_LEN;
use crate::operation::Operation;

/// The first 16 bytes of every frame (`struct xsd_sockmsg`): four little-endian words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Message type: the number of an [`Operation`], or an unknown one.
    pub ty: u32,
    /// The client chooses it; the server copies it into the reply.
    pub req_id: RequestId,
    /// The transaction of the request, or [`TxId::NONE`].
    pub tx_id: TxId,
    /// Bytes of the payload.
    pub len: u32,
}

impl Header {
    /// The message type, or `None` if its number is unknown.
    #[inline]
    pub const fn operation(&self) -> Option<Operation> {
        Operation::from_wire(self.ty)
    }

    /// The name of the message type for a log line; `?` if its number is unknown.
    pub fn operation_name(&self) -> &'static str {
        self.operation().map_or("?", Operation::name)
    }

    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Header {
        let word =
            |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        Header { ty: word(0), req_id: RequestId(word(4)), tx_id: TxId(word(8)), len: word(12) }
    }

    /// Writes a header.
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        for (at, word) in [self.ty, self.req_id.0, self.tx_id.0, self.len].into_iter().enumerate() {
            bytes[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if the offset or byte order of a field differs from struct xsd_sockmsg.
    #[test]
    fn layout_matches_xsd_sockmsg() {
        let bytes = [2, 0, 0, 0, 7, 1, 0, 0, 9, 0, 0, 0, 0, 16, 0, 0];
        let header = Header::parse(&bytes);
        assert_eq!(header, Header { ty: 2, req_id: RequestId(263), tx_id: TxId(9), len: 4096 });
        assert_eq!(header.emit(), bytes);
    }
}
