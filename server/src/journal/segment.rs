//! The writer of a segment: one file of the journal, a snapshot and the batches that follow it.

use std::fs::File;
use std::io::{self, Write};

use xenstore_protocol::stream::Sink;
use xenstore_sys::mapped_file::{MappedFile, Recycled};
use xxhash_rust::xxh3::Xxh3;

use super::error::RecoveryError;
use super::format::{
    Batch, END, EXECUTED, HEADER, LIMIT, PREFIX, checksum, first_batch, head, low_half, word,
};
use super::reader::SegmentReader;

/// Bytes that are allocated ahead: room for the records of turns in progress when no more can be
/// allocated.
pub(super) const AHEAD: usize = 1 << 20;
/// A segment is full when its records are a quarter as long as its snapshot. Records are appended while
/// the next snapshot is written, until they have grown by the length of the snapshot.
const PART: usize = 4;

/// A segment that is open for appending.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) file: MappedFile,
    /// Checksum of the header.
    head: u32,
    /// Position of the first batch.
    pub(super) start: usize,
    /// Position of the next batch.
    pub(super) at: usize,
    /// All records before this position were executed.
    executed: usize,
    /// Bytes of records after which the segment is full.
    full: usize,
    /// Maximum length of the file while the next snapshot is written.
    pub(super) max_end: usize,
    /// Less than [`AHEAD`] bytes are left, and no more can be allocated.
    pub(super) is_tight: bool,
}

impl Segment {
    /// Writes a header and a snapshot, which `write` passes to its argument in pieces. `number` must
    /// differ from that of every other segment with batches. The segment is full after `full` bytes of
    /// records or a quarter of the length of the snapshot, whichever is more.
    pub(super) fn create(
        mut file: File,
        recycled: Option<Recycled>,
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
        let (start, prepared, full) = (first_batch(len), full, full.max(len / PART));
        let mut file = MappedFile::map(file, start + prepared, recycled)?;
        let (constant, head) = head(boot, number, len, low_half(sum.digest()));
        file.write(0, &constant)?;
        file.write(start, &END)?;
        let (at, executed, max_end, is_tight) = (start, 0, usize::MAX, false);
        let mut segment = Segment { file, head, start, at, executed, full, max_end, is_tight };
        segment.set_executed(start)?;
        Ok(segment)
    }

    /// Closes the file and stores its first `keep` bytes for the next segment to overwrite. The rest is
    /// released to the system.
    pub(super) fn close(self, keep: usize) -> io::Result<Recycled> {
        self.file.close(keep)
    }

    /// Returns the length in bytes of the segment with `full` bytes of records.
    pub(super) fn size(&self, full: usize) -> usize {
        self.start + full
    }

    /// Allocates memory for `full` bytes of records.
    pub(super) fn allocate(&mut self, full: usize) -> io::Result<()> {
        self.file.reserve(self.start + full)
    }

    /// Returns a reader of what is written so far. It is valid until the next append.
    pub(super) fn reader(&mut self, boot: &[u8; 16]) -> Result<SegmentReader, RecoveryError> {
        let (file, bytes) = self.file.bytes()?;
        SegmentReader::mapped(bytes, file, boot)
    }

    /// Returns true if the next segment is due.
    pub(super) fn is_full(&self) -> bool {
        self.at - self.start >= self.full || self.is_tight
    }

    /// Returns true if nothing may be appended before the next segment is complete.
    pub(super) fn is_over(&self) -> bool {
        self.at >= self.max_end || self.is_tight
    }

    /// Limits the length of this segment while the next one is written, which allocates `full` bytes
    /// for records; `free` bytes are available. Records appended meanwhile take room in both segments.
    /// Returns the position from which they must be copied.
    pub(super) fn limit(&mut self, free: usize, full: usize) -> usize {
        let common = free.saturating_sub(self.start + full + 2 * AHEAD) / 2;
        self.max_end = self.at + common.min(PART * self.full);
        self.at
    }

    /// Allocates [`AHEAD`] bytes. If that fails, the segment is tight.
    pub(super) fn allocate_ahead(&mut self) {
        let end = self.at + AHEAD;
        self.is_tight = end > LIMIT || self.file.reserve(end).is_err();
    }

    /// Returns the position of the next batch.
    pub(super) fn end(&self) -> usize {
        self.at
    }

    /// Copies about `len` bytes of batches, whose inputs have been executed, from position `since` of
    /// another segment. Returns the position of the next batch there.
    pub(super) fn copy(&mut self, other: &Segment, since: usize, len: usize) -> io::Result<usize> {
        let (mut at, mut records) = (since, Vec::new());
        while at < other.at && at - since < len {
            let mut len = [0; 4];
            other.file.read(at, &mut len);
            records.resize(u32::from_ne_bytes(len) as usize + END.len(), 0);
            other.file.read(at + PREFIX, &mut records);
            self.append(&records)?;
            at += PREFIX + records.len() - END.len();
        }
        self.set_executed(self.at)?;
        Ok(at)
    }

    /// Appends records, which `bytes` has followed by the [`END`] mark.
    #[inline]
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (at, records) = (self.at, &bytes[..bytes.len() - END.len()]);
        let words = [word(records.len())?, checksum(self.head, word(at)?, records)];
        self.file.append(at, words, bytes)?;
        self.at = at + PREFIX + records.len();
        Ok(())
    }

    /// Appends a batch and clears it. All records so far have been executed, except for the last one of
    /// the batch if it is `open`.
    pub(super) fn write(&mut self, batch: &mut Batch, open: bool) -> io::Result<()> {
        let (last, has_records) = (self.at + PREFIX + batch.last, !batch.is_empty());
        if has_records {
            batch.seal();
            self.append(&batch.bytes)?;
            batch.clear();
            if self.file.room() < self.at + AHEAD && !self.is_tight {
                self.allocate_ahead();
            }
        }
        match open {
            false => self.set_executed(self.at),
            true if has_records => self.set_executed(last),
            true => Ok(()),
        }
    }

    fn set_executed(&mut self, executed: usize) -> io::Result<()> {
        if executed == self.executed {
            return Ok(());
        }
        self.executed = executed;
        let at = word(executed)?;
        self.file.publish(EXECUTED, [at, !at])
    }
}
