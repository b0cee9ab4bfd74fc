//! The journal: the inputs of the engine since a snapshot, in memory that outlives the process.
//!
//! A segment is a file in the runtime directory, which is memory on every Linux host. It holds a
//! snapshot and every input of the engine that follows it ([`mod@format`]). The engine is deterministic, so
//! the next process restores it from there ([`recovery`]), however this one ends: killed, aborted, out of
//! memory. The journal does not survive the host.
//!
//! Each turn of a connection is recorded as one batch before its replies and events are sent. So work
//! that is lost with a process had no visible effect, and its requests are still in the rings. After a
//! crash, the next process first works in write-ahead mode: it records each input before it executes
//! it. So an input in which processes keep ending is found and refused ([`poison`]).
//!
//! When a segment is full, all connections pause while a snapshot is taken. The worker thread writes it
//! to the next segment ([`checkpoint`]). Meanwhile records are appended to the current segment, which
//! grows; they are copied to the next segment in parts, which then replaces the current one
//! ([`rotation`]). A segment is abandoned only when nothing can be appended to it any more. Until the
//! next segment exists, records are appended to a segment without a snapshot (a carrier).
//!
//! | file | |
//! |---|---|
//! | `format.rs`, `record.rs` | bytes of a segment, bytes of a record |
//! | `segment.rs`, `reader.rs` | a segment that is written, a segment that is read |
//! | `checkpoint.rs`, `rotation.rs` | writing the next segment, replacing the current one |
//! | `request_batch.rs` | requests that become one record |
//! | `recovery.rs`, `ring_progress.rs` | the engine and the rings from a journal |
//! | `poison.rs` | inputs in which processes end |
//! | `files.rs`, `error.rs` | names in the directory; why recovery fails |

mod checkpoint;
mod error;
mod files;
mod format;
mod poison;
mod reader;
mod record;
mod recovery;
mod request_batch;
mod ring_progress;
mod rotation;
mod segment;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::task::Waker;
use std::time::Instant;

use xenstore_protocol::stream::Sink;
use xenstore_store::{Config, ConnId, Engine, Input};
use xenstore_sys::mapped_file::Recycled;

use crate::paths;
pub(crate) use checkpoint::{Checkpoint, NewSegment, Retired};
pub(crate) use error::RecoveryError;
use files::{numbers, remove};
use format::Batch;
use record::Record;
use recovery::Recovery;
pub(crate) use recovery::{Recovered, clock, no_panic, recover};
pub(crate) use request_batch::{Entry, RequestBatch};
pub(crate) use ring_progress::{RingResume, move_to, settle};
pub(crate) use rotation::CatchUp;
use segment::Segment;

/// Bytes of records after which a segment is full, unless its snapshot has more than four times as
/// many.
const FULL: usize = 4 << 20;

/// The journal of a server.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    config: Config,
    boot: [u8; 16],
    /// Number of the current segment.
    number: u64,
    /// `None` while it cannot be written.
    segment: Option<Segment>,
    /// The current segment lacks an input.
    is_invalid: bool,
    /// The current segment has no snapshot: recovery does not read it.
    is_carrier: bool,
    /// While the next segment is written: the position in the current one from which records must still
    /// be copied.
    copy_from: Option<usize>,
    /// The next segment, once it has its snapshot.
    next: Option<Segment>,
    /// The end of the current segment at the last call of [`Journal::catch_up`].
    last_end: usize,
    /// The mapping of the recycled segment.
    recycled: Option<Recycled>,
    /// The time from which a failed checkpoint may be retried.
    retry_at: Instant,
    /// Number of consecutive failures.
    failures: u32,
    /// Records that are not written yet.
    batch: Batch,
    /// The last input is being executed.
    is_open: bool,
    /// Inputs that are still executed in write-ahead mode.
    write_ahead_left: u32,
    /// The key of the poison input, in write-ahead mode.
    poison: Option<Vec<u8>>,
    waiter: Option<Waker>,
}

/// Returns the random id that the kernel has chosen at boot.
fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let pairs = digits.chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or_default());
    let bytes: Vec<u8> = pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap_or(0)).collect();
    bytes.try_into().unwrap_or_default()
}

impl Journal {
    /// Begins a journal with a snapshot, which `write` passes to its argument in pieces, and removes the
    /// journal that was in `dir`. After a crash, `write_ahead` finds the input at which the process ends.
    pub(crate) fn begin(
        dir: PathBuf,
        config: &Config,
        write_ahead: bool,
        write: impl FnOnce(&mut Sink<'_>),
    ) -> Journal {
        let number = numbers(&dir).first().copied().unwrap_or(0);
        let poison = if write_ahead { poison::key_of_poison(&dir) } else { None };
        let mut journal = Journal {
            dir,
            config: *config,
            boot: boot_id(),
            number,
            segment: None,
            is_invalid: false,
            is_carrier: false,
            copy_from: None,
            next: None,
            last_end: 0,
            recycled: None,
            retry_at: Instant::now(),
            failures: 0,
            batch: Batch::default(),
            is_open: false,
            write_ahead_left: if write_ahead { poison::WRITE_AHEAD_INPUTS } else { 0 },
            poison,
            waiter: None,
        };
        journal.write_first(write);
        journal
    }

    /// Removes the journal: the next process must not recover from it.
    pub(crate) fn end(self) {
        remove(&self.dir);
        paths::leave(&self.dir);
    }

    /// Returns true if the next process could recover from this journal.
    pub(crate) fn is_valid(&self) -> bool {
        self.segment.is_some() && !self.is_invalid
    }

    /// Returns true if each input is recorded before it is executed.
    pub(crate) fn is_write_ahead(&self) -> bool {
        self.write_ahead_left > 0
    }

    /// Adds a record. `emit` appends its body to its argument.
    #[inline]
    fn record(&mut self, emit: impl FnOnce(&mut Vec<u8>)) {
        if self.segment.is_some() {
            self.batch.push(emit);
        }
    }

    /// Records an input that is about to be executed.
    #[inline]
    pub(crate) fn begin_input(&mut self, input: &Input<'_>) {
        self.record(|out| input.emit(out));
        self.is_open = true;
        if self.is_write_ahead() {
            self.write();
        }
    }

    /// Refuses an input that has just been recorded, if it is like the poison input. Returns true if it
    /// is refused.
    #[inline]
    pub(crate) fn refuses<'a>(&mut self, input: impl FnOnce() -> Input<'a>) -> bool {
        if !self.is_write_ahead() || self.poison.is_none() {
            return false;
        }
        let is_refused = poison::is_like(&mut self.poison, &input());
        if is_refused {
            self.record(|out| Record::Refused.emit(out));
            self.end_input(&[]);
        }
        is_refused
    }

    /// Records that the last input was executed, and the replies that the hypervisor gave meanwhile.
    #[inline]
    pub(crate) fn end_input(&mut self, replies: &[u8]) {
        if !replies.is_empty() {
            self.record(|out| Record::HostReplies(replies).emit(out));
        }
        self.is_open = false;
        if self.is_write_ahead() {
            self.write();
            self.write_ahead_left -= 1;
        }
    }

    /// Records all bytes that were read from a ring and not executed.
    pub(crate) fn unread(&mut self, conn: ConnId, bytes: &[u8]) {
        self.record(|out| Record::Unread { conn, bytes }.emit(out));
    }

    /// Records that the last `withheld` bytes of the replies of a connection are not sent, and `bytes` are
    /// sent instead.
    pub(crate) fn replace_reply(&mut self, conn: ConnId, withheld: usize, bytes: &[u8]) {
        let withheld = u32::try_from(withheld).unwrap_or(u32::MAX);
        self.record(|out| Record::ReplaceReply { conn, withheld, bytes }.emit(out));
    }

    /// Records that a guest has set the indices of its ring to 0 while the last `unsent` bytes of replies
    /// were not sent yet.
    pub(crate) fn zeroed(&mut self, conn: ConnId, unsent: usize) {
        let unsent = u32::try_from(unsent).unwrap_or(u32::MAX);
        self.record(|out| Record::Zeroed { conn, unsent }.emit(out));
    }

    /// Writes all records. Must be called before their replies and events are sent.
    #[inline]
    pub(crate) fn commit(&mut self) {
        if !self.batch.is_empty() {
            self.write();
        }
    }

    /// Writes all records, and whether the last input was executed.
    fn write(&mut self) {
        let Some(segment) = &mut self.segment else { return };
        if let Err(error) = segment.write(&mut self.batch, self.is_open) {
            return self.abandon(&error);
        }
        if self.is_due() {
            self.wake();
        }
    }

    /// Restores the engine from the journal. If the last input was not executed, it is refused.
    ///
    /// # Errors
    ///
    /// Fails if there is no valid journal or if it cannot be replayed.
    pub(crate) fn rebuild(&mut self) -> Result<Engine, RecoveryError> {
        self.commit();
        let is_valid = self.is_valid();
        let segment = self.segment.as_mut().filter(|_| is_valid);
        let segment = segment.ok_or(RecoveryError::NoJournal)?.reader(&self.boot)?;
        let (engine, refused) = recovery::no_panic(|| {
            let mut recovery = Recovery::replay(&self.config, &segment)?;
            let refused = recovery.refuse_interrupted(|input| input.is_some())?;
            recovery.engine.check()?;
            Ok((recovery.engine, refused))
        })?;
        // An input that is not in the journal needs no refusal there.
        if refused {
            self.record(|out| Record::Refused.emit(out));
        }
        self.is_open = false;
        self.commit();
        Ok(engine)
    }
}
