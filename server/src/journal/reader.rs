//! The reader of a segment that another process has written.

use std::fs::File;
use std::ops::{Deref, Range};

use xenstore_sys::Sealed;
use xxhash_rust::xxh3::Xxh3;

use super::error::RecoveryError;
use super::format::{
    EXECUTED, HEADER, LEN, MAGIC, PREFIX, checksum, first_batch, head, low_half, word,
};

/// Bytes that are read before their memory is released.
const PIECE: usize = 1 << 20;

/// The bytes of a segment.
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

/// A segment with a valid header and a valid snapshot.
#[derive(Debug)]
pub(super) struct SegmentReader {
    pub(super) bytes: Bytes,
    /// Checksum of the header.
    head: u32,
    snapshot: Range<usize>,
}

impl SegmentReader {
    /// Reads a locked file.
    ///
    /// # Errors
    ///
    /// Fails if the file cannot be mapped, is from another boot or version, or if its header or snapshot
    /// is incomplete or damaged.
    pub(super) fn open(file: File, boot: &[u8; 16]) -> Result<SegmentReader, RecoveryError> {
        let bytes = Sealed::map_own(&file)?;
        SegmentReader::mapped(bytes, file, boot)
    }

    pub(super) fn mapped(
        bytes: Sealed,
        file: File,
        boot: &[u8; 16],
    ) -> Result<SegmentReader, RecoveryError> {
        SegmentReader::parse(Bytes::Mapped(bytes, file), boot)
    }

    pub(super) fn parse(bytes: Bytes, boot: &[u8; 16]) -> Result<SegmentReader, RecoveryError> {
        let number = |at| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let (this, len) = number(24).zip(number(32)).ok_or(RecoveryError::TooShort)?;
        let len = usize::try_from(len).map_err(|_| RecoveryError::TruncatedSnapshot)?;
        let end = HEADER.checked_add(len).filter(|end| *end <= bytes.len());
        let snapshot = HEADER..end.ok_or(RecoveryError::TruncatedSnapshot)?;
        if bytes[..8] != MAGIC {
            return Err(RecoveryError::OtherVersion);
        }
        if bytes[8..24] != *boot {
            return Err(RecoveryError::OtherBoot);
        }
        let mut reader = SegmentReader { bytes, head: 0, snapshot };
        let mut sum = Xxh3::new();
        for at in reader.snapshot.clone().step_by(PIECE) {
            sum.update(&reader.bytes[at..reader.snapshot.end.min(at + PIECE)]);
            reader.release_before(at);
        }
        let (constant, head) = head(boot, this, len, low_half(sum.digest()));
        if reader.bytes[..constant.len()] != constant {
            return Err(RecoveryError::DamagedSnapshot);
        }
        reader.head = head;
        Ok(reader)
    }

    /// Releases the memory of the file before position `end`, which has been read.
    fn release_before(&self, end: usize) {
        match &self.bytes {
            Bytes::Mapped(bytes, _) => bytes.set_aside(end),
            #[cfg(test)]
            Bytes::Copied(_) => {}
        }
    }

    /// Releases the memory of the first `end` bytes of the snapshot.
    pub(super) fn release_snapshot(&self, end: usize) {
        self.release_before(self.snapshot.start + end);
    }

    /// Returns the snapshot that the records follow.
    pub(super) fn snapshot(&self) -> &[u8] {
        &self.bytes[self.snapshot.clone()]
    }

    fn word(&self, at: usize) -> u32 {
        let word = self.bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
        word.map_or(0, u32::from_ne_bytes)
    }

    /// All records before the returned position were executed. Returns `None` if the header is damaged
    /// there.
    fn executed(&self) -> Option<usize> {
        let executed = self.word(EXECUTED);
        (executed == !self.word(EXECUTED + 4)).then_some(executed as usize)
    }

    /// Returns the positions of the records of each batch, in order, up to the first invalid batch.
    pub(super) fn batches(&self) -> impl Iterator<Item = Range<usize>> {
        let mut at = first_batch(self.snapshot.len());
        let mut released = 0;
        std::iter::from_fn(move || {
            if at >= released + PIECE {
                self.release_before(at);
                released = at;
            }
            let start = at.checked_add(PREFIX)?;
            let end = start.checked_add(self.word(at) as usize)?;
            let records = self.bytes.get(start..end).filter(|records| !records.is_empty())?;
            let is_valid = self.word(at + 4) == checksum(self.head, word(at).ok()?, records);
            at = end;
            is_valid.then_some(start..end)
        })
    }

    /// Returns the bodies of the records in order, each with whether it was executed. If that is
    /// unknown, all were: a batch is written after or right before its inputs are executed.
    pub(super) fn records(&self) -> impl Iterator<Item = (&[u8], bool)> {
        let executed = self.executed().unwrap_or(usize::MAX);
        self.batches().flat_map(move |batch| {
            let mut at = batch.start;
            std::iter::from_fn(move || {
                let start = at + LEN;
                let len = self.word(at) as usize;
                let body = self.bytes[..batch.end].get(start..start + len)?;
                at = start + len;
                (len > 0).then_some((body, at <= executed))
            })
        })
    }

    /// Returns the position after the last valid batch.
    pub(super) fn end(&self) -> usize {
        let last = self.batches().last();
        last.map_or(first_batch(self.snapshot.len()), |batch| batch.end)
    }

    /// Returns true if more was executed than can be read here, or if that is unknown.
    pub(super) fn is_damaged(&self) -> bool {
        self.executed().is_none_or(|executed| executed > self.end())
    }
}
