//! The embedded store, in bytes.

use futures_lite::{AsyncReadExt, AsyncWriteExt, future};
use xenstore_embedded::{Connection, DomId, Store};
use xenstore_protocol::{HEADER_LEN, Header, Operation, TxId};

fn send(conn: &mut Connection, op: Operation, tx_id: u32, payload: &[u8]) {
    let len = u32::try_from(payload.len()).unwrap();
    let header = Header { ty: op.as_wire(), tx_id: TxId(tx_id), len, ..Header::default() };
    future::block_on(conn.write_all(&[&header.emit()[..], payload].concat())).unwrap();
}

fn receive(conn: &mut Connection) -> Vec<u8> {
    let mut header = [0; HEADER_LEN];
    future::block_on(conn.read_exact(&mut header)).unwrap();
    let mut payload = vec![0; Header::parse(&header).len as usize];
    future::block_on(conn.read_exact(&mut payload)).unwrap();
    payload
}

fn ask(conn: &mut Connection, op: Operation, tx_id: u32, payload: &[u8]) -> Vec<u8> {
    send(conn, op, tx_id, payload);
    receive(conn)
}

fn begin(conn: &mut Connection) -> u32 {
    let id = ask(conn, Operation::TransactionStart, 0, b"\0");
    String::from_utf8(id).unwrap().trim_end_matches('\0').parse().unwrap()
}

/// A protected transaction of dom0, and a guest whose conflicting request is deferred.
fn deferred(store: &Store) -> (Connection, u32, Connection) {
    let (mut dom0, mut guest) = (store.connect(DomId::DOM0), store.connect(DomId(5)));
    let key = b"/local/domain/5/key\0";
    ask(&mut dom0, Operation::Write, 0, &[&key[..], b"0"].concat());
    ask(&mut dom0, Operation::SetPerms, 0, &[&key[..], b"n5\0"].concat());
    for value in ["1", "2"] {
        let tx = begin(&mut dom0);
        ask(&mut dom0, Operation::Read, tx, key);
        ask(&mut dom0, Operation::Write, tx, b"/vm\x001");
        ask(&mut guest, Operation::Write, 0, format!("key\0{value}").as_bytes());
        assert_eq!(ask(&mut dom0, Operation::TransactionEnd, tx, b"T\0"), b"EAGAIN\0");
    }
    let tx = begin(&mut dom0);
    ask(&mut dom0, Operation::Read, tx, key);
    ask(&mut dom0, Operation::Write, tx, b"/vm\x002");
    send(&mut guest, Operation::Write, 0, b"key\x003");
    send(&mut guest, Operation::Read, 0, b"key\0");
    let mut byte = [0];
    let reply = future::block_on(future::poll_once(guest.read(&mut byte)));
    assert!(reply.is_none(), "the request is deferred");
    (dom0, tx, guest)
}

fn replies_in_order(guest: &mut Connection) {
    assert_eq!(receive(guest), b"OK\0");
    assert_eq!(receive(guest), b"3");
}

// Fails if a deferred request is lost, or is executed after a later one.
#[test]
fn deferred_request_is_executed_when_the_transaction_ends() {
    let store = Store::start();
    let (mut dom0, tx, mut guest) = deferred(&store);
    assert_eq!(ask(&mut dom0, Operation::TransactionEnd, tx, b"T\0"), b"OK\0");
    replies_in_order(&mut guest);
    store.check().unwrap();
}

// Fails if a test with a transaction that never ends hangs.
#[test]
fn deferred_request_is_executed_at_its_deadline() {
    let store = Store::start();
    let (_dom0, _, mut guest) = deferred(&store);
    replies_in_order(&mut guest);
}

// Fails if the clock of the store has no effect.
#[test]
fn deferred_request_is_executed_when_the_clock_passes_its_deadline() {
    let store = Store::start();
    let (_dom0, _, mut guest) = deferred(&store);
    store.set_time(10_000);
    let mut header = [0; HEADER_LEN];
    let reply = future::block_on(future::poll_once(guest.read(&mut header)));
    assert!(reply.is_some(), "the request is executed at once");
}

// Fails if a client that reads nothing makes the store keep more than a bound.
#[test]
fn writer_waits_while_its_replies_are_unread() {
    let store = Store::start();
    let mut dom0 = store.connect(DomId::DOM0);
    let header = Header { ty: Operation::Directory.as_wire(), len: 2, ..Header::default() };
    let request = [&header.emit()[..], b"/\0"].concat().repeat(100_000);
    let written = future::block_on(future::poll_once(dom0.write_all(&request)));
    assert!(written.is_none(), "the writer waits");
}

// Fails if a connection outlives its domain or its store, or loses what it has not read.
#[test]
fn connection_ends_with_its_domain_and_its_store() {
    let store = Store::start();
    let (mut guest, mut dom0) = (store.connect(DomId(5)), store.connect(DomId::DOM0));
    store.destroy(DomId(5));
    assert_eq!(future::block_on(guest.read(&mut [0])).unwrap(), 0);
    send(&mut dom0, Operation::GetDomainPath, 0, b"7\0");
    drop(store);
    assert_eq!(receive(&mut dom0), b"/local/domain/7\0");
    assert_eq!(future::block_on(dom0.read(&mut [0])).unwrap(), 0);
    assert!(future::block_on(dom0.write(b"x")).is_err());
}
