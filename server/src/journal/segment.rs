//! One file of the journal: a state, and what was done to it since.
//!
//! ```text
//! header  magic, version, boot id, number, length and checksum of the state, checksum of all that
//!         done: everything before this byte has been carried out; and its complement
//! state   a migration stream
//! batches  length, checksum, records; 8 bytes of 0 end them
//! records length, body; a length of 0 ends them, so that lengths of batches are multiples of 8
//! ```
//!
//! Checksums are the low half of XXH3. That of a batch is seeded with that of the header and the
//! batch's place, so that none from another place is taken, nor from the file over which this one is
//! written. It is there as soon as its length is, which is written last. All words are in the order
//! of this machine: no other reads them.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Deref;

use xenstore_protocol::stream::Sink;
use xenstore_sys::Sealed;
use xenstore_sys::mapped_file::{MappedFile, Recycled};
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

const MAGIC: [u8; 8] = *b"xsjourn\x05";
pub(super) const HEADER: usize = 4096;
/// Where `done` is.
pub(super) const DONE: usize = 64;
/// Bytes of a batch before its records.
const PREFIX: usize = 8;
/// What comes behind the last batch, over whatever was in the file before.
const END: [u8; PREFIX] = [0; PREFIX];
/// Bytes of a record before its body.
const LEN: usize = 4;

/// Bytes that are allocated ahead: room for the records of turns in progress when no more can be
/// allocated.
const AHEAD: usize = 1 << 20;
/// Maximum length of a file in bytes: positions are words of 4 bytes.
const LIMIT: usize = u32::MAX as usize;
/// A file is full when its records are a quarter as long as its state. Records are appended while the
/// state of the next file is written, until they have grown by the length of the state.
const PART: usize = 4;
/// Bytes that are read or copied at once.
const PIECE: usize = 1 << 20;

fn place(len: usize) -> usize {
    (HEADER + len).next_multiple_of(8)
}

#[expect(clippy::cast_possible_truncation)]
fn low_half(sum: u64) -> u32 {
    sum as u32
}

/// The part of the header that does not change, and its checksum, with which it ends.
fn head(boot: &[u8; 16], number: u64, len: usize, state: u32) -> (Vec<u8>, u32) {
    let mut head = [&MAGIC[..], boot, &number.to_ne_bytes()].concat();
    head.extend_from_slice(&(len as u64).to_ne_bytes());
    head.extend_from_slice(&state.to_ne_bytes());
    let check = low_half(xxh3_64(&head));
    head.extend_from_slice(&check.to_ne_bytes());
    (head, check)
}

/// The checksum of a batch at its place, in the file that begins like this.
fn check(head: u32, at: u32, records: &[u8]) -> u32 {
    low_half(xxh3_64_with_seed(records, u64::from(head) << 32 | u64::from(at)))
}

fn word(at: usize) -> io::Result<u32> {
    u32::try_from(at).map_err(io::Error::other)
}

/// Records that are to be written together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// Where the last of them begins.
    last: usize,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Adds a record, whose body `emit` appends to its argument.
    #[inline]
    pub(super) fn push(&mut self, emit: impl FnOnce(&mut Vec<u8>)) {
        self.last = self.bytes.len();
        self.bytes.extend_from_slice(&[0; LEN]);
        emit(&mut self.bytes);
        let len = u32::try_from(self.bytes.len() - self.last - LEN).unwrap_or(u32::MAX);
        self.bytes[self.last..self.last + LEN].copy_from_slice(&len.to_ne_bytes());
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct Segment {
    file: MappedFile,
    /// The checksum of its header.
    head: u32,
    start: usize,
    at: usize,
    /// Everything before has been carried out.
    done: usize,
    /// Bytes of records after which another is to be begun.
    full: usize,
    /// The most bytes that the file may have while the next one is being written.
    over: usize,
    /// Less room than [`AHEAD`] is left, and no more can be allocated.
    is_tight: bool,
}

impl Segment {
    /// Makes a file into one with a state, which `write` gives to its argument in pieces; its number is that
    /// of no other with batches. It is full after `full` bytes of records, or a quarter of what the state
    /// has.
    pub(super) fn create(
        mut file: File,
        spare: Option<Recycled>,
        boot: &[u8; 16],
        number: u64,
        full: usize,
        write: impl FnOnce(&mut Sink<'_>),
    ) -> io::Result<Segment> {
        let mut written = file.write_all(&[0; HEADER]);
        let (mut len, mut sum) = (0, Xxh3::new());
        write(&mut |piece| {
            if written.is_ok() {
                written = file.write_all(piece);
            }
            len += piece.len();
            sum.update(piece);
        });
        written?;
        let (start, prepared, full) = (place(len), full, full.max(len / PART));
        let mut file = MappedFile::map(file, start + prepared, spare)?;
        let (head, check) = head(boot, number, len, low_half(sum.digest()));
        file.write(0, &head)?;
        file.write(start, &END)?;
        let (at, done, over, is_tight) = (start, 0, usize::MAX, false);
        let mut segment = Segment { file, head: check, start, at, done, full, over, is_tight };
        segment.done(start)?;
        Ok(segment)
    }

    /// Closes the file, and keeps `keep` bytes of it for the next file to overwrite. The rest is released to
    /// the system.
    pub(super) fn close(self, keep: usize) -> io::Result<Recycled> {
        self.file.close(keep)
    }

    /// Length in bytes of the state with `full` bytes of records.
    pub(super) fn size(&self, full: usize) -> usize {
        self.start + full
    }

    /// Allocates memory for this many bytes of records.
    pub(super) fn get_memory(&mut self, full: usize) -> io::Result<()> {
        self.file.reserve(self.start + full)
    }

    /// The written part of the file, to be read before anything is appended.
    pub(super) fn left(&mut self, boot: &[u8; 16]) -> Result<SegmentReader, String> {
        let (file, bytes) = self.file.bytes().map_err(|error| error.to_string())?;
        SegmentReader::of(Bytes::Mapped(bytes, file), boot)
    }

    /// Is it time for the next?
    pub(super) fn is_full(&self) -> bool {
        self.at - self.start >= self.full || self.is_tight
    }

    /// Returns true if nothing may be appended before the next file is complete.
    pub(super) fn is_over(&self) -> bool {
        self.at >= self.over || self.is_tight
    }

    /// Limits this file when the next one is begun, which allocates `full` bytes for records; `free` bytes
    /// are available. Records appended meanwhile take room in both. Returns the position in this file
    /// from which records must be copied.
    pub(super) fn limit(&mut self, free: usize, full: usize) -> usize {
        let common = free.saturating_sub(self.start + full + 2 * AHEAD) / 2;
        self.over = self.at + common.min(PART * self.full);
        self.at
    }

    /// Allocates room ahead.
    pub(super) fn look_ahead(&mut self) {
        let end = self.at + AHEAD;
        self.is_tight = end > LIMIT || self.file.reserve(end).is_err();
    }

    /// Where the next batch comes.
    pub(super) fn end(&self) -> usize {
        self.at
    }

    /// Copies about `len` bytes of batches from another file, from `since` on. Their inputs have been
    /// executed. Returns the position of the next batch in the other file.
    pub(super) fn take(&mut self, other: &Segment, since: usize, len: usize) -> io::Result<usize> {
        let (mut at, mut records) = (since, Vec::new());
        while at < other.at && at - since < len {
            let mut len = [0; 4];
            other.file.read(at, &mut len);
            records.resize(u32::from_ne_bytes(len) as usize + END.len(), 0);
            other.file.read(at + PREFIX, &mut records);
            self.append(&records)?;
            at += PREFIX + records.len() - END.len();
        }
        self.done(self.at)?;
        Ok(at)
    }

    /// Appends records with the [`END`] behind them.
    #[inline]
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (at, records) = (self.at, &bytes[..bytes.len() - END.len()]);
        let words = [word(records.len())?, check(self.head, word(at)?, records)];
        self.file.append(at, words, bytes)?;
        self.at = at + PREFIX + records.len();
        Ok(())
    }

    /// Writes what is in the batch, which is empty then. All that was written so far has been carried
    /// out, but for the last of it, if that is `open`.
    pub(super) fn write(&mut self, batch: &mut Batch, open: bool) -> io::Result<()> {
        let (last, begun) = (self.at + PREFIX + batch.last, !batch.is_empty());
        if begun {
            let len = batch.bytes.len().next_multiple_of(8);
            batch.bytes.extend_from_slice(&[0; 16]);
            batch.bytes.truncate(len + END.len());
            self.append(&batch.bytes)?;
            batch.clear();
            if self.file.room() < self.at + AHEAD && !self.is_tight {
                self.look_ahead();
            }
        }
        match open {
            false => self.done(self.at),
            true if begun => self.done(last),
            true => Ok(()),
        }
    }

    fn done(&mut self, done: usize) -> io::Result<()> {
        if done == self.done {
            return Ok(());
        }
        self.done = done;
        let at = word(done)?;
        self.file.publish(DONE, [at, !at])
    }
}

/// The bytes of a file that is read.
#[derive(Debug)]
pub(super) enum Bytes {
    /// Mapped from the file, which stays locked.
    Mapped(Sealed, #[expect(dead_code)] File),
    #[cfg(test)]
    Copied(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(bytes, _) => bytes,
            #[cfg(test)]
            Bytes::Copied(bytes) => bytes,
        }
    }
}

/// A file that another process has written.
#[derive(Debug)]
pub(super) struct SegmentReader {
    pub(super) bytes: Bytes,
    /// The checksum of its header.
    head: u32,
    state: std::ops::Range<usize>,
}

impl SegmentReader {
    /// Reads a locked file that a process has left. Fails with one line if it is not usable.
    pub(super) fn read(file: File, boot: &[u8; 16]) -> Result<SegmentReader, String> {
        let bytes = Sealed::map_own(&file).map_err(|error| error.to_string())?;
        SegmentReader::of(Bytes::Mapped(bytes, file), boot)
    }

    #[cfg(test)]
    pub(super) fn parse(bytes: Vec<u8>, boot: &[u8; 16]) -> Result<SegmentReader, String> {
        SegmentReader::of(Bytes::Copied(bytes), boot)
    }

    fn of(bytes: Bytes, boot: &[u8; 16]) -> Result<SegmentReader, String> {
        let number = |at| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let (this, len) = number(24).zip(number(32)).ok_or("it is too short")?;
        let len = usize::try_from(len).map_err(|_| "its state is not whole")?;
        let end = HEADER.checked_add(len).filter(|end| *end <= bytes.len());
        let state = HEADER..end.ok_or("its state is not whole")?;
        if bytes[..8] != MAGIC {
            return Err("it is not a journal of this version".into());
        }
        if bytes[8..24] != *boot {
            return Err("it is from before the machine was started".into());
        }
        let mut left = SegmentReader { bytes, head: 0, state };
        let mut sum = Xxh3::new();
        for at in left.state.clone().step_by(PIECE) {
            sum.update(&left.bytes[at..left.state.end.min(at + PIECE)]);
            left.set_aside(at);
        }
        let (head, check) = head(boot, this, len, low_half(sum.digest()));
        if left.bytes[..head.len()] != head {
            return Err("its state is damaged".into());
        }
        left.head = check;
        Ok(left)
    }

    /// Releases the memory of the file before this byte, which has been read.
    pub(super) fn set_aside(&self, end: usize) {
        match &self.bytes {
            Bytes::Mapped(bytes, _) => bytes.set_aside(end),
            #[cfg(test)]
            Bytes::Copied(_) => {}
        }
    }

    /// Releases the memory of the state before this byte of the state.
    pub(super) fn set_state_aside(&self, end: usize) {
        self.set_aside(self.state.start + end);
    }

    /// The state that the records go on from.
    pub(super) fn state(&self) -> &[u8] {
        &self.bytes[self.state.clone()]
    }

    fn word(&self, at: usize) -> u32 {
        let word = self.bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
        word.map_or(0, u32::from_ne_bytes)
    }

    /// Everything before this byte has been carried out. None if that is damaged.
    fn done(&self) -> Option<usize> {
        let done = self.word(DONE);
        (done == !self.word(DONE + 4)).then_some(done as usize)
    }

    /// The batches in order: where their records are. Ends at the first that is not whole.
    pub(super) fn batches(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let mut at = place(self.state.len());
        let mut aside = 0;
        std::iter::from_fn(move || {
            if at >= aside + PIECE {
                self.set_aside(at);
                aside = at;
            }
            let start = at.checked_add(PREFIX)?;
            let end = start.checked_add(self.word(at) as usize)?;
            let records = self.bytes.get(start..end).filter(|records| !records.is_empty())?;
            let whole = self.word(at + 4) == check(self.head, word(at).ok()?, records);
            at = end;
            whole.then_some(start..end)
        })
    }

    /// The records in order: body, and whether it was carried out. If that is not known, all were:
    /// what is written had been done or was about to be.
    pub(super) fn records(&self) -> impl Iterator<Item = (&[u8], bool)> {
        let done = self.done().unwrap_or(usize::MAX);
        self.batches().flat_map(move |batch| {
            let mut at = batch.start;
            std::iter::from_fn(move || {
                let start = at + LEN;
                let len = self.word(at) as usize;
                let body = self.bytes[..batch.end].get(start..start + len)?;
                at = start + len;
                (len > 0).then_some((body, at <= done))
            })
        })
    }

    /// Where the last whole batch ends.
    pub(super) fn end(&self) -> usize {
        let last = self.batches().last();
        last.map_or(place(self.state.len()), |batch| batch.end)
    }

    /// Was more carried out than what can be read here, or is that not known?
    pub(super) fn is_damaged(&self) -> bool {
        self.done().is_none_or(|done| done > self.end())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use xenstore_sys::mapped_file::{self, fail};

    use super::*;

    const BOOT: [u8; 16] = *b"0123456789abcdef";

    fn segment(path: &Path, number: u64, state: &[u8], full: usize) -> Segment {
        let halves = state.split_at(state.len() / 2);
        let write = |sink: &mut Sink<'_>| [halves.0, halves.1].into_iter().for_each(sink);
        Segment::create(mapped_file::create(path).unwrap(), None, &BOOT, number, full, write)
            .unwrap()
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

    fn bodies(left: &SegmentReader) -> Vec<(Vec<u8>, bool)> {
        left.records().map(|(body, done)| (body.to_vec(), done)).collect()
    }

    // Fails if a state or a record comes back otherwise, or if it is not known which was carried out.
    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let left = SegmentReader::read(File::open(written(dir.path())).unwrap(), &BOOT).unwrap();
        assert_eq!(left.state(), b"the state");
        let expected = [&b"one"[..], b"two two", &[3; 100], b"done"].map(|body| (body, true));
        let mut expected: Vec<_> = expected.map(|(body, done)| (body.to_vec(), done)).into();
        expected.push((b"not done".to_vec(), false));
        assert_eq!(bodies(&left), expected);
        assert!(!left.is_damaged());
        assert!(
            SegmentReader::read(File::open(dir.path().join("segment")).unwrap(), &[0; 16]).is_err(),
            "another boot"
        );
    }

    // Fails if a file that is cut or in which a bit is another is taken for something that was never
    // written: each gives a front part of the records or nothing at all.
    #[test]
    fn damage_gives_a_front_part_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let whole = SegmentReader::read(File::open(&path).unwrap(), &BOOT).unwrap();
        let all: Vec<Vec<u8>> = bodies(&whole).into_iter().map(|(body, _)| body).collect();
        drop(whole);
        let good = std::fs::read(&path).unwrap();
        let end = good.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        let seen = |bytes: Vec<u8>| {
            let left = SegmentReader::parse(bytes, &BOOT).ok()?;
            assert_eq!(left.state(), b"the state");
            Some(left.records().map(|(body, _)| body.to_vec()).collect::<Vec<_>>())
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

    // Fails if what goes from one file to the next is not all of it from there on, in that order, or
    // is not found there.
    #[test]
    fn records_go_on_in_the_next_file() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        let mut first = segment(&old, 1, b"the state", 4096);
        write(&mut first, &[b"before"], false);
        let since = first.end();
        let after = [&b"a"[..], b"12345678", &[9; 1000]];
        write(&mut first, &after[..1], false);
        write(&mut first, &after[1..], false);
        let mut next = segment(&new, 2, b"another", 4096);
        assert_eq!(next.take(&first, since, usize::MAX).unwrap(), first.end());
        write(&mut next, &[b"more"], true);
        let left = SegmentReader::read(File::open(&new).unwrap(), &BOOT).unwrap();
        let mut expected: Vec<_> = after.iter().map(|body| (body.to_vec(), true)).collect();
        expected.push((b"more".to_vec(), false));
        assert_eq!(bodies(&left), expected);
        assert!(!left.is_damaged());
    }

    // Fails if anything of a file is taken for part of the one that is written over it.
    #[test]
    fn records_of_another_file_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let left = || SegmentReader::read(File::open(&path).unwrap(), &BOOT).unwrap();
        let batches: Vec<_> = left().batches().collect();
        assert_eq!(batches.len(), 3);
        let mut over = segment(&path, 2, b"the state", 2048);
        for (count, batch) in batches.iter().enumerate() {
            assert!(left().batches().eq(batches[..count].iter().cloned()));
            assert_eq!(left().end(), batch.start - PREFIX);
            let mut same = vec![0; batch.len()];
            over.file.read(batch.start, &mut same);
            over.append(&[&same, &END[..]].concat()).unwrap();
        }
        assert!(left().batches().eq(batches));
    }

    // Fails if a file does not grow beyond its first allocation, or is neither full nor over then.
    #[test]
    fn a_file_grows() {
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
        // A batch is 104 bytes: a prefix, a length, the body, its end.
        assert_eq!((first(1), first(2)), (512_usize.div_ceil(104), 10 + 2048_usize.div_ceil(104)));
        assert!(path.metadata().unwrap().len() > 50_000 * 100);
        let left = SegmentReader::read(File::open(&path).unwrap(), &BOOT).unwrap();
        assert_eq!(left.records().count(), 50_000);
    }

    // Fails if records appended while the next file is written can use up the room that it needs.
    #[test]
    fn little_room_is_shared_with_the_next_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut segment = segment(&dir.path().join("segment"), 1, &[1; 1 << 20], 1 << 20);
        let needed = segment.start + (1 << 20) + 2 * AHEAD;
        for (free, records) in [(0, 0), (needed, 0), (needed + 2000, 1000), (usize::MAX, 4 << 20)] {
            segment.limit(free, 1 << 20);
            assert_eq!(segment.over - segment.start, records);
            assert_eq!(segment.is_over(), records == 0);
        }
    }

    // Fails if the last room of a file system cannot be used, if its end is not detected ahead, or if a
    // file does not grow when there is room again.
    #[test]
    fn a_file_says_before_it_cannot_grow() {
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
        segment.look_ahead();
        assert!(!segment.is_tight);
        write(&mut segment, &[&vec![9; 2 * AHEAD]], false);
        let left = SegmentReader::read(File::open(&path).unwrap(), &BOOT).unwrap();
        assert_eq!(left.records().count(), written + 1);
    }
}
