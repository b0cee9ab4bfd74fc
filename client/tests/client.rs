//! The client against the embedded store, and against a server that misbehaves.

use futures_lite::{AsyncReadExt, AsyncWriteExt, future};
use xenstore_client::{
    Client, DomId, Errno, Error, EvtchnPort, Features, Gfn, Quota, Tree, blocking,
};
use xenstore_embedded::Store;
use xenstore_transport::Peer;
use xenstore_transport::fault::{Fault, Faulty, rough};
use xenstore_transport::memory::{Pipe, pair};

fn run<R>(future: impl Future<Output = Result<R, Error>>) -> R {
    future::block_on(future).unwrap()
}

// Fails if a request has another effect than documented.
#[test]
fn every_request_has_its_effect() {
    let store = Store::start();
    let dom0 = Client::new(store.connect(DomId::DOM0));
    run(async {
        dom0.write("/a/b", "1").await?;
        dom0.mkdir("/a/c").await?;
        assert_eq!(dom0.read("/a/b").await?, b"1");
        assert_eq!(dom0.list("/a").await?, ["b", "c"]);
        assert!(dom0.exists("/a").await? && !dom0.exists("/z").await?);
        dom0.set_perms("/a/b", "n0 r5").await?;
        let perms: Vec<String> = dom0.perms("/a/b").await?.iter().map(|p| p.to_string()).collect();
        assert_eq!(perms, ["n0", "r5"]);
        dom0.rm("/a").await?;
        assert!(dom0.read("/a").await.unwrap_err().is_not_found());
        assert_eq!(dom0.domain_path(DomId(5)).await?, "/local/domain/5");
        assert!(!dom0.is_introduced(DomId(5)).await?);
        dom0.set_features(DomId(5), Features::RECONNECT | Features::ERROR).await?;
        assert_eq!(dom0.features(Some(DomId(5))).await?, Features::RECONNECT | Features::ERROR);
        dom0.introduce(DomId(5), Gfn(1), EvtchnPort(1)).await?;
        dom0.introduce(DomId(6), Gfn(1), EvtchnPort(1)).await?;
        assert!(dom0.is_introduced(DomId(5)).await?);
        dom0.set_target(DomId(6), DomId(5)).await?;
        dom0.resume(DomId(5)).await?;
        dom0.set_quota(Some(DomId(5)), Quota::Nodes, 7).await?;
        assert_eq!(dom0.quota(Some(DomId(5)), Quota::Nodes).await?, 7);
        assert!(dom0.quota_names().await?.contains(&"watches".to_owned()));
        dom0.release(DomId(5)).await?;
        assert_eq!(dom0.control("check", &[]).await?, b"OK\0");
        dom0.reset_watches().await
    });
}

// Fails if an invalid argument is sent, or causes no error.
#[test]
fn invalid_arguments_are_errors_and_are_not_sent() {
    let store = Store::start();
    let dom0 = blocking::Client::new(store.connect(DomId::DOM0));
    let too_long = vec![0; 4096];
    for error in [
        dom0.read("/a b").unwrap_err(),
        dom0.write("/a", &too_long).unwrap_err(),
        dom0.set_perms("/", "x5").unwrap_err(),
        dom0.set_perms("/", "").unwrap_err(),
        dom0.control("print", &["a\0b"]).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Argument(_)), "{error:?}");
    }
    assert_eq!(dom0.list("/").unwrap(), ["tool"]);
}

// Fails if a list that needs several parts is incomplete, out of order or endless.
#[test]
fn list_of_several_parts_is_complete_and_ordered() {
    let store = Store::start();
    let dom0 = blocking::Client::new(store.connect(DomId::DOM0));
    let names: Vec<String> = (0..3000).map(|i| format!("n{}", (i * 7) % 3000)).collect();
    dom0.transaction(1, |tx| names.iter().try_for_each(|n| tx.mkdir(&format!("/many/{n}"))))
        .unwrap();
    assert_eq!(dom0.list("/many").unwrap(), names);
}

// Fails if a transaction is not retried after EAGAIN, is retried too often, or takes effect in part.
#[test]
fn transaction_is_retried_after_a_conflict() {
    let store = Store::start();
    let dom0 = blocking::Client::new(store.connect(DomId::DOM0));
    let mut tries = 0;
    store.inject_eagain(2);
    dom0.transaction(3, |tx| {
        tries += 1;
        tx.write("/a", format!("{tries}"))
    })
    .unwrap();
    assert_eq!((tries, dom0.read("/a").unwrap()), (3, b"3".to_vec()));
    store.inject_eagain(9);
    let result = dom0.transaction(3, |tx| tx.write("/a", "no"));
    assert_eq!(result, Err(Error::Store(Errno::Eagain)));
    store.inject_eagain(0);
    let result = dom0.transaction(0, |tx| {
        tx.write("/a", "no")?;
        tx.read("/missing")
    });
    assert!(result.unwrap_err().is_not_found());
    assert_eq!(dom0.read("/a").unwrap(), b"3");
}

// Fails if an event reaches another watch, is lost, or arrives after the watch has ended.
#[test]
fn each_watch_receives_its_events() {
    let store = Store::start();
    let (dom0, other) =
        (Client::new(store.connect(DomId::DOM0)), Client::new(store.connect(DomId::DOM0)));
    run(async {
        let mut a = dom0.watch("/a", None).await?;
        let mut b = dom0.watch("/b", Some(0)).await?;
        assert_eq!((a.next().await?, b.next().await?), ("/a".into(), "/b".into()));
        for path in ["/b/below", "/a/x", "/b", "/a/y"] {
            other.write(path, "1").await?;
        }
        assert_eq!((a.next().await?, a.next().await?), ("/a/x".into(), "/a/y".into()));
        assert_eq!(b.next().await?, "/b");
        drop(a);
        other.write("/a/z", "1").await?;
        other.write("/b", "2").await?;
        assert_eq!(b.next().await?, "/b");
        assert!(!String::from_utf8_lossy(&dom0.control("watches", &[]).await?).contains(" /a "));
        Ok(())
    });
}

// Fails if several tasks of one client deadlock, or receive each other's replies.
#[test]
fn tasks_of_one_client_receive_their_replies() {
    let store = Store::start();
    let client = Client::new(store.connect(DomId::DOM0));
    let threads: Vec<_> = (0..8)
        .map(|i| {
            let client = client.clone();
            std::thread::spawn(move || {
                run(async {
                    for round in 0..100 {
                        let path = format!("/t/{i}");
                        client.write(&path, format!("{round}")).await?;
                        assert_eq!(client.read(&path).await?, format!("{round}").into_bytes());
                    }
                    Ok(())
                });
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

// Fails if short or delayed reads and writes change a reply.
#[test]
fn short_reads_and_writes_change_nothing() {
    let store = Store::start();
    for seed in 1..20 {
        let client = Client::new(Faulty::new(store.connect(DomId::DOM0), rough(seed)));
        run(async {
            client.write("/r", vec![b'x'; 3000]).await?;
            let mut watch = client.watch("/r", None).await?;
            assert_eq!(watch.next().await?, "/r");
            assert_eq!(client.read("/r").await?, vec![b'x'; 3000]);
            client.transaction(0, async |tx| tx.rm("/r").await).await
        });
    }
    let failing = |kind| {
        let client =
            Client::new(Faulty::new(store.connect(DomId::DOM0), move || Fault::Error(kind)));
        future::block_on(client.read("/")).unwrap_err()
    };
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut};
    assert!(matches!(failing(TimedOut), Error::Io(TimedOut, _)));
    assert_eq!([failing(ConnectionReset), failing(BrokenPipe)], [Error::Closed, Error::Closed]);
}

// Fails if a closed connection is another error for a write than for a read, or if the last replies are
// lost.
#[test]
fn closed_connection_is_an_error_after_its_last_replies() {
    for _ in 0..50 {
        let store = Store::start();
        let guest = Client::new(store.connect(DomId(5)));
        assert_eq!(future::block_on(guest.read("/")), Err(Error::Store(Errno::Eacces)));
        store.destroy(DomId(5));
        assert_eq!(future::block_on(guest.read("/")), Err(Error::Closed));
    }
    let (client, mut server) = pair(Peer::Domain(DomId(0)), Peer::Domain(DomId(0)));
    let client = Client::new(client);
    let mut first = Box::pin(client.read("/a"));
    assert!(future::block_on(future::poll_once(&mut first)).is_none());
    future::block_on(async {
        let mut header = [0; 16];
        server.read_exact(&mut header).await.unwrap();
        let id = u32::from_le_bytes(header[4..8].try_into().unwrap());
        server.write_all(&frame(2, id, b"v")).await.unwrap();
    });
    drop(server);
    assert_eq!(future::block_on(client.read("/b")), Err(Error::Closed));
    assert_eq!(future::block_on(first), Ok(b"v".to_vec()));
}

// Fails if a dropped request changes the reply to a later one.
#[test]
fn dropped_request_leaves_later_ones_intact() {
    let store = Store::start();
    let client = Client::new(store.connect(DomId::DOM0));
    run(async {
        client.write("/a", "1").await?;
        for _ in 0..50 {
            // Polled once, so that it is sent, and dropped.
            let _ = future::poll_once(client.read("/a")).await;
            let _ = future::poll_once(client.watch("/a", None)).await;
        }
        assert_eq!(client.read("/a").await?, b"1");
        client.write("/a", "2").await
    });
}

/// Returns a client whose server replies to the first request with the bytes of this closure.
fn against(answer: impl FnOnce(u32) -> Vec<u8> + Send + 'static) -> Client {
    let (client, mut server): (Pipe, Pipe) = pair(Peer::Domain(DomId(0)), Peer::Domain(DomId(0)));
    std::thread::spawn(move || {
        future::block_on(async {
            let mut header = [0; 16];
            server.read_exact(&mut header).await.unwrap();
            let id = u32::from_le_bytes(header[4..8].try_into().unwrap());
            let _ = server.write_all(&answer(id)).await;
            let _ = server.read_to_end(&mut Vec::new()).await;
        });
    });
    Client::new(client)
}

fn frame(ty: u32, id: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [ty, id, 0, u32::try_from(payload.len()).unwrap()] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

// Fails if a reply that violates the protocol is accepted, or the client hangs.
#[test]
fn protocol_violation_of_the_server_is_an_error() {
    let read = |client: Client| future::block_on(client.read("/a"));
    let broken = |result| matches!(result, Err(Error::Protocol(_)));
    assert!(broken(read(against(|id| frame(2, id + 1, b"")))), "unknown id");
    assert!(broken(read(against(|id| frame(11, id, b"OK\0")))), "wrong type");
    assert!(broken(read(against(|id| frame(16, id, b"ENOENT")))), "error without NUL");
    assert!(broken(read(against(|_| frame(15, 0, b"no-token\0")))), "malformed event");
    assert!(broken(read(against(|_| [2, 1, 0, 4097].map(u32::to_le_bytes).concat()))), "too long");
    let unknown = read(against(|id| frame(16, id, b"EQUOTA\0")));
    assert_eq!(unknown, Err(Error::Store(Errno::Einval)), "as libxenstore does");
    let fine = against(|id| [frame(15, 0, b"/x\0t\0"), frame(2, id, b"v")].concat());
    assert_eq!(read(fine), Ok(b"v".to_vec()), "an event in between");
}

// Fails if events that exceed one write are delayed until the next request.
#[test]
fn large_commit_delivers_all_events() {
    let store = Store::start();
    let (dom0, other) =
        (Client::new(store.connect(DomId::DOM0)), Client::new(store.connect(DomId::DOM0)));
    let names: Vec<String> = (0..1000).map(|i| format!("/big/{i}-{}", "x".repeat(200))).collect();
    run(async {
        let mut watch = dom0.watch("/big", None).await?;
        assert_eq!(watch.next().await?, "/big");
        other
            .transaction(1, async |tx| {
                for name in &names {
                    tx.write(name, "").await?;
                }
                Ok(())
            })
            .await?;
        for name in &names {
            assert_eq!(watch.next().await?, *name);
        }
        Ok(())
    });
}

// Fails if a dropped transaction stays open at the server.
#[test]
fn dropped_transaction_is_aborted() {
    let store = Store::start();
    let client = Client::new(store.connect(DomId(5)));
    run(async {
        for _ in 0..30 {
            // Polled once, so that it is sent, and dropped. Its reply then arrives, and the next request
            // also aborts the transaction.
            let _ = future::poll_once(client.begin()).await;
            let _ = client.read("/").await;
        }
        let _ = client.read("/").await;
        client.begin().await?.abort().await
    });
    let dom0 = blocking::Client::new(store.connect(DomId::DOM0));
    assert_eq!(dom0.control("transactions", &[]).unwrap(), b"\0");
}

// Fails if a connection remains after its domain is released.
#[test]
fn released_domain_has_no_connections() {
    let store = Store::start();
    for _ in 0..200 {
        let guest = Client::new(store.connect(DomId(5)));
        store.release(DomId(5)).unwrap();
        assert_eq!(future::block_on(guest.read("/")), Err(Error::Closed));
    }
}

// Fails if a watch of a closed connection returns errors without end.
#[test]
fn watch_ends_with_its_connection() {
    let store = Store::start();
    let guest = blocking::Client::new(store.connect(DomId(5)));
    let mut watch = guest.watch("a", None).unwrap();
    assert_eq!(watch.next(), Some(Ok("a".into())));
    store.destroy(DomId(5));
    assert_eq!(watch.next(), Some(Err(Error::Closed)));
    assert_eq!(watch.next(), None);
}
