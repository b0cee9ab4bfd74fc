//! The checks of a request that come before its execution, in their order.

use crate::errno::Errno;
use crate::frame::Frame;
use crate::ids::TxId;
use crate::request::Request;

/// Returns the request in a frame, or the error that answers it.
///
/// `privileged` states whether the connection is the control domain's, and `has_transaction` whether
/// a transaction is open on the connection.
///
/// # Errors
///
/// The checks are those of C xenstored in the same order, which decides over the error if several
/// fail:
///
/// 1. `ENOSYS` for an unknown type, or one that only a server sends;
/// 2. `EACCES` for a type that only the control domain may send, from another domain;
/// 3. `ENOENT` for a transaction id that is not open (WATCH and UNWATCH accept any id);
/// 4. `EINVAL` for a malformed payload.
pub fn admit<'a>(
    frame: &Frame<'a>,
    privileged: bool,
    has_transaction: impl FnOnce(TxId) -> bool,
) -> Result<Request<'a>, Errno> {
    let op = frame.header.operation().filter(|op| op.is_request()).ok_or(Errno::Enosys)?;
    if op.is_privileged() && !privileged {
        return Err(Errno::Eacces);
    }
    let tx_id = frame.header.tx_id;
    if tx_id != TxId::NONE && !op.ignores_transaction_id() && !has_transaction(tx_id) {
        return Err(Errno::Enoent);
    }
    Request::parse(op, frame.payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::Header;

    fn error_of(ty: u32, tx_id: u32, payload: &[u8], privileged: bool) -> Option<Errno> {
        let frame =
            Frame { header: Header { ty, tx_id: TxId(tx_id), ..Header::default() }, payload };
        admit(&frame, privileged, |id| id == TxId(1)).err()
    }

    // Fails if a check precedes one that C xenstored does before it.
    #[test]
    fn first_failing_check_decides_over_the_error() {
        use Errno::*;
        // Each row fails all later checks too.
        assert_eq!(error_of(20, 9, b"", false), Some(Enosys));
        assert_eq!(error_of(27, 9, b"", false), Some(Enosys));
        assert_eq!(error_of(65535, 9, b"", true), Some(Enosys));
        assert_eq!(error_of(15, 9, b"", false), Some(Enosys));
        assert_eq!(error_of(9, 9, b"", false), Some(Eacces));
        assert_eq!(error_of(9, 9, b"", true), Some(Enoent));
        assert_eq!(error_of(9, 1, b"", true), Some(Einval));
        assert_eq!(error_of(2, 9, b"", false), Some(Enoent));
        assert_eq!(error_of(2, 1, b"", false), Some(Einval));
        assert_eq!(error_of(2, 1, b"/a\0", false), None);
    }

    // Fails if WATCH or UNWATCH checks the transaction id.
    #[test]
    fn watch_and_unwatch_accept_an_unknown_transaction_id() {
        assert_eq!(error_of(4, 9, b"/a\0t\0", false), None);
        assert_eq!(error_of(5, 9, b"/a\0t\0", false), None);
    }
}
