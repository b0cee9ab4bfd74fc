//! The event loop with socket pairs.

use std::future::poll_fn;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::*;

fn source(driver: &Driver) -> (Source<UnixStream>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (driver.source(ours).unwrap(), theirs)
}

/// Reads up to 16 bytes, as a socket does: a short read is the last.
fn poll_read(source: &Source<UnixStream>, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    let mut bytes = [0; 16];
    let count = ready!(source.poll_read(cx, |mut stream| stream.read(&mut bytes)))?;
    if count < bytes.len() {
        source.drained();
    }
    Poll::Ready(Ok(count))
}

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A waker that counts, and its count.
fn counting() -> (Waker, Arc<Wakes>) {
    let wakes = Arc::<Wakes>::default();
    (wakes.clone().into(), wakes)
}

/// One turn of the loop that does not wait.
fn turn(driver: &Driver) {
    let event_loop = driver.0.as_ref().unwrap();
    event_loop.sleep.wake();
    event_loop.wait();
    event_loop.sleep.take_wake();
}

fn count(wakes: &Wakes) -> usize {
    wakes.0.load(Ordering::SeqCst)
}

// Fails if bytes that were there before the registration need an event.
#[test]
fn new_source_reads_without_an_event() {
    let driver = Driver::new().unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.write_all(b"early").unwrap();
    let source = driver.source(ours).unwrap();
    let read = poll_read(&source, &mut Context::from_waker(Waker::noop()));
    assert!(matches!(read, Poll::Ready(Ok(5))), "{read:?}");
}

// Fails if a wait does not end when another thread writes, before or after the wait begins.
#[test]
fn waiting_reader_is_woken_for_each_write() {
    let driver = Driver::new().unwrap();
    let (source, mut theirs) = source(&driver);
    let writer = std::thread::spawn(move || {
        for pause in [0, 20, 0, 5] {
            std::thread::sleep(Duration::from_millis(pause));
            theirs.write_all(b"x").unwrap();
        }
    });
    driver.block_on(async {
        let mut read = 0;
        loop {
            match poll_fn(|cx| poll_read(&source, cx)).await.unwrap() {
                0 => break assert_eq!(read, 4),
                count => read += count,
            }
        }
    });
    writer.join().unwrap();
}

// Fails if a wake-up by another thread does not end the wait.
#[test]
fn block_on_returns_when_another_thread_wakes_it() {
    let driver = Driver::new().unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let mut waker_thread = None;
    driver.block_on(poll_fn(|cx| {
        waker_thread.get_or_insert_with(|| {
            let (waker, done) = (cx.waker().clone(), done.clone());
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(10));
                done.store(true, Ordering::SeqCst);
                waker.wake();
            })
        });
        if done.load(Ordering::SeqCst) { Poll::Ready(()) } else { Poll::Pending }
    }));
    waker_thread.unwrap().join().unwrap();
}

// Fails if the end of the stream is lost that came in one event with the last bytes.
#[test]
fn end_of_stream_is_read_after_the_last_bytes() {
    for close in [Shutdown::Write, Shutdown::Both] {
        let driver = Driver::new().unwrap();
        let (source, mut theirs) = source(&driver);
        let (waker, wakes) = counting();
        let mut cx = Context::from_waker(&waker);
        assert!(poll_read(&source, &mut cx).is_pending());
        theirs.write_all(b"last").unwrap();
        theirs.shutdown(close).unwrap();
        turn(&driver);
        assert_eq!(count(&wakes), 1);
        assert!(matches!(poll_read(&source, &mut cx), Poll::Ready(Ok(4))));
        let end = poll_read(&source, &mut cx);
        assert!(matches!(end, Poll::Ready(Ok(0))), "{close:?}: {end:?}");
    }
}

// Fails if a writer is not woken when there is room again, or a reading peer wakes a connection
// without a waiting writer.
#[test]
fn room_wakes_only_a_waiting_writer() {
    let driver = Driver::new().unwrap();
    let (source, mut theirs) = source(&driver);
    let (waker, wakes) = counting();
    let mut cx = Context::from_waker(&waker);
    let write = |cx: &mut Context<'_>| source.poll_write(cx, |mut io| io.write(&[0; 4096]));
    let mut written = 0;
    while let Poll::Ready(count) = write(&mut cx) {
        written += count.unwrap();
    }
    turn(&driver);
    assert_eq!(count(&wakes), 0, "there is no room");
    theirs.read_exact(&mut vec![0; written]).unwrap();
    turn(&driver);
    assert_eq!(count(&wakes), 1);
    assert!(matches!(write(&mut cx), Poll::Ready(Ok(4096))));
    theirs.read_exact(&mut [0; 4096]).unwrap();
    turn(&driver);
    assert_eq!((count(&wakes), driver.load()), (1, 0), "an event without a waiting writer");
}

// Fails if a dropped source gets events, its number is lost, or the next owner of the number
// gets its events.
#[test]
fn dropped_source_frees_its_number() {
    let driver = Driver::new().unwrap();
    let (first, mut to_first) = source(&driver);
    let (_second, _to_second) = source(&driver);
    let (waker, wakes) = counting();
    let mut cx = Context::from_waker(&waker);
    assert!(poll_read(&first, &mut cx).is_pending());
    drop(first);
    let (third, mut to_third) = source(&driver);
    assert_eq!(lock(&driver.0.as_ref().unwrap().sources).slots.len(), 2);
    assert!(to_first.write_all(b"x").is_err(), "its descriptor is closed");
    assert!(poll_read(&third, &mut cx).is_pending());
    turn(&driver);
    assert_eq!(count(&wakes), 0);
    to_third.write_all(b"y").unwrap();
    turn(&driver);
    assert_eq!(count(&wakes), 1);
}

// Fails if a descriptor that epoll refuses takes a number.
#[test]
fn refused_descriptor_takes_no_number() {
    let driver = Driver::new().unwrap();
    assert!(driver.source(tempfile::tempfile().unwrap()).is_err());
    let sources = lock(&driver.0.as_ref().unwrap().sources);
    assert_eq!((sources.slots.len(), sources.free.len()), (0, 0));
}

// Fails if a deferred task is not woken, or is woken before a task whose descriptor is ready.
#[test]
fn deferred_task_runs_after_the_ready_ones() {
    let driver = Driver::new().unwrap();
    let (source, mut theirs) = source(&driver);
    let mut order = Vec::new();
    let mut deferred = false;
    driver.block_on(poll_fn(|cx| {
        if !deferred {
            deferred = true;
            assert!(poll_read(&source, cx).is_pending());
            theirs.write_all(b"x").unwrap();
            driver.defer(cx.waker());
            assert_eq!(driver.load(), 1);
            return Poll::Pending;
        }
        // The event of the source and the deferred wake-up belong to the same turn.
        order.push(if poll_read(&source, cx).is_ready() { "ready" } else { "deferred" });
        Poll::Ready(())
    }));
    assert_eq!(order, ["ready"]);
}
