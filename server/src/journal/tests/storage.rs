//! Journals on a full file system, and journals whose files other users have replaced.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use std::task::Context;

use rustix::fs::{CWD, Mode, mkfifoat};
use xenstore_protocol::Operation;
use xenstore_store::Engine;
use xenstore_sys::mapped_file::{self, fail};

use super::super::files::{self, new_file, old_file, segment_file};
use super::super::*;
use super::panics::log_of;
use super::{Fixture, fixture};

/// The file system is full while this value exists.
struct Full;

impl Full {
    fn new() -> Full {
        fail::set(true);
        Full
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        fail::set(false);
    }
}

fn is_due(fixture: &Fixture) -> bool {
    let poll = |journal: &mut Journal| journal.poll_due(&mut Context::from_waker(Waker::noop()));
    fixture.server.with_journal(poll).unwrap().is_ready()
}

fn value(fixture: &Fixture, len: usize) {
    let turn = [(Operation::Write, 0, &*format!("/a|{}", "x".repeat(len)))];
    let conn = fixture.server.connect(xenstore_store::Caller::Socket).unwrap();
    fixture.turn(conn, &turn);
    fixture.server.disconnect(conn);
    fixture.server.commit();
}

// Fails if a valid journal is abandoned because the next segment does not fit, if the checkpoint is not
// retried, or if nothing is logged.
#[test]
fn a_segment_stays_in_use_if_the_next_one_does_not_fit() {
    let fixture = fixture();
    let log = log_of(|| {
        let full = Full::new();
        for _ in 0..3 {
            fixture.rotate();
            value(&fixture, 1000);
            assert_eq!(numbers(fixture.dir.path()), [1]);
            fixture.assert_recoverable();
        }
        assert!(!new_file(fixture.dir.path()).exists());
        drop(full);
        fixture.rotate();
    });
    assert_eq!(numbers(fixture.dir.path()), [2]);
    fixture.assert_recoverable();
    assert!(log.contains("cannot write the next file of the journal"), "{log}");
    assert!(log.contains("the journal is written again"), "{log}");
}

// Fails if the next segment is not due before the room of the current one is used up, if the journal is
// abandoned before that or not begun again afterwards; or if recovery finds a journal that lacks records.
#[test]
fn a_journal_is_abandoned_only_when_nothing_can_be_appended() {
    let fixture = fixture();
    let full = Full::new();
    let mut asked = 0;
    let log = log_of(|| {
        while numbers(fixture.dir.path()) == [1] {
            fixture.assert_recoverable();
            for _ in 0..40 {
                value(&fixture, 3000);
            }
            asked += usize::from(is_due(&fixture));
        }
    });
    assert!(asked >= 5, "{asked}");
    assert!(log.contains("cannot write the journal") && log.contains("retry_ms"), "{log}");
    assert!(numbers(fixture.dir.path()).is_empty() && is_due(&fixture));
    assert!(fixture.server.with_journal(Journal::checkpoint).unwrap().is_none());
    drop(full);
    // Requests are executed while the next segment is written.
    let (checkpoint, state) = fixture.checkpoint();
    value(&fixture, 10);
    let new = checkpoint.write(|sink| state.encode_to(sink));
    value(&fixture, 20);
    assert!(numbers(fixture.dir.path()).is_empty());
    fixture.accept(new);
    fixture.assert_recoverable();
    let left: Vec<_> = std::fs::read_dir(fixture.dir.path()).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

// Fails if files are much longer than their contents: `docs/operating.md` documents their size.
#[test]
fn segments_are_little_longer_than_their_contents() {
    let fixture = fixture();
    for at in 0..200 {
        fixture.ask(Operation::Write, &format!("/a/{at}|{}", "x".repeat(4000)));
    }
    let state = fixture.server.with(|engine, _| engine.dump()).encode().len();
    for _ in 0..4 {
        fixture.rotate();
        for _ in 0..1500 {
            value(&fixture, 4000);
        }
        fixture.assert_recoverable();
    }
    fixture.rotate();
    let files = std::fs::read_dir(fixture.dir.path()).unwrap().flatten();
    let blocks: u64 = files.map(|file| file.metadata().unwrap().blocks() * 512).sum();
    let most = 2 * (state + FULL + (2 << 20));
    assert!(blocks <= most as u64, "{blocks} of {most}");
}

// Fails if an object that another user has put in place of a file is followed, waited for, read or reused,
// or prevents the daemon from starting.
#[test]
fn objects_of_other_users_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (target, theirs) = (dir.path().join("target"), dir.path().join("journal.7"));
    std::fs::write(&target, "theirs").unwrap();
    // A file that is valid except for its mode, and that another user has locked.
    let state = Engine::new(&Config::default()).dump();
    let begin = || {
        let write = |sink: &mut Sink<'_>| state.encode_to(sink);
        Journal::begin(dir.path().to_owned(), &Config::default(), false, write)
    };
    drop(begin());
    std::fs::rename(segment_file(dir.path(), 1), &theirs).unwrap();
    std::fs::set_permissions(&theirs, PermissionsExt::from_mode(0o666)).unwrap();
    let lock = File::open(&theirs).unwrap();
    mapped_file::lock(&lock).unwrap();
    mkfifoat(CWD, segment_file(dir.path(), 8), Mode::RUSR | Mode::WUSR).unwrap();
    symlink(&target, segment_file(dir.path(), 9)).unwrap();
    symlink(&target, new_file(dir.path())).unwrap();
    std::fs::write(old_file(dir.path()), "planted").unwrap();
    std::fs::set_permissions(old_file(dir.path()), PermissionsExt::from_mode(0o666)).unwrap();
    let log = log_of(|| assert!(recover(dir.path(), &Config::default()).unwrap().is_none()));
    for reason in ["symbolic link", "FIFO", "mode 0666"] {
        assert!(log.contains(reason), "no {reason} in {log}");
    }
    drop(begin());
    assert_eq!(std::fs::read(&target).unwrap(), b"theirs");
    let found = std::fs::symlink_metadata(segment_file(dir.path(), 10)).unwrap();
    assert!(found.is_file() && found.mode() & 0o777 == 0o600 && found.nlink() == 1);
    assert!(recover(dir.path(), &Config::default()).unwrap().is_some());
}

// Fails if the error does not name the process that has locked the journal, and what to do.
#[test]
fn the_error_for_a_locked_journal_names_its_process() {
    let fixture = fixture();
    let path = segment_file(fixture.dir.path(), 1);
    let journal = File::open(&path).unwrap();
    let error = mapped_file::lock(&journal).unwrap_err();
    let said = files::lock_error(&path, &journal, error).to_string();
    let pid = format!("process {} has it locked", std::process::id());
    assert!(said.contains(&pid) && said.contains("--journal"), "{said}");
}
