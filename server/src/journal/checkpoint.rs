//! The files before and after the current one: the next file, and the previous one.

use std::io;
use std::path::PathBuf;

use xenstore_protocol::stream::Sink;
use xenstore_sys::mapped_file::Recycled;
use xenstore_sys::{crash, mapped_file};

use super::FULL;
use super::files::{self, new_file, old_file, remove_file};
use super::segment::Segment;

/// The next file. Any thread can write it.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(super) dir: PathBuf,
    pub(super) boot: [u8; 16],
    pub(super) number: u64,
    /// The previous file, which the next one overwrites.
    pub(super) spare: Option<Recycled>,
    /// Bytes that the file needs. They are allocated before anything is written, so that records
    /// appended meanwhile do not use them up.
    pub(super) room: usize,
}

impl Checkpoint {
    /// Writes the file. `write` passes the state to its argument in pieces.
    pub(crate) fn write(self, write: impl FnOnce(&mut Sink<'_>)) -> NewSegment {
        let path = new_file(&self.dir);
        remove_file(&path);
        if crash::point() {
            let _ = std::fs::rename(old_file(&self.dir), &path);
        }
        let create = |file| Segment::create(file, self.spare, &self.boot, self.number, FULL, write);
        let room = |file| mapped_file::allocate(&file, self.room).map(|()| file);
        let drafted = mapped_file::create(&path).and_then(room).and_then(create);
        if drafted.is_err() {
            // What it takes is needed.
            remove_file(&path);
        }
        NewSegment(drafted)
    }
}

/// The next file, or why it cannot be written.
#[derive(Debug)]
pub(crate) struct NewSegment(pub(super) io::Result<Segment>);

impl NewSegment {
    /// The next file could not be written, e.g. because the worker thread has panicked.
    pub(crate) fn failed(error: io::Error) -> NewSegment {
        NewSegment(Err(error))
    }

    /// Allocates memory for the first records, so that appending them does not wait for it.
    pub(crate) fn with_memory(mut self) -> NewSegment {
        if let Ok(segment) = &mut self.0 {
            // If this fails, the first appends allocate it.
            let _ = segment.get_memory(FULL);
        }
        self
    }
}

/// A file that is not needed any more.
#[derive(Debug)]
pub(crate) struct Retired {
    pub(super) dir: PathBuf,
    pub(super) segment: Segment,
    /// Bytes of it that the next file reuses.
    pub(super) keep: usize,
}

impl Retired {
    /// Releases the bytes that the next file does not reuse. This can take long.
    pub(crate) fn trim(self) -> Option<Recycled> {
        let spare = self.segment.close(self.keep);
        files::watch_room(&self.dir, self.keep);
        spare.ok()
    }
}
