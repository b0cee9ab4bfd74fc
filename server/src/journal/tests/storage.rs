//! Journals without room, and journals whose files other users have replaced.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use rustix::fs::{CWD, Mode, mkfifoat};
use xenstore_sys::mapped_file::fail;

use super::super::files::old_file;
use super::super::*;
use super::panics::log_of;
use super::{Kept, kept};

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

fn is_due(kept: &Kept) -> bool {
    let poll = |journal: &mut Journal| journal.poll_due(&mut Context::from_waker(Waker::noop()));
    kept.server.with_journal(poll).unwrap().is_ready()
}

fn value(kept: &Kept, len: usize) {
    let turn = [(Operation::Write, 0, &*format!("/a|{}", "x".repeat(len)))];
    let conn = kept.server.connect(xenstore_store::Caller::Socket).unwrap();
    kept.turn(conn, &turn);
    kept.server.disconnect(conn);
    kept.server.commit();
}

// Fails if a valid journal is abandoned because the next file does not fit, if the next file is not
// retried, or if nothing is logged.
#[test]
fn a_next_file_that_does_not_fit_leaves_this_one() {
    let kept = kept();
    let log = log_of(|| {
        let full = Full::new();
        for _ in 0..3 {
            kept.renew();
            value(&kept, 1000);
            assert_eq!(numbers(kept.dir.path()), [1]);
            kept.is_exact();
        }
        assert!(!new_file(kept.dir.path()).exists());
        drop(full);
        kept.renew();
    });
    assert_eq!(numbers(kept.dir.path()), [2]);
    kept.is_exact();
    assert!(log.contains("cannot write the next file of the journal"), "{log}");
    assert!(log.contains("the journal is written again"), "{log}");
}

// Fails if a journal whose file cannot grow does not begin the next one before its room is used up, if it is
// abandoned before that, or is not begun again afterwards; or if recovery finds a journal that lacks records.
#[test]
fn a_file_is_given_up_only_when_nothing_can_be_appended() {
    let kept = kept();
    let full = Full::new();
    let mut asked = 0;
    let log = log_of(|| {
        while numbers(kept.dir.path()) == [1] {
            kept.is_exact();
            for _ in 0..40 {
                value(&kept, 3000);
            }
            asked += usize::from(is_due(&kept));
        }
    });
    assert!(asked >= 5, "{asked}");
    assert!(log.contains("cannot write the journal") && log.contains("retry_ms"), "{log}");
    assert!(numbers(kept.dir.path()).is_empty() && is_due(&kept));
    assert!(kept.server.with_journal(Journal::checkpoint).unwrap().is_none());
    drop(full);
    // Requests are served while the next file is written.
    let (draft, state) = kept.draft();
    value(&kept, 10);
    let drafted = draft.write(|sink| state.encode_to(sink));
    value(&kept, 20);
    assert!(numbers(kept.dir.path()).is_empty());
    kept.accept(drafted);
    kept.is_exact();
    let left: Vec<_> = std::fs::read_dir(kept.dir.path()).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

// Fails if files are much longer than their contents: `docs/operating.md` documents their size.
#[test]
fn files_take_what_they_need() {
    let kept = kept();
    for at in 0..200 {
        kept.ask(Operation::Write, &format!("/a/{at}|{}", "x".repeat(4000)));
    }
    let state = kept.server.with(|engine, _| engine.dump()).encode().len();
    for _ in 0..4 {
        kept.renew();
        for _ in 0..1500 {
            value(&kept, 4000);
        }
        kept.is_exact();
    }
    kept.renew();
    let files = std::fs::read_dir(kept.dir.path()).unwrap().flatten();
    let blocks: u64 = files.map(|file| file.metadata().unwrap().blocks() * 512).sum();
    let most = 2 * (state + FULL + (2 << 20));
    assert!(blocks <= most as u64, "{blocks} of {most}");
}

// Fails if an object that another user has put in place of a file is followed, waited for, read or kept, or
// prevents the daemon from starting.
#[test]
fn files_of_others_are_left_alone() {
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
    std::fs::rename(file(dir.path(), 1), &theirs).unwrap();
    std::fs::set_permissions(&theirs, PermissionsExt::from_mode(0o666)).unwrap();
    let lock = File::open(&theirs).unwrap();
    mapped_file::lock(&lock).unwrap();
    mkfifoat(CWD, file(dir.path(), 8), Mode::RUSR | Mode::WUSR).unwrap();
    symlink(&target, file(dir.path(), 9)).unwrap();
    symlink(&target, new_file(dir.path())).unwrap();
    std::fs::write(old_file(dir.path()), "planted").unwrap();
    std::fs::set_permissions(old_file(dir.path()), PermissionsExt::from_mode(0o666)).unwrap();
    let log = log_of(|| assert!(recover(dir.path(), &Config::default()).unwrap().is_none()));
    for reason in ["symbolic link", "FIFO", "mode 0666"] {
        assert!(log.contains(reason), "no {reason} in {log}");
    }
    drop(begin());
    assert_eq!(std::fs::read(&target).unwrap(), b"theirs");
    let found = std::fs::symlink_metadata(file(dir.path(), 10)).unwrap();
    assert!(found.is_file() && found.mode() & 0o777 == 0o600 && found.nlink() == 1);
    assert!(recover(dir.path(), &Config::default()).unwrap().is_some());
}

// Fails if the error does not name the process that has the journal locked, and what to do.
#[test]
fn a_journal_in_use_names_its_user() {
    let kept = kept();
    let path = file(kept.dir.path(), 1);
    let left = File::open(&path).unwrap();
    let error = mapped_file::lock(&left).unwrap_err();
    let said = files::in_use(&path, &left, &error);
    let pid = format!("process {} has it locked", std::process::id());
    assert!(said.contains(&pid) && said.contains("--journal"), "{said}");
}
