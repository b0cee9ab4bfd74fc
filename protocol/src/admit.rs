//! The order in which a request is checked before it is looked at.

use crate::{Errno, Frame, Request, TxId};

/// Decides whether a frame is a request that may go on, in the order of C xenstored, which can be
/// seen in the name of the error:
///
/// 1. an unknown type, or one that only a server sends: ENOSYS;
/// 2. a type reserved to the control domain, from somebody else: EACCES;
/// 3. a transaction id that the connection does not have: ENOENT (WATCH and UNWATCH ignore it);
/// 4. a malformed payload: EINVAL.
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
    use crate::Header;

    fn try_it(ty: u32, tx_id: u32, payload: &[u8], privileged: bool) -> Option<Errno> {
        let frame =
            Frame { header: Header { ty, tx_id: TxId(tx_id), ..Header::default() }, payload };
        admit(&frame, privileged, |id| id == TxId(1)).err()
    }

    // Fails if a later check answers before an earlier one.
    #[test]
    fn checks_come_in_the_order_of_c_xenstored() {
        use Errno::*;
        // Each row is wrong in all that follows its reason as well.
        assert_eq!(try_it(20, 9, b"", false), Some(Enosys));
        assert_eq!(try_it(27, 9, b"", false), Some(Enosys));
        assert_eq!(try_it(65535, 9, b"", true), Some(Enosys));
        assert_eq!(try_it(15, 9, b"", false), Some(Enosys));
        assert_eq!(try_it(9, 9, b"", false), Some(Eacces));
        assert_eq!(try_it(9, 9, b"", true), Some(Enoent));
        assert_eq!(try_it(9, 1, b"", true), Some(Einval));
        assert_eq!(try_it(2, 9, b"", false), Some(Enoent));
        assert_eq!(try_it(2, 1, b"", false), Some(Einval));
        assert_eq!(try_it(2, 1, b"/a\0", false), None);
    }

    // Fails if a stale transaction id makes WATCH or UNWATCH fail.
    #[test]
    fn watches_ignore_the_transaction_id() {
        assert_eq!(try_it(4, 9, b"/a\0t\0", false), None);
        assert_eq!(try_it(5, 9, b"/a\0t\0", false), None);
    }
}
