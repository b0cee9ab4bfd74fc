//! Panics in requests, in other inputs and in transports.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_lite::{AsyncReadExt, AsyncWriteExt};
use xenstore_protocol::{DomId, HEADER_LEN, Header, Operation};
use xenstore_store::{Caller, State};
use xenstore_transport::memory::{self, Pipe};
use xenstore_transport::{Failure, Peer, ResumePoint};

use super::super::files::segment_file;
use super::super::*;
use super::{Fixture, fixture, frame};
use crate::serve::Failed;

/// Returns the log of `run`.
pub(in super::super) fn log_of(run: impl FnOnce()) -> String {
    let mut file = tempfile::tempfile().unwrap();
    let writer = Arc::new(file.try_clone().unwrap());
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish();
    tracing::subscriber::with_default(subscriber, run);
    let mut text = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

/// Sends a request. Returns the type and payload of the reply, or `None` if the connection has ended.
async fn ask(client: &mut Pipe, op: Operation, payload: &str) -> Option<(Operation, String)> {
    client.write_all(&frame(op, 0, payload)).await.ok()?;
    answer(client).await
}

async fn answer(client: &mut Pipe) -> Option<(Operation, String)> {
    let mut header = [0; HEADER_LEN];
    client.read_exact(&mut header).await.ok()?;
    let header = Header::parse(&header);
    let mut payload = vec![0; header.len as usize];
    client.read_exact(&mut payload).await.unwrap();
    let payload = String::from_utf8(payload).unwrap().replace('\0', "|");
    Some((Operation::from_wire(header.ty).unwrap(), payload))
}

/// Serves two clients of dom0 until `talk` returns.
fn with_clients(fixture: &Fixture, talk: impl AsyncFnOnce(Pipe, Pipe)) {
    let [(one, served), (other, also)] =
        [(); 2].map(|()| memory::pair(Peer::Domain(DomId(0)), Peer::Domain(DomId(0))));
    smol::block_on(futures_lite::future::or(talk(one, other), async {
        futures_lite::future::zip(fixture.server.serve(served), fixture.server.serve(also)).await;
        panic!("all connections have ended");
    }));
}

fn eio() -> Option<(Operation, String)> {
    Some((Operation::Error, "EIO|".into()))
}

// Fails if a panic in a request leaves changes behind, here or in the next process, ends its connection,
// or affects later requests; or if the log does not name the request.
#[test]
fn a_request_that_panics_changes_nothing() {
    let fixture = fixture();
    fixture.ask(Operation::Write, "/a|1");
    fixture.ask(Operation::Introduce, "4|7|8|");
    fixture.ask(Operation::Write, "/local/domain/4|");
    fixture.ask(Operation::SetPerms, "/local/domain/4|n4|");
    let log = log_of(|| {
        with_clients(&fixture, async |mut one, mut other| {
            assert_eq!(ask(&mut one, Operation::Control, "boom|").await, eio());
            assert_eq!(ask(&mut one, Operation::Read, "/a|").await.unwrap().1, "1");
            assert_eq!(ask(&mut one, Operation::Write, "/a|2").await.unwrap().1, "OK|");
            // After its nodes have been removed.
            assert_eq!(ask(&mut one, Operation::Release, "4|").await, eio());
            let home = ask(&mut other, Operation::GetPerms, "/local/domain/4|").await.unwrap();
            assert_eq!(home, (Operation::GetPerms, "n4|".into()));
            fixture.server.with(|engine, _| engine.check().unwrap());
            fixture.assert_recoverable();
        });
    });
    assert!(log.contains("panic while answering this request") && log.contains("boom"), "{log}");
    assert!(log.contains("RELEASE"), "{log}");
    assert_eq!(fixture.ask(Operation::Read, "/a|"), "2");
}

// Fails if a panic in a request affects others of the same turn, before it or after it.
#[test]
fn requests_of_the_same_turn_as_a_panic_are_executed() {
    let fixture = fixture();
    let asked = [
        (Operation::Write, "/a|1"),
        (Operation::Read, "/a|"),
        (Operation::Write, "/b|2"),
        (Operation::Control, "boom|"),
        (Operation::Write, "/c|3"),
        (Operation::Introduce, "3|7|8|"),
        (Operation::Write, "/d|4"),
    ];
    let expected = ["OK|", "1", "OK|", "EIO|", "OK|", "OK|", "OK|"];
    let all = asked.map(|(op, payload)| frame(op, 0, payload)).concat();
    let log = log_of(|| {
        with_clients(&fixture, async |mut one, _other| {
            one.write_all(&all).await.unwrap();
            for expected in expected {
                assert_eq!(answer(&mut one).await.unwrap().1, expected);
            }
            fixture.assert_recoverable();
        });
    });
    assert!(log.contains("boom"), "{log}");
    assert_eq!(["/b|", "/c|", "/d|"].map(|at| fixture.ask(Operation::Read, at)), ["2", "3", "4"]);
}

// Fails if a panic in a request that is not recorded undoes the one before it.
#[test]
fn a_panic_in_an_unrecorded_request_undoes_no_other() {
    let fixture = fixture();
    fixture.ask(Operation::Write, "/a|1");
    let conn = fixture.server.connect(Caller::Socket).unwrap();
    fixture.turn(conn, &[(Operation::Write, 0, "/a|2")]);
    let read = frame(Operation::Read, 0, "/a|");
    let log = log_of(|| {
        let mut batch = RequestBatch::new(conn, 5, &read);
        let entry = Entry::Request { batch: &mut batch, range: 0..read.len(), recorded: false };
        let failed = fixture.server.record(entry, |_, _| panic!("injected panic"));
        assert_eq!(failed, Err::<(), _>(Failed::Refused));
    });
    assert!(log.contains("READ"), "{log}");
    fixture.assert_recoverable();
    assert_eq!(fixture.ask(Operation::Read, "/a|"), "2");
}

// Fails if, without a journal, a panic ends more than its connection, or is not logged.
#[test]
fn without_a_journal_a_panic_ends_its_connection() {
    let fixture = fixture();
    fixture.server.leave_journal(false);
    let log = log_of(|| {
        with_clients(&fixture, async |mut one, mut other| {
            assert_eq!(ask(&mut one, Operation::Control, "boom|").await, None);
            assert_eq!(ask(&mut other, Operation::Write, "/a|1").await.unwrap().1, "OK|");
        });
    });
    assert!(log.contains("an internal error") && log.contains("boom"), "{log}");
    assert_eq!(fixture.ask(Operation::Read, "/a|"), "1");
}

// Fails if records are appended after a request that was neither executed nor refused, or if the engine
// is restored from a journal that lacks an input.
#[test]
fn a_journal_that_cannot_be_replayed_is_replaced() {
    let damage = |fixture: &Fixture| {
        let newest = segment_file(fixture.dir.path(), numbers(fixture.dir.path())[0]);
        let file = File::options().write(true).open(newest).unwrap();
        file.write_all_at(&[0xff], format::HEADER as u64).unwrap();
    };
    let void = |fixture: &Fixture| fixture.server.with_journal(Journal::invalidate).unwrap();
    for spoil in [&damage as &dyn Fn(&Fixture), &void] {
        let fixture = fixture();
        spoil(&fixture);
        let log = log_of(|| {
            with_clients(&fixture, async |mut one, _other| {
                assert_eq!(ask(&mut one, Operation::Control, "boom|").await, None);
                let full = futures_lite::future::poll_once(fixture.server.journal_is_due()).await;
                assert_eq!(full, Some(()));
            });
        });
        assert!(log.contains("the store cannot be restored from the journal"), "{log}");
    }
}

/// A transport that panics after this number of bytes has been read.
struct Broken(Pipe, usize);

impl futures_lite::AsyncRead for Broken {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        assert!(self.1 > 0, "injected panic");
        let end = bytes.len().min(self.1);
        let read = std::task::ready!(Pin::new(&mut self.0).poll_read(cx, &mut bytes[..end]))?;
        self.1 -= read;
        Poll::Ready(Ok(read))
    }
}

impl futures_lite::AsyncWrite for Broken {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_close(cx)
    }
}

impl xenstore_transport::Transport for Broken {
    fn peer(&self) -> Peer {
        self.0.peer()
    }
    fn resume_point(&self) -> ResumePoint {
        self.0.resume_point()
    }
    fn restarts_at_zero(&mut self) -> bool {
        self.0.restarts_at_zero()
    }
    fn poll_recover(&mut self, cx: &mut Context<'_>, failure: Failure) -> Poll<bool> {
        self.0.poll_recover(cx, failure)
    }
}

// Fails if a panic outside of the engine ends more than its connection, or leaves a change in the engine
// that is not in the journal.
#[test]
fn a_panic_in_a_transport_ends_its_connection() {
    let fixture = fixture();
    let write = frame(Operation::Write, 0, "/a|1");
    let [(one, served), (mut other, also)] =
        [(); 2].map(|()| memory::pair(Peer::Domain(DomId(0)), Peer::Domain(DomId(0))));
    let mut one = one;
    let log = log_of(|| {
        smol::block_on(futures_lite::future::or(
            async {
                one.write_all(&write.repeat(2)).await.unwrap();
                assert_eq!(answer(&mut one).await.unwrap().1, "OK|");
                assert_eq!(answer(&mut one).await, None);
                assert_eq!(ask(&mut other, Operation::Read, "/a|").await.unwrap().1, "1");
                fixture.assert_recoverable();
            },
            async {
                let broken = fixture.server.serve(Broken(served, write.len()));
                futures_lite::future::zip(broken, fixture.server.serve(also)).await;
            },
        ));
    });
    assert!(log.contains("an internal error"), "{log}");
}

/// Executes an input in part, then panics. Returns the log.
fn spoil(fixture: &Fixture, input: Input<'_>) -> String {
    log_of(|| {
        let failed = fixture.server.record(Entry::Alone(input), |engine, host| {
            engine.apply(&input, host, &mut Vec::new());
            panic!("injected panic");
        });
        assert_eq!(failed, Err::<(), _>(Failed::Refused));
        fixture.server.commit();
    })
}

// Fails if a panic in an input of any kind ends the process, leaves a part of the input behind, for this
// process or the next, or is not logged; or if a connection that cannot end still exists afterwards, or
// one that cannot restart keeps its watches and transactions.
#[test]
fn a_panic_in_an_input_of_any_kind_is_refused() {
    let inputs: [fn(ConnId) -> Input<'static>; 5] = [
        |_| Input::Connect(Caller::Socket),
        Input::Disconnect,
        Input::Restart,
        |conn| Input::Events { conn, limit: 1000 },
        |_| Input::DomainsChanged,
    ];
    for input in inputs {
        let fixture = fixture();
        fixture.ask(Operation::Introduce, "1|7|8|");
        fixture.ask(Operation::Write, "/local/domain/1|");
        fixture.ask(Operation::SetPerms, "/local/domain/1|n1|");
        let conn = fixture.server.connect(Caller::Domain(DomId(1))).unwrap();
        fixture.turn(
            conn,
            &[(Operation::Watch, 0, "/local/domain/1|t|"), (Operation::TransactionStart, 0, "|")],
        );
        fixture.turn(conn, &[(Operation::Write, 1, "/local/domain/1/a|1")]);
        fixture.ask(Operation::Write, "/local/domain/1/b|1");
        fixture.server.with(|_, machine| machine.0.clear());
        let before = fixture.server.with(|engine, _| engine.dump());
        let input = input(conn);
        let log = spoil(&fixture, input);
        assert!(log.contains("panic in this input"), "{log}");
        let after = fixture.server.with(|engine, _| engine.dump());
        let of = |state: &State| {
            let found = state.connections.iter().find(|connection| connection.id == conn);
            found.map(|found| (found.watches.len(), found.transactions().count(), found.events()))
        };
        assert_eq!(of(&before), Some((1, 1, 1)));
        match input {
            Input::Disconnect(_) => assert_eq!(of(&after), None),
            Input::Restart(_) => assert_eq!(of(&after), Some((0, 0, 0))),
            _ => assert!(before.encode() == after.encode(), "{input:?}"),
        }
        fixture.server.with(|engine, _| engine.check().unwrap());
        fixture.assert_recoverable();
        // Charges stay exact: they depend on the requests alone, not on other references to the nodes.
        fixture.ask(Operation::Write, "/a|2");
        fixture.assert_recoverable();
    }
}
