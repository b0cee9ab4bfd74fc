//! The layout of a segment, and the checksums in it. `docs/formats.md` describes it byte by byte.
//!
//! ```text
//! header   magic, version, boot id, number, length and checksum of the snapshot, checksum of these
//!          executed: all records before this position were executed; its complement
//! snapshot a migration stream
//! batches  length, checksum, records; 8 zero bytes end them
//! records  length, body; a length of 0 pads a batch to a multiple of 8
//! ```
//!
//! Checksums are the low half of XXH3. The checksum of a batch is seeded with the checksum of the
//! header and the position of the batch. A batch of another segment or another position is therefore
//! invalid, also one of the recycled file below the segment. Integers have the byte order of the host.

use std::io;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

pub(super) const MAGIC: [u8; 8] = *b"xsjourn\x05";
pub(super) const HEADER: usize = 4096;
/// Position of `executed` in the header.
pub(super) const EXECUTED: usize = 64;
/// Bytes of a batch before its records.
pub(super) const PREFIX: usize = 8;
/// The end mark after the last batch. A recycled file has old bytes there.
pub(super) const END: [u8; PREFIX] = [0; PREFIX];
/// Bytes of a record before its body.
pub(super) const LEN: usize = 4;
/// Maximum length of a segment in bytes: positions are 32-bit words.
pub(super) const LIMIT: usize = u32::MAX as usize;

/// Position of the first batch after a snapshot of `len` bytes.
pub(super) fn first_batch(len: usize) -> usize {
    (HEADER + len).next_multiple_of(8)
}

#[expect(clippy::cast_possible_truncation)]
pub(super) fn low_half(sum: u64) -> u32 {
    sum as u32
}

/// Returns the constant part of the header, and its checksum, which is its last word.
pub(super) fn head(boot: &[u8; 16], number: u64, len: usize, snapshot: u32) -> (Vec<u8>, u32) {
    let mut head = [&MAGIC[..], boot, &number.to_ne_bytes()].concat();
    head.extend_from_slice(&(len as u64).to_ne_bytes());
    head.extend_from_slice(&snapshot.to_ne_bytes());
    let checksum = low_half(xxh3_64(&head));
    head.extend_from_slice(&checksum.to_ne_bytes());
    (head, checksum)
}

/// Returns the checksum of a batch at position `at` of the segment whose header has the checksum
/// `head`.
pub(super) fn checksum(head: u32, at: u32, records: &[u8]) -> u32 {
    low_half(xxh3_64_with_seed(records, u64::from(head) << 32 | u64::from(at)))
}

pub(super) fn word(at: usize) -> io::Result<u32> {
    u32::try_from(at).map_err(io::Error::other)
}

/// Records that are written together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    /// Position of the last record in `bytes`.
    pub(super) last: usize,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Adds a record. `emit` appends its body to its argument.
    #[inline]
    pub(super) fn push(&mut self, emit: impl FnOnce(&mut Vec<u8>)) {
        self.last = self.bytes.len();
        self.bytes.extend_from_slice(&[0; LEN]);
        emit(&mut self.bytes);
        let len = u32::try_from(self.bytes.len() - self.last - LEN).unwrap_or(u32::MAX);
        self.bytes[self.last..self.last + LEN].copy_from_slice(&len.to_ne_bytes());
    }

    /// Pads the batch to a multiple of 8 bytes and appends the end mark.
    pub(super) fn seal(&mut self) {
        let len = self.bytes.len().next_multiple_of(8);
        self.bytes.resize(len + END.len(), 0);
    }

    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }
}
