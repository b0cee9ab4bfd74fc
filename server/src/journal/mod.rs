//! The journal: what was done to the engine, in memory that outlives the process.
//!
//! A file in the runtime directory, which is memory on every Linux host, holds a state and every
//! input of the engine since ([`segment`]). The engine is deterministic, so the next process makes
//! it again from there ([`recovery`]), however this one ends: killed, aborted, out of memory. It does
//! not survive the machine.
//!
//! Each turn of a connection is recorded as one batch before its replies and events are sent. So work
//! that is lost with a process had no visible effect, and its requests are still in the rings. After a
//! crash, the next process first works in write-ahead mode: it records each input before it executes
//! it. So an input in which processes keep ending is found and set aside ([`poison`]).
//!
//! When a file is long enough, all connections pause while a snapshot of the state is taken. The worker
//! thread writes the snapshot to the next file ([`Checkpoint`]). Meanwhile records are appended to the
//! current file, which grows; they are copied to the next file in parts, which then replaces the current
//! one. A file is abandoned only when nothing can be appended to it any more. Until the next file
//! exists, records are appended to a file without a state, and then copied to the next file.

mod checkpoint;
mod files;
mod poison;
mod record;
mod recovery;
mod request_batch;
mod segment;
#[cfg(test)]
mod tests;
mod way;

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};
use xenstore_protocol::stream::Sink;
use xenstore_protocol::{Header, Operation, TxId};
use xenstore_store::{Config, ConnId, Engine, Input, State};
use xenstore_sys::mapped_file::Recycled;
use xenstore_sys::own_file::{self, Access, Others};
use xenstore_sys::{crash, mapped_file};

use crate::place;
use crate::worker;
pub(crate) use checkpoint::{Checkpoint, NewSegment, Retired};
use files::{
    carrier_file, file, keep_for_later, keep_left, new_file, numbers, remove, remove_file,
};
use record::Record;
use recovery::Recovery;
pub(crate) use recovery::clock;
pub(crate) use request_batch::{Entry, RequestBatch};
use segment::{Batch, Segment, SegmentReader};
pub(crate) use way::{Settled, set_out, settle};

/// Bytes of records after which the next file is begun, if the state that it begins with has not more
/// than four times as many.
const FULL: usize = 4 << 20;
/// Bytes copied to the next file at once, of the records appended since its state was taken.
const CATCH_UP: usize = 256 << 10;
/// Delay before the first retry of a failed write; it doubles with each failure.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);
/// How long a process may take to end.
const END: Duration = Duration::from_secs(5);
/// The journal of a server.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    config: Config,
    boot: [u8; 16],
    number: u64,
    /// None while it cannot be written.
    segment: Option<Segment>,
    /// Something has happened that is not in it.
    is_void: bool,
    /// The current file has no state: recovery does not find it.
    is_carrier: bool,
    /// The next file is being written, or gets the records since its state was taken: those from this
    /// byte of the current file on.
    draft: Option<usize>,
    /// The next file, once it has its state, and up to which byte of the current file it has the records.
    next: Option<Segment>,
    seen: usize,
    /// The mapping of the file before this one.
    spare: Option<Recycled>,
    /// When the failed write may be retried, and how often it has failed.
    rests_until: Instant,
    failures: u32,
    /// What has been recorded and not written.
    batch: Batch,
    /// The last input is being carried out.
    open: bool,
    /// Inputs left in write-ahead mode, and the key of the input that is set aside.
    write_ahead_left: u32,
    aside: Option<Vec<u8>>,
    waiter: Option<Waker>,
}

/// What a process has left in its journal.
pub(crate) struct Recovered {
    pub(crate) engine: Engine,
    pub(crate) state: State,
}

fn boot_id() -> [u8; 16] {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let pairs = digits.chunks(2).map(|pair| std::str::from_utf8(pair).unwrap_or_default());
    let bytes: Vec<u8> = pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap_or(0)).collect();
    bytes.try_into().unwrap_or_default()
}

/// What the last process has left here; none if it left nothing, or nothing that can be used, which
/// is told. An error is one line: that process has not ended.
pub(crate) fn recover(dir: &Path, config: &Config) -> Result<Option<Recovered>, String> {
    let begun = Instant::now();
    for number in numbers(dir) {
        let path = file(dir, number);
        let left = match own_file::open(&path, Access::Read, Others::None) {
            Ok(left) => left,
            Err(error) => {
                warn!(journal = %path.display(), %error, "this journal is not read");
                continue;
            }
        };
        wait_for(&left).map_err(|error| files::in_use(&path, &left, &error))?;
        let left = SegmentReader::read(left, &boot_id());
        let make = |drops_work| {
            let left = left.as_ref().map_err(String::clone)?;
            finish(&path, Recovery::of(config, left)?, left, begun, drops_work)
        };
        let try_to = |drops_work| catch_unwind(AssertUnwindSafe(|| make(drops_work)));
        let made = try_to(false).or_else(|_| try_to(true));
        match made.unwrap_or_else(|_| Err("panic while reading it".into())) {
            Ok(recovered) => return Ok(Some(recovered)),
            Err(reason) => {
                warn!(journal = %path.display(), reason, "nothing can be made of this journal");
            }
        }
    }
    Ok(None)
}

/// Waits until whoever writes a journal has ended: one that is killed takes a moment.
fn wait_for(journal: &File) -> io::Result<()> {
    let late = Instant::now() + END;
    loop {
        match mapped_file::lock(journal) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < late => {
                std::thread::sleep(END / 500);
            }
            result => return result,
        }
    }
}

/// Ends a recovery. Deferred work is done. It is dropped if `drops_work` is set or if [`poison::TRIES`]
/// recoveries from this journal have ended in it.
fn finish(
    path: &Path,
    replay: Recovery,
    left: &SegmentReader,
    begun: Instant,
    drops_work: bool,
) -> Result<Recovered, String> {
    let (records, mut replay) = (replay.records, replay);
    let interrupted = replay.interrupted.take();
    let interrupted = interrupted.as_deref().and_then(Input::parse);
    if poison::note(path, interrupted.as_ref())
        && let Some(input) = interrupted
    {
        replay.refuse(&input)?;
    }
    let has_work = replay.engine.has_work();
    if has_work && (drops_work || poison::try_work(path)) {
        error!(
            "deferred work is dropped, since recoveries end in it: events are lost, and nodes of \
             domains that are gone may stay; if the process was killed for its memory, raise the \
             limit; please report it"
        );
        replay.drop_work()?;
    }
    let (engine, state) = replay.finish()?;
    if has_work {
        poison::work_is_done(path);
    }
    engine.check().map_err(|violation| format!("it makes a store that is damaged: {violation}"))?;
    if left.is_damaged() {
        error!("the end of the journal is damaged: what was done last is lost");
    }
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    let rings = state.connections.len();
    info!(records, rings, ms, "the last process ended unexpectedly; going on from its journal");
    Ok(Recovered { engine, state })
}

/// How far the next file has come.
#[derive(Debug)]
pub(crate) enum CatchUp {
    /// It lacks records.
    More,
    /// It has replaced the current file, or cannot be used.
    Done(Option<Retired>),
}

impl Journal {
    /// Begins a journal with a state, which `write` gives to its argument in pieces. Whatever was in
    /// this directory before is not needed any more. If it `is_write_ahead`, inputs are written ahead for a
    /// while, to know at which one the process ends.
    pub(crate) fn begin(
        dir: PathBuf,
        config: &Config,
        is_write_ahead: bool,
        write: impl FnOnce(&mut Sink<'_>),
    ) -> Journal {
        let number = numbers(&dir).first().copied().unwrap_or(0);
        let aside = if is_write_ahead { poison::set_aside(&dir) } else { None };
        let mut journal = Journal {
            dir,
            config: *config,
            boot: boot_id(),
            number,
            segment: None,
            is_void: false,
            is_carrier: false,
            draft: None,
            next: None,
            seen: 0,
            spare: None,
            rests_until: Instant::now(),
            failures: 0,
            batch: Batch::default(),
            open: false,
            write_ahead_left: if is_write_ahead { poison::WRITE_AHEAD_INPUTS } else { 0 },
            aside,
            waiter: None,
        };
        match journal.new_draft().write(write).0 {
            Ok(segment) => journal.begin_with(segment),
            Err(error) => journal.give_up(&error),
        }
        journal
    }

    /// Begins with a file that has the current state.
    fn begin_with(&mut self, segment: Segment) {
        if let Err(error) = self.name(self.number + 1) {
            return self.give_up(&error);
        }
        self.number += 1;
        if crash::point() {
            keep_left(&self.dir, self.number, segment.size(FULL));
        }
        self.segment = Some(segment);
    }

    /// Gives the next file the name by which recovery finds it.
    fn name(&self, number: u64) -> io::Result<()> {
        if crash::point() {
            std::fs::rename(new_file(&self.dir), file(&self.dir, number))?;
        }
        Ok(())
    }

    /// Nobody is to go on from here.
    pub(crate) fn end(self) {
        remove(&self.dir);
        place::leave(&self.dir);
    }

    /// The next file, to be written with the current state. `None` if there is no room for the records
    /// appended meanwhile: this is retried later.
    pub(crate) fn checkpoint(&mut self) -> Option<Checkpoint> {
        self.commit();
        if self.segment.is_none()
            && let Err(error) = self.carry()
        {
            self.put_off(&error);
            return None;
        }
        let free = files::available(&self.dir);
        self.draft = self.segment.as_mut().map(|segment| segment.limit(free, FULL));
        Some(self.new_draft())
    }

    fn new_draft(&mut self) -> Checkpoint {
        let (dir, number, spare) = (self.dir.clone(), self.number + 1, self.spare.take());
        // A state is about as long as the previous one.
        let room = self.segment.as_ref().map_or(0, |segment| segment.size(0));
        Checkpoint { dir, boot: self.boot, number, spare, room }
    }

    /// Directs records to a file without a state, from which they are copied to the next file.
    fn carry(&mut self) -> io::Result<()> {
        let path = carrier_file(&self.dir);
        remove_file(&path);
        self.number += 1;
        let file = mapped_file::create(&path)?;
        let segment = Segment::create(file, None, &self.boot, self.number, FULL, |_| ())?;
        (self.is_void, self.is_carrier) = (true, true);
        self.segment = Some(segment);
        Ok(())
    }

    /// Could the next process go on from here?
    pub(crate) fn is_valid(&self) -> bool {
        self.segment.is_some() && !self.is_void
    }

    /// Accepts the next file. [`Journal::catch_up`] copies the records to it that were appended since
    /// its state was taken. If the file could not be written, the current file stays in use.
    pub(crate) fn accept(&mut self, drafted: NewSegment) {
        match drafted.0 {
            Err(error) if self.draft.is_some() => self.put_off(&error),
            Ok(next) if self.draft.is_some() => {
                self.seen = self.segment.as_ref().map_or(0, Segment::end);
                self.next = Some(next);
            }
            // It lacks records.
            _ => remove_file(&new_file(&self.dir)),
        }
    }

    /// Copies some of the missing records to the next file. When it has all, it replaces the current
    /// file, which is then retired.
    pub(crate) fn catch_up(&mut self) -> CatchUp {
        let (Some(since), Some(mut next)) = (self.draft, self.next.take()) else {
            return CatchUp::Done(None);
        };
        let Some(segment) = &self.segment else { return CatchUp::Done(None) };
        // More than is appended meanwhile, or the copy would never be complete.
        let come = segment.end() - std::mem::replace(&mut self.seen, segment.end());
        let taken = next.take(segment, since, CATCH_UP.max(2 * come)).and_then(|at| {
            let is_all = at == segment.end();
            if is_all {
                self.name(self.number + 1)?;
            }
            Ok((at, is_all))
        });
        match taken {
            Ok((at, false)) => {
                (self.draft, self.next) = (Some(at), Some(next));
                CatchUp::More
            }
            Ok((_, true)) => CatchUp::Done(self.replace(next)),
            Err(error) => {
                remove_file(&new_file(&self.dir));
                worker::dispose(next);
                self.put_off(&error);
                CatchUp::Done(None)
            }
        }
    }

    /// Makes this file the current one. It has its name already.
    fn replace(&mut self, next: Segment) -> Option<Retired> {
        let (keep, last) = (next.size(FULL), self.segment.replace(next));
        if crash::point() {
            match self.is_carrier {
                true => remove_file(&carrier_file(&self.dir)),
                false => keep_for_later(&self.dir, self.number),
            }
        }
        if self.failures > 0 {
            info!(dir = %self.dir.display(), "the journal is written again");
        }
        let was_carrier = std::mem::take(&mut self.is_carrier);
        (self.is_void, self.draft, self.failures) = (false, None, 0);
        self.number += 1;
        let retired = last.map(|segment| Retired { dir: self.dir.clone(), segment, keep })?;
        if was_carrier {
            worker::dispose(retired);
            return None;
        }
        Some(retired)
    }

    /// Keeps a retired file, which the next one overwrites.
    pub(crate) fn recycle(&mut self, spare: Option<Recycled>) {
        self.spare = spare;
    }

    /// Ready when the next file is due or, while that is being written, when no input may be executed
    /// before it is complete. Returns when to begin, which is not before the time of the next retry.
    pub(crate) fn poll_due(&mut self, cx: &mut Context<'_>) -> Poll<Instant> {
        self.waiter = Some(cx.waker().clone());
        if self.is_due() { Poll::Ready(self.rests_until) } else { Poll::Pending }
    }

    fn is_due(&self) -> bool {
        match &self.segment {
            Some(segment) if self.draft.is_some() => segment.is_over(),
            Some(segment) => segment.is_full() || self.is_void,
            None => true,
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waiter.take() {
            waker.wake();
        }
    }

    /// It is time for the next file: something happened that cannot be recorded.
    pub(crate) fn invalidate(&mut self) {
        (self.is_void, self.draft, self.next) = (true, None, None);
        self.wake();
    }

    /// Nobody is to go on from here until the next file.
    pub(crate) fn discard(&mut self) {
        worker::dispose((self.segment.take(), self.next.take(), self.spare.take()));
        (self.draft, self.is_carrier) = (None, false);
        self.batch.clear();
        self.rests_until = Instant::now();
        remove(&self.dir);
        self.wake();
    }

    /// The next file cannot be written. The current file stays in use, with the room it has left, until
    /// the retry.
    fn put_off(&mut self, error: &io::Error) {
        self.draft = None;
        if std::mem::take(&mut self.is_carrier) {
            // Without a next file, recovery cannot use the records in it.
            worker::dispose(self.segment.take());
            self.batch.clear();
            remove_file(&carrier_file(&self.dir));
        } else if let Some(segment) = &mut self.segment {
            segment.look_ahead();
        }
        let pause = self.pause();
        if self.failures.is_power_of_two() {
            warn!(
                dir = %self.dir.display(), %error, valid = self.is_valid(), retry_ms = pause.as_millis(),
                "cannot write the next file of the journal, which continues in the current file; make room there, or choose another place with --journal"
            );
        }
    }

    /// Nothing can be appended any more. A journal that lacks records is worse than none: it is removed,
    /// and a new one is begun.
    fn give_up(&mut self, error: &io::Error) {
        self.discard();
        let pause = self.pause();
        error!(
            dir = %self.dir.display(), %error, retry_ms = pause.as_millis(),
            "cannot write the journal: until a new one is there a crash loses the store; make room there, or choose another place with --journal"
        );
    }

    /// The delay before the next retry.
    fn pause(&mut self) -> Duration {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16)).min(LAST_PAUSE);
        self.failures = self.failures.saturating_add(1);
        self.rests_until = Instant::now() + pause;
        pause
    }

    /// Adds a record, which `emit` appends to its argument.
    #[inline]
    fn record(&mut self, emit: impl FnOnce(&mut Vec<u8>)) {
        if self.segment.is_some() {
            self.batch.push(emit);
        }
    }

    /// Must it hear of each input before that is carried out?
    pub(crate) fn is_write_ahead(&self) -> bool {
        self.write_ahead_left > 0
    }

    /// Something is about to be done.
    #[inline]
    pub(crate) fn input(&mut self, input: &Input<'_>) {
        self.record(|out| input.emit(out));
        self.open = true;
        if self.is_write_ahead() {
            self.write();
        }
    }

    /// Refuses an input that has just been recorded, if it is like one that was set aside. Returns true
    /// if it is refused.
    #[inline]
    pub(crate) fn refuses<'a>(&mut self, input: impl FnOnce() -> Input<'a>) -> bool {
        if !self.is_write_ahead() || self.aside.is_none() {
            return false;
        }
        let is_refused = poison::is_like(&mut self.aside, &input());
        if is_refused {
            self.record(|out| Record::Refused.emit(out));
            self.done(&[]);
        }
        is_refused
    }

    /// It has been done, and the machine has answered this meanwhile.
    #[inline]
    pub(crate) fn done(&mut self, answers: &[u8]) {
        if !answers.is_empty() {
            self.record(|out| Record::Answers(answers).emit(out));
        }
        self.open = false;
        if self.is_write_ahead() {
            self.write();
            self.write_ahead_left -= 1;
        }
    }

    /// These bytes were taken from a ring, besides requests that were executed.
    pub(crate) fn left_over(&mut self, conn: ConnId, bytes: &[u8]) {
        self.record(|out| Record::LeftOver { conn, bytes }.emit(out));
    }

    /// Of the last reply of a connection so many bytes are not written, but these.
    pub(crate) fn instead(&mut self, conn: ConnId, withheld: usize, bytes: &[u8]) {
        let withheld = u32::try_from(withheld).unwrap_or(u32::MAX);
        self.record(|out| Record::Instead { conn, withheld, bytes }.emit(out));
    }

    /// The guest has set the indices of its ring to 0. `unsent` bytes of replies were not written yet.
    pub(crate) fn zeroed(&mut self, conn: ConnId, unsent: usize) {
        let unsent = u32::try_from(unsent).unwrap_or(u32::MAX);
        self.record(|out| Record::Zeroed { conn, unsent }.emit(out));
    }

    /// The next process knows of all that has happened: to be called before anybody hears of any of
    /// it.
    #[inline]
    pub(crate) fn commit(&mut self) {
        if !self.batch.is_empty() {
            self.write();
        }
    }

    /// Writes what has been recorded, and whether the last of it has been carried out.
    fn write(&mut self) {
        let Some(segment) = &mut self.segment else { return };
        if let Err(error) = segment.write(&mut self.batch, self.open) {
            return self.give_up(&error);
        }
        if self.is_due() {
            self.wake();
        }
    }

    /// Restores the engine as it was before the last input, if that has not been executed, and refuses
    /// that input. An error is one line.
    pub(crate) fn rebuild(&mut self) -> Result<Engine, String> {
        self.commit();
        let is_valid = self.is_valid();
        let segment = self.segment.as_mut().filter(|_| is_valid);
        let left = segment.ok_or("there is no journal")?.left(&self.boot)?;
        let make = || -> Result<(Engine, bool), String> {
            let mut replay = Recovery::of(&self.config, &left)?;
            let interrupted = replay.interrupted.take();
            if let Some(input) = interrupted.as_deref().and_then(Input::parse) {
                replay.refuse(&input)?;
            }
            replay.engine.check().map_err(|violation| violation.to_string())?;
            Ok((replay.engine, interrupted.is_some()))
        };
        let made = catch_unwind(AssertUnwindSafe(make));
        let (engine, refused) = made.unwrap_or_else(|_| Err("panic while reading it".into()))?;
        // One that is not in the journal leaves nothing that is to be refused.
        if refused {
            self.record(|out| Record::Refused.emit(out));
        }
        self.open = false;
        self.commit();
        Ok(engine)
    }
}

/// Does a request leave everything as it is, besides events that go with its answer?
pub(crate) fn only_reads(header: &Header) -> bool {
    use Operation::{Directory, DirectoryPart, GetDomainPath, GetPerms, IsDomainIntroduced, Read};
    let asks = matches!(
        Operation::from_wire(header.ty),
        Some(Directory | DirectoryPart | GetDomainPath | GetPerms | IsDomainIntroduced | Read)
    );
    asks && header.tx_id == TxId::NONE
}
