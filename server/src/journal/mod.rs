//! The journal: what was done to the engine, in memory that outlives the process.
//!
//! A file in the runtime directory, which is memory on every Linux host, holds a state and every
//! input of the engine since ([`segment`]). The engine is deterministic, so the next process makes
//! it again from there ([`replay`]), however this one ends: killed, aborted, out of memory. It does
//! not survive the machine.
//!
//! What is done is recorded before anybody hears of it, a turn of a connection at once: of what is
//! lost with a process nothing has happened to the store, and requests of rings are still there. A
//! process that comes after a crash also records each input before it carries it out, at first: so an
//! input at which processes keep ending is found, and set aside ([`suspect`]).
//!
//! When a file is long enough, all connections stand still for a moment, in which the state is taken:
//! a snapshot. Another thread writes it into the next file ([`Draft`]), while records go on in this
//! one; those that have come meanwhile are copied, and the next file takes its place.

#[cfg(test)]
mod panics;
mod record;
mod replay;
mod run;
mod segment;
mod suspect;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod traces;
mod way;

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use smol::Task;
use tracing::{error, info, warn};
use xenstore_protocol::stream::Sink;
use xenstore_protocol::{Header, Operation};
use xenstore_store::{Config, ConnId, Engine, Input, State};
use xenstore_transport::mapped_file::Spare;
use xenstore_transport::{crash, mapped_file};

use crate::place;
use record::Record;
use replay::Replay;
pub(crate) use replay::clock;
pub(crate) use run::{Entry, Run};
use segment::{Group, Left, Segment};
pub(crate) use way::{Settled, set_out, settle};

/// Bytes of records after which the next file is begun, if the state that it begins with has not more
/// than half as many.
const FULL: usize = 4 << 20;
/// How long a journal that could not be written rests.
const PAUSE: Duration = Duration::from_secs(30);
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
    /// A next one is being written.
    draft: Option<Since>,
    /// The mapping of the file before this one.
    spare: Option<Spare>,
    /// When it may be tried again.
    rests_until: Instant,
    /// What has been recorded and not written.
    group: Group,
    /// The last input is being carried out.
    open: bool,
    /// Inputs that are still to be looked out for, and like which one they are not to be.
    look_out: u32,
    aside: Option<Vec<u8>>,
    waiter: Option<Waker>,
}

/// What a file goes on from that is being written: the end of another, or nothing, if nothing is
/// recorded meanwhile.
type Since = Option<usize>;

/// The next file, for any thread to write.
#[derive(Debug)]
pub(crate) struct Draft {
    dir: PathBuf,
    boot: [u8; 16],
    number: u64,
    /// That of the file that is written over.
    spare: Option<Spare>,
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
        Drafted(mapped_file::create(&path).and_then(create))
    }
}

/// Does something on another thread; in a simulation at once, since its processes end and their
/// thread does not.
pub(crate) fn unblock<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Task<T> {
    if cfg!(test) {
        let result = work();
        return smol::unblock(|| result);
    }
    smol::unblock(work)
}

/// The next file, or why it cannot be.
#[derive(Debug)]
pub(crate) struct Drafted(io::Result<Segment>);

impl Drafted {
    /// With memory for all records until the one after it, so that whoever writes them need not wait
    /// for that.
    pub(crate) fn with_memory(mut self) -> Drafted {
        if let Ok(segment) = &mut self.0
            && let Err(error) = segment.get_memory()
        {
            self.0 = Err(error);
        }
        self
    }
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

fn file(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("journal.{number}"))
}

/// The one that is not whole yet.
fn new_file(dir: &Path) -> PathBuf {
    dir.join("journal.new")
}

/// One that is not needed any more, to be written over: its memory is at hand, which to get anew, and
/// to map, would be a third of what a record costs.
fn old_file(dir: &Path) -> PathBuf {
    dir.join("journal.old")
}

/// The next file is written over this one.
fn keep_for_later(dir: &Path, number: u64) {
    let file = file(dir, number);
    if std::fs::rename(&file, old_file(dir)).is_err() {
        let _ = std::fs::remove_file(file);
    }
}

/// Or over those before this one that another process has left, if it has let go of them.
fn keep_left(dir: &Path, number: u64) {
    for left in numbers(dir).into_iter().filter(|left| *left < number) {
        let path = file(dir, left);
        match File::open(&path).and_then(|file| mapped_file::lock(&file)) {
            Ok(()) => keep_for_later(dir, left),
            Err(_) => drop(std::fs::remove_file(path)),
        }
    }
}

/// Numbers of the files that are there, the newest first.
fn numbers(dir: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name());
    let number = |name: std::ffi::OsString| name.to_str()?.strip_prefix("journal.")?.parse().ok();
    let mut numbers: Vec<u64> = names.filter_map(number).collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    numbers
}

fn remove_file(path: &Path) {
    if crash::point() {
        let _ = std::fs::remove_file(path);
    }
}

/// Removes all files of a journal.
fn remove(dir: &Path) {
    remove_file(&new_file(dir));
    remove_file(&old_file(dir));
    // The newest last: what is found is to be what would have been found before.
    for number in numbers(dir).into_iter().rev() {
        remove_file(&file(dir, number));
    }
}

/// What the last process has left here; none if it left nothing, or nothing that can be used, which
/// is told. An error is one line: that process has not ended.
pub(crate) fn recover(dir: &Path, config: &Config) -> Result<Option<Recovered>, String> {
    let begun = Instant::now();
    for number in numbers(dir) {
        let path = file(dir, number);
        let Ok(left) = File::open(&path) else { continue };
        wait_for(&left).map_err(|error| {
            format!("journal {}: {error}; does another xenstored use it?", path.display())
        })?;
        let left = Left::read(left, &boot_id());
        let make = |drops_work| {
            let left = left.as_ref().map_err(String::clone)?;
            finish(&path, Replay::of(config, left)?, left, begun, drops_work)
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

/// Ends a recovery. Work that the engine has deferred is done, or dropped: if it must be, or if processes
/// have ended in it here.
fn finish(
    path: &Path,
    replay: Replay,
    left: &Left,
    begun: Instant,
    drops_work: bool,
) -> Result<Recovered, String> {
    let (records, mut replay) = (replay.records, replay);
    let interrupted = replay.interrupted.take();
    let interrupted = interrupted.as_deref().and_then(Input::parse);
    if suspect::note(path, interrupted.as_ref())
        && let Some(input) = interrupted
    {
        replay.refuse(&input)?;
    }
    let has_work = replay.engine.has_work();
    if has_work && (drops_work || suspect::try_work(path)) {
        error!(
            "deferred work is dropped, since recoveries end in it: events are lost, and nodes of \
             domains that are gone may stay; if the process was killed for its memory, raise the \
             limit; please report it"
        );
        replay.drop_work()?;
    }
    let (engine, state) = replay.finish()?;
    if has_work {
        suspect::work_is_done(path);
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

impl Journal {
    /// Begins a journal with a state, which `write` gives to its argument in pieces. Whatever was in
    /// this directory before is not needed any more. If it `looks_out`, inputs are written ahead for a
    /// while, to know at which one the process ends.
    pub(crate) fn begin(
        dir: PathBuf,
        config: &Config,
        looks_out: bool,
        write: impl FnOnce(&mut Sink<'_>),
    ) -> Journal {
        let number = numbers(&dir).first().copied().unwrap_or(0);
        let aside = if looks_out { suspect::set_aside(&dir) } else { None };
        let mut journal = Journal {
            dir,
            config: *config,
            boot: boot_id(),
            number,
            segment: None,
            is_void: false,
            draft: None,
            spare: None,
            rests_until: Instant::now(),
            group: Group::default(),
            open: false,
            look_out: if looks_out { suspect::LOOKED_OUT_FOR } else { 0 },
            aside,
            waiter: None,
        };
        let draft = journal.draft();
        journal.replace(draft.write(write));
        journal
    }

    /// Nobody is to go on from here.
    pub(crate) fn end(self) {
        remove(&self.dir);
        place::leave(&self.dir);
    }

    /// The next file, which is to be written with the state as it is now.
    pub(crate) fn draft(&mut self) -> Draft {
        self.commit();
        let goes_on = self.segment.as_ref();
        self.draft = Some(goes_on.map(Segment::end));
        let (dir, number, spare) = (self.dir.clone(), self.number + 1, self.spare.take());
        Draft { dir, boot: self.boot, number, spare }
    }

    /// Could the next process go on from here?
    pub(crate) fn is_valid(&self) -> bool {
        self.segment.is_some() && !self.is_void
    }

    /// Goes on with the next file; the ones before are not needed any more. One that misses something
    /// is given up.
    pub(crate) fn replace(&mut self, drafted: Drafted) {
        let (number, new) = (self.number + 1, new_file(&self.dir));
        let Some(since) = self.draft.take() else {
            remove_file(&new);
            return;
        };
        let make = || -> io::Result<Segment> {
            let mut segment = drafted.0?;
            if let (Some(since), Some(old)) = (since, &self.segment) {
                segment.take(old, since)?;
            }
            if crash::point() {
                std::fs::rename(&new, file(&self.dir, number))?;
            }
            Ok(segment)
        };
        match make() {
            Ok(segment) => {
                let last = self.segment.replace(segment);
                if crash::point() {
                    match last {
                        Some(_) => keep_for_later(&self.dir, self.number),
                        None => keep_left(&self.dir, number),
                    }
                }
                self.spare = last.and_then(|last| last.close().ok());
                (self.number, self.is_void) = (number, false);
            }
            Err(error) => self.suspend(&error),
        }
    }

    /// Ready when it is time for the next file. Until when that is certainly not so, if it rests.
    pub(crate) fn poll_full(&mut self, cx: &mut Context<'_>) -> Poll<Option<Instant>> {
        self.waiter = Some(cx.waker().clone());
        match &self.segment {
            Some(segment) if !segment.is_full() && !self.is_void => Poll::Pending,
            Some(_) => Poll::Ready(None),
            None => Poll::Ready(Some(self.rests_until)),
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waiter.take() {
            waker.wake();
        }
    }

    /// It is time for the next file: something happened that cannot be recorded.
    pub(crate) fn renew(&mut self) {
        (self.is_void, self.draft) = (true, None);
        self.wake();
    }

    /// Nobody is to go on from here until the next file.
    pub(crate) fn interrupt(&mut self) {
        (self.segment, self.draft, self.spare) = (None, None, None);
        self.group.clear();
        self.rests_until = Instant::now();
        remove(&self.dir);
        self.wake();
    }

    /// A journal that lacks something is worse than none: it goes, and a new one is tried later.
    fn suspend(&mut self, error: &io::Error) {
        self.interrupt();
        self.rests_until = Instant::now() + PAUSE;
        error!(
            dir = %self.dir.display(), %error, retry_s = PAUSE.as_secs(),
            "cannot write the journal: until then a crash loses the store; make room there, or choose another place with --journal"
        );
    }

    /// Adds a record, which `emit` appends to its argument.
    #[inline]
    fn record(&mut self, emit: impl FnOnce(&mut Vec<u8>)) {
        if self.segment.is_some() {
            self.group.push(emit);
        }
    }

    /// Must it hear of each input before that is carried out?
    pub(crate) fn looks_out(&self) -> bool {
        self.look_out > 0
    }

    /// Something is about to be done.
    #[inline]
    pub(crate) fn input(&mut self, input: &Input<'_>) {
        self.record(|out| input.emit(out));
        self.open = true;
        if self.looks_out() {
            self.write();
        }
    }

    /// Refuses an input that has just been recorded, if it is like one that was set aside. Returns true
    /// if it is refused.
    #[inline]
    pub(crate) fn refuses<'a>(&mut self, input: impl FnOnce() -> Input<'a>) -> bool {
        if !self.looks_out() || self.aside.is_none() {
            return false;
        }
        let is_refused = suspect::is_like(&mut self.aside, &input());
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
        if self.looks_out() {
            self.write();
            self.look_out -= 1;
        }
    }

    /// These bytes were taken from a ring, besides requests that were executed.
    pub(crate) fn left_over(&mut self, conn: ConnId, bytes: &[u8]) {
        self.record(|out| Record::LeftOver { conn, bytes }.emit(out));
    }

    /// The next process knows of all that has happened: to be called before anybody hears of any of
    /// it.
    #[inline]
    pub(crate) fn commit(&mut self) {
        if !self.group.is_empty() {
            self.write();
        }
    }

    /// Writes what has been recorded, and whether the last of it has been carried out.
    fn write(&mut self) {
        let Some(segment) = &mut self.segment else { return };
        if let Err(error) = segment.write(&mut self.group, self.open) {
            return self.suspend(&error);
        }
        if segment.is_full() {
            self.wake();
        }
    }

    /// Makes the engine again as it was before the last input, if that is not carried out, and refuses
    /// it. An error is one line.
    pub(crate) fn rebuild(&mut self) -> Result<Engine, String> {
        self.commit();
        let segment = self.segment.as_ref().filter(|_| self.is_valid());
        let bytes = segment.ok_or("there is no journal")?.bytes();
        let make = || -> Result<(Engine, bool), String> {
            let left = Left::parse(bytes, &self.boot)?;
            let mut replay = Replay::of(&self.config, &left)?;
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
pub(crate) fn only_asks(header: &Header) -> bool {
    use Operation::{Directory, DirectoryPart, GetDomainPath, GetPerms, IsDomainIntroduced, Read};
    let asks = matches!(
        Operation::from_wire(header.ty),
        Some(Directory | DirectoryPart | GetDomainPath | GetPerms | IsDomainIntroduced | Read)
    );
    asks && header.tx_id == 0
}
