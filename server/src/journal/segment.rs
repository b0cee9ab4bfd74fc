//! One file of the journal: a state, and what was done to it since.
//!
//! ```text
//! header  magic, version, boot id, length and checksum of the state, checksum of all that
//!         done: everything before this byte has been carried out
//! state   a migration stream
//! records length, checksum of place and body, body; each at a multiple of 8; a length of 0 ends them
//! ```
//!
//! A record is there as soon as its length is, which is written last. All words are in the order of
//! this machine: no other reads them.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use xenstore_transport::mapped_file::MappedFile;

const MAGIC: [u8; 8] = *b"xsjourn\x01";
const HEADER: usize = 4096;
/// Where the word `done` is.
const DONE: usize = 64;
/// Bytes of a record before its body.
const PREFIX: usize = 8;

/// Bytes that are read at once, more than the longest record has.
const PIECE: u64 = 1 << 20;

fn place(len: usize) -> usize {
    (HEADER + len).next_multiple_of(8)
}

/// The part of the header that does not change.
fn head(boot: &[u8; 16], state: &[u8]) -> Vec<u8> {
    let mut head = [&MAGIC[..], boot].concat();
    head.extend_from_slice(&(state.len() as u64).to_ne_bytes());
    head.extend_from_slice(&crc32fast::hash(state).to_ne_bytes());
    head.extend_from_slice(&crc32fast::hash(&head).to_ne_bytes());
    head
}

/// Of which record at which place this is the checksum. So that one from elsewhere is not taken.
fn check(at: usize, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(at as u64).to_ne_bytes());
    hasher.update(body);
    hasher.finalize()
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct Segment {
    file: MappedFile,
    start: usize,
    at: usize,
}

impl Segment {
    /// Makes a file with a state, and room for this many bytes of records.
    pub(super) fn create(
        path: &Path,
        boot: &[u8; 16],
        state: &[u8],
        room: usize,
    ) -> io::Result<Segment> {
        let start = place(state.len());
        let mut file = MappedFile::create(path, start + room)?;
        file.write(HEADER, state)?;
        file.write(0, &head(boot, state))?;
        let mut segment = Segment { file, start, at: start };
        segment.done()?;
        Ok(segment)
    }

    /// Bytes of records so far.
    pub(super) fn len(&self) -> usize {
        self.at - self.start
    }

    /// Writes a record.
    pub(super) fn record(&mut self, body: &[u8]) -> io::Result<()> {
        let at = self.at;
        let end = (at + PREFIX + body.len()).next_multiple_of(8);
        // Room for the length of the next, which says that there is none.
        if end + PREFIX > self.file.limit() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write(at + PREFIX, body)?;
        self.file.publish(at + 4, check(at, body))?;
        self.file.publish(at, u32::try_from(body.len()).map_err(io::Error::other)?)?;
        self.at = end;
        Ok(())
    }

    /// What has been recorded so far has been carried out.
    pub(super) fn done(&mut self) -> io::Result<()> {
        self.file.publish(DONE, u32::try_from(self.at).map_err(io::Error::other)?)
    }
}

/// A file that another process has written.
#[derive(Debug)]
pub(super) struct Left {
    bytes: Vec<u8>,
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

    fn parse(file: File, bytes: Vec<u8>, boot: &[u8; 16]) -> Result<Left, String> {
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
        let head = head(boot, &bytes[state.clone()]);
        if bytes[..head.len()] != head {
            return Err("its state is damaged".into());
        }
        Ok(Left { bytes, state, _file: file })
    }

    /// The state that the records go on from.
    pub(super) fn state(&self) -> &[u8] {
        &self.bytes[self.state.clone()]
    }

    fn word(&self, at: usize) -> u32 {
        let word = self.bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
        word.map_or(0, u32::from_ne_bytes)
    }

    /// The records in order: body, and whether it was carried out. Ends at the first that is not
    /// whole.
    pub(super) fn records(&self) -> impl Iterator<Item = (&[u8], bool)> {
        let done = self.word(DONE) as usize;
        let mut at = place(self.state.len());
        std::iter::from_fn(move || {
            let len = self.word(at) as usize;
            let end = at.checked_add(PREFIX)?.checked_add(len)?;
            let body = self.bytes.get(at + PREFIX..end).filter(|body| !body.is_empty())?;
            let whole = self.word(at + 4) == check(at, body);
            at = end.next_multiple_of(8);
            whole.then_some((body, at <= done))
        })
    }

    /// Is there something behind the last whole record, of which nothing can be made?
    pub(super) fn is_damaged(&self) -> bool {
        let whole = self.records().map(|(body, _)| (PREFIX + body.len()).next_multiple_of(8));
        let end = place(self.state.len()) + whole.sum::<usize>();
        (self.word(DONE) as usize) > end
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

    fn written(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("segment");
        let mut segment = Segment::create(&path, &BOOT, b"the state", 4096).unwrap();
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

    // Fails if a journal that is full is written beyond its end.
    #[test]
    fn a_full_journal_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("segment");
        let mut segment = Segment::create(&path, &BOOT, b"", 1024).unwrap();
        let count = (0..).take_while(|_| segment.record(&[7; 92]).is_ok()).count();
        assert_eq!(count, 9);
        assert_eq!(Left::read(File::open(&path).unwrap(), &BOOT).unwrap().records().count(), 9);
    }
}
