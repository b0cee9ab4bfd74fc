//! Poison inputs: inputs of any kind in which processes end.
//!
//! An input that panics is refused at once ([`Journal::rebuild`](super::Journal::rebuild)). An input that
//! ends the process is found by recovery. After a crash, the next process records each of its first
//! [`WRITE_AHEAD_INPUTS`] inputs before it executes it (write-ahead mode), so that recovery knows the
//! input in which a process has ended. A note beside the journal counts consecutive ends in the same
//! input. After [`MAX_ENDS`] it is poison: [`Recovery::refuse`](super::recovery::Recovery::refuse)
//! refuses it, and [`is_like`] every input with the same key in write-ahead mode. Deferred work that
//! recovery executes has no record; a second note counts the recoveries that have begun it.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use tracing::{error, warn};
use xenstore_protocol::Header;
use xenstore_store::{ConnId, Input};
use xenstore_sys::crash;
use xenstore_sys::own_file::{self, Access, Others};

use crate::log::GUEST;

/// Number of processes in write-ahead mode that end in the same input before it is poison. A process
/// that is killed right after recovery ends in its first input; two ends in the same one can be chance.
const MAX_ENDS: u8 = 4;

/// Inputs that a process executes in write-ahead mode after a crash: more than the requests that can
/// wait in 1,000 rings, one of which may have ended the previous process.
pub(super) const WRITE_AHEAD_INPUTS: u32 = 1 << 17;

/// The input in which the last processes have ended.
#[derive(Debug, Default)]
struct Note {
    /// Name of the last segment in which it was found. A process that ends during recovery has not
    /// executed the input again.
    segment: Vec<u8>,
    ends: u8,
    /// See [`key`].
    key: Vec<u8>,
}

fn input_note(dir: &Path) -> PathBuf {
    dir.join("journal-suspect")
}

fn work_note(dir: &Path) -> PathBuf {
    dir.join("journal-work")
}

/// Returns an input as bytes, without the parts that differ each time: a tool that repeats a request has
/// another connection.
fn key(input: &Input<'_>) -> Vec<u8> {
    let mut key = Vec::new();
    match *input {
        Input::Requests { frames, .. } => Input::Requests { conn: ConnId(0), now: 0, frames },
        other => other,
    }
    .emit(&mut key);
    key
}

/// Returns an input in readable form.
fn describe(input: &Input<'_>) -> String {
    let Input::Requests { conn, frames, .. } = input else { return format!("{input:?}") };
    let header = frames.first_chunk().map(Header::parse).unwrap_or_default();
    let operation = header.operation_name();
    format!("{operation} of connection {conn}, {header:?}")
}

impl Note {
    fn read(dir: &Path) -> Option<Note> {
        let bytes = read(&input_note(dir)).ok()?;
        let mut parts = bytes.splitn(3, |byte| *byte == 0);
        let (segment, ends, key) = (parts.next()?, parts.next()?, parts.next()?);
        let ends = std::str::from_utf8(ends).ok()?.parse().ok()?;
        Some(Note { segment: segment.into(), ends, key: key.into() })
    }

    fn emit(&self) -> Vec<u8> {
        let ends = self.ends.to_string();
        [&self.segment, &b"\0"[..], ends.as_bytes(), b"\0", &self.key].concat()
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    own_file::open(path, Access::Read, Others::None)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Replaces a note. Only the owner can read it: an input may contain a secret value.
fn write(path: &Path, bytes: &[u8]) {
    let replace = || -> io::Result<()> {
        let _ = std::fs::remove_file(path);
        own_file::create(path)?.write_all(bytes)
    };
    if crash::point()
        && let Err(error) = replace()
    {
        error!(note = %path.display(), %error, "cannot write the note that attributes the end of the process to an input");
    }
}

fn remove(path: &Path) {
    if crash::point() {
        let _ = std::fs::remove_file(path);
    }
}

/// Splits the path of a segment into its directory and its name.
fn split(segment: &Path) -> (&Path, &[u8]) {
    let name = segment.file_name().unwrap_or_default().as_encoded_bytes();
    (segment.parent().unwrap_or(segment), name)
}

/// Notes the input in which the process ended that wrote this segment. Returns true if the input is
/// poison.
pub(super) fn note_input(segment: &Path, interrupted: Option<&Input<'_>>) -> bool {
    let (dir, name) = split(segment);
    let Some(input) = interrupted else {
        remove(&input_note(dir));
        return false;
    };
    let key = key(input);
    let known = Note::read(dir).filter(|known| known.key == key).unwrap_or_default();
    let ends = known.ends.saturating_add(u8::from(known.segment != name));
    let what = describe(input);
    warn!(
        input = what,
        times = ends,
        limit = MAX_ENDS,
        "the process ended while it executed this input"
    );
    write(&input_note(dir), &Note { segment: name.to_vec(), ends, key }.emit());
    let is_poison = ends >= MAX_ENDS;
    if is_poison {
        error!(
            input = what,
            times = ends,
            "this input is set aside: it is refused, and those like it for the next \
             {WRITE_AHEAD_INPUTS} inputs; if the process was killed for its memory, raise the limit; \
             please report it"
        );
    }
    is_poison
}

/// Must be called before recovery from this segment executes the deferred work of the engine. Returns
/// true if the work is poison: [`MAX_ENDS`] recoveries have ended in it.
pub(super) fn note_work(segment: &Path) -> bool {
    let (dir, name) = split(segment);
    // The name of the segment, and a zero byte for each recovery.
    let mut note = read(&work_note(dir)).unwrap_or_default();
    if note.strip_prefix(name).is_none_or(|ends| ends.iter().any(|byte| *byte != 0)) {
        note = name.to_vec();
    }
    let ends = note.len() - name.len();
    note.push(0);
    write(&work_note(dir), &note);
    ends >= MAX_ENDS.into()
}

/// Must be called when recovery has executed or dropped the deferred work.
pub(super) fn forget_work(segment: &Path) {
    remove(&work_note(split(segment).0));
}

/// Returns the key of the poison input, if there is one.
pub(super) fn key_of_poison(dir: &Path) -> Option<Vec<u8>> {
    Note::read(dir).filter(|note| note.ends >= MAX_ENDS).map(|note| note.key)
}

/// Returns true if this input is refused because it has the key of the poison input. The end and the
/// restart of a connection are not refused: recovery has done that already. A new connection is refused
/// once: all clients of the socket have the same key.
pub(super) fn is_like(poison: &mut Option<Vec<u8>>, input: &Input<'_>) -> bool {
    let is_once = match input {
        Input::Disconnect(_) | Input::Restart(_) | Input::Work { .. } => return false,
        Input::Connect(_) => true,
        Input::Requests { .. } | Input::Events { .. } | Input::DomainsChanged => false,
    };
    let is_like = poison.as_ref().is_some_and(|poison| *poison == key(input));
    if is_like {
        error!(target: GUEST, input = describe(input), "this input is refused: processes have ended in it");
    }
    if is_like && is_once {
        *poison = None;
    }
    is_like
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use xenstore_protocol::stream::Sink;
    use xenstore_protocol::{DomId, HEADER_LEN, Operation};
    use xenstore_store::{Caller, Config, Engine, State};

    use super::super::tests::panics::log_of;
    use super::super::tests::{Fixture, TestHost, fixture, frame};
    use super::super::{Journal, recover};
    use super::*;
    use crate::serve::{Clock, Failed, Server};

    /// Returns a server with a guest that has a watch and a queued event, and the guest's connection.
    fn with_guest() -> (Fixture, ConnId) {
        let fixture = fixture();
        fixture.ask(Operation::Introduce, "1|7|8|");
        fixture.ask(Operation::Write, "/local/domain/1|");
        fixture.ask(Operation::SetPerms, "/local/domain/1|n1|");
        let conn = fixture.server.connect(Caller::Domain(DomId(1))).unwrap();
        fixture.turn(conn, &[(Operation::Watch, 0, "/local/domain/1|t|")]);
        fixture.ask(Operation::Write, "/local/domain/1/a|");
        (fixture, conn)
    }

    fn begin(dir: &Path, state: &State) -> Journal {
        let write = |sink: &mut Sink<'_>| state.encode_to(sink);
        Journal::begin(dir.to_owned(), &Config::default(), true, write)
    }

    /// Runs `times` processes that begin with this state and end in this input. Returns the last state.
    fn end_in(dir: &Path, mut state: State, input: &Input<'_>, times: u8) -> State {
        for _ in 0..times {
            begin(dir, &state).begin_input(input);
            state = recover(dir, &Config::default()).unwrap().unwrap().state;
        }
        state
    }

    fn guest(state: &State, conn: ConnId) -> Option<(usize, usize)> {
        let found = state.connections.iter().find(|connection| connection.id == conn)?;
        Some((found.watches.len(), found.events()))
    }

    // Fails if an input of any kind in which processes end is executed for ever, or is refused too early; if
    // a request of a ring gets no reply, or a connection does not end or restart; or if other users can
    // read the note.
    #[test]
    fn an_input_in_which_4_processes_end_is_refused() {
        let write = frame(Operation::Write, 0, "/local/domain/1/b|x");
        let (fixture, conn) = with_guest();
        let state = fixture.server.with(|engine, _| engine.dump());
        let inputs = [
            Input::Requests { conn, now: 1, frames: &write },
            Input::Connect(Caller::Domain(DomId(1))),
            Input::Disconnect(conn),
            Input::Restart(conn),
            Input::Events { conn, limit: 1000 },
            Input::DomainsChanged,
        ];
        for input in inputs {
            let dir = tempfile::tempdir().unwrap();
            let before = end_in(dir.path(), state.clone(), &input, MAX_ENDS - 1);
            assert_eq!(key_of_poison(dir.path()), None, "{input:?}");
            assert_eq!(guest(&before, conn), Some((1, 1)), "{input:?}");
            let after = end_in(dir.path(), before, &input, 1);
            assert_eq!(key_of_poison(dir.path()), Some(key(&input)));
            let mode = std::fs::metadata(input_note(dir.path())).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let expected = match input {
                Input::Disconnect(_) => None,
                Input::Restart(_) => Some((0, 0)),
                _ => Some((1, 1)),
            };
            assert_eq!(guest(&after, conn), expected, "{input:?}");
            if let Input::Requests { .. } = input {
                let io = &after.connections[0].io;
                let answer = Header { ty: Operation::Error.as_wire(), len: 4, ..Header::default() };
                assert_eq!(io.unsent, [&answer.emit()[..], b"EIO\0"].concat());
                assert_eq!(io.indices, Some((u32::try_from(HEADER_LEN + 19).unwrap(), 0)));
            }
            // The end of a process in another input resets the count.
            let other = Input::Disconnect(ConnId(77));
            end_in(dir.path(), after, &other, 1);
            assert_eq!(key_of_poison(dir.path()), None, "{input:?}");
        }
    }

    /// Returns a server after processes have ended in this input, which is poison now.
    fn after(poison: &Input<'_>) -> (Fixture, ConnId) {
        let (fixture, conn) = with_guest();
        let (dir, config) = (tempfile::tempdir().unwrap(), Config::default());
        let state = fixture.server.with(|engine, _| engine.dump());
        let state = end_in(dir.path(), state, poison, MAX_ENDS);
        let (engine, _) = Engine::restore(&config, &state).unwrap();
        let server = Server::with_engine(engine, TestHost::default(), Clock::Manual(5.into()));
        (Fixture { server: server.journaled(Some(begin(dir.path(), &state))), dir }, conn)
    }

    // Fails if deferred work in which recoveries end is executed for ever, or dropped too early, or if the
    // count of one journal affects another.
    #[test]
    fn deferred_work_in_which_4_recoveries_end_is_poison() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = [1, 2].map(|number| dir.path().join(format!("journal.{number}")));
        for journal in [&one, &two] {
            for _ in 0..MAX_ENDS {
                assert!(!note_work(journal));
            }
            assert!(note_work(journal));
        }
        assert!(!note_work(&one));
        forget_work(&one);
        for _ in 0..MAX_ENDS {
            assert!(!note_work(&one));
        }
    }

    // Fails if recovery executes poison work, leaves a damaged store without it, or does not execute other
    // work.
    #[test]
    fn recovery_drops_poison_work_and_executes_other_work() {
        for tries in [0, MAX_ENDS] {
            let (fixture, _) = with_guest();
            fixture.ask(Operation::SetQuota, "1|nodes|100000|");
            fixture.ask(Operation::SetQuota, "1|memory|100000000|");
            for at in 0..10_000 {
                let reply = fixture.ask(Operation::Write, &format!("/local/domain/1/{at}|"));
                assert_eq!(reply, "OK|");
            }
            assert_eq!(fixture.ask(Operation::Release, "1|"), "OK|");
            let Fixture { server, dir } = fixture;
            assert!(server.with(|engine, _| engine.has_work()));
            drop(server);
            let journal =
                super::super::files::segment_file(dir.path(), super::super::numbers(dir.path())[0]);
            assert!((0..tries).all(|_| !note_work(&journal)));
            let log = log_of(|| {
                let engine = recover(dir.path(), &Config::default()).unwrap().unwrap().engine;
                assert!(!engine.has_work() && !work_note(dir.path()).exists());
                engine.check().unwrap();
            });
            assert_eq!(log.contains("deferred work is dropped"), tries == MAX_ENDS, "{log}");
        }
    }

    // Fails if the server executes an input like the poison input, refuses any other, or refuses clients for
    // ever; or if the next process does not know what was refused.
    #[test]
    fn an_input_like_the_poison_input_is_refused() {
        let write = frame(Operation::Write, 0, "/a|poison");
        let poisons = [
            Input::Requests { conn: ConnId(7), now: 1, frames: &write },
            Input::Connect(Caller::Socket),
            Input::DomainsChanged,
        ];
        for poison in poisons {
            let (fixture, conn) = after(&poison);
            let first = fixture.ask(Operation::Write, "/a|poison");
            let is_refused = matches!(poison, Input::Requests { .. } | Input::Connect(_));
            assert_eq!(first == "EIO|", is_refused, "{poison:?}: {first}");
            assert_eq!(fixture.ask(Operation::Write, "/a|fine"), "OK|");
            // No domain exists any more.
            fixture.server.domains_changed();
            let is_there = fixture.server.with(|engine, _| engine.is_connected(conn));
            assert_eq!(is_there, poison == Input::DomainsChanged);
            fixture.assert_recoverable();
        }
    }

    // Fails if poison events are fetched again and again for the same connection.
    #[test]
    fn poison_events_end_their_connection() {
        let limit = u32::try_from(xenstore_protocol::ServerConnection::HIGH_WATER).unwrap();
        let (_, conn) = with_guest();
        let (fixture, conn) = after(&Input::Events { conn, limit });
        let mut out = Vec::new();
        assert_eq!(fixture.server.emit_events(conn, &mut out), Err(Failed::Refused));
        assert_eq!(out, []);
        fixture.server.restart(conn);
        assert_eq!(fixture.server.emit_events(conn, &mut out), Ok(false));
        fixture.assert_recoverable();
    }
}
