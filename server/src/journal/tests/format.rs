//! The bytes of segments, records and notes, as `docs/formats.md` describes them.

use xenstore_protocol::DomId;
use xenstore_store::Caller;
use xenstore_sys::mapped_file;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::super::format::{Batch, low_half};
use super::super::record::Record;
use super::super::segment::Segment;
use super::*;

const BOOT: [u8; 16] = *b"0123456789abcdef";
const CONN: ConnId = ConnId(0x0102_0304);

fn body(record: &Record<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    record.emit(&mut body);
    assert_eq!(Record::parse(&body).as_ref(), Some(record));
    body
}

// Fails if a field of the header or of a batch moves, or has another checksum: the next version could
// not read the segment.
#[test]
fn a_segment_has_the_documented_layout() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("segment");
    let file = mapped_file::create(&path).unwrap();
    let mut segment =
        Segment::create(file, None, &BOOT, 7, 4096, |sink: &mut Sink<'_>| sink(b"state")).unwrap();
    let mut batch = Batch::default();
    batch.push(|out| out.extend_from_slice(b"executed"));
    batch.push(|out| out.extend_from_slice(b"open"));
    segment.write(&mut batch, true).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!((&bytes[..8], &bytes[8..24]), (&b"xsjourn\x05"[..], &BOOT[..]));
    assert_eq!((long(24), long(32)), (7, 5));
    assert_eq!(word(40), low_half(xxh3_64(b"state")));
    assert_eq!(word(44), low_half(xxh3_64(&bytes[..44])));
    assert_eq!(bytes[48..64], [0; 16]);
    assert_eq!(bytes[72..4096], [0; 4024]);
    assert_eq!(&bytes[4096..4101], b"state");
    let at = 4104;
    let records = &bytes[at + 8..at + 32];
    assert_eq!(word(at), 24);
    let seed = u64::from(word(44)) << 32 | at as u64;
    assert_eq!(word(at + 4), low_half(xxh3_64_with_seed(records, seed)));
    let lens = [8_u32, 4].map(u32::to_ne_bytes);
    let expected = [&lens[0][..], b"executed", &lens[1], b"open", &[0; 4]].concat();
    assert_eq!(records, expected);
    assert_eq!(bytes[at + 32..at + 40], [0; 8]);
    // The second record begins there.
    let executed = u32::try_from(at + 8 + 12).unwrap();
    assert_eq!((word(64), word(68)), (executed, !executed));
}

// Fails if the bytes of a record change: the next version would refuse the segment, or execute something
// else.
#[test]
fn records_have_the_documented_bytes() {
    let conn = [4, 3, 2, 1, 0, 0, 0, 0];
    let request = frame(Operation::Read, 0, "/|");
    let cases: [(Record<'_>, Vec<u8>); 13] = [
        (Record::Input(Input::Connect(Caller::Socket)), vec![0]),
        (Record::Input(Input::Connect(Caller::Domain(DomId(0x0105)))), vec![1, 5, 1]),
        (Record::Input(Input::Disconnect(CONN)), [&[2][..], &conn].concat()),
        (Record::Input(Input::Restart(CONN)), [&[3][..], &conn].concat()),
        (
            Record::Input(Input::Requests { conn: CONN, now: 9, frames: &request }),
            [&[4][..], &conn, &[9, 0, 0, 0, 0, 0, 0, 0], &request].concat(),
        ),
        (
            Record::Input(Input::Events { conn: CONN, limit: 0x0201 }),
            [&[5][..], &conn, &[1, 2, 0, 0]].concat(),
        ),
        (Record::Input(Input::DomainsChanged), vec![6]),
        (Record::Input(Input::Work { budget: 3 }), vec![7, 3, 0, 0, 0]),
        (Record::HostReplies(b"ab"), b"\x80ab".to_vec()),
        (Record::Refused, vec![0x81]),
        (Record::Unread { conn: CONN, bytes: b"ab" }, [&[0x82][..], &conn, b"ab"].concat()),
        (Record::Zeroed { conn: CONN, unsent: 6 }, [&[0x83][..], &conn, &[6, 0, 0, 0]].concat()),
        (
            Record::ReplaceReply { conn: CONN, withheld: 5, bytes: b"ab" },
            [&[0x84][..], &conn, &[5, 0, 0, 0], b"ab"].concat(),
        ),
    ];
    for (record, expected) in cases {
        assert_eq!(body(&record), expected, "{record:?}");
    }
}
