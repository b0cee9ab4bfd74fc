//! A file that is written as memory: without a system call for each record, and with all written
//! bytes in the file however the process ends.

use std::fs::{File, Metadata};
use std::io::{self, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::retry_on_intr;

use crate::crash;
use crate::own_file::{self, Access, Others};
use crate::raw::{Mapping, Sealed};

/// Bytes that one allocation adds.
const STEP: usize = 1 << 20;
const PAGE: usize = 4096;

/// A mapped file that only this process writes. Space is allocated before it is written, so that a full
/// file system is an error instead of SIGBUS.
#[derive(Debug)]
pub struct MappedFile {
    file: File,
    mapped: Mapped,
}

#[derive(Debug)]
struct Mapped {
    mapping: Mapping,
    /// Allocated bytes from the start.
    room: usize,
}

/// The mapping of a closed file, to be reused when the file is overwritten: creating a mapping costs more
/// than filling it.
#[derive(Debug)]
pub struct Recycled {
    mapped: Mapped,
    of: Id,
}

/// Device and inode.
type Id = (u64, u64);

fn id(file: &Metadata) -> Id {
    (file.dev(), file.ino())
}

/// Creates and locks a file that only its owner can access. An existing file retains its content and is
/// overwritten, because its memory is populated; a file that others can access is removed.
///
/// # Errors
///
/// Fails if the file cannot be created, or if another process has locked it.
pub fn create(path: &Path) -> io::Result<File> {
    if !crash::point() {
        return Err(io::ErrorKind::Other.into());
    }
    let file = match own_file::open(path, Access::Write, Others::None) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => own_file::create(path)?,
        Err(_) => {
            std::fs::remove_file(path)?;
            own_file::create(path)?
        }
    };
    lock(&file)?;
    Ok(file)
}

/// Allocates `len` bytes for a file, so that writing to them does not fail for lack of space.
///
/// # Errors
///
/// `ENOSPC` if the file system is full.
pub fn allocate(file: &File, len: usize) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    fail::point()?;
    Ok(retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, len as u64))?)
}

impl MappedFile {
    /// Maps a file and makes it at least `len` bytes long. The bytes before its cursor are written
    /// already: for many bytes that is cheaper than [`MappedFile::write`]. The other bytes are 0 or old
    /// content.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot grow or cannot be mapped.
    pub fn map(mut file: File, len: usize, recycled: Option<Recycled>) -> io::Result<MappedFile> {
        let written = usize::try_from(file.stream_position()?).map_err(io::Error::other)?;
        let metadata = file.metadata()?;
        // Not if the file has been truncated: access beyond its end raises SIGBUS.
        let fits = |Recycled { mapped, of }: &Recycled| {
            *of == id(&metadata) && mapped.mapping.len() as u64 <= metadata.len()
        };
        if let Some(Recycled { mut mapped, .. }) = recycled.filter(fits) {
            if mapped.mapping.len() < len {
                set_len(&file, len)?;
                mapped.mapping.resize(len)?;
            }
            mapped.room = mapped.room.max(written);
            return Ok(MappedFile { file, mapped });
        }
        set_len(&file, len)?;
        let mapping = Mapping::shared(&file, 0, len)?;
        Ok(MappedFile { file, mapped: Mapped { mapping, room: written } })
    }

    /// Closes the file and truncates it to `keep` bytes, which the next file reuses.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be unlocked or truncated.
    pub fn close(mut self, keep: usize) -> io::Result<Recycled> {
        // Closing does not unlock it: the mapping refers to the file as well.
        flock(&self.file, FlockOperation::Unlock)?;
        let keep = keep.next_multiple_of(PAGE).max(PAGE);
        if keep < self.mapped.mapping.len() {
            self.mapped.mapping.resize(keep)?;
            set_len(&self.file, keep)?;
            self.mapped.room = self.mapped.room.min(keep);
        }
        Ok(Recycled { of: id(&self.file.metadata()?), mapped: self.mapped })
    }

    /// The number of bytes from the start that can be written without an allocation.
    #[inline]
    pub fn room(&self) -> usize {
        self.mapped.room
    }

    /// The file and its bytes. Nothing may be written while the bytes exist.
    ///
    /// # Errors
    ///
    /// Fails if no descriptor is left or the file cannot be mapped.
    pub fn bytes(&mut self) -> io::Result<(File, Sealed)> {
        Ok((self.file.try_clone()?, Sealed::map_own(&self.file)?))
    }

    /// Allocates space up to `end`.
    ///
    /// # Errors
    ///
    /// `ENOSPC` if the file system is full.
    pub fn reserve(&mut self, end: usize) -> io::Result<()> {
        if end <= self.mapped.room { Ok(()) } else { self.extend(end) }
    }

    #[cold]
    fn extend(&mut self, end: usize) -> io::Result<()> {
        let result = self.extend_to(end.next_multiple_of(STEP));
        // The rest of the file system may be smaller.
        result.or_else(|_| self.extend_to(end.next_multiple_of(PAGE)))
    }

    fn extend_to(&mut self, room: usize) -> io::Result<()> {
        fail::point()?;
        let mapped = &mut self.mapped;
        let (offset, len) = (mapped.room as u64, (room - mapped.room) as u64);
        // This makes the file longer as well.
        retry_on_intr(|| fallocate(&self.file, FallocateFlags::empty(), offset, len))?;
        if room > mapped.mapping.len() {
            mapped.mapping.resize(room)?;
        }
        let page = mapped.room.next_multiple_of(PAGE).min(room);
        mapped.mapping.populate(page, room - page);
        mapped.room = room;
        Ok(())
    }

    /// Writes bytes at an offset.
    ///
    /// # Errors
    ///
    /// Fails like [`MappedFile::reserve`]; nothing is written then.
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.reserve(at + bytes.len())?;
        crash::in_parts(bytes, |from, part| self.mapped.mapping.put(at + from, part));
        Ok(())
    }

    /// Writes bytes, and then the two words before them atomically, at a multiple of 8.
    ///
    /// # Errors
    ///
    /// Fails like [`MappedFile::reserve`]; nothing is written then.
    pub fn append(&mut self, at: usize, words: [u32; 2], bytes: &[u8]) -> io::Result<()> {
        self.write(at + 8, bytes)?;
        self.store(at, words);
        Ok(())
    }

    /// Reads bytes.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        self.mapped.mapping.read(at, bytes);
    }

    /// Writes two words atomically, at a multiple of 8, after all earlier writes.
    ///
    /// # Errors
    ///
    /// Fails like [`MappedFile::reserve`]; nothing is written then.
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

fn set_len(file: &File, len: usize) -> io::Result<()> {
    file.set_len(u64::try_from(len).map_err(io::Error::other)?)
}

/// A full file system, for tests.
pub mod fail {
    use std::io;

    #[cfg(not(feature = "crash-points"))]
    #[inline(always)]
    pub(super) const fn point() -> io::Result<()> {
        Ok(())
    }

    #[cfg(feature = "crash-points")]
    pub(super) fn point() -> io::Result<()> {
        if FULL.get() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    #[cfg(feature = "crash-points")]
    thread_local! {
        static FULL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }

    /// Sets whether the file system is full for this thread.
    #[cfg(feature = "crash-points")]
    pub fn set(full: bool) {
        FULL.set(full);
    }

    /// Returns true if the file system is full.
    #[cfg(feature = "crash-points")]
    pub fn is_set() -> bool {
        FULL.get()
    }
}

/// Two words in memory order, the first at the lower address.
fn in_memory([first, second]: [u32; 2]) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

/// Locks a file for this process until it is closed.
///
/// # Errors
///
/// `EWOULDBLOCK` if another process has locked it.
pub fn lock(file: &File) -> io::Result<()> {
    Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    // Fails if an overwritten file loses its content or its mapping, or gets the mapping of another file.
    #[test]
    fn overwritten_file_reuses_its_mapping() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut mapped = MappedFile::map(create(&path).unwrap(), 3 * PAGE, None).unwrap();
        mapped.write(PAGE, b"retained").unwrap();
        for len in [2 * PAGE, 3 * PAGE, 4 * PAGE, PAGE] {
            let recycled = mapped.close(3 * PAGE).unwrap();
            assert_eq!(path.metadata().unwrap().len(), 3 * PAGE as u64);
            let mut file = create(&path).unwrap();
            file.write_all(b"begun").unwrap();
            mapped = MappedFile::map(file, len, Some(recycled)).unwrap();
            assert_eq!(mapped.room(), 3 * PAGE);
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!((bytes.len(), &bytes[..5]), (len.max(3 * PAGE), &b"begun"[..]));
            assert!(bytes[PAGE..].starts_with(b"retained"));
            mapped.write(0, b"again").unwrap();
            mapped.write(4 * PAGE, b"more").unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert!(bytes.starts_with(b"again") && bytes[4 * PAGE..].starts_with(b"more"));
        }
        let recycled = mapped.close(PAGE).unwrap();
        std::fs::rename(&path, dir.path().join("other")).unwrap();
        let another = create(&path).unwrap();
        another.set_len(PAGE as u64).unwrap();
        let mut mapped = MappedFile::map(another, PAGE, Some(recycled)).unwrap();
        mapped.write(0, b"another").unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(b"another"));
    }

    // Fails if a file that another user can access is overwritten, or prevents the creation of the file.
    #[test]
    fn file_that_others_can_access_is_removed() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("file"), dir.path().join("target"));
        std::fs::write(&target, "theirs").unwrap();
        let plant: [&dyn Fn(); 3] = [
            &|| symlink(&target, &path).unwrap(),
            &|| std::fs::hard_link(&target, &path).unwrap(),
            &|| {
                std::fs::write(&path, "planted").unwrap();
                std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666)).unwrap();
            },
        ];
        for plant in plant {
            plant();
            let mut mapped = MappedFile::map(create(&path).unwrap(), PAGE, None).unwrap();
            mapped.write(0, b"a value").unwrap();
            let found = std::fs::symlink_metadata(&path).unwrap();
            assert!(found.is_file() && found.nlink() == 1 && found.mode() & 0o777 == 0o600);
            assert_eq!(std::fs::read(&target).unwrap(), b"theirs");
            std::fs::remove_file(&path).unwrap();
        }
    }

    // Fails if the mapping of a truncated file is reused: a write there raises SIGBUS.
    #[test]
    fn truncated_file_is_mapped_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut mapped = MappedFile::map(create(&path).unwrap(), 3 * PAGE, None).unwrap();
        mapped.write(2 * PAGE, b"first").unwrap();
        let recycled = mapped.close(3 * PAGE).unwrap();
        let file = create(&path).unwrap();
        file.set_len(0).unwrap();
        let mut mapped = MappedFile::map(file, 3 * PAGE, Some(recycled)).unwrap();
        mapped.write(2 * PAGE, b"again").unwrap();
        assert!(std::fs::read(&path).unwrap()[2 * PAGE..].starts_with(b"again"));
    }

    // Fails if written bytes are not in the file, within or beyond its first length, or if two processes
    // can lock the file.
    #[test]
    fn written_bytes_are_in_the_locked_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = create(&path).unwrap();
        file.write_all(b"first").unwrap();
        let mut mapped = MappedFile::map(file, 8192, None).unwrap();
        mapped.write(4093, b"abcdef").unwrap();
        mapped.publish(8, [0x0102_0304, 5]).unwrap();
        mapped.write(3 * STEP - 1, b"xyz").unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(
            (&bytes[4093..4099], &bytes[3 * STEP - 1..][..3]),
            (&b"abcdef"[..], &b"xyz"[..])
        );
        assert_eq!(bytes[..6], *b"first\0");
        let mut back = [0; 4];
        mapped.read(4094, &mut back);
        assert_eq!(back, *b"bcde");
        assert_eq!(bytes[8..16], [0x0102_0304, 5_u32].map(u32::to_ne_bytes).concat());
        assert!(lock(&File::open(&path).unwrap()).is_err());
        drop(mapped);
        assert!(lock(&File::open(&path).unwrap()).is_ok());
    }
}
