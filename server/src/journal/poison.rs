//! Poison inputs: inputs of any kind in which processes end.
//!
//! After a crash, the next process records each of its first [`WRITE_AHEAD_INPUTS`] inputs before it
//! executes it (write-ahead mode). So recovery knows in which input a process ended. A note beside the
//! journal counts how often that was the same one. After [`TRIES`] times the input is set aside: it is
//! refused like one that panics (`recovery.rs`), and so is every input with the same key in write-ahead mode.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use tracing::{error, warn};
use xenstore_protocol::{Header, Operation};
use xenstore_store::{ConnId, Input};
use xenstore_sys::crash;
use xenstore_sys::own_file::{self, Access, Others};

use crate::log::GUEST;

/// How often processes in write-ahead mode end in the same input before it is set aside. A process that
/// is killed right after recovery ends in its first input; twice in the same one can be chance.
pub(super) const TRIES: u8 = 4;

/// Inputs that a process executes in write-ahead mode after a crash: more than the requests that can
/// wait in 1,000 rings, one of which may have ended the previous process.
pub(super) const WRITE_AHEAD_INPUTS: u32 = 1 << 17;

/// The input in which the last processes have ended.
#[derive(Debug, Default)]
struct Note {
    /// Name of the last journal in which that was found. A process that ended during recovery has not
    /// executed the input again.
    journal: Vec<u8>,
    times: u8,
    /// See [`key`].
    key: Vec<u8>,
}

fn note_file(dir: &Path) -> PathBuf {
    dir.join("journal-suspect")
}

/// An input as bytes, without the parts that differ each time: a tool that repeats a request has another
/// connection.
fn key(input: &Input<'_>) -> Vec<u8> {
    let mut key = Vec::new();
    match *input {
        Input::Requests { frames, .. } => Input::Requests { conn: ConnId(0), now: 0, frames },
        other => other,
    }
    .emit(&mut key);
    key
}

/// An input in readable form.
fn describe(input: &Input<'_>) -> String {
    let Input::Requests { conn, frames, .. } = input else { return format!("{input:?}") };
    let header = frames.first_chunk().map(Header::parse).unwrap_or_default();
    let operation = Operation::from_wire(header.ty).map_or("?", Operation::name);
    format!("{operation} of connection {conn}, {header:?}")
}

impl Note {
    fn read(dir: &Path) -> Option<Note> {
        let bytes = read(&note_file(dir)).ok()?;
        let mut parts = bytes.splitn(3, |byte| *byte == 0);
        let (journal, times, key) = (parts.next()?, parts.next()?, parts.next()?);
        let times = std::str::from_utf8(times).ok()?.parse().ok()?;
        Some(Note { journal: journal.into(), times, key: key.into() })
    }

    fn write(&self, dir: &Path) -> io::Result<()> {
        let times = self.times.to_string();
        let parts = [&self.journal, &b"\0"[..], times.as_bytes(), b"\0", &self.key];
        write_anew(&note_file(dir), &parts.concat())
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    own_file::open(path, Access::Read, Others::None)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a new file that only the owner can read: an input may contain a secret value.
fn write_anew(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let _ = std::fs::remove_file(path);
    own_file::create(path)?.write_all(bytes)
}

fn work_file(dir: &Path) -> PathBuf {
    dir.join("journal-work")
}

/// To be called before a recovery from this journal does the deferred work of the engine, which has no
/// record. Returns true if the work is to be dropped, because [`TRIES`] recoveries have ended in it.
pub(super) fn try_work(journal: &Path) -> bool {
    let dir = journal.parent().unwrap_or(journal);
    let name = journal.file_name().unwrap_or_default().as_encoded_bytes();
    // One byte for each try, after the name.
    let mut tried = read(&work_file(dir)).unwrap_or_default();
    if tried.strip_prefix(name).is_none_or(|tries| tries.iter().any(|byte| *byte != 0)) {
        tried = name.to_vec();
    }
    let tries = tried.len() - name.len();
    tried.push(0);
    if crash::point()
        && let Err(error) = write_anew(&work_file(dir), &tried)
    {
        error!(dir = %dir.display(), %error, "cannot note that deferred work is begun");
    }
    tries >= TRIES.into()
}

/// That recovery is complete.
pub(super) fn work_is_done(journal: &Path) {
    if crash::point() {
        let _ = std::fs::remove_file(work_file(journal.parent().unwrap_or(journal)));
    }
}

/// Notes in which input the process ended that wrote this journal. Returns true if the input is to be set
/// aside.
pub(super) fn note(journal: &Path, interrupted: Option<&Input<'_>>) -> bool {
    let dir = journal.parent().unwrap_or(journal);
    let Some(input) = interrupted else {
        if crash::point() {
            let _ = std::fs::remove_file(note_file(dir));
        }
        return false;
    };
    let name = journal.file_name().unwrap_or_default().as_encoded_bytes().to_vec();
    let key = key(input);
    let known = Note::read(dir).filter(|known| known.key == key).unwrap_or_default();
    let times = known.times.saturating_add(u8::from(known.journal != name));
    let what = describe(input);
    warn!(input = what, times, limit = TRIES, "the process ended while it executed this input");
    let note = Note { journal: name, times, key };
    if crash::point()
        && let Err(error) = note.write(dir)
    {
        error!(dir = %dir.display(), %error, "cannot note at which input the process ended");
    }
    if times >= TRIES {
        error!(
            input = what,
            times,
            "this input is set aside: it is refused, and those like it for the next {WRITE_AHEAD_INPUTS} \
             inputs; if the process was killed for its memory, raise the limit; please report it"
        );
    }
    times >= TRIES
}

/// The key of the input that has been set aside, if any.
pub(super) fn set_aside(dir: &Path) -> Option<Vec<u8>> {
    Note::read(dir).filter(|note| note.times >= TRIES).map(|note| note.key)
}

/// Returns true if this input is refused because it has the key of the one that was set aside. The end
/// and the restart of a connection are not refused: setting the input aside has done that already. A
/// new connection is refused once: all clients of the socket have the same key.
pub(super) fn is_like(aside: &mut Option<Vec<u8>>, input: &Input<'_>) -> bool {
    let is_once = match input {
        Input::Disconnect(_) | Input::Restart(_) | Input::Work { .. } => return false,
        Input::Connect(_) => true,
        Input::Requests { .. } | Input::Events { .. } | Input::DomainsChanged => false,
    };
    let is_like = aside.as_ref().is_some_and(|aside| *aside == key(input));
    if is_like {
        error!(target: GUEST, input = describe(input), "this input is refused: processes have ended in it");
    }
    if is_like && is_once {
        *aside = None;
    }
    is_like
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use xenstore_protocol::stream::Sink;
    use xenstore_protocol::{DomId, HEADER_LEN};
    use xenstore_store::{Caller, Config, Engine, State};

    use super::super::tests::panics::log_of;
    use super::super::tests::{Kept, Machine, frame, kept};
    use super::super::{Journal, recover};
    use super::*;
    use crate::clock::Clock;
    use crate::server::{Failed, Server};

    /// A server with a guest that has a watch, for which an event waits, and its connection.
    fn with_guest() -> (Kept, ConnId) {
        let kept = kept();
        kept.ask(Operation::Introduce, "1|7|8|");
        kept.ask(Operation::Write, "/local/domain/1|");
        kept.ask(Operation::SetPerms, "/local/domain/1|n1|");
        let conn = kept.server.connect(Caller::Domain(DomId(1))).unwrap();
        kept.turn(conn, &[(Operation::Watch, 0, "/local/domain/1|t|")]);
        kept.ask(Operation::Write, "/local/domain/1/a|");
        (kept, conn)
    }

    fn begin(dir: &Path, state: &State) -> Journal {
        let write = |sink: &mut Sink<'_>| state.encode_to(sink);
        Journal::begin(dir.to_owned(), &Config::default(), true, write)
    }

    /// Lets `times` processes begin with this state and end in this input. Returns the last state.
    fn end_in(dir: &Path, mut state: State, input: &Input<'_>, times: u8) -> State {
        for _ in 0..times {
            begin(dir, &state).input(input);
            state = recover(dir, &Config::default()).unwrap().unwrap().state;
        }
        state
    }

    fn guest(state: &State, conn: ConnId) -> Option<(usize, usize)> {
        let found = state.connections.iter().find(|connection| connection.id == conn)?;
        Some((found.watches.len(), found.events()))
    }

    // Fails if an input of any kind in which processes end is executed for ever, or is set aside too
    // early; if a request of a ring gets no reply, or a connection does not end or restart; or if other
    // users can read the note.
    #[test]
    fn an_input_at_which_processes_end_is_set_aside() {
        let write = frame(Operation::Write, 0, "/local/domain/1/b|x");
        let (kept, conn) = with_guest();
        let state = kept.server.with(|engine, _| engine.dump());
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
            let before = end_in(dir.path(), state.clone(), &input, TRIES - 1);
            assert_eq!(set_aside(dir.path()), None, "{input:?}");
            assert_eq!(guest(&before, conn), Some((1, 1)), "{input:?}");
            let after = end_in(dir.path(), before, &input, 1);
            assert_eq!(set_aside(dir.path()), Some(key(&input)));
            let mode = std::fs::metadata(note_file(dir.path())).unwrap().permissions().mode();
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
                assert_eq!(io.output, [&answer.emit()[..], b"EIO\0"].concat());
                assert_eq!(io.indices, Some((u32::try_from(HEADER_LEN + 19).unwrap(), 0)));
            }
            // The end of a process in another input, or in none, resets the count.
            let other = Input::Disconnect(ConnId(77));
            end_in(dir.path(), after, &other, 1);
            assert_eq!(set_aside(dir.path()), None, "{input:?}");
        }
    }

    /// The server after processes have ended in this input, and the input has been set aside.
    fn after(poison: &Input<'_>) -> (Kept, ConnId) {
        let (kept, conn) = with_guest();
        let (dir, config) = (tempfile::tempdir().unwrap(), Config::default());
        let state = kept.server.with(|engine, _| engine.dump());
        let state = end_in(dir.path(), state, poison, TRIES);
        let (engine, _) = Engine::restore(&config, &state).unwrap();
        let server = Server::with_engine(engine, Machine::default(), Clock::Manual(5.into()));
        (Kept { server: server.journaled(Some(begin(dir.path(), &state))), dir }, conn)
    }

    // Fails if a process that ends in what a recovery does of deferred work comes to it for ever, drops it
    // too early, or drops that of another journal.
    #[test]
    fn deferred_work_in_which_recoveries_end_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = [1, 2].map(|number| dir.path().join(format!("journal.{number}")));
        for journal in [&one, &two] {
            for _ in 0..TRIES {
                assert!(!try_work(journal));
            }
            assert!(try_work(journal));
        }
        assert!(!try_work(&one));
        work_is_done(&one);
        for _ in 0..TRIES {
            assert!(!try_work(&one));
        }
    }

    // Fails if a recovery after that does the work, or leaves a store that is damaged; or if one before
    // does not do it.
    #[test]
    fn a_recovery_can_do_without_deferred_work() {
        for tries in [0, TRIES] {
            let (kept, _) = with_guest();
            kept.ask(Operation::SetQuota, "1|nodes|100000|");
            kept.ask(Operation::SetQuota, "1|memory|100000000|");
            for at in 0..10_000 {
                let reply = kept.ask(Operation::Write, &format!("/local/domain/1/{at}|"));
                assert_eq!(reply, "OK|");
            }
            assert_eq!(kept.ask(Operation::Release, "1|"), "OK|");
            let Kept { server, dir } = kept;
            assert!(server.with(|engine, _| engine.has_work()));
            drop(server);
            let journal = super::super::file(dir.path(), super::super::numbers(dir.path())[0]);
            assert!((0..tries).all(|_| !try_work(&journal)));
            let log = log_of(|| {
                let engine = recover(dir.path(), &Config::default()).unwrap().unwrap().engine;
                assert!(!engine.has_work() && !work_file(dir.path()).exists());
                engine.check().unwrap();
            });
            assert_eq!(log.contains("deferred work is dropped"), tries == TRIES, "{log}");
        }
    }

    // Fails if the server after that carries such an input out when it comes again, refuses any other, or
    // refuses clients for ever; or if the next process does not know what was refused.
    #[test]
    fn an_input_like_it_is_refused_when_it_comes_again() {
        let write = frame(Operation::Write, 0, "/a|poison");
        let poisons = [
            Input::Requests { conn: ConnId(7), now: 1, frames: &write },
            Input::Connect(Caller::Socket),
            Input::DomainsChanged,
        ];
        for poison in poisons {
            let (kept, conn) = after(&poison);
            let first = kept.ask(Operation::Write, "/a|poison");
            let is_refused = matches!(poison, Input::Requests { .. } | Input::Connect(_));
            assert_eq!(first == "EIO|", is_refused, "{poison:?}: {first}");
            assert_eq!(kept.ask(Operation::Write, "/a|fine"), "OK|");
            // All domains are gone.
            kept.server.domains_changed();
            let is_there = kept.server.with(|engine, _| engine.is_connected(conn));
            assert_eq!(is_there, poison == Input::DomainsChanged);
            kept.is_exact();
        }
    }

    // Fails if events that are set aside are offered to the same connection for ever.
    #[test]
    fn events_that_are_set_aside_are_the_end_of_their_connection() {
        let limit = u32::try_from(xenstore_protocol::server::Connection::HIGH_WATER).unwrap();
        let (_, conn) = with_guest();
        let (kept, conn) = after(&Input::Events { conn, limit });
        let mut out = Vec::new();
        assert_eq!(kept.server.emit_events(conn, &mut out), Err(Failed::Refused));
        assert_eq!(out, []);
        kept.server.restart(conn);
        assert_eq!(kept.server.emit_events(conn, &mut out), Ok(false));
        kept.is_exact();
    }
}
