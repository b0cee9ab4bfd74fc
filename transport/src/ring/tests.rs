//! The ring with a page in memory, a doorbell that counts, and a scripted guest.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Wake, Waker};

use xenstore_protocol::Features;

use super::*;

#[derive(Clone)]
struct InMemory(Arc<Mutex<Vec<u8>>>);

impl InMemory {
    fn new() -> InMemory {
        InMemory(Arc::new(Mutex::new(vec![0xaa; 2048].into_iter().chain([0; 2048]).collect())))
    }

    /// Writes requests as the guest, without a check for space.
    fn send(&self, bytes: &[u8]) {
        let prod = self.load(Word::ReqProd);
        for (at, byte) in bytes.iter().enumerate() {
            let at = (prod % SIZE) as usize + at;
            self.write(Side::Requests, at % SIZE as usize, &[*byte]);
        }
        self.store(Word::ReqProd, prod.wrapping_add(u32::try_from(bytes.len()).unwrap()));
    }

    /// Reads up to `count` bytes of replies as the guest.
    fn take(&self, count: u32) -> Vec<u8> {
        let (cons, prod) = (self.load(Word::RspCons), self.load(Word::RspProd));
        let count = count.min(prod.wrapping_sub(cons));
        let mut bytes = vec![0; count as usize];
        for (at, byte) in bytes.iter_mut().enumerate() {
            let at = (cons % SIZE) as usize + at;
            self.read(Side::Replies, at % SIZE as usize, std::slice::from_mut(byte));
        }
        self.store(Word::RspCons, cons.wrapping_add(count));
        bytes
    }

    /// Sets all four indices to 0 as the guest.
    fn zero(&self) {
        for word in [Word::ReqCons, Word::ReqProd, Word::RspCons, Word::RspProd] {
            self.store(word, 0);
        }
    }

    fn words(&self) -> [u32; 7] {
        [
            Word::ReqCons,
            Word::ReqProd,
            Word::RspCons,
            Word::RspProd,
            Word::ServerFeatures,
            Word::Connection,
            Word::Error,
        ]
        .map(|word| self.load(word))
    }
}

impl Page for InMemory {
    fn load(&self, word: Word) -> u32 {
        let page = self.0.lock().unwrap();
        u32::from_le_bytes(page[word.offset()..word.offset() + 4].try_into().unwrap())
    }
    fn store(&self, word: Word, value: u32) {
        let mut page = self.0.lock().unwrap();
        page[word.offset()..word.offset() + 4].copy_from_slice(&value.to_le_bytes());
    }
    fn read(&self, side: Side, at: usize, bytes: &mut [u8]) {
        let at = side.offset() + at;
        bytes.copy_from_slice(&self.0.lock().unwrap()[at..at + bytes.len()]);
    }
    fn write(&self, side: Side, at: usize, bytes: &[u8]) {
        let at = side.offset() + at;
        self.0.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

#[derive(Clone, Default)]
struct Count(Arc<AtomicU32>);

impl Doorbell for Count {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Both ends of a ring, and the waker of its task.
struct Ends {
    page: InMemory,
    channel: Arc<RingChannel<InMemory, Count>>,
    ring: Ring<InMemory, Count>,
    woken: Arc<Woken>,
    waker: Waker,
}

fn ends_offering(features: Features) -> Ends {
    let page = InMemory::new();
    let channel = RingChannel::new(page.clone(), Count::default(), features);
    let ring = Ring::new(channel.clone(), DomId(5));
    let woken = Arc::<Woken>::default();
    Ends { page, channel, ring, waker: woken.clone().into(), woken }
}

fn ends() -> Ends {
    ends_offering(Features::ALL)
}

impl Ends {
    fn read(&mut self, count: usize) -> Poll<Result<Vec<u8>, io::ErrorKind>> {
        let mut bytes = vec![0; count];
        let mut cx = Context::from_waker(&self.waker);
        let read = Pin::new(&mut self.ring).poll_read(&mut cx, &mut bytes);
        read.map_ok(|count| bytes[..count].to_vec()).map_err(|error| error.kind())
    }

    fn write(&mut self, bytes: &[u8]) -> Poll<Result<usize, io::ErrorKind>> {
        let mut cx = Context::from_waker(&self.waker);
        Pin::new(&mut self.ring).poll_write(&mut cx, bytes).map_err(|error| error.kind())
    }

    fn flush(&mut self) {
        let mut cx = Context::from_waker(&self.waker);
        assert!(Pin::new(&mut self.ring).poll_flush(&mut cx).is_ready());
    }

    fn recover(&mut self, failure: Failure) -> Poll<bool> {
        let mut cx = Context::from_waker(&self.waker);
        self.ring.poll_recover(&mut cx, failure)
    }

    fn notified(&self) -> u32 {
        self.channel.doorbell().0.load(Ordering::Relaxed)
    }

    fn wakes(&self) -> usize {
        self.woken.0.load(Ordering::Relaxed)
    }
}

fn some_bytes(count: usize) -> Vec<u8> {
    (0..251_u8).cycle().take(count).collect()
}

// Fails if a byte is lost, repeated or misplaced at the end of the ring or where the indices overflow, in
// either direction.
#[test]
fn bytes_arrive_in_order_around_both_ends() {
    let mut ends = ends();
    let start = u32::MAX - 3000;
    ends.ring.indices = Indices { req_cons: start, rsp_prod: start };
    for word in [Word::ReqCons, Word::ReqProd, Word::RspCons, Word::RspProd] {
        ends.page.store(word, start);
    }
    let sent = some_bytes(20_000);
    let (mut requests, mut received, mut replies, mut taken) = (&sent[..], vec![], 0, vec![]);
    for size in (1..).map(|n: usize| n * 37 % 1100 + 1) {
        let room = SIZE - ends.page.load(Word::ReqProd).wrapping_sub(ends.page.load(Word::ReqCons));
        let (now, rest) = requests.split_at(size.min(room as usize).min(requests.len()));
        ends.page.send(now);
        requests = rest;
        if let Poll::Ready(read) = ends.read(size * 3 % 700 + 1) {
            received.extend(read.unwrap());
        }
        if replies < sent.len() {
            let some = (size * 5 % 1500).clamp(1, sent.len() - replies);
            if let Poll::Ready(count) = ends.write(&sent[replies..replies + some]) {
                replies += count.unwrap();
            }
        }
        ends.flush();
        taken.extend(ends.page.take(u32::try_from(size * 7 % 600).unwrap()));
        if received.len() == sent.len() && taken.len() == sent.len() {
            break;
        }
    }
    assert!(received == sent && taken == sent);
}

// Fails if a request without an event is missed: Linux sends none for a request that it writes after the
// last attempt of the server, and before it finds the earlier one read.
#[test]
fn request_without_an_event_is_found_by_the_flush() {
    let mut ends = ends();
    ends.page.send(b"header");
    assert_eq!(ends.read(100), Poll::Ready(Ok(b"header".to_vec())));
    assert_eq!(ends.read(100), Poll::Pending);
    ends.page.send(b"payload");
    ends.flush();
    assert_eq!(ends.wakes(), 1);
    assert_eq!(ends.read(100), Poll::Ready(Ok(b"payload".to_vec())));
    ends.flush();
    assert_eq!(ends.wakes(), 1);
}

// Fails if more than a ring is written, or the writer is not woken when there is space.
#[test]
fn write_to_a_full_ring_waits_until_the_guest_reads() {
    let mut ends = ends();
    let sent = some_bytes(1500);
    assert_eq!(ends.write(&sent), Poll::Ready(Ok(1024)));
    assert_eq!(ends.write(&sent[1024..]), Poll::Pending);
    assert_eq!(ends.page.take(100), sent[..100]);
    let before = ends.wakes();
    ends.channel.notify();
    assert_eq!(ends.wakes(), before + 1);
    assert_eq!(ends.write(&sent[1024..]), Poll::Ready(Ok(100)));
    assert_eq!(ends.write(&sent[1124..]), Poll::Pending);
    assert_eq!(ends.page.take(2000), sent[100..1124]);
}

// Fails if an empty ring does not wait, a full ring is invalid, or the index of read requests is published
// before the flush: if the server dies, the next one must find the requests in the ring.
#[test]
fn read_requests_remain_in_the_ring_until_the_flush() {
    let mut ends = ends();
    assert_eq!(ends.read(10), Poll::Pending);
    let sent = some_bytes(1024);
    ends.page.send(&sent);
    ends.channel.notify();
    assert_eq!(ends.wakes(), 1);
    assert_eq!(ends.read(1000), Poll::Ready(Ok(sent[..1000].to_vec())));
    assert_eq!(ends.page.load(Word::ReqCons), 0);
    ends.flush();
    assert_eq!(ends.page.load(Word::ReqCons), 1000);
    assert_eq!(ends.read(1000), Poll::Ready(Ok(sent[1000..].to_vec())));
    ends.flush();
    assert_eq!(ends.page.load(Word::ReqCons), 1024);
    assert_eq!(ends.read(1000), Poll::Pending);
}

type Then = Box<dyn FnOnce()>;

/// A page whose guest acts directly after the server has read its index of requests.
struct Late(InMemory, Rc<RefCell<Option<Then>>>);

impl Page for Late {
    fn load(&self, word: Word) -> u32 {
        let value = self.0.load(word);
        if word == Word::ReqProd
            && let Some(then) = self.1.take()
        {
            then();
        }
        value
    }
    fn store(&self, word: Word, value: u32) {
        self.0.store(word, value);
    }
    fn read(&self, side: Side, at: usize, bytes: &mut [u8]) {
        self.0.read(side, at, bytes);
    }
    fn write(&self, side: Side, at: usize, bytes: &[u8]) {
        self.0.write(side, at, bytes);
    }
}

// Fails if a request is missed that arrives with its event between an attempt of the server and the
// registration of its waker: the guest would wait forever.
#[test]
fn request_before_the_registration_of_the_waker_is_found() {
    let (page, then) = (InMemory::new(), Rc::<RefCell<Option<Then>>>::default());
    let channel =
        RingChannel::new(Late(page.clone(), then.clone()), Count::default(), Features::NONE);
    let mut ring = Ring::new(channel.clone(), DomId(5));
    *then.borrow_mut() = Some(Box::new(move || {
        page.send(b"late");
        channel.notify();
    }));
    let mut bytes = [0; 8];
    let read = Pin::new(&mut ring).poll_read(&mut Context::from_waker(Waker::noop()), &mut bytes);
    assert!(matches!(read, Poll::Ready(Ok(4))), "{read:?}");
}

// Fails if a flush sends more or less than one event, or one although no index has moved: a guest without
// an event about free space waits forever.
#[test]
fn flush_notifies_once_if_an_index_has_moved() {
    let mut ends = ends();
    assert!(ends.read(10).is_pending());
    ends.flush();
    assert_eq!(ends.notified(), 0, "nothing has moved");
    ends.page.send(b"abc");
    assert!(ends.read(2).is_ready() && ends.read(2).is_ready());
    assert!(ends.write(b"d").is_ready() && ends.write(b"e").is_ready());
    assert_eq!(ends.notified(), 0, "not before the flush");
    ends.flush();
    ends.flush();
    assert_eq!(ends.notified(), 1);
    ends.page.send(b"f");
    assert!(ends.read(2).is_ready());
    ends.flush();
    assert_eq!(ends.notified(), 2, "there is space for requests");
}

// Fails if an invalid index of the guest is used (XSA-38), is not reported, or does not end the connection.
#[test]
fn invalid_index_of_the_guest_ends_the_connection() {
    // More than a ring ahead of the consumer, or behind it; ahead of the producer.
    for (word, values) in [
        (Word::ReqProd, [1025, 2000, 0x8000_0000, u32::MAX]),
        (Word::RspCons, [1, 2000, 0x8000_0000, u32::MAX - 1024]),
    ] {
        for garbage in values {
            let mut ends = ends();
            ends.page.store(word, garbage);
            let result = match word {
                Word::ReqProd => ends.read(4096).map_ok(|bytes| bytes.len()),
                _ => ends.write(&[1; 4096]),
            };
            assert_eq!(result, Poll::Ready(Err(io::ErrorKind::InvalidData)), "{word:?} {garbage}");
            assert_eq!(ends.recover(Failure::Transport), Poll::Pending);
            assert_eq!((ends.page.load(Word::Error), ends.notified()), (2, 1));
            assert_eq!(ends.recover(Failure::Transport), Poll::Pending);
            assert_eq!(ends.notified(), 1, "one event");
            let mut ring = [0; 1024];
            ends.page.read(Side::Replies, 0, &mut ring);
            assert_eq!(ring, [0xaa; 1024], "nothing was written");
        }
    }
}

impl Ends {
    /// One request and its reply.
    fn exchange(&mut self, request: &[u8], reply: &[u8]) {
        self.page.send(request);
        assert_eq!(self.read(100), Poll::Ready(Ok(request.to_vec())));
        assert_eq!(self.write(reply), Poll::Ready(Ok(reply.len())));
        self.flush();
        assert_eq!(self.page.take(100), reply);
    }

    /// Checks that the ring waits and wakes its task until `restarts_at_zero` is called.
    fn assert_restarts_at_zero(&mut self) {
        let wakes = self.wakes();
        assert!(self.read(10).is_pending() && self.write(b"x").is_pending());
        assert_eq!(self.wakes(), wakes + 2);
        assert!(self.ring.restarts_at_zero() && !self.ring.restarts_at_zero());
    }
}

// Fails if a guest that sets all four indices of its idle ring to 0, as the first driver of OpenBSD does
// after every reply, is not served, or only if its next request is longer than the last one.
#[test]
fn guest_that_zeroes_its_idle_ring_is_served() {
    let mut ends = ends();
    for request in [&b"request"[..], b"requests", b"request", b"re"] {
        ends.exchange(request, b"reply");
        ends.page.zero();
        ends.page.send(request);
        ends.assert_restarts_at_zero();
        assert_eq!(ends.read(100), Poll::Ready(Ok(request.to_vec())));
        assert_eq!(ends.write(b"again"), Poll::Ready(Ok(5)));
        ends.flush();
        let count = u32::try_from(request.len()).unwrap();
        assert_eq!(ends.page.words()[..4], [count, count, 0, 5]);
        assert_eq!(ends.page.take(100), b"again");
        ends.page.zero();
        ends.assert_restarts_at_zero();
        assert_eq!(ends.ring.resume_point(), ResumePoint::Ring(Indices::default()));
        assert_eq!(ends.write(b"event"), Poll::Ready(Ok(5)));
        assert_eq!(ends.page.take(100), b"event");
    }
}

// Fails if a flush overwrites indices that the guest has set to 0, or the server does not poll the page
// afterwards.
#[test]
fn flush_does_not_overwrite_zeroed_indices() {
    let mut ends = ends();
    ends.exchange(b"request", b"reply");
    ends.page.send(b"more");
    assert_eq!(ends.read(100), Poll::Ready(Ok(b"more".to_vec())));
    ends.page.zero();
    let (wakes, rings) = (ends.wakes(), ends.notified());
    ends.flush();
    assert_eq!((ends.wakes(), ends.notified()), (wakes + 1, rings));
    assert_eq!(ends.page.words()[..4], [0; 4]);
    ends.assert_restarts_at_zero();
}

// Fails if a guest that has set its indices to 0 is not served by the next server, with the recorded
// indices, or with those of the page after C xenstored.
#[test]
fn next_server_finds_zeroed_indices() {
    let mut ends = ends();
    ends.exchange(b"request", b"reply");
    let ResumePoint::Ring(indices) = ends.ring.resume_point() else { panic!("not on a ring") };
    ends.page.zero();
    ends.page.send(b"next");
    let channel = || RingChannel::resume(ends.page.clone(), Count::default(), Features::ALL);
    let (ours, from_page) = (channel(), channel());
    ends.ring = Ring::resume(ours, DomId(5), indices);
    ends.assert_restarts_at_zero();
    assert_eq!(ends.read(100), Poll::Ready(Ok(b"next".to_vec())));
    ends.ring = Ring::resume(from_page, DomId(5), Indices::of(&ends.page));
    assert_eq!(ends.read(100), Poll::Ready(Ok(b"next".to_vec())));
}

// Fails if a single zeroed index restarts both rings: the server would use an index that the guest has
// overwritten.
#[test]
fn single_zeroed_index_does_not_restart_the_ring() {
    for word in [Word::ReqCons, Word::RspProd] {
        let mut ends = ends();
        ends.exchange(b"request", b"reply");
        ends.page.store(word, 0);
        ends.page.send(b"x");
        assert!(!ends.ring.restarts_at_zero());
        assert_eq!(ends.read(10), Poll::Ready(Ok(b"x".to_vec())), "{word:?}");
    }
    for word in [Word::ReqProd, Word::RspCons] {
        let mut ends = ends();
        for _ in 0..300 {
            ends.exchange(b"request", b"reply");
        }
        ends.page.store(word, 0);
        let result = match word {
            Word::ReqProd => ends.read(10).map_ok(|bytes| bytes.len()),
            _ => ends.write(b"x"),
        };
        assert_eq!(result, Poll::Ready(Err(io::ErrorKind::InvalidData)), "{word:?}");
    }
}

// Fails if the server uses its own indices from the page, except that both are 0.
#[test]
fn invalid_index_of_the_server_is_ignored() {
    let mut ends = ends();
    ends.page.send(b"abc");
    assert!(ends.write(b"xyz").is_ready());
    for garbage in [1, 1025, 0x8000_0000, u32::MAX] {
        ends.page.store(Word::ReqCons, garbage);
        ends.page.store(Word::RspProd, garbage);
        ends.page.send(b"d");
        assert_eq!(ends.read(1).map_ok(|bytes| bytes.len()), Poll::Ready(Ok(1)));
        assert_eq!(ends.write(b"w"), Poll::Ready(Ok(1)));
    }
    ends.flush();
    assert_eq!(ends.page.words()[..4], [4, 7, 0, 7]);
}

// Fails if a violation is not reported as error 3 of xs_wire.h.
#[test]
fn protocol_violation_is_reported_to_the_guest() {
    let mut ends = ends();
    assert_eq!(ends.recover(Failure::Protocol), Poll::Pending);
    assert_eq!((ends.page.load(Word::Error), ends.notified()), (3, 1));
}

// Fails if a guest finds an error in a word that it was not offered, or other features than it was
// offered.
#[test]
fn error_is_written_only_if_it_was_offered() {
    for features in
        [Features::NONE, Features::ALL, Features::ALL & !Features::ERROR, Features::ERROR]
    {
        let mut ends = ends_offering(features);
        assert_eq!(ends.page.load(Word::ServerFeatures), features.bits());
        assert_eq!(ends.recover(Failure::Protocol), Poll::Pending);
        let expected = if features.contains(Features::ERROR) { 3 } else { 0 };
        assert_eq!((ends.page.load(Word::Error), ends.notified()), (expected, expected / 3));
    }
}

// Fails if a reconnect leaves bytes or indices, is granted before they are removed or without an event, or
// does not end the connection.
#[test]
fn reconnect_in_the_middle_of_a_message_restarts_the_ring() {
    let mut ends = ends();
    ends.page.send(b"half a requ");
    assert!(ends.read(4).is_ready() && ends.write(b"half an ans").is_ready());
    ends.page.store(Word::Connection, connection::RECONNECT);
    ends.channel.notify();
    assert_eq!(ends.read(10), Poll::Ready(Err(io::ErrorKind::ConnectionReset)));
    assert_eq!(ends.write(b"old"), Poll::Ready(Err(io::ErrorKind::ConnectionReset)));
    assert_eq!(
        ends.page.load(Word::Connection),
        connection::RECONNECT,
        "not before the server has recorded it"
    );
    assert_eq!(ends.recover(Failure::Transport), Poll::Ready(true));
    assert_eq!(ends.page.words(), [0, 0, 0, 0, Features::ALL.bits(), 0, 0]);
    assert_eq!(ends.notified(), 1);
    ends.flush();
    assert_eq!((ends.notified(), ends.page.load(Word::Error)), (1, 0), "no event is pending");
    ends.page.send(b"new");
    assert_eq!(ends.read(10), Poll::Ready(Ok(b"new".to_vec())));
    assert_eq!(ends.write(b"answer"), Poll::Ready(Ok(6)));
    assert_eq!(ends.page.take(100), b"answer");
}

// Fails if a reconnect does not end an error, or the error returns.
#[test]
fn reconnect_ends_an_error() {
    let mut ends = ends();
    ends.page.store(Word::ReqProd, 5000);
    assert!(matches!(ends.read(10), Poll::Ready(Err(_))));
    assert_eq!(ends.recover(Failure::Transport), Poll::Pending);
    let before = ends.wakes();
    ends.page.store(Word::Connection, connection::RECONNECT);
    ends.channel.notify();
    assert_eq!(ends.wakes(), before + 1, "a failed connection waits for an event");
    assert_eq!(ends.recover(Failure::Transport), Poll::Ready(true));
    assert_eq!(ends.page.words(), [0, 0, 0, 0, Features::ALL.bits(), 0, 0]);
    assert!(ends.read(10).is_pending());
}

// Fails if a second introduction does not restart the ring, with or without an error before, or sends an
// event to a guest that has not requested a reconnect.
#[test]
fn second_introduction_restarts_the_ring() {
    for failed in [false, true] {
        let mut ends = ends();
        ends.page.send(b"x");
        assert!(ends.read(1).is_ready());
        assert!(ends.read(10).is_pending());
        ends.page.send(b"old");
        let events = u32::from(failed);
        if failed {
            assert!(ends.recover(Failure::Protocol).is_pending());
        }
        let before = ends.wakes();
        ends.channel.start();
        assert_eq!(ends.wakes(), before + 1);
        assert_eq!(ends.page.words(), [0, 0, 0, 0, Features::ALL.bits(), 0, 0]);
        assert_eq!(ends.read(10), Poll::Ready(Err(io::ErrorKind::ConnectionReset)));
        assert_eq!(ends.recover(Failure::Transport), Poll::Ready(true));
        assert!(ends.read(10).is_pending());
        assert_eq!(ends.notified(), events);
    }
}

// Fails if a guest that waits for its introduction (dom0less) is not connected by it.
#[test]
fn introduction_connects_a_waiting_guest() {
    let page = InMemory::new();
    page.store(Word::Connection, connection::RECONNECT);
    page.store(Word::ReqProd, 77);
    let channel = RingChannel::new(page.clone(), Count::default(), Features::ALL);
    assert_eq!(page.words(), [0, 0, 0, 0, Features::ALL.bits(), 0, 0]);
    assert_eq!(channel.doorbell().0.load(Ordering::Relaxed), 1);
}

// Fails if the page of a destroyed domain is read or written, also by a task that begins to serve it later.
#[test]
fn closed_channel_fails_reads_and_writes() {
    let mut ends = ends();
    ends.page.send(b"too late");
    assert!(ends.recover(Failure::Transport).is_pending());
    let (before, words) = (ends.wakes(), ends.page.words());
    ends.channel.close();
    assert_eq!(ends.wakes(), before + 1);
    ends.ring = Ring::new(ends.channel.clone(), DomId(5));
    assert_eq!(ends.read(10), Poll::Ready(Err(io::ErrorKind::BrokenPipe)));
    assert_eq!(ends.write(b"x"), Poll::Ready(Err(io::ErrorKind::BrokenPipe)));
    assert_eq!(ends.recover(Failure::Transport), Poll::Ready(false));
    assert_eq!(ends.page.words(), words);
}
