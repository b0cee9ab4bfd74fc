//! Recovery: restores the engine of the process that has written a journal.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::{error, info, warn};
use xenstore_protocol::{
    DomId, Errno, EvtchnPort, Frame, Gfn, HEADER_LEN, Header, Operation, Reply,
};
use xenstore_store::{
    Caller, Config, ConnId, ConnectionIo, ConnectionState, Engine, Input, Millis, Replayed, State,
};
use xenstore_sys::mapped_file;
use xenstore_sys::own_file::{self, Access, Others};

use super::error::RecoveryError;
use super::files::{lock_error, numbers, segment_file};
use super::reader::SegmentReader;
use super::record::Record;
use super::{boot_id, poison};
use crate::handover::UpdatableHost;

/// How long recovery waits for a process that is being killed to release its journal.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// The page of a ring and the port of the guest, as they were introduced.
type Introduced = BTreeMap<DomId, (u64, Option<u32>)>;

/// What was recovered from a journal.
pub(crate) struct Recovered {
    pub(crate) engine: Engine,
    pub(crate) state: State,
}

/// Recovers the newest usable journal in `dir`. Returns `None` if there is none; the reason is logged.
///
/// # Errors
///
/// Fails if the process that writes the journal is still running.
pub(crate) fn recover(dir: &Path, config: &Config) -> Result<Option<Recovered>, RecoveryError> {
    let begun = Instant::now();
    for number in numbers(dir) {
        let path = segment_file(dir, number);
        let journal = match own_file::open(&path, Access::Read, Others::None) {
            Ok(journal) => journal,
            Err(error) => {
                warn!(journal = %path.display(), %error, "this journal is not read");
                continue;
            }
        };
        lock(&journal).map_err(|error| lock_error(&path, &journal, error))?;
        match recover_segment(&path, journal, config, begun) {
            Ok(recovered) => return Ok(Some(recovered)),
            Err(error) => {
                warn!(journal = %path.display(), reason = %error, "nothing can be made of this journal");
            }
        }
    }
    Ok(None)
}

/// Locks a journal. A killed process takes a moment to release its lock.
fn lock(journal: &File) -> io::Result<()> {
    let deadline = Instant::now() + LOCK_LIMIT;
    loop {
        match mapped_file::lock(journal) {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline =>
            {
                std::thread::sleep(LOCK_LIMIT / 500);
            }
            result => return result,
        }
    }
}

/// Recovers one journal. If that panics, it is tried again without the deferred work of the engine.
fn recover_segment(
    path: &Path,
    journal: File,
    config: &Config,
    begun: Instant,
) -> Result<Recovered, RecoveryError> {
    let segment = SegmentReader::open(journal, &boot_id())?;
    let attempt = |drop_work| {
        no_panic(|| {
            let recovery = Recovery::replay(config, &segment)?;
            finish(path, recovery, &segment, begun, drop_work)
        })
    };
    match attempt(false) {
        Err(RecoveryError::Panic) => attempt(true),
        result => result,
    }
}

/// Turns a panic into an error.
pub(crate) fn no_panic<T>(
    run: impl FnOnce() -> Result<T, RecoveryError>,
) -> Result<T, RecoveryError> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or(Err(RecoveryError::Panic))
}

/// Refuses a poison input and executes the deferred work. That is dropped if `drop_work` is set or if
/// it is poison.
fn finish(
    path: &Path,
    mut recovery: Recovery,
    segment: &SegmentReader,
    begun: Instant,
    drop_work: bool,
) -> Result<Recovered, RecoveryError> {
    let records = recovery.records;
    recovery.refuse_interrupted(|input| poison::note_input(path, input))?;
    let has_work = recovery.engine.has_work();
    if has_work && (drop_work || poison::note_work(path)) {
        error!(
            "deferred work is dropped, since recoveries end in it: events are lost, and nodes of \
             dead domains may stay; if the process was killed for its memory, raise the limit; please \
             report it"
        );
        recovery.refuse(&Input::Work { budget: u32::MAX })?;
    }
    let (engine, state) = recovery.finish()?;
    if has_work {
        poison::forget_work(path);
    }
    engine.check()?;
    if segment.is_damaged() {
        error!("the end of the journal is damaged: what was done last is lost");
    }
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    let rings = state.connections.len();
    info!(records, rings, ms, "the last process ended unexpectedly: recovered its journal");
    Ok(Recovered { engine, state })
}

/// An engine that is being restored.
pub(super) struct Recovery {
    pub(super) engine: Engine,
    /// Where the connections of domains are.
    rings: BTreeMap<ConnId, ConnectionIo>,
    introduced: Introduced,
    /// The latest time that the engine has got.
    now: Millis,
    /// Number of records that were executed.
    records: u64,
    /// The record of the last input, if it was not executed.
    pub(super) interrupted: Option<Vec<u8>>,
    config: Config,
}

impl Recovery {
    /// Restores the engine from a snapshot and the records that follow it.
    pub(super) fn replay(
        config: &Config,
        segment: &SegmentReader,
    ) -> Result<Recovery, RecoveryError> {
        match Recovery::replay_first(config, segment, usize::MAX) {
            // Records that belong to the last input may be among what is lost.
            Err(_) if segment.is_damaged() => {
                let count = segment.records().count().saturating_sub(1);
                Recovery::replay_first(config, segment, count)
            }
            result => result,
        }
    }

    /// Executes the first `count` records only.
    fn replay_first(
        config: &Config,
        segment: &SegmentReader,
        count: usize,
    ) -> Result<Recovery, RecoveryError> {
        let release = |end| segment.release_snapshot(end);
        let state = State::decode_in_turn(segment.snapshot(), release)?;
        let mut recovery = Recovery::begin(config, &state)?;
        // The nodes of the state are not needed any more.
        drop(state);
        let mut records = segment.records().take(count).peekable();
        while let Some((body, executed)) = records.next() {
            let record = Record::parse(body).ok_or(RecoveryError::UnknownRecord)?;
            if !executed {
                // Only the last input can have been interrupted.
                if matches!(record, Record::Input(_)) && records.peek().is_none() {
                    recovery.interrupted = Some(body.to_vec());
                }
                break;
            }
            let next = records.peek().and_then(|(body, _)| Record::parse(body));
            recovery.step(&record, next.as_ref())?;
            recovery.records += 1;
        }
        Ok(recovery)
    }

    fn begin(config: &Config, state: &State) -> Result<Recovery, RecoveryError> {
        let (engine, _) = Engine::restore(config, state)?;
        let mut recovery = Recovery {
            engine,
            rings: BTreeMap::new(),
            introduced: Introduced::new(),
            now: clock(state),
            records: 0,
            interrupted: None,
            config: *config,
        };
        for connection in &state.connections {
            let Caller::Domain(domid) = connection.caller else { continue };
            let io = &connection.io;
            recovery.rings.insert(connection.id, ConnectionIo::of_snapshot(io));
            recovery.introduced.insert(domid, (io.gfn.unwrap_or(0), io.remote_port));
        }
        Ok(recovery)
    }

    /// Executes one record. Replies of the hypervisor, and whether an input was refused, are in the `next`
    /// record.
    fn step(
        &mut self,
        record: &Record<'_>,
        next: Option<&Record<'_>>,
    ) -> Result<(), RecoveryError> {
        match record {
            Record::Input(input) if next == Some(&Record::Refused) => self.refuse(input)?,
            Record::Input(input) => {
                let replies = match next {
                    Some(Record::HostReplies(replies)) => replies,
                    _ => &[][..],
                };
                self.execute(input, replies)?;
            }
            Record::Unread { conn, bytes } => {
                self.ring(*conn).set_unread(bytes);
            }
            Record::Zeroed { conn, unsent } => self.ring(*conn).zeroed(*unsent),
            Record::ReplaceReply { conn, withheld, bytes } => {
                if let Some(ring) = self.rings.get_mut(conn) {
                    ring.withdraw(*withheld);
                    ring.queue(bytes);
                }
            }
            // Handled with the input before.
            Record::HostReplies(_) | Record::Refused => {}
        }
        Ok(())
    }

    fn execute(&mut self, input: &Input<'_>, replies: &[u8]) -> Result<(), RecoveryError> {
        let mut out = Vec::new();
        let mut host = Replayed { commands: UpdatableHost::COMMANDS, ..Replayed::new(replies) };
        let executed = self.engine.apply(input, &mut host, &mut out).executed;
        if host.astray {
            return Err(RecoveryError::MissingReplies);
        }
        match input {
            Input::Requests { conn, now, frames } => {
                self.now = self.now.max(*now);
                self.answered(*conn, &frames[..executed], &out);
            }
            Input::Events { conn, .. } => {
                if let Some(ring) = self.rings.get_mut(conn) {
                    ring.queue(&out);
                }
            }
            Input::Connect(Caller::Domain(_)) => {
                let conns = self.engine.connections();
                let new = conns.last().filter(|conn| !self.rings.contains_key(conn));
                self.rings.extend(new.map(|conn| (*conn, ConnectionIo::new_ring())));
            }
            Input::Restart(conn) => drop(self.rings.insert(*conn, ConnectionIo::new_ring())),
            Input::Disconnect(conn) => drop(self.rings.remove(conn)),
            _ => {}
        }
        // INTRODUCE empties the page of a ring.
        for (domid, Gfn(gfn), EvtchnPort(port)) in host.introduced {
            self.introduced.insert(domid, (gfn, Some(port)));
            for (conn, ring) in &mut self.rings {
                if self.engine.caller(*conn) == Some(Caller::Domain(domid)) {
                    *ring = ConnectionIo::new_ring();
                }
            }
        }
        while let Some(ended) = self.engine.pop_closed() {
            self.rings.remove(&ended);
        }
        Ok(())
    }

    /// Refuses the last input if it was not executed and `is_poison` returns true for it. Returns true if
    /// it is refused.
    pub(super) fn refuse_interrupted(
        &mut self,
        is_poison: impl FnOnce(Option<&Input<'_>>) -> bool,
    ) -> Result<bool, RecoveryError> {
        let record = self.interrupted.take();
        let input = record.as_deref().and_then(Input::parse);
        let input = if is_poison(input.as_ref()) { input } else { None };
        input.map_or(Ok(()), |input| self.refuse(&input))?;
        Ok(input.is_some())
    }

    /// Refuses an input, in recovery and in the running server alike:
    ///
    /// * A request gets the reply EIO.
    /// * A new connection is not made. Events stay queued, and the server ends their connection. A change
    ///   of domains has no effect.
    /// * Deferred work is dropped: events are lost, and nodes of a dead domain may stay.
    /// * A connection that ends is removed from the state, and one that restarts is reset there, without
    ///   running the code that failed.
    pub(super) fn refuse(&mut self, input: &Input<'_>) -> Result<(), RecoveryError> {
        match input {
            Input::Requests { conn, frames, .. } => {
                let header = frames.first_chunk().map(Header::parse).unwrap_or_default();
                let mut out = Vec::new();
                Reply::Error(Errno::Eio).emit(&header, &mut out);
                self.answered(*conn, frames, &out);
            }
            // A state does not contain deferred work.
            Input::Work { .. } => self.restore(&self.engine.dump())?,
            Input::Connect(_) | Input::Events { .. } | Input::DomainsChanged => {}
            Input::Disconnect(conn) => {
                self.change_state(|all| all.retain(|connection| connection.id != *conn))?;
                self.rings.remove(conn);
            }
            Input::Restart(conn) => {
                self.change_state(|all| {
                    let connection = all.iter_mut().find(|connection| connection.id == *conn);
                    if let Some(connection) = connection {
                        *connection = ConnectionState::new(*conn, connection.caller);
                    }
                })?;
                self.rings.insert(*conn, ConnectionIo::new_ring());
            }
        }
        Ok(())
    }

    /// Restores the engine from its state with changed connections.
    fn change_state(
        &mut self,
        change: impl FnOnce(&mut Vec<ConnectionState>),
    ) -> Result<(), RecoveryError> {
        self.engine.finish_work();
        let mut state = self.engine.dump();
        change(&mut state.connections);
        self.restore(&state)
    }

    fn restore(&mut self, state: &State) -> Result<(), RecoveryError> {
        (self.engine, _) = Engine::restore(&self.config, state)?;
        Ok(())
    }

    fn ring(&mut self, conn: ConnId) -> &mut ConnectionIo {
        self.rings.entry(conn).or_insert_with(ConnectionIo::new_ring)
    }

    fn answered(&mut self, conn: ConnId, requests: &[u8], replies: &[u8]) {
        if let Some(ring) = self.rings.get_mut(&conn) {
            ring.executed(requests, replies);
        }
    }

    /// Returns the domain whose ring a connection is.
    fn domid(&self, conn: ConnId) -> Option<DomId> {
        match self.engine.caller(conn)? {
            Caller::Domain(domid) => Some(domid),
            Caller::Socket => None,
        }
    }

    /// Ends the connections of sockets, which have ended with the process, and begins those of domains
    /// that were introduced and not connected yet. Returns the engine and its state.
    fn finish(mut self) -> Result<(Engine, State), RecoveryError> {
        self.end_sockets()?;
        self.engine.finish_work();
        let domains: Vec<_> = self.engine.dump().domains;
        let served: BTreeSet<DomId> =
            self.engine.connections().into_iter().filter_map(|conn| self.domid(conn)).collect();
        for domain in domains.iter().filter(|domain| domain.introduced) {
            let domid = domain.domid;
            if !served.contains(&domid) && self.introduced.contains_key(&domid) {
                let conn = self.engine.connect(Caller::Domain(domid));
                self.rings.insert(conn, ConnectionIo::new_ring());
            }
        }
        for (domid, (_, port)) in &mut self.introduced {
            *port = port.or_else(|| port_in_store(&mut self.engine, *domid));
        }
        let mut state = self.engine.dump();
        state.io.other = self.now.to_le_bytes().to_vec();
        for connection in &mut state.connections {
            let Caller::Domain(domid) = connection.caller else { continue };
            let introduced = self.introduced.get(&domid);
            let ring = self.rings.remove(&connection.id).unwrap_or_else(ConnectionIo::new_ring);
            connection.io = ConnectionIo {
                gfn: introduced.map(|(gfn, _)| *gfn),
                remote_port: introduced.and_then(|(_, port)| *port),
                ..ring
            };
        }
        Ok((self.engine, state))
    }

    /// Ends the connections of sockets. If that panics, removes them from the state instead.
    fn end_sockets(&mut self) -> Result<(), RecoveryError> {
        let is_socket = |caller| caller == Caller::Socket;
        let mut before = self.engine.dump();
        let sockets = before.connections.iter().filter(|known| is_socket(known.caller));
        let ended = catch_unwind(AssertUnwindSafe(|| {
            sockets.for_each(|known| self.engine.disconnect(known.id));
        }));
        if ended.is_err() {
            error!(
                "panic while ending the connections of sockets: they are left out; please report it"
            );
            before.connections.retain(|known| !is_socket(known.caller));
            self.restore(&before)?;
        }
        Ok(())
    }
}

/// Returns the port of a domain as its builder has written it into the store. A daemon other than this
/// one does not pass it on.
fn port_in_store(engine: &mut Engine, domid: DomId) -> Option<u32> {
    let payload = format!("/local/domain/{domid}/store/port\0");
    let len = u32::try_from(payload.len()).ok()?;
    let header = Header { ty: Operation::Read.as_wire(), len, ..Header::default() };
    let (conn, mut out) = (engine.connect(Caller::Socket), Vec::new());
    let mut host = Replayed::new(&[]);
    let frame = Frame { header, payload: payload.as_bytes() };
    let _ = engine.request(conn, &frame, 0, &mut host, &mut out);
    engine.disconnect(conn);
    std::str::from_utf8(out.get(HEADER_LEN..)?).ok()?.parse().ok()
}

/// Returns the time of the clock, in milliseconds, in the snapshot of a journal.
pub(crate) fn clock(state: &State) -> Millis {
    state.io.other.as_slice().try_into().map_or(0, Millis::from_le_bytes)
}
