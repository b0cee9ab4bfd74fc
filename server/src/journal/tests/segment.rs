//! Segments: what is written is read, also from damaged and recycled files.

use std::fs::File;
use std::path::Path;

use xenstore_protocol::stream::Sink;
use xenstore_sys::mapped_file::{self, fail};

use super::super::format::{Batch, END, HEADER, PREFIX};
use super::super::reader::{Bytes, SegmentReader};
use super::super::segment::{AHEAD, Segment};

const BOOT: [u8; 16] = *b"0123456789abcdef";

fn segment(path: &Path, number: u64, state: &[u8], full: usize) -> Segment {
    let halves = state.split_at(state.len() / 2);
    let write = |sink: &mut Sink<'_>| [halves.0, halves.1].into_iter().for_each(sink);
    Segment::create(mapped_file::create(path).unwrap(), None, &BOOT, number, full, write).unwrap()
}

fn written(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("segment");
    let mut segment = segment(&path, 1, b"the state", 2048);
    write(&mut segment, &[b"one"], false);
    write(&mut segment, &[b"two two", &[3; 100]], false);
    write(&mut segment, &[b"done", b"not done"], true);
    path
}

fn write(segment: &mut Segment, bodies: &[&[u8]], open: bool) {
    let mut batch = Batch::default();
    bodies.iter().for_each(|body| batch.push(|out| out.extend_from_slice(body)));
    segment.write(&mut batch, open).unwrap();
    assert!(batch.is_empty());
}

fn bodies(reader: &SegmentReader) -> Vec<(Vec<u8>, bool)> {
    reader.records().map(|(body, done)| (body.to_vec(), done)).collect()
}

// Fails if a snapshot or a record is read differently, or if it is not known which was executed.
#[test]
fn a_segment_is_read_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let reader = SegmentReader::open(File::open(written(dir.path())).unwrap(), &BOOT).unwrap();
    assert_eq!(reader.snapshot(), b"the state");
    let expected = [&b"one"[..], b"two two", &[3; 100], b"done"].map(|body| (body, true));
    let mut expected: Vec<_> = expected.map(|(body, done)| (body.to_vec(), done)).into();
    expected.push((b"not done".to_vec(), false));
    assert_eq!(bodies(&reader), expected);
    assert!(!reader.is_damaged());
    assert!(
        SegmentReader::open(File::open(dir.path().join("segment")).unwrap(), &[0; 16]).is_err(),
        "another boot"
    );
}

// Fails if a truncated segment, or one with a changed bit, gives a record that was never written.
#[test]
fn a_damaged_segment_gives_a_prefix_of_its_records() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(dir.path());
    let whole = SegmentReader::open(File::open(&path).unwrap(), &BOOT).unwrap();
    let all: Vec<Vec<u8>> = bodies(&whole).into_iter().map(|(body, _)| body).collect();
    drop(whole);
    let good = std::fs::read(&path).unwrap();
    let end = good.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    let seen = |bytes: Vec<u8>| {
        let reader = SegmentReader::parse(Bytes::Copied(bytes), &BOOT).ok()?;
        assert_eq!(reader.snapshot(), b"the state");
        Some(reader.records().map(|(body, _)| body.to_vec()).collect::<Vec<_>>())
    };
    let interesting = (0..100).chain(HEADER..end);
    for at in interesting {
        for bytes in [good[..at].to_vec(), {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            bytes
        }] {
            if let Some(found) = seen(bytes) {
                assert!(all.starts_with(&found), "damage at {at}: {found:?}");
            }
        }
    }
}

// Fails if the copied records are incomplete, in another order, or not read from the next segment.
#[test]
fn records_are_copied_to_the_next_segment() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    let mut first = segment(&old, 1, b"the state", 4096);
    write(&mut first, &[b"before"], false);
    let since = first.end();
    let after = [&b"a"[..], b"12345678", &[9; 1000]];
    write(&mut first, &after[..1], false);
    write(&mut first, &after[1..], false);
    let mut next = segment(&new, 2, b"another", 4096);
    assert_eq!(next.copy(&first, since, usize::MAX).unwrap(), first.end());
    write(&mut next, &[b"more"], true);
    let reader = SegmentReader::open(File::open(&new).unwrap(), &BOOT).unwrap();
    let mut expected: Vec<_> = after.iter().map(|body| (body.to_vec(), true)).collect();
    expected.push((b"more".to_vec(), false));
    assert_eq!(bodies(&reader), expected);
    assert!(!reader.is_damaged());
}

// Fails if a batch of a recycled file is taken for one of the segment that overwrites it.
#[test]
fn batches_of_a_recycled_segment_are_invalid() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(dir.path());
    let reader = || SegmentReader::open(File::open(&path).unwrap(), &BOOT).unwrap();
    let batches: Vec<_> = reader().batches().collect();
    assert_eq!(batches.len(), 3);
    let mut over = segment(&path, 2, b"the state", 2048);
    for (count, batch) in batches.iter().enumerate() {
        assert!(reader().batches().eq(batches[..count].iter().cloned()));
        assert_eq!(reader().end(), batch.start - PREFIX);
        let mut same = vec![0; batch.len()];
        over.file.read(batch.start, &mut same);
        over.append(&[&same, &END[..]].concat()).unwrap();
    }
    assert!(reader().batches().eq(batches));
}

// Fails if a segment does not grow beyond its first allocation, or is neither full nor over then.
#[test]
fn a_segment_grows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("segment");
    let mut segment = segment(&path, 1, b"", 512);
    let mut known = Vec::new();
    for count in 1..=50_000 {
        write(&mut segment, &[&[7; 88]], false);
        if count == 10 {
            assert_eq!(segment.limit(usize::MAX, 512), segment.at);
        }
        known.extend([(segment.is_full(), count, 1), (segment.is_over(), count, 2)]);
    }
    let first = |what| known.iter().find(|(is, _, which)| *is && *which == what).unwrap().1;
    // A batch has 104 bytes: prefix, length, body, padding.
    assert_eq!((first(1), first(2)), (512_usize.div_ceil(104), 10 + 2048_usize.div_ceil(104)));
    assert!(path.metadata().unwrap().len() > 50_000 * 100);
    let reader = SegmentReader::open(File::open(&path).unwrap(), &BOOT).unwrap();
    assert_eq!(reader.records().count(), 50_000);
}

// Fails if records appended while the next segment is written can use up the room that it needs.
#[test]
fn the_limit_leaves_room_for_the_next_segment() {
    let dir = tempfile::tempdir().unwrap();
    let mut segment = segment(&dir.path().join("segment"), 1, &[1; 1 << 20], 1 << 20);
    let needed = segment.start + (1 << 20) + 2 * AHEAD;
    for (free, records) in [(0, 0), (needed, 0), (needed + 2000, 1000), (usize::MAX, 4 << 20)] {
        segment.limit(free, 1 << 20);
        assert_eq!(segment.max_end - segment.start, records);
        assert_eq!(segment.is_over(), records == 0);
    }
}

// Fails if the last bytes of a file system cannot be used, if its end is not detected ahead, or if a
// segment does not grow when there is room again.
#[test]
fn a_segment_is_tight_before_it_cannot_grow() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("segment");
    let mut segment = segment(&path, 1, b"the state", 512);
    write(&mut segment, &[&[7; 88]], false);
    assert!(!segment.is_over());
    fail::set(true);
    let mut written = 1;
    while !segment.is_tight {
        write(&mut segment, &[&[7; 4000]], false);
        written += 1;
    }
    for _ in 0..(AHEAD / 2) / 4000 {
        write(&mut segment, &[&[8; 4000]], false);
        written += 1;
    }
    fail::set(false);
    segment.allocate_ahead();
    assert!(!segment.is_tight);
    write(&mut segment, &[&vec![9; 2 * AHEAD]], false);
    let reader = SegmentReader::open(File::open(&path).unwrap(), &BOOT).unwrap();
    assert_eq!(reader.records().count(), written + 1);
}
