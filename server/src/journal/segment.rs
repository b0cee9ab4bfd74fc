//! One file of the journal: a state, and what was done to it since.
//!
//! ```text
//! header  magic, version, boot id, length and checksum of the state, checksum of all that
//!         done: everything before this byte has been carried out; and its complement
//! state   a migration stream
//! records length, checksum, body; each at a multiple of 8; a length of 0 ends them
//! ```
//!
//! The checksum of a record is that of the header, its place and its body, so that none from another
//! file or place is taken. It is there as soon as its length is, which is written last. All words are
//! in the order of this machine: no other reads them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use xenstore_protocol::stream::Sink;
use xenstore_transport::mapped_file::{self, MappedFile};

const MAGIC: [u8; 8] = *b"xsjourn\x03";
pub(super) const HEADER: usize = 4096;
/// Where `done` is.
pub(super) const DONE: usize = 64;
/// Bytes of a record before its body.
pub(super) const PREFIX: usize = 8;

/// Bytes that are read at once, more than the longest record has.
const PIECE: u64 = 1 << 20;

fn place(len: usize) -> usize {
    (HEADER + len).next_multiple_of(8)
}

/// Where the record comes that follows one of this length.
fn after(at: usize, len: usize) -> usize {
    (at + PREFIX + len).next_multiple_of(8)
}

/// The part of the header that does not change, and its checksum, with which it ends.
fn head(boot: &[u8; 16], len: usize, state: u32) -> (Vec<u8>, u32) {
    let mut head = [&MAGIC[..], boot].concat();
    head.extend_from_slice(&(len as u64).to_ne_bytes());
    head.extend_from_slice(&state.to_ne_bytes());
    let check = crc32fast::hash(&head);
    head.extend_from_slice(&check.to_ne_bytes());
    (head, check)
}

/// The checksum of a record at its place, in the file that begins like this.
fn check(head: u32, at: usize, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(head);
    hasher.update(&(at as u64).to_ne_bytes());
    hasher.update(body);
    hasher.finalize()
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct Segment {
    file: MappedFile,
    /// The checksum of its header.
    head: u32,
    start: usize,
    at: usize,
    /// Bytes of records after which another is to be begun.
    full: usize,
}

impl Segment {
    /// Makes a file with a state, which `write` gives to its argument in pieces. It is full after
    /// `full` bytes of records, or as many as the state has, so that writing states is always the
    /// smaller part of the work; there is as much room again for what comes until then.
    pub(super) fn create(
        path: &Path,
        boot: &[u8; 16],
        full: usize,
        write: impl FnOnce(&mut Sink<'_>),
    ) -> io::Result<Segment> {
        let mut file = mapped_file::create(path)?;
        let mut written = file.write_all(&[0; HEADER]);
        let (mut len, mut check) = (0, crc32fast::Hasher::new());
        write(&mut |piece| {
            if written.is_ok() {
                written = file.write_all(piece);
            }
            len += piece.len();
            check.update(piece);
        });
        written?;
        let (start, full) = (place(len), full.max(len));
        let mut file = MappedFile::of(file, start + 2 * full)?;
        let (head, check) = head(boot, len, check.finalize());
        file.write(0, &head)?;
        let mut segment = Segment { file, head: check, start, at: start, full };
        segment.done()?;
        Ok(segment)
    }

    /// Is it time for the next?
    pub(super) fn is_full(&self) -> bool {
        self.at - self.start >= self.full
    }

    /// Where the next record comes.
    pub(super) fn end(&self) -> usize {
        self.at
    }

    /// Takes all records of another that begin at `since` or later. They have been carried out.
    pub(super) fn take(&mut self, other: &Segment, since: usize) -> io::Result<()> {
        let (mut at, mut body) = (since, Vec::new());
        while at < other.at {
            let mut len = [0; 4];
            other.file.read(at, &mut len);
            body.resize(u32::from_ne_bytes(len) as usize, 0);
            other.file.read(at + PREFIX, &mut body);
            self.record(&body)?;
            at = after(at, body.len());
        }
        self.done()
    }

    /// Writes a record.
    pub(super) fn record(&mut self, body: &[u8]) -> io::Result<()> {
        let at = self.at;
        let end = after(at, body.len());
        // Room for the length of the next, which says that there is none.
        if end + PREFIX > self.file.limit() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write(at + PREFIX, body)?;
        let len = u32::try_from(body.len()).map_err(io::Error::other)?;
        self.file.publish(at, [len, check(self.head, at, body)])?;
        self.at = end;
        Ok(())
    }

    /// What has been recorded so far has been carried out.
    pub(super) fn done(&mut self) -> io::Result<()> {
        let at = u32::try_from(self.at).map_err(io::Error::other)?;
        self.file.publish(DONE, [at, !at])
    }
}

/// A file that another process has written.
#[derive(Debug)]
pub(super) struct Left {
    pub(super) bytes: Vec<u8>,
    /// The checksum of its header.
    head: u32,
    state: std::ops::Range<usize>,
    /// Kept, so that nobody else takes it.
    _file: File,
}

impl Left {
    /// Reads a file that a process has left. `Err` says why nothing can be made of it.
    pub(super) fn read(file: File, boot: &[u8; 16]) -> Result<Left, String> {
        let bytes = front(&file).map_err(|error| error.to_string())?;
        Left::parse(file, bytes, boot)
    }

    pub(super) fn parse(file: File, bytes: Vec<u8>, boot: &[u8; 16]) -> Result<Left, String> {
        let len = bytes.get(24..32).and_then(|len| len.try_into().ok()).map(u64::from_ne_bytes);
        let len = len.and_then(|len| usize::try_from(len).ok()).ok_or("it is too short")?;
        let end = HEADER.checked_add(len).filter(|end| *end <= bytes.len());
        let state = HEADER..end.ok_or("its state is not whole")?;
        if bytes[..8] != MAGIC {
            return Err("it is not a journal of this version".into());
        }
        if bytes[8..24] != *boot {
            return Err("it is from before the machine was started".into());
        }
        let (head, check) = head(boot, len, crc32fast::hash(&bytes[state.clone()]));
        if bytes[..head.len()] != head {
            return Err("its state is damaged".into());
        }
        Ok(Left { bytes, head: check, state, _file: file })
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

    /// The records in order: body, and whether it was carried out. Ends at the first that is not
    /// whole. If it is not known what was carried out, all was: what is written was about to be.
    pub(super) fn records(&self) -> impl Iterator<Item = (&[u8], bool)> {
        let done = self.done().unwrap_or(usize::MAX);
        let mut at = place(self.state.len());
        std::iter::from_fn(move || {
            let len = self.word(at) as usize;
            let end = at.checked_add(PREFIX)?.checked_add(len)?;
            let body = self.bytes.get(at + PREFIX..end).filter(|body| !body.is_empty())?;
            let whole = self.word(at + 4) == check(self.head, at, body);
            at = end.next_multiple_of(8);
            whole.then_some((body, at <= done))
        })
    }

    /// Where the last whole record ends.
    pub(super) fn end(&self) -> usize {
        let whole = self.records().map(|(body, _)| (PREFIX + body.len()).next_multiple_of(8));
        place(self.state.len()) + whole.sum::<usize>()
    }

    /// Was more carried out than what can be read here, or is that not known?
    pub(super) fn is_damaged(&self) -> bool {
        self.done().is_none_or(|done| done > self.end())
    }
}

/// A file up to where there is nothing but zeroes: it has more room than is used.
fn front(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let at = bytes.len();
        let count = file.take(PIECE).read_to_end(&mut bytes)?;
        // Records are shorter than this, and there is no room between them.
        if count == 0 || bytes[at..].iter().all(|byte| *byte == 0) {
            bytes.truncate(at);
            return Ok(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: [u8; 16] = *b"0123456789abcdef";

    fn segment(path: &Path, state: &[u8], full: usize) -> Segment {
        let halves = state.split_at(state.len() / 2);
        let write = |sink: &mut Sink<'_>| [halves.0, halves.1].into_iter().for_each(sink);
        Segment::create(path, &BOOT, full, write).unwrap()
    }

    fn written(dir: &Path) -> std::path::PathBuf {
        written_on(dir, b"the state")
    }

    fn written_on(dir: &Path, state: &[u8]) -> std::path::PathBuf {
        let path = dir.join("segment");
        let mut segment = segment(&path, state, 2048);
        for body in [&b"one"[..], b"two two", &[3; 100]] {
            segment.record(body).unwrap();
            segment.done().unwrap();
        }
        segment.record(b"not done").unwrap();
        path
    }

    fn bodies(left: &Left) -> Vec<(Vec<u8>, bool)> {
        left.records().map(|(body, done)| (body.to_vec(), done)).collect()
    }

    // Fails if a state or a record comes back otherwise, or if it is not known which was carried out.
    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let left = Left::read(File::open(written(dir.path())).unwrap(), &BOOT).unwrap();
        assert_eq!(left.state(), b"the state");
        let expected = [(&b"one"[..], true), (b"two two", true), (&[3; 100], true)];
        let mut expected: Vec<_> = expected.map(|(body, done)| (body.to_vec(), done)).into();
        expected.push((b"not done".to_vec(), false));
        assert_eq!(bodies(&left), expected);
        assert!(!left.is_damaged());
        assert!(
            Left::read(File::open(dir.path().join("segment")).unwrap(), &[0; 16]).is_err(),
            "another boot"
        );
    }

    // Fails if a file that is cut or in which a bit is another is taken for something that was never
    // written: each gives a front part of the records or nothing at all.
    #[test]
    fn damage_gives_a_front_part_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let whole = Left::read(File::open(&path).unwrap(), &BOOT).unwrap();
        let all: Vec<Vec<u8>> = bodies(&whole).into_iter().map(|(body, _)| body).collect();
        drop(whole);
        let good = std::fs::read(&path).unwrap();
        let end = good.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        let seen = |bytes: Vec<u8>| {
            let file = File::open(&path).unwrap();
            let left = Left::parse(file, bytes, &BOOT).ok()?;
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
        let mut first = segment(&old, b"the state", 4096);
        first.record(b"before").unwrap();
        let since = first.end();
        let after = [&b"a"[..], b"12345678", &[9; 1000]];
        after.iter().for_each(|body| first.record(body).unwrap());
        first.done().unwrap();
        let mut next = segment(&new, b"another", 4096);
        next.take(&first, since).unwrap();
        next.record(b"more").unwrap();
        let left = Left::read(File::open(&new).unwrap(), &BOOT).unwrap();
        let mut expected: Vec<_> = after.iter().map(|body| (body.to_vec(), true)).collect();
        expected.push((b"more".to_vec(), false));
        assert_eq!(bodies(&left), expected);
        assert!(!left.is_damaged());
    }

    // Fails if what an earlier file has left behind the last record is taken for records.
    #[test]
    fn records_of_another_file_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let old = std::fs::read(written_on(dir.path(), b"was state")).unwrap();
        let new = std::fs::read(written_on(dir.path(), b"the state")).unwrap();
        let left = |bytes: &[u8]| {
            Left::parse(tempfile::tempfile().unwrap(), bytes.to_vec(), &BOOT).unwrap()
        };
        let (records, mut at) = (bodies(&left(&new)), place(9));
        for (count, (body, _)) in records.iter().enumerate() {
            let both = [&new[..at], &old[at..]].concat();
            assert_eq!(bodies(&left(&both)), records[..count]);
            at = (at + PREFIX + body.len()).next_multiple_of(8);
        }
    }

    // Fails if a journal that is full is written beyond its end.
    #[test]
    fn a_full_journal_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("segment");
        let mut segment = segment(&path, b"", 512);
        let count = (0..).take_while(|_| segment.record(&[7; 92]).is_ok()).count();
        assert_eq!(count, 9);
        assert_eq!(Left::read(File::open(&path).unwrap(), &BOOT).unwrap().records().count(), 9);
    }
}
