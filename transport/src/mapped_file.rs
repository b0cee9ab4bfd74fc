//! A file that is written as memory: no call of the kernel for each piece, and what has been
//! written is there for the next program however this one ends.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

use crate::crash;
use crate::raw::Mapping;

/// Bytes that are asked for at once.
const STEP: usize = 1 << 20;
const PAGE: usize = 4096;

/// A file of one's own, mapped. Room is asked for before anything is written there, so that a full
/// file system is an error and not a signal.
#[derive(Debug)]
pub struct MappedFile {
    file: File,
    mapped: Mapped,
}

#[derive(Debug)]
struct Mapped {
    mapping: Mapping,
    len: usize,
    /// Bytes from the start on that are there.
    room: usize,
}

/// What is left of a file that has been closed: its mapping, for when it is written over. To make one
/// costs more than to fill it.
#[derive(Debug)]
pub struct Spare {
    mapped: Mapped,
    of: Id,
}

/// Device and inode.
type Id = (u64, u64);

fn id(file: &Metadata) -> Id {
    (file.dev(), file.ino())
}

/// Makes a file that only its owner may read, and locks it. What is in a file of that name stays there, to
/// be written over: its memory is at hand.
pub fn create(path: &Path) -> io::Result<File> {
    if !crash::point() {
        return Err(io::ErrorKind::Other.into());
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(path)?;
    lock(&file)?;
    Ok(file)
}

impl MappedFile {
    /// Maps a file with what has been written to it, which for much is cheaper than
    /// [`MappedFile::write`]. It can get at least `len` bytes long, and at most twice as long if there is a
    /// spare mapping of it; what comes behind what has been written is 0 or anything that was in the file
    /// before.
    pub fn of(mut file: File, len: usize, spare: Option<Spare>) -> io::Result<MappedFile> {
        let written = usize::try_from(file.stream_position()?).map_err(io::Error::other)?;
        let there = file.metadata()?;
        // Not if somebody has cut it: to touch what is not there is a signal.
        let fits = |Spare { mapped, of }: &Spare| {
            let enough = mapped.len >= len && mapped.len / 2 <= len;
            enough && *of == id(&there) && mapped.len as u64 <= there.len()
        };
        if let Some(Spare { mut mapped, .. }) = spare.filter(fits) {
            mapped.room = mapped.room.max(written);
            return Ok(MappedFile { file, mapped });
        }
        file.set_len(u64::try_from(len).map_err(io::Error::other)?)?;
        let mapping = Mapping::shared(&file, 0, len)?;
        Ok(MappedFile { file, mapped: Mapped { mapping, len, room: written } })
    }

    /// Closes the file.
    pub fn close(self) -> io::Result<Spare> {
        // Which closing does not do: the mapping has the file as well.
        flock(&self.file, FlockOperation::Unlock)?;
        Ok(Spare { of: id(&self.file.metadata()?), mapped: self.mapped })
    }

    /// How long it may get.
    pub fn limit(&self) -> usize {
        self.mapped.len
    }

    /// Has memory at hand up to here. Fails if there is none, or beyond the limit.
    pub fn reserve(&mut self, end: usize) -> io::Result<()> {
        if end <= self.mapped.room { Ok(()) } else { self.extend(end) }
    }

    #[cold]
    fn extend(&mut self, end: usize) -> io::Result<()> {
        let mapped = &mut self.mapped;
        if end > mapped.len {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let room = end.next_multiple_of(STEP).min(mapped.len);
        let (offset, len) = (mapped.room as u64, (room - mapped.room) as u64);
        fallocate(&self.file, FallocateFlags::empty(), offset, len)?;
        let page = mapped.room.next_multiple_of(PAGE).min(room);
        mapped.mapping.have_at_hand(page, room - page);
        mapped.room = room;
        Ok(())
    }

    /// Writes bytes at an offset. Fails, having written nothing, if there is no room.
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.reserve(at + bytes.len())?;
        crash::in_parts(bytes, |from, part| self.mapped.mapping.put(at + from, part));
        Ok(())
    }

    /// Writes two words, at a multiple of 8, and bytes after them: the words at once, when all the bytes
    /// are there. Fails, having written nothing, if there is no room.
    pub fn append(&mut self, at: usize, words: [u32; 2], bytes: &[u8]) -> io::Result<()> {
        self.write(at + 8, bytes)?;
        self.store(at, words);
        Ok(())
    }

    /// Reads bytes back.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        self.mapped.mapping.read(at, bytes);
    }

    /// Writes two words at once, at a multiple of 8, after all that has been written before.
    pub fn publish(&mut self, at: usize, words: [u32; 2]) -> io::Result<()> {
        self.reserve(at + 8)?;
        self.store(at, words);
        Ok(())
    }

    fn store(&self, at: usize, words: [u32; 2]) {
        if crash::point() {
            self.mapped.mapping.pair(at).store(in_memory(words), Ordering::Release);
        }
    }
}

/// Two words as they are to stand in memory, the first at the lower address.
fn in_memory([first, second]: [u32; 2]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// Locks a file for this process, until it is closed. Fails at once if another has it.
pub fn lock(file: &File) -> io::Result<()> {
    Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    // Fails if a file that is written over is mapped anew without need; or is not although it is another one,
    // too short or much too long; or if anything is lost of what is in it.
    #[test]
    fn a_file_that_is_written_over_keeps_its_mapping() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut mapped = MappedFile::of(create(&path).unwrap(), 3 * PAGE, None).unwrap();
        mapped.write(PAGE, b"kept").unwrap();
        for (len, limit) in [(2 * PAGE, 3), (3 * PAGE, 3), (4 * PAGE, 4), (PAGE, 1)] {
            let spare = mapped.close().unwrap();
            let mut file = create(&path).unwrap();
            file.write_all(b"begun").unwrap();
            mapped = MappedFile::of(file, len, Some(spare)).unwrap();
            assert_eq!(mapped.limit(), limit * PAGE);
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!((bytes.len(), &bytes[..5]), (limit * PAGE, &b"begun"[..]));
            assert!(limit == 1 || bytes[PAGE..].starts_with(b"kept"));
            mapped.write(0, b"again").unwrap();
            assert!(std::fs::read(&path).unwrap().starts_with(b"again"));
            assert!(mapped.write(len.max(limit * PAGE), b"x").is_err());
        }
        let spare = mapped.close().unwrap();
        std::fs::rename(&path, dir.path().join("other")).unwrap();
        let another = create(&path).unwrap();
        another.set_len(PAGE as u64).unwrap();
        let mut mapped = MappedFile::of(another, PAGE, Some(spare)).unwrap();
        mapped.write(0, b"another").unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(b"another"));
    }

    // Fails if memory is counted on that somebody has cut off a file since: to write there is the end of
    // the process.
    #[test]
    fn a_file_that_was_cut_is_mapped_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut mapped = MappedFile::of(create(&path).unwrap(), 3 * PAGE, None).unwrap();
        mapped.write(2 * PAGE, b"first").unwrap();
        let spare = mapped.close().unwrap();
        let file = create(&path).unwrap();
        file.set_len(0).unwrap();
        let mut mapped = MappedFile::of(file, 3 * PAGE, Some(spare)).unwrap();
        mapped.write(2 * PAGE, b"again").unwrap();
        assert!(std::fs::read(&path).unwrap()[2 * PAGE..].starts_with(b"again"));
    }

    // Fails if what was written is not in the file, if there is anything beyond the limit, or if
    // two can have the file at once.
    #[test]
    fn what_is_written_is_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = create(&path).unwrap();
        file.write_all(b"first").unwrap();
        let mut mapped = MappedFile::of(file, 8192, None).unwrap();
        mapped.write(4093, b"abcdef").unwrap();
        mapped.publish(8, [0x0102_0304, 5]).unwrap();
        assert_eq!(mapped.write(8190, b"xyz").unwrap_err().kind(), io::ErrorKind::StorageFull);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len(), &bytes[4093..4099]), (8192, &b"abcdef"[..]));
        assert_eq!(bytes[..6], *b"first\0");
        let mut back = [0; 4];
        mapped.read(4094, &mut back);
        assert_eq!(back, *b"bcde");
        assert_eq!(bytes[8..16], [0x0102_0304, 5_u32].map(u32::to_ne_bytes).concat());
        assert!(bytes[8190..].iter().all(|byte| *byte == 0));
        assert!(lock(&File::open(&path).unwrap()).is_err());
        drop(mapped);
        assert!(lock(&File::open(&path).unwrap()).is_ok());
    }
}
