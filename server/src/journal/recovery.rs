//! From what a journal holds to an engine that is where the one was that wrote it.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tracing::error;
use xenstore_protocol::{DomId, Errno, EvtchnPort, Gfn, HEADER_LEN, Header, Operation, Reply};
use xenstore_store::{
    Caller, Config, ConnId, ConnectionState, Engine, Input, Millis, Replayed, State,
};

use super::record::Record;
use super::segment::SegmentReader;
use super::way::Way;
use crate::handover::UpdatableHost;

/// The page of a ring and the guest's port, as they were introduced.
pub(super) type Introduced = BTreeMap<DomId, (u64, Option<u32>)>;

/// An engine that was made again.
pub(super) struct Recovery {
    pub(super) engine: Engine,
    /// What went over the connections of domains.
    pub(super) ways: BTreeMap<ConnId, Way>,
    pub(super) introduced: Introduced,
    /// The last time that was told to the engine.
    pub(super) now: Millis,
    /// Records that were carried out again.
    pub(super) records: u64,
    /// The record of the last input, if it was not executed.
    pub(super) interrupted: Option<Vec<u8>>,
    config: Config,
}

impl Recovery {
    /// Makes the engine again. An error is one line.
    pub(super) fn of(config: &Config, left: &SegmentReader) -> Result<Recovery, String> {
        match Recovery::of_first(config, left, usize::MAX) {
            // What belonged to the last record may be among what is lost.
            Err(_) if left.is_damaged() => {
                Recovery::of_first(config, left, left.records().count().saturating_sub(1))
            }
            result => result,
        }
    }

    /// The same from so many records.
    fn of_first(config: &Config, left: &SegmentReader, count: usize) -> Result<Recovery, String> {
        let read = |end| left.set_state_aside(end);
        let state = State::decode_in_turn(left.state(), read).map_err(|error| error.to_string())?;
        let (engine, _) = Engine::restore(config, &state).map_err(|error| error.to_string())?;
        let mut replay = Recovery {
            engine,
            ways: BTreeMap::new(),
            introduced: Introduced::new(),
            now: 0,
            records: 0,
            interrupted: None,
            config: *config,
        };
        replay.begin(&state);
        // The nodes of the state are not needed any more.
        drop(state);
        let mut records = left.records().take(count).peekable();
        while let Some((body, done)) = records.next() {
            let record = Record::parse(body).ok_or("a record in it means nothing")?;
            if !done {
                // One that was being carried out is the last of all.
                if matches!(record, Record::Input(_)) && records.peek().is_none() {
                    replay.interrupted = Some(body.to_vec());
                }
                break;
            }
            let next = records.peek().and_then(|(body, _)| Record::parse(body));
            replay.step(&record, next.as_ref())?;
            replay.records += 1;
        }
        Ok(replay)
    }

    fn begin(&mut self, state: &State) {
        for connection in &state.connections {
            let Caller::Domain(domid) = connection.caller else { continue };
            let io = &connection.io;
            self.ways.insert(connection.id, Way::of(io));
            self.introduced.insert(domid, (io.gfn.unwrap_or(0), io.remote_port));
        }
        self.now = clock(state);
    }

    /// Carries out one record; the answers of the machine, and whether it was refused, come in the
    /// next.
    fn step(&mut self, record: &Record<'_>, next: Option<&Record<'_>>) -> Result<(), String> {
        let input = match record {
            Record::Input(input) => input,
            Record::LeftOver { conn, bytes } => {
                self.ways.entry(*conn).or_default().left_over(bytes);
                return Ok(());
            }
            Record::Zeroed { conn, unsent } => {
                self.ways.entry(*conn).or_default().zeroed(*unsent);
                return Ok(());
            }
            Record::Instead { conn, withheld, bytes } => {
                if let Some(way) = self.ways.get_mut(conn) {
                    way.withhold(*withheld);
                    way.made(bytes);
                }
                return Ok(());
            }
            // With the record before.
            Record::Answers(_) | Record::Refused => return Ok(()),
        };
        if next == Some(&Record::Refused) {
            return self.refuse(input);
        }
        let mut out = Vec::new();
        let answers = match next {
            Some(Record::Answers(answers)) => answers,
            _ => &[][..],
        };
        let mut host = Replayed { commands: UpdatableHost::COMMANDS, ..Replayed::new(answers) };
        let answered = self.engine.apply(input, &mut host, &mut out);
        if host.astray {
            return Err("it does not say what the machine answered".into());
        }
        match input {
            Input::Requests { conn, now, frames } => {
                self.now = self.now.max(*now);
                self.answered(*conn, &frames[..answered], &out);
            }
            Input::Events { conn, .. } => {
                if let Some(way) = self.ways.get_mut(conn) {
                    way.made(&out);
                }
            }
            Input::Connect(Caller::Domain(_)) => {
                let conns = self.engine.connections();
                let new = conns.last().filter(|conn| !self.ways.contains_key(conn));
                self.ways.extend(new.map(|conn| (*conn, Way::default())));
            }
            Input::Restart(conn) => drop(self.ways.insert(*conn, Way::default())),
            Input::Disconnect(conn) => drop(self.ways.remove(conn)),
            _ => {}
        }
        // The page of a ring that is introduced again is empty from then on.
        for (domid, Gfn(gfn), EvtchnPort(port)) in host.introduced {
            self.introduced.insert(domid, (gfn, Some(port)));
            for (conn, way) in &mut self.ways {
                if self.engine.caller(*conn) == Some(Caller::Domain(domid)) {
                    *way = Way::default();
                }
            }
        }
        while let Some(ended) = self.engine.pop_closed() {
            self.ways.remove(&ended);
        }
        Ok(())
    }

    /// Refuses an input, in recovery and in the running server alike:
    ///
    /// * A request gets the reply EIO.
    /// * A new connection is not made. Events stay queued, and the server ends their connection. A change
    ///   of domains has no effect.
    /// * Deferred work is dropped: events are lost, and nodes of a dead domain may stay.
    /// * A connection that ends is removed from the state, and one that restarts is reset there, without
    ///   running the code that failed.
    pub(super) fn refuse(&mut self, input: &Input<'_>) -> Result<(), String> {
        match input {
            Input::Requests { conn, frames, .. } => {
                let header = frames.first_chunk().map(Header::parse).unwrap_or_default();
                let mut out = Vec::new();
                Reply::Error(Errno::Eio).emit(&header, &mut out);
                self.answered(*conn, frames, &out);
            }
            // The engine whose deferred work failed is replaced by one without that work.
            Input::Work { .. } => self.drop_work()?,
            Input::Connect(_) | Input::Events { .. } | Input::DomainsChanged => {}
            Input::Disconnect(conn) => {
                self.change_state(|all| all.retain(|connection| connection.id != *conn))?;
                self.ways.remove(conn);
            }
            Input::Restart(conn) => {
                self.change_state(|all| {
                    let connection = all.iter_mut().find(|connection| connection.id == *conn);
                    if let Some(connection) = connection {
                        *connection = ConnectionState::new(*conn, connection.caller);
                    }
                })?;
                self.ways.insert(*conn, Way::default());
            }
        }
        Ok(())
    }

    /// Drops the deferred work of the engine: a state does not contain it.
    pub(super) fn drop_work(&mut self) -> Result<(), String> {
        self.restore(&self.engine.dump())
    }

    /// Restores the engine from its state with changed connections.
    fn change_state(
        &mut self,
        change: impl FnOnce(&mut Vec<ConnectionState>),
    ) -> Result<(), String> {
        self.engine.finish_work();
        let mut state = self.engine.dump();
        change(&mut state.connections);
        self.restore(&state)
    }

    fn restore(&mut self, state: &State) -> Result<(), String> {
        let made = Engine::restore(&self.config, state).map_err(|error| error.to_string())?;
        self.engine = made.0;
        Ok(())
    }

    fn answered(&mut self, conn: ConnId, requests: &[u8], answers: &[u8]) {
        if let Some(way) = self.ways.get_mut(&conn) {
            way.answered(requests, answers);
        }
    }

    /// Whose ring a connection is.
    fn domid(&self, conn: ConnId) -> Option<DomId> {
        match self.engine.caller(conn)? {
            Caller::Domain(domid) => Some(domid),
            Caller::Socket => None,
        }
    }

    /// Ends what ended with the process: connections of sockets; and begins what it had not come to:
    /// those of domains that had been introduced. The state from which to go on.
    pub(super) fn finish(mut self) -> Result<(Engine, State), String> {
        self.end_sockets()?;
        self.engine.finish_work();
        let domains: Vec<_> = self.engine.dump().domains;
        let served: BTreeSet<DomId> =
            self.engine.connections().into_iter().filter_map(|conn| self.domid(conn)).collect();
        for domain in domains.iter().filter(|domain| domain.introduced) {
            let domid = domain.domid;
            if !served.contains(&domid) && self.introduced.contains_key(&domid) {
                let conn = self.engine.connect(Caller::Domain(domid));
                self.ways.insert(conn, Way::default());
            }
        }
        for (domid, (_, port)) in &mut self.introduced {
            *port = port.or_else(|| written_port(&mut self.engine, *domid));
        }
        let mut state = self.engine.dump();
        state.io.other = self.now.to_le_bytes().to_vec();
        for connection in &mut state.connections {
            let Caller::Domain(domid) = connection.caller else { continue };
            let introduced = self.introduced.get(&domid);
            let io = &mut connection.io;
            io.gfn = introduced.map(|(gfn, _)| *gfn);
            io.remote_port = introduced.and_then(|(_, port)| *port);
            self.ways.remove(&connection.id).unwrap_or_default().put(io);
        }
        Ok((self.engine, state))
    }

    /// Ends the connections of sockets. If that panics, removes them from the state instead.
    fn end_sockets(&mut self) -> Result<(), String> {
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

/// The port of a domain as its builder has written it down, for those that another daemon has
/// introduced and not told.
fn written_port(engine: &mut Engine, domid: DomId) -> Option<u32> {
    let payload = format!("/local/domain/{domid}/store/port\0");
    let len = u32::try_from(payload.len()).ok()?;
    let header = Header { ty: Operation::Read.as_wire(), len, ..Header::default() };
    let (conn, mut out) = (engine.connect(Caller::Socket), Vec::new());
    let mut host = Replayed::new(&[]);
    let _ = engine.handle(conn, &header, payload.as_bytes(), 0, &mut host, &mut out);
    engine.disconnect(conn);
    std::str::from_utf8(out.get(HEADER_LEN..)?).ok()?.parse().ok()
}

/// What the clock said, in a state that is kept in a journal.
pub(crate) fn clock(state: &State) -> Millis {
    state.io.other.as_slice().try_into().map_or(0, Millis::from_le_bytes)
}
