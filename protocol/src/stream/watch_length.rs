//! The length of a WATCH_DATA_EXTENDED record, which some writers state incorrectly.

use super::cursor::Cursor;
use super::format::StreamError;

/// Bytes before the path as in the design document: connection, two lengths, depth, padding.
const WITH_DEPTH: usize = 12;
/// Bytes before the path as C xenstored of Xen 4.22 and 4.23 writes them: no depth, no padding.
const WITHOUT_DEPTH: usize = 8;

/// Returns the length of the body at `body`, whose header states `announced`.
///
/// C xenstored announces `WITH_DEPTH` bytes before the path and writes `WITHOUT_DEPTH`. For half of all
/// lengths the padding hides the difference; for the others the next record begins 8 bytes before
/// the announced end. The short layout is assumed only if path and token end in it where their
/// lengths say, and do not in the other.
pub(super) fn watch_length(body: &Cursor<'_>, announced: usize) -> usize {
    let end = |before: usize| -> Result<usize, StreamError> {
        let mut body = body.clone();
        body.take(4)?;
        let (path, token) = (usize::from(body.u16()?), usize::from(body.u16()?));
        body.take(before - WITHOUT_DEPTH)?;
        body.string(path)?;
        body.string(token)?;
        Ok(before + path + token)
    };
    match (end(WITH_DEPTH), end(WITHOUT_DEPTH)) {
        (Ok(end), _) if end <= announced => announced,
        (_, Ok(end)) => announced.min(end.next_multiple_of(8)),
        _ => announced,
    }
}
