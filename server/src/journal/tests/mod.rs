//! Journals of servers without a hypervisor, and the engines that are recovered from them.

mod format;
pub(super) mod panics;
mod segment;
mod storage;
mod traces;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Frame, Gfn, Header, Operation, TxId};
use xenstore_store::{DomainInfo, Host, State};

use super::files::{new_file, old_file, segment_file};
use super::reader::SegmentReader;
use super::*;
use crate::serve::{Clock, Server};

/// A host whose domains are those in the map. CONTROL `boom` and the release of domain 4 panic.
#[derive(Default)]
pub(super) struct TestHost(pub(super) BTreeMap<DomId, DomainInfo>);

impl Host for TestHost {
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
        assert_ne!(domid, DomId(4), "injected panic");
        self.0.remove(&domid);
    }
    fn control(&mut self, command: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        assert_ne!(command, b"boom", "injected panic");
        None
    }
    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}

pub(super) struct Fixture {
    pub(super) server: Server<TestHost>,
    pub(super) dir: tempfile::TempDir,
}

pub(super) fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default();
    let mut machine = TestHost::default();
    for domid in [1, 2, 3, 4].map(DomId) {
        let unique_id = 100 + u64::from(domid.0);
        machine.0.insert(domid, DomainInfo { unique_id, shutdown: false });
    }
    let server = Server::new(&config, machine, Clock::Manual(5.into()));
    let state = server.with(|engine, _| engine.dump());
    let journal =
        Journal::begin(dir.path().to_owned(), &config, false, |sink| state.encode_to(sink));
    Fixture { server: server.journaled(Some(journal)), dir }
}

/// A request; `|` stands for NUL.
pub(super) fn frame(op: Operation, tx_id: u32, payload: &str) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    let header = Header { ty: op.as_wire(), tx_id: TxId(tx_id), len, ..Header::default() };
    [&header.emit()[..], payload.replace('|', "\0").as_bytes()].concat()
}

impl Fixture {
    pub(super) fn ask(&self, op: Operation, payload: &str) -> String {
        let (_, answer) = self.server.request(op, payload.replace('|', "\0").as_bytes());
        String::from_utf8_lossy(&answer).replace('\0', "|")
    }

    /// Begins the next segment. Returns the state that must be written to it.
    pub(super) fn checkpoint(&self) -> (Checkpoint, State) {
        let checkpoint = self.server.with_journal(Journal::checkpoint).unwrap().unwrap();
        (checkpoint, self.server.with(|engine, _| engine.dump()))
    }

    /// Rotates the journal.
    pub(super) fn rotate(&self) {
        let (checkpoint, state) = self.checkpoint();
        self.accept(checkpoint.write(|sink| state.encode_to(sink)));
    }

    /// Makes this segment the current one, if it could be written.
    pub(super) fn accept(&self, new: NewSegment) {
        let finish = |journal: &mut Journal| {
            journal.accept(new);
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

    /// Executes requests of a connection in one turn.
    pub(super) fn turn(&self, conn: ConnId, requests: &[(Operation, u32, &str)]) {
        let mut frames = Vec::new();
        for (op, tx_id, payload) in requests {
            frames.extend_from_slice(&frame(*op, *tx_id, payload));
        }
        let (mut batch, mut at) = (RequestBatch::new(conn, 5, &frames), 0);
        while let Some((frame, rest)) = Frame::split_first(&frames[at..]) {
            let end = frames.len() - rest.len();
            let _ = self.server.handle(&mut batch, at..end, &frame, &mut Vec::new());
            at = end;
        }
        self.server.flush(&mut batch);
    }

    /// Fails if the engine that is recovered now differs from that of the server.
    pub(super) fn assert_recoverable(&self) {
        let [newest, ..] = numbers(self.dir.path())[..] else { panic!("no journal") };
        let segment = File::open(segment_file(self.dir.path(), newest)).unwrap();
        let segment = SegmentReader::open(segment, &boot_id()).unwrap();
        let recovery = Recovery::replay(&Config::default(), &segment).unwrap();
        assert_eq!(recovery.interrupted, None);
        let now = self.server.with(|engine, _| engine.dump());
        assert!(recovery.engine.dump().encode() == now.encode(), "{:?}", recovery.engine);
    }
}

// Fails if recovery after any of these requests makes a different engine, or queries the hypervisor.
#[test]
fn recovery_after_each_request_makes_the_same_engine() {
    let fixture = fixture();
    fixture.assert_recoverable();
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
        fixture.ask(op, payload);
        fixture.assert_recoverable();
    }
    fixture.server.with(|_, machine| machine.0.clear());
    fixture.server.domains_changed();
    fixture.assert_recoverable();
}

// Fails if recovery while the next segment is written loses a request, or if a request of that time is
// missing in the next segment.
#[test]
fn requests_during_a_checkpoint_are_in_both_segments() {
    let fixture = fixture();
    fixture.ask(Operation::Write, "/a|1");
    let (checkpoint, state) = fixture.checkpoint();
    let first = numbers(fixture.dir.path());
    fixture.ask(Operation::Mkdir, "/local/domain/1|");
    fixture.assert_recoverable();
    let new = checkpoint.write(|sink| state.encode_to(sink));
    assert!(new_file(fixture.dir.path()).exists());
    fixture.ask(Operation::Introduce, "1|7|8|");
    fixture.assert_recoverable();
    assert_eq!(numbers(fixture.dir.path()), first);
    fixture.accept(new);
    assert_eq!(numbers(fixture.dir.path())[0], first[0] + 1);
    fixture.assert_recoverable();
    fixture.ask(Operation::Write, "/a|2");
    fixture.assert_recoverable();
}

// Fails if a retired segment is not overwritten by the next one, or if a missing or replaced file
// prevents the rotation.
#[test]
fn retired_segments_are_recycled() {
    let fixture = fixture();
    let old = old_file(fixture.dir.path());
    let rotate = || {
        fixture.rotate();
        fixture.ask(Operation::Write, "/a|1");
        fixture.assert_recoverable();
    };
    let newest = || segment_file(fixture.dir.path(), numbers(fixture.dir.path())[0]);
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    rotate();
    let (one, two) = (inode(&newest()), inode(&old));
    rotate();
    assert_eq!((inode(&newest()), inode(&old)), (two, one));
    std::fs::remove_file(&old).unwrap();
    rotate();
    std::fs::remove_file(&old).unwrap();
    std::fs::write(&old, "another").unwrap();
    rotate();
    assert_eq!(numbers(fixture.dir.path()).len(), 1);
}

// Fails if a segment that lacks an input replaces the current one, or if nothing is recorded afterwards.
#[test]
fn a_segment_that_lacks_an_input_is_not_used() {
    let fixture = fixture();
    let change = |change: fn(&mut Journal)| fixture.server.with_journal(change).unwrap();
    let rotate = |between: fn(&mut Journal)| {
        let (checkpoint, state) = fixture.checkpoint();
        change(between);
        let new = checkpoint.write(|sink| state.encode_to(sink));
        fixture.ask(Operation::Write, "/a|1");
        fixture.accept(new);
        numbers(fixture.dir.path()).first().copied()
    };
    assert_eq!(rotate(|_| ()), Some(2));
    assert_eq!(rotate(Journal::invalidate), Some(2));
    fixture.assert_recoverable();
    assert_eq!(rotate(Journal::discard), None);
    assert!(!new_file(fixture.dir.path()).exists());
    // There is no current segment whose records could be missing.
    fixture.rotate();
    fixture.ask(Operation::Write, "/a|2");
    fixture.assert_recoverable();
}
