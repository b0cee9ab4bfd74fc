//! Journals of servers without a machine, and what comes of them.

pub(super) mod panics;
mod storage;
mod traces;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Frame, Gfn, TxId};
use xenstore_store::{DomainInfo, Host};

use super::files::old_file;
use super::*;
use crate::clock::Clock;
use crate::server::Server;

/// A machine on which domains exist that have been made. CONTROL `boom` and letting domain 4 go are
/// mistakes.
#[derive(Default)]
pub(super) struct Machine(pub(super) BTreeMap<DomId, DomainInfo>);

impl Host for Machine {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        self.0.get(&domid).copied()
    }
    fn introduce(
        &mut self,
        domid: DomId,
        _: Gfn,
        port: EvtchnPort,
        _: Features,
    ) -> Result<(), Errno> {
        let unique_id = u64::from(port.0) << 32 | u64::from(domid.0);
        self.0.entry(domid).or_insert(DomainInfo { unique_id, shutdown: false });
        if port.0 == 0 { Err(Errno::Einval) } else { Ok(()) }
    }
    fn release(&mut self, domid: DomId) {
        assert_ne!(domid, DomId(4), "a mistake");
        self.0.remove(&domid);
    }
    fn control(&mut self, command: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        assert_ne!(command, b"boom", "a mistake");
        None
    }
    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}

pub(super) struct Kept {
    pub(super) server: Server<Machine>,
    pub(super) dir: tempfile::TempDir,
}

pub(super) fn kept() -> Kept {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default();
    let mut machine = Machine::default();
    for domid in [1, 2, 3, 4].map(DomId) {
        let unique_id = 100 + u64::from(domid.0);
        machine.0.insert(domid, DomainInfo { unique_id, shutdown: false });
    }
    let server = Server::new(&config, machine, Clock::Manual(5.into()));
    let state = server.with(|engine, _| engine.dump());
    let journal =
        Journal::begin(dir.path().to_owned(), &config, false, |sink| state.encode_to(sink));
    Kept { server: server.journaled(Some(journal)), dir }
}

/// A request; `|` stands for NUL.
pub(super) fn frame(op: Operation, tx_id: u32, payload: &str) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let header = Header { ty: op.as_wire(), tx_id: TxId(tx_id), len, ..Header::default() };
    [&header.emit()[..], payload.replace('|', "\0").as_bytes()].concat()
}

impl Kept {
    pub(super) fn ask(&self, op: Operation, payload: &str) -> String {
        let (_, answer) = self.server.request(op, payload.replace('|', "\0").as_bytes());
        String::from_utf8_lossy(&answer).replace('\0', "|")
    }

    /// The next file, and the state with which it is to be written.
    pub(super) fn draft(&self) -> (Checkpoint, State) {
        let draft = self.server.with_journal(Journal::checkpoint).unwrap().unwrap();
        (draft, self.server.with(|engine, _| engine.dump()))
    }

    /// Goes on in the next file.
    pub(super) fn renew(&self) {
        let (draft, state) = self.draft();
        self.accept(draft.write(|sink| state.encode_to(sink)));
    }

    /// Goes on in this file, if it is one.
    pub(super) fn accept(&self, drafted: NewSegment) {
        let finish = |journal: &mut Journal| {
            journal.accept(drafted);
            loop {
                match journal.catch_up() {
                    CatchUp::More => {}
                    CatchUp::Done(retired) => {
                        break journal.recycle(retired.and_then(Retired::trim));
                    }
                }
            }
        };
        self.server.with_journal(finish).unwrap();
    }

    /// Lets a connection ask for all of this in one turn.
    pub(super) fn turn(&self, conn: ConnId, requests: &[(Operation, u32, &str)]) {
        let mut frames = Vec::new();
        for (op, tx_id, payload) in requests {
            frames.extend_from_slice(&frame(*op, *tx_id, payload));
        }
        let (mut run, mut at) = (RequestBatch::new(conn, 5, &frames), 0);
        while let Some((frame, rest)) = Frame::split_first(&frames[at..]) {
            let end = frames.len() - rest.len();
            let _ = self.server.handle(&mut run, at..end, &frame, &mut Vec::new());
            at = end;
        }
        self.server.flush(&mut run);
    }

    /// An engine that is made now is that of the server.
    pub(super) fn is_exact(&self) {
        let [newest, ..] = numbers(self.dir.path())[..] else { panic!("no journal") };
        let left = File::open(file(self.dir.path(), newest)).unwrap();
        let left = SegmentReader::read(left, &boot_id()).unwrap();
        let replay = Recovery::of(&Config::default(), &left).unwrap();
        assert_eq!(replay.interrupted, None);
        let now = self.server.with(|engine, _| engine.dump());
        assert!(replay.engine.dump().encode() == now.encode(), "{:?}", replay.engine);
    }
}

// Fails if a server that ends after any of these requests is found otherwise than it was, or if the
// machine is asked anything when it is made again.
#[test]
fn the_server_can_be_found_again_after_every_request() {
    let kept = kept();
    kept.is_exact();
    for (op, payload) in [
        (Operation::Mkdir, "/local/domain/1|"),
        (Operation::SetPerms, "/local/domain/1|n1|r2|b9|"),
        (Operation::Write, "/local/domain/1/a|value"),
        (Operation::Introduce, "1|7|8|"),
        (Operation::Introduce, "9|7|8|"),
        (Operation::Introduce, "2|7|0|"),
        (Operation::SetTarget, "2|1|"),
        (Operation::SetQuota, "1|nodes|77|"),
        (Operation::Control, "quota|set|nodes|500|"),
        (Operation::Write, "/local/domain/1/b/c/d|"),
        (Operation::Rm, "/local/domain/1/b|"),
        (Operation::Control, "help|"),
        (Operation::Release, "1|"),
    ] {
        kept.ask(op, payload);
        kept.is_exact();
    }
    kept.server.with(|_, machine| machine.0.clear());
    kept.server.domains_changed();
    kept.is_exact();
}

// Fails if a process that ends while the next file is written finds anything but what had been done
// until then, or if something that was done meanwhile is missing in the next file.
#[test]
fn the_next_file_is_begun_while_requests_go_on() {
    let kept = kept();
    kept.ask(Operation::Write, "/a|1");
    let (draft, state) = kept.draft();
    let first = numbers(kept.dir.path());
    kept.ask(Operation::Mkdir, "/local/domain/1|");
    kept.is_exact();
    let drafted = draft.write(|sink| state.encode_to(sink));
    assert!(new_file(kept.dir.path()).exists());
    kept.ask(Operation::Introduce, "1|7|8|");
    kept.is_exact();
    assert_eq!(numbers(kept.dir.path()), first);
    kept.accept(drafted);
    assert_eq!(numbers(kept.dir.path())[0], first[0] + 1);
    kept.is_exact();
    kept.ask(Operation::Write, "/a|2");
    kept.is_exact();
}

// Fails if a file is not written over that can be, or one that nobody finds, or that is another's.
#[test]
fn files_are_written_over_one_another() {
    let kept = kept();
    let old = old_file(kept.dir.path());
    let renew = || {
        kept.renew();
        kept.ask(Operation::Write, "/a|1");
        kept.is_exact();
    };
    let newest = || file(kept.dir.path(), numbers(kept.dir.path())[0]);
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    renew();
    let (one, two) = (inode(&newest()), inode(&old));
    renew();
    assert_eq!((inode(&newest()), inode(&old)), (two, one));
    std::fs::remove_file(&old).unwrap();
    renew();
    std::fs::remove_file(&old).unwrap();
    std::fs::write(&old, "another").unwrap();
    renew();
    assert_eq!(numbers(kept.dir.path()).len(), 1);
}

// Fails if a file takes the place of another although something happened since it was begun that is
// in neither, or if nothing is recorded any more after that.
#[test]
fn a_file_that_misses_something_is_given_up() {
    let kept = kept();
    let change = |change: fn(&mut Journal)| kept.server.with_journal(change).unwrap();
    let draft = |between: fn(&mut Journal)| {
        let (draft, state) = kept.draft();
        change(between);
        let drafted = draft.write(|sink| state.encode_to(sink));
        kept.ask(Operation::Write, "/a|1");
        kept.accept(drafted);
        numbers(kept.dir.path()).first().copied()
    };
    assert_eq!(draft(|_| ()), Some(2));
    assert_eq!(draft(Journal::invalidate), Some(2));
    kept.is_exact();
    assert_eq!(draft(Journal::discard), None);
    assert!(!new_file(kept.dir.path()).exists());
    // Nothing was kept when it was begun: it is that of a moment in which nothing happens.
    kept.renew();
    kept.ask(Operation::Write, "/a|2");
    kept.is_exact();
}
