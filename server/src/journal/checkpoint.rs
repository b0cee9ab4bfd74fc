//! Checkpoints: the next segment is written, then the previous one is recycled.

use std::io;
use std::path::PathBuf;

use xenstore_protocol::stream::Sink;
use xenstore_sys::mapped_file::Recycled;
use xenstore_sys::{crash, mapped_file};

use super::FULL;
use super::files::{self, new_file, old_file, remove_file};
use super::segment::Segment;

/// What is needed to write the next segment. Any thread can write it.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(super) dir: PathBuf,
    pub(super) boot: [u8; 16],
    pub(super) number: u64,
    /// The recycled segment, which the next one overwrites.
    pub(super) recycled: Option<Recycled>,
    /// Bytes that are allocated before anything is written, so that records appended meanwhile do not
    /// use them up.
    pub(super) reserve: usize,
}

impl Checkpoint {
    /// Writes the segment. `write` passes the snapshot to its argument in pieces.
    pub(crate) fn write(self, write: impl FnOnce(&mut Sink<'_>)) -> NewSegment {
        let path = new_file(&self.dir);
        remove_file(&path);
        if crash::point() {
            let _ = std::fs::rename(old_file(&self.dir), &path);
        }
        let create =
            |file| Segment::create(file, self.recycled, &self.boot, self.number, FULL, write);
        let allocate = |file| mapped_file::allocate(&file, self.reserve).map(|()| file);
        let segment = mapped_file::create(&path).and_then(allocate).and_then(create);
        if segment.is_err() {
            // The current segment needs its room.
            remove_file(&path);
        }
        NewSegment(segment)
    }
}

/// The next segment, or why it cannot be written.
#[derive(Debug)]
pub(crate) struct NewSegment(pub(super) io::Result<Segment>);

impl NewSegment {
    /// The next segment could not be written, e.g. because the worker thread has panicked.
    pub(crate) fn failed(error: io::Error) -> NewSegment {
        NewSegment(Err(error))
    }

    /// Allocates memory for the first records, so that appending them does not wait for it.
    pub(crate) fn with_memory(mut self) -> NewSegment {
        if let Ok(segment) = &mut self.0 {
            // If this fails, the first appends allocate it.
            let _ = segment.allocate(FULL);
        }
        self
    }
}

/// A segment that recovery does not need any more.
#[derive(Debug)]
pub(crate) struct Retired {
    pub(super) dir: PathBuf,
    pub(super) segment: Segment,
    /// Bytes of it that the next segment reuses.
    pub(super) keep: usize,
}

impl Retired {
    /// Releases the bytes that the next segment does not reuse. This can take long.
    pub(crate) fn trim(self) -> Option<Recycled> {
        let recycled = self.segment.close(self.keep);
        files::warn_if_little_room(&self.dir, self.keep);
        recycled.ok()
    }
}
