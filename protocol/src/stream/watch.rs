//! The length of a WATCH_DATA_EXTENDED record, which not every writer states correctly.

use super::{Cursor, StreamError};

/// Bytes before the path of a record as the design document lays it out: connection, the two
/// lengths, depth and padding.
const DOCUMENTED: usize = 12;
/// Bytes before it as C xenstored of Xen 4.22 and 4.23 writes them: without depth and padding.
const WITHOUT_DEPTH: usize = 8;

/// The number of bytes of the body of the record that begins at `body`, with `announced` as its
/// header states it.
///
/// C xenstored announces `DOCUMENTED` bytes before the texts and writes `WITHOUT_DEPTH`. For half of
/// all lengths the padding hides the difference; for the others the next record begins 8 bytes
/// before the announced end. A body is taken as the short one only if its path and token end where
/// their lengths say, and those of the documented one do not.
pub(super) fn length(body: &Cursor<'_>, announced: usize) -> usize {
    let end = |before: usize| -> Result<usize, StreamError> {
        let mut body = body.clone();
        body.take(4)?;
        let (path, token) = (usize::from(body.u16()?), usize::from(body.u16()?));
        body.take(before - WITHOUT_DEPTH)?;
        body.string(path)?;
        body.string(token)?;
        Ok(before + path + token)
    };
    match (end(DOCUMENTED), end(WITHOUT_DEPTH)) {
        (Ok(end), _) if end <= announced => announced,
        (_, Ok(end)) => announced.min(end.next_multiple_of(8)),
        _ => announced,
    }
}
