//! Tests of reader and writer.

use alloc::vec::Vec;

use super::writer::PIECE;
use super::*;

// Fails if the layout of the header or of a record differs from the design document.
#[test]
fn layout_matches_the_design_document() {
    let mut writer = Writer::new(VERSION, 0);
    writer.begin(kind::NODE_DATA);
    writer.bytes(b"abc");
    let bytes = writer.finish();
    let expected = *b"xenstore\0\0\0\x02\0\0\0\0\
                      \x05\0\0\0\x08\0\0\0abc\0\0\0\0\0\
                      \0\0\0\0\0\0\0\0";
    assert_eq!(bytes, expected);
    let mut reader = Reader::new(&bytes).unwrap();
    let mut record = reader.next_record().unwrap().unwrap();
    assert_eq!((record.kind, record.body.take(3)), (kind::NODE_DATA, Ok(&b"abc"[..])));
    assert!(reader.next_record().unwrap().is_none());
    assert!(reader.next_record().unwrap().is_none());
}

// Fails if a stream that goes to a sink differs from one in memory.
#[test]
fn pieces_for_a_sink_are_the_stream_in_memory() {
    let write = |mut writer: Writer<'_>| {
        for len in (0..4000).chain([3 * PIECE, 1]) {
            writer.begin(kind::NODE_DATA);
            writer.bytes(&alloc::vec![7; len]);
        }
        writer.finish()
    };
    let mut pieces = Vec::new();
    let mut sink = |piece: &[u8]| pieces.push(Vec::from(piece));
    assert!(write(Writer::to(&mut sink, VERSION)).is_empty());
    assert!(pieces.len() > 3 && pieces.concat() == write(Writer::new(VERSION, 0)));
}

// Fails if a truncated stream is read to its end, or panics.
#[test]
fn truncated_stream_is_an_error() {
    let mut writer = Writer::new(VERSION, 0);
    writer.begin(kind::WATCH_DATA);
    writer.bytes(b"0123456789");
    let bytes = writer.finish();
    for len in 0..bytes.len() {
        let read = || {
            let mut reader = Reader::new(&bytes[..len])?;
            while reader.next_record()?.is_some() {}
            Ok::<(), StreamError>(())
        };
        assert!(read().is_err(), "{len} bytes");
    }
}

// Fails if the record after a watch with a depth is missed, for any lengths of path and token, in
// the layout of the design document or in that of C xenstored of Xen 4.23, which announces 4 bytes
// more than it writes and rounds up both numbers.
#[test]
#[allow(clippy::cast_possible_truncation)] // all lengths are below 256
fn record_after_a_watch_with_a_depth_is_found() {
    for (path, token, documented) in (2..20_usize).flat_map(|path| {
        (1..20_usize).flat_map(move |token| [(path, token, false), (path, token, true)])
    }) {
        let mut body = alloc::vec![1, 0, 0, 0, path as u8, 0, token as u8, 0];
        if documented {
            body.extend_from_slice(&[path as u8, 0, 0, 0]);
        }
        for len in [path, token] {
            body.extend((1..len).map(|_| b'/').chain([0]));
        }
        let announced = (12 + path + token).next_multiple_of(8);
        body.resize(body.len().next_multiple_of(8), 0);
        let mut bytes = b"xenstore\0\0\0\x02\0\0\0\0".to_vec();
        for (kind, len, body) in [
            (kind::WATCH_DATA_EXTENDED, announced, &body[..]),
            (kind::NODE_DATA, 0, b""),
            (kind::END, 0, b""),
        ] {
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(&(len as u32).to_le_bytes());
            bytes.extend_from_slice(body);
        }
        let mut reader = Reader::new(&bytes).unwrap();
        let mut next = || reader.next_record().map(|record| record.map(|record| record.kind));
        let read = [next(), next(), next()];
        let all = [Some(kind::WATCH_DATA_EXTENDED), Some(kind::NODE_DATA), None];
        assert_eq!(read, all.map(Ok), "{path} {token} {documented}");
    }
}

// Fails if a big-endian body, or a length that is not rounded up, is read wrongly.
#[test]
fn big_endian_stream_is_read() {
    let bytes = *b"xenstore\0\0\0\x01\0\0\0\x01\
                   \0\0\0\x07\0\0\0\x06\0\x05\0\0\0\x0e\0\0\
                   \0\0\0\0\0\0\0\0";
    let mut reader = Reader::new(&bytes).unwrap();
    let mut record = reader.next_record().unwrap().unwrap();
    assert_eq!(record.kind, kind::DOMAIN_DATA);
    assert_eq!((record.body.u16(), record.body.u32()), (Ok(5), Ok(14)));
    assert!(record.body.u8().is_err());
    assert!(reader.next_record().unwrap().is_none());
    assert!(Reader::new(b"xenstore\0\0\0\x03\0\0\0\0").is_err());
    assert!(Reader::new(b"xenstorf\0\0\0\x02\0\0\0\0").is_err());
}
