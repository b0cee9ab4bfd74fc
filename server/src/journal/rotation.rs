//! Rotation: the next segment replaces the current one while requests are served.

use std::io;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};
use xenstore_protocol::stream::Sink;
use xenstore_sys::crash;
use xenstore_sys::mapped_file::{self, Recycled};

use super::files::{
    self, carrier_file, new_file, recycle, recycle_before, remove, remove_file, segment_file,
};
use super::segment::Segment;
use super::{Checkpoint, FULL, Journal, NewSegment, Retired};
use crate::worker;

/// Bytes of records that are copied to the next segment at once.
const CATCH_UP: usize = 256 << 10;
/// Delay before the first retry of a failed checkpoint; it doubles with each failure, up to
/// [`MAX_RETRY_DELAY`].
const MIN_RETRY_DELAY: Duration = Duration::from_millis(100);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(5);

/// How far the next segment is.
#[derive(Debug)]
pub(crate) enum CatchUp {
    /// The next segment lacks records.
    More,
    /// The next segment has replaced the current one, or cannot be used.
    Done(Option<Retired>),
}

impl Journal {
    /// Writes the first segment.
    pub(super) fn write_first(&mut self, write: impl FnOnce(&mut Sink<'_>)) {
        let segment = self.new_checkpoint().write(write).0;
        let segment = segment.and_then(|segment| self.name_next().map(|()| segment));
        match segment {
            Ok(segment) => {
                self.number += 1;
                if crash::point() {
                    recycle_before(&self.dir, self.number, segment.size(FULL));
                }
                self.segment = Some(segment);
            }
            Err(error) => self.abandon(&error),
        }
    }

    /// Gives the next segment the name by which recovery finds it.
    fn name_next(&self) -> io::Result<()> {
        if crash::point() {
            std::fs::rename(new_file(&self.dir), segment_file(&self.dir, self.number + 1))?;
        }
        Ok(())
    }

    /// Begins the next segment, which must be written with the current state. Returns `None` if there is
    /// no room for the records that are appended meanwhile: it is retried later.
    pub(crate) fn checkpoint(&mut self) -> Option<Checkpoint> {
        self.commit();
        if self.segment.is_none()
            && let Err(error) = self.begin_carrier()
        {
            self.postpone(&error);
            return None;
        }
        let free = files::available(&self.dir);
        self.copy_from = self.segment.as_mut().map(|segment| segment.limit(free, FULL));
        Some(self.new_checkpoint())
    }

    fn new_checkpoint(&mut self) -> Checkpoint {
        let (dir, number, recycled) = (self.dir.clone(), self.number + 1, self.recycled.take());
        // A snapshot is about as long as the previous one.
        let reserve = self.segment.as_ref().map_or(0, |segment| segment.size(0));
        Checkpoint { dir, boot: self.boot, number, recycled, reserve }
    }

    /// Directs records to a segment without a snapshot, from which they are copied to the next segment.
    fn begin_carrier(&mut self) -> io::Result<()> {
        let path = carrier_file(&self.dir);
        remove_file(&path);
        self.number += 1;
        let file = mapped_file::create(&path)?;
        let segment = Segment::create(file, None, &self.boot, self.number, FULL, |_| ())?;
        (self.is_invalid, self.is_carrier) = (true, true);
        self.segment = Some(segment);
        Ok(())
    }

    /// Accepts the next segment. [`Journal::catch_up`] copies the records to it that were appended since
    /// the snapshot was taken. If it could not be written, the current segment stays in use.
    pub(crate) fn accept(&mut self, new: NewSegment) {
        match new.0 {
            Err(error) if self.copy_from.is_some() => self.postpone(&error),
            Ok(next) if self.copy_from.is_some() => {
                self.last_end = self.segment.as_ref().map_or(0, Segment::end);
                self.next = Some(next);
            }
            // The journal was invalidated or discarded meanwhile: the new segment lacks records.
            _ => remove_file(&new_file(&self.dir)),
        }
    }

    /// Copies some of the missing records to the next segment. When it has all, it replaces the current
    /// segment, which is then retired.
    pub(crate) fn catch_up(&mut self) -> CatchUp {
        let (Some(since), Some(mut next)) = (self.copy_from, self.next.take()) else {
            return CatchUp::Done(None);
        };
        let Some(segment) = &self.segment else { return CatchUp::Done(None) };
        // More than is appended meanwhile, or the copy would never be complete.
        let appended = segment.end() - std::mem::replace(&mut self.last_end, segment.end());
        let copied = next.copy(segment, since, CATCH_UP.max(2 * appended)).and_then(|at| {
            let is_all = at == segment.end();
            if is_all {
                self.name_next()?;
            }
            Ok((at, is_all))
        });
        match copied {
            Ok((at, false)) => {
                (self.copy_from, self.next) = (Some(at), Some(next));
                CatchUp::More
            }
            Ok((_, true)) => CatchUp::Done(self.replace(next)),
            Err(error) => {
                remove_file(&new_file(&self.dir));
                worker::dispose(next);
                self.postpone(&error);
                CatchUp::Done(None)
            }
        }
    }

    /// Makes the next segment, which is named already, the current one.
    fn replace(&mut self, next: Segment) -> Option<Retired> {
        let (keep, previous) = (next.size(FULL), self.segment.replace(next));
        if crash::point() {
            match self.is_carrier {
                true => remove_file(&carrier_file(&self.dir)),
                false => recycle(&self.dir, self.number),
            }
        }
        if self.failures > 0 {
            info!(dir = %self.dir.display(), "the journal is written again");
        }
        let was_carrier = std::mem::take(&mut self.is_carrier);
        (self.is_invalid, self.copy_from, self.failures) = (false, None, 0);
        self.number += 1;
        let retired = previous.map(|segment| Retired { dir: self.dir.clone(), segment, keep })?;
        if was_carrier {
            worker::dispose(retired);
            return None;
        }
        Some(retired)
    }

    /// Stores the mapping of a retired segment, which the next one overwrites.
    pub(crate) fn recycle(&mut self, recycled: Option<Recycled>) {
        self.recycled = recycled;
    }

    /// Ready when the next segment is due or, while that is being written, when no input may be executed
    /// before it is complete. Returns the time at which to begin: that of the next retry, or a past one.
    pub(crate) fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<Instant> {
        self.waiter = Some(cx.waker().clone());
        if self.is_due() { Poll::Ready(self.retry_at) } else { Poll::Pending }
    }

    pub(super) fn is_due(&self) -> bool {
        match &self.segment {
            Some(segment) if self.copy_from.is_some() => segment.is_over(),
            Some(segment) => segment.is_full() || self.is_invalid,
            None => true,
        }
    }

    pub(super) fn wake(&mut self) {
        if let Some(waker) = self.waiter.take() {
            waker.wake();
        }
    }

    /// Makes the next segment due: something happened that cannot be recorded.
    pub(crate) fn invalidate(&mut self) {
        (self.is_invalid, self.copy_from, self.next) = (true, None, None);
        self.wake();
    }

    /// Removes the journal. Until there is a next segment, a crash loses the store.
    pub(crate) fn discard(&mut self) {
        worker::dispose((self.segment.take(), self.next.take(), self.recycled.take()));
        (self.copy_from, self.is_carrier) = (None, false);
        self.batch.clear();
        self.retry_at = Instant::now();
        remove(&self.dir);
        self.wake();
    }

    /// The next segment cannot be written. The current one stays in use, with the room it has left,
    /// until the retry.
    fn postpone(&mut self, error: &io::Error) {
        self.copy_from = None;
        if std::mem::take(&mut self.is_carrier) {
            // Without a next segment, recovery cannot use the records in it.
            worker::dispose(self.segment.take());
            self.batch.clear();
            remove_file(&carrier_file(&self.dir));
        } else if let Some(segment) = &mut self.segment {
            segment.allocate_ahead();
        }
        let delay = self.delay_retry();
        if self.failures.is_power_of_two() {
            warn!(
                dir = %self.dir.display(), %error, valid = self.is_valid(), retry_ms = delay.as_millis(),
                "cannot write the next file of the journal, which continues in the current file; make room there, or choose another place with --journal"
            );
        }
    }

    /// Nothing can be appended any more. A journal that lacks records must not be recovered: it is
    /// removed, and a new one is begun.
    pub(super) fn abandon(&mut self, error: &io::Error) {
        self.discard();
        let delay = self.delay_retry();
        error!(
            dir = %self.dir.display(), %error, retry_ms = delay.as_millis(),
            "cannot write the journal: until a new one is there a crash loses the store; make room there, or choose another place with --journal"
        );
    }

    /// Sets the time of the next retry. Returns the delay.
    fn delay_retry(&mut self) -> Duration {
        let doubled = MIN_RETRY_DELAY.saturating_mul(1 << self.failures.min(16));
        let delay = doubled.min(MAX_RETRY_DELAY);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Instant::now() + delay;
        delay
    }
}
