//! The ring with a page in memory, a doorbell that counts, and a guest that does what a test says.

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

    /// The guest puts requests down, without looking whether there is room.
    fn send(&self, bytes: &[u8]) {
        let prod = self.load(Word::ReqProd);
        for (at, byte) in bytes.iter().enumerate() {
            let at = (prod % SIZE) as usize + at;
            self.write(Side::Requests, at % SIZE as usize, &[*byte]);
        }
        self.store(Word::ReqProd, prod.wrapping_add(u32::try_from(bytes.len()).unwrap()));
    }

    /// The guest takes up to `count` bytes of replies.
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

    /// The guest sets all four indices to 0.
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

/// Both ends of a ring, and whoever serves it.
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

    fn rings(&self) -> u32 {
        self.channel.doorbell().0.load(Ordering::Relaxed)
    }

    fn wakes(&self) -> usize {
        self.woken.0.load(Ordering::Relaxed)
    }
}

fn some_bytes(count: usize) -> Vec<u8> {
    (0..251_u8).cycle().take(count).collect()
}

// Fails if a byte is lost, repeated or misplaced at the end of a ring or of the numbers, in either
// direction, whatever the sizes.
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

// Fails if a request is missed for which Linux does not ring: one that it puts down after the server
// has looked for the last time, and before the page says that the one before has been taken.
#[test]
fn a_request_without_a_bell_is_found() {
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

// Fails if more than a ring is written, or if nobody is woken once there is room again.
#[test]
fn a_full_ring_takes_no_more_until_the_guest_has_read() {
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

// Fails if an empty ring does not wait, if a full one is taken for garbage, or if the guest is not
// told where the server has got to, or told too early: whoever comes after a server that has died
// must find in the ring what that had not yet come to.
#[test]
fn requests_are_taken_as_they_come() {
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

/// A page whose guest does something right after it has been looked for requests.
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

// Fails if a request is missed that comes, and is rung for, while the server has looked in vain and
// has not said yet whom to wake: its guest would wait for ever.
#[test]
fn a_request_that_comes_while_nobody_waits_yet_is_taken() {
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

// Fails if the guest is told of every byte, or of nothing, or when nothing has moved: each event
// costs both sides, and a guest that is not told of free space waits for ever.
#[test]
fn the_bell_rings_once_for_all_that_moved() {
    let mut ends = ends();
    assert!(ends.read(10).is_pending());
    ends.flush();
    assert_eq!(ends.rings(), 0, "nothing has moved");
    ends.page.send(b"abc");
    assert!(ends.read(2).is_ready() && ends.read(2).is_ready());
    assert!(ends.write(b"d").is_ready() && ends.write(b"e").is_ready());
    assert_eq!(ends.rings(), 0, "not before the flush");
    ends.flush();
    ends.flush();
    assert_eq!(ends.rings(), 1);
    ends.page.send(b"f");
    assert!(ends.read(2).is_ready());
    ends.flush();
    assert_eq!(ends.rings(), 2, "room for requests is worth telling");
}

// Fails if an index of the guest that is garbage is used (XSA-38), is not told, or is not the end of
// the connection.
#[test]
fn garbage_in_an_index_of_the_guest_ends_the_connection() {
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
            assert_eq!((ends.page.load(Word::Error), ends.rings()), (2, 1));
            assert_eq!(ends.recover(Failure::Transport), Poll::Pending);
            assert_eq!(ends.rings(), 1, "told once");
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

    /// The guest has set its indices to 0: nothing is copied, and the task is woken, until that is asked.
    fn finds_zeros(&mut self) {
        let wakes = self.wakes();
        assert!(self.read(10).is_pending() && self.write(b"x").is_pending());
        assert_eq!(self.wakes(), wakes + 2);
        assert!(self.ring.restarts_at_zero() && !self.ring.restarts_at_zero());
    }
}

// Fails if a guest that sets all four indices of its idle ring to 0, as OpenBSD's first driver does
// after every reply, is not served, or is noticed only when its next request is longer than the last.
#[test]
fn a_guest_may_set_its_idle_ring_to_zero() {
    let mut ends = ends();
    for request in [&b"request"[..], b"requests", b"request", b"re"] {
        ends.exchange(request, b"reply");
        ends.page.zero();
        ends.page.send(request);
        ends.finds_zeros();
        assert_eq!(ends.read(100), Poll::Ready(Ok(request.to_vec())));
        assert_eq!(ends.write(b"again"), Poll::Ready(Ok(5)));
        ends.flush();
        let count = u32::try_from(request.len()).unwrap();
        assert_eq!(ends.page.words()[..4], [count, count, 0, 5]);
        assert_eq!(ends.page.take(100), b"again");
        ends.page.zero();
        ends.finds_zeros();
        assert_eq!(ends.ring.resume_point(), ResumePoint::Ring(Indices::default()));
        assert_eq!(ends.write(b"event"), Poll::Ready(Ok(5)));
        assert_eq!(ends.page.take(100), b"event");
    }
}

// Fails if an index that the guest sets to 0 between two steps of a turn is overwritten with the server's,
// which the page does not match, or if the server does not poll the page afterwards.
#[test]
fn a_flush_leaves_zeros_alone() {
    let mut ends = ends();
    ends.exchange(b"request", b"reply");
    ends.page.send(b"more");
    assert_eq!(ends.read(100), Poll::Ready(Ok(b"more".to_vec())));
    ends.page.zero();
    let (wakes, rings) = (ends.wakes(), ends.rings());
    ends.flush();
    assert_eq!((ends.wakes(), ends.rings()), (wakes + 1, rings));
    assert_eq!(ends.page.words()[..4], [0; 4]);
    ends.finds_zeros();
}

// Fails if a guest that set its indices to 0 under one server is not served by the next, or by one that
// took the ring from C xenstored, which knows no indices but those in the page.
#[test]
fn zeros_are_found_by_the_next_server() {
    let mut ends = ends();
    ends.exchange(b"request", b"reply");
    let ResumePoint::Ring(place) = ends.ring.resume_point() else { panic!("not on a ring") };
    ends.page.zero();
    ends.page.send(b"next");
    let channel = || RingChannel::resume(ends.page.clone(), Count::default(), Features::ALL);
    let (ours, from_page) = (channel(), channel());
    ends.ring = Ring::resume(ours, DomId(5), place);
    ends.finds_zeros();
    assert_eq!(ends.read(100), Poll::Ready(Ok(b"next".to_vec())));
    ends.ring = Ring::resume(from_page, DomId(5), Indices::of(&ends.page));
    assert_eq!(ends.read(100), Poll::Ready(Ok(b"next".to_vec())));
}

// Fails if a single index that the guest sets to 0 is taken for a restart of both rings: then the server
// would use an index that the guest has overwritten.
#[test]
fn a_single_zero_is_not_a_fresh_ring() {
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

// Fails if the server believes what the page says about its own indices, other than that both are 0.
#[test]
fn garbage_in_an_index_of_ours_is_not_looked_at() {
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

// Fails if a violation is told as something else than error 3 of xs_wire.h.
#[test]
fn a_violation_is_told() {
    let mut ends = ends();
    assert_eq!(ends.recover(Failure::Protocol), Poll::Pending);
    assert_eq!((ends.page.load(Word::Error), ends.rings()), (3, 1));
}

// Fails if a guest finds an error in a field that it was not offered, or other features than it was
// offered.
#[test]
fn errors_are_told_only_to_those_who_were_offered_them() {
    for features in
        [Features::NONE, Features::ALL, Features::ALL & !Features::ERROR, Features::ERROR]
    {
        let mut ends = ends_offering(features);
        assert_eq!(ends.page.load(Word::ServerFeatures), features.bits());
        assert_eq!(ends.recover(Failure::Protocol), Poll::Pending);
        let expected = if features.contains(Features::ERROR) { 3 } else { 0 };
        assert_eq!((ends.page.load(Word::Error), ends.rings()), (expected, expected / 3));
    }
}

// Fails if a reconnect leaves bytes or indices, is granted before they are gone, is not told, or is
// not noticed by whoever serves the ring.
#[test]
fn the_guest_may_reconnect_at_any_time() {
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
        "not before it is recorded"
    );
    assert_eq!(ends.recover(Failure::Transport), Poll::Ready(true));
    assert_eq!(ends.page.words(), [0, 0, 0, 0, Features::ALL.bits(), 0, 0]);
    assert_eq!(ends.rings(), 1);
    ends.flush();
    assert_eq!((ends.rings(), ends.page.load(Word::Error)), (1, 0), "nothing is left to be told");
    ends.page.send(b"new");
    assert_eq!(ends.read(10), Poll::Ready(Ok(b"new".to_vec())));
    assert_eq!(ends.write(b"answer"), Poll::Ready(Ok(6)));
    assert_eq!(ends.page.take(100), b"answer");
}

// Fails if a reconnect does not end an error, or an error that ended comes back.
#[test]
fn a_reconnect_ends_an_error() {
    let mut ends = ends();
    ends.page.store(Word::ReqProd, 5000);
    assert!(matches!(ends.read(10), Poll::Ready(Err(_))));
    assert_eq!(ends.recover(Failure::Transport), Poll::Pending);
    let before = ends.wakes();
    ends.page.store(Word::Connection, connection::RECONNECT);
    ends.channel.notify();
    assert_eq!(ends.wakes(), before + 1, "an error waits for the doorbell");
    assert_eq!(ends.recover(Failure::Transport), Poll::Ready(true));
    assert_eq!(ends.page.words(), [0, 0, 0, 0, Features::ALL.bits(), 0, 0]);
    assert!(ends.read(10).is_pending());
}

// Fails if being introduced again does not start the rings anew, with or without an error before,
// or if it rings for a guest that has not asked for anything.
#[test]
fn being_introduced_again_starts_anew() {
    for failed in [false, true] {
        let mut ends = ends();
        ends.page.send(b"x");
        assert!(ends.read(1).is_ready());
        assert!(ends.read(10).is_pending());
        ends.page.send(b"old");
        let told = u32::from(failed);
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
        assert_eq!(ends.rings(), told);
    }
}

// Fails if a guest that a builder left waiting (dom0less) is not let in when it is introduced.
#[test]
fn a_page_that_waits_is_let_in() {
    let page = InMemory::new();
    page.store(Word::Connection, connection::RECONNECT);
    page.store(Word::ReqProd, 77);
    let channel = RingChannel::new(page.clone(), Count::default(), Features::ALL);
    assert_eq!(page.words(), [0, 0, 0, 0, Features::ALL.bits(), 0, 0]);
    assert_eq!(channel.doorbell().0.load(Ordering::Relaxed), 1);
}

// Fails if the page of a domain that is gone is looked at or kept, also by somebody who begins to
// serve it only afterwards.
#[test]
fn a_closed_line_ends_its_ring() {
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
