//! Files that are not the one that is written: the next one, and the one before.

use std::io;
use std::path::PathBuf;

use xenstore_protocol::stream::Sink;
use xenstore_transport::mapped_file::Spare;
use xenstore_transport::{crash, mapped_file};

use super::FULL;
use super::files::{self, new_file, old_file, remove_file};
use super::segment::Segment;

/// The next file, for any thread to write.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(super) dir: PathBuf,
    pub(super) boot: [u8; 16],
    pub(super) number: u64,
    /// That of the file that is written over.
    pub(super) spare: Option<Spare>,
    /// Bytes that it needs: had before anything is written, so that records that come meanwhile do not
    /// take them.
    pub(super) room: usize,
}

impl Draft {
    /// Writes it with this state, which `write` gives to its argument in pieces.
    pub(crate) fn write(self, write: impl FnOnce(&mut Sink<'_>)) -> Drafted {
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
        Drafted(drafted)
    }
}

/// The next file, or why it cannot be.
#[derive(Debug)]
pub(crate) struct Drafted(pub(super) io::Result<Segment>);

impl Drafted {
    /// None, since the thread that was to write it has panicked.
    pub(crate) fn failed(error: io::Error) -> Drafted {
        Drafted(Err(error))
    }

    /// With memory for the first records, so that whoever writes them need not wait for that.
    pub(crate) fn with_memory(mut self) -> Drafted {
        if let Ok(segment) = &mut self.0 {
            // Without it they get it themselves.
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
    /// Bytes of it that the next file has use for.
    pub(super) keep: usize,
}

impl Retired {
    /// Gives back what the next file has no use for, which takes long.
    pub(crate) fn trim(self) -> Option<Spare> {
        let spare = self.segment.close(self.keep);
        files::watch_room(&self.dir, self.keep);
        spare.ok()
    }
}
