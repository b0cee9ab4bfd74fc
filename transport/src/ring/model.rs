//! A loom model of the ring: the order of accesses to the page, in all interleavings of a guest and a
//! server that the memory model of Rust allows. Run by `cargo xtask test`, or with
//!
//!     RUSTFLAGS="--cfg xenstore_loom -Copt-level=2" cargo test -p xenstore-transport --lib model
//!
//! An event stays pending until it is received. The model fails as well if a server or a guest misses an
//! event and waits forever.

use std::task::{Wake, Waker};

use loom::sync::atomic::AtomicU32;
use loom::sync::{Arc, Notify};
use loom::thread;
use xenstore_sys::Byte;

use super::*;

/// The bytes of each ring that the model checks: those at both sides of its end.
const WATCHED: usize = 4;
/// The fill level at the start: two bytes fit up to the end of the ring, and two more once it is read.
const FULL: u32 = SIZE - 2;
/// The bytes that are sent, and the byte that fills the ring before.
const SENT: [u8; WATCHED] = [1, 2, 3, 4];
const OLD: u8 = 9;

struct Shared {
    words: [AtomicU32; 8],
    rings: [[Byte; WATCHED]; 2],
    to_server: Notify,
    to_guest: Notify,
}

#[derive(Clone)]
struct Model(Arc<Shared>);

impl Model {
    /// Words from `req_cons` on.
    fn new(words: [u32; 4]) -> Model {
        let [a, b, c, d] = words;
        let ring = || [0; WATCHED].map(|_| Byte::new(OLD));
        Model(Arc::new(Shared {
            words: [a, b, c, d, 0, 0, 0, 0].map(AtomicU32::new),
            rings: [ring(), ring()],
            to_server: Notify::new(),
            to_guest: Notify::new(),
        }))
    }

    fn word(&self, word: Word) -> &AtomicU32 {
        &self.0.words[(word.offset() - Word::ReqCons.offset()) / 4]
    }

    fn byte(&self, side: Side, at: usize) -> Option<&Byte> {
        let at = (at + 2) % SIZE as usize;
        self.0.rings[side.offset() / SIZE as usize].get(at)
    }
}

impl Page for Model {
    fn load(&self, word: Word) -> u32 {
        self.word(word).load(READ)
    }
    fn store(&self, word: Word, value: u32) {
        self.word(word).store(value, WRITE);
    }
    fn read(&self, side: Side, at: usize, bytes: &mut [u8]) {
        for (at, byte) in (at..).zip(bytes) {
            *byte = self.byte(side, at).map_or(OLD, Byte::get);
        }
    }
    fn write(&self, side: Side, at: usize, bytes: &[u8]) {
        for (at, byte) in (at..).zip(bytes) {
            if let Some(watched) = self.byte(side, at) {
                watched.set(*byte);
            }
        }
    }
}

impl Doorbell for Model {
    fn notify(&self) {
        self.0.to_guest.notify();
    }
}

/// Whether the task of the ring was woken.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A guest like Linux, which sends an event only if the server may have read all earlier requests. It
/// sends [`SENT`], as many bytes at a time as there is space for.
fn guest_sends(page: &Model) {
    let mut rest = &SENT[..];
    while !rest.is_empty() {
        let prod = page.word(Word::ReqProd).load(Ordering::Relaxed);
        let there = prod.wrapping_sub(page.word(Word::ReqCons).load(Ordering::Acquire));
        let (now, later) = rest.split_at(rest.len().min((SIZE - there) as usize));
        if now.is_empty() {
            page.0.to_guest.wait();
            continue;
        }
        for (index, byte) in (prod..).zip(now) {
            page.write(Side::Requests, (index % SIZE) as usize, &[*byte]);
        }
        let count = u32::try_from(now.len()).unwrap();
        page.word(Word::ReqProd).store(prod.wrapping_add(count), Ordering::Release);
        fence(Ordering::SeqCst);
        if prod <= page.word(Word::ReqCons).load(Ordering::Acquire) {
            page.0.to_server.notify();
        }
        rest = later;
    }
}

/// A guest that reads `wanted` bytes of replies. It sends an event only if the ring was full.
fn guest_takes(page: &Model, wanted: usize) -> Vec<u8> {
    let mut taken = Vec::new();
    while taken.len() < wanted {
        let cons = page.word(Word::RspCons).load(Ordering::Relaxed);
        let there = page.word(Word::RspProd).load(Ordering::Acquire).wrapping_sub(cons);
        if there == 0 {
            page.0.to_guest.wait();
            continue;
        }
        for index in (cons..).take(there as usize) {
            let mut byte = [0];
            page.read(Side::Replies, (index % SIZE) as usize, &mut byte);
            taken.push(byte[0]);
        }
        page.word(Word::RspCons).store(cons.wrapping_add(there), Ordering::Release);
        fence(Ordering::SeqCst);
        if page.word(Word::RspProd).load(Ordering::Acquire).wrapping_sub(cons) >= SIZE {
            page.0.to_server.notify();
        }
    }
    taken
}

// Fails if the server reads a request before the guest has written it, frees its space before it has read
// it, or misses an event.
#[test]
fn request_is_read_after_it_is_written() {
    loom::model(|| {
        let page = Model::new([0, FULL, 0, 0]);
        let guest = thread::spawn({
            let page = page.clone();
            move || guest_sends(&page)
        });
        let channel = RingChannel::resume(page.clone(), page.clone(), Features::NONE);
        let (mut ring, mut got) =
            (Ring::resume(channel, DomId(5), Indices::default()).notify_on_flush(), Vec::new());
        let woken = std::sync::Arc::<Woken>::default();
        let waker = Waker::from(woken.clone());
        let cx = &mut Context::from_waker(&waker);
        while got.len() < FULL as usize + WATCHED {
            let mut bytes = [0; SIZE as usize];
            match Pin::new(&mut ring).poll_read(cx, &mut bytes) {
                Poll::Ready(count) => got.extend_from_slice(&bytes[..count.unwrap()]),
                Poll::Pending => {
                    assert!(Pin::new(&mut ring).poll_flush(cx).is_ready());
                    if !woken.0.swap(false, Ordering::Relaxed) {
                        page.0.to_server.wait();
                    }
                }
            }
        }
        assert_eq!((&got[..2], &got[FULL as usize..]), (&[OLD; 2][..], &SENT[..]));
        guest.join().unwrap();
    });
}

// Fails if the guest reads a reply before the server has written it, the server overwrites one before the
// guest has read it, or one of them misses an event.
#[test]
fn reply_is_read_after_it_is_written() {
    loom::model(|| {
        let page = Model::new([0, 0, 0, FULL]);
        let guest = thread::spawn({
            let page = page.clone();
            move || guest_takes(&page, FULL as usize + WATCHED)
        });
        let mut indices = Indices { req_cons: 0, rsp_prod: FULL };
        let mut rest = &SENT[..];
        while !rest.is_empty() {
            match indices.write(&page, rest).unwrap() {
                0 => page.0.to_server.wait(),
                count => {
                    rest = &rest[count..];
                    page.notify();
                }
            }
        }
        let taken = guest.join().unwrap();
        assert_eq!((&taken[..2], &taken[FULL as usize..]), (&[OLD; 2][..], &SENT[..]));
    });
}

// Fails if a guest can find old indices after it was connected again.
#[test]
fn connected_word_is_written_after_the_indices() {
    loom::model(|| {
        let page = Model::new([0; 4]);
        let channel = RingChannel::new(page.clone(), page.clone(), Features::NONE);
        let mut ring = Ring::new(channel, DomId(5));
        let guest = thread::spawn({
            let page = page.clone();
            move || {
                page.word(Word::ReqProd).store(5000, Ordering::Relaxed);
                page.word(Word::RspCons).store(5000, Ordering::Relaxed);
                page.word(Word::Connection).store(connection::RECONNECT, Ordering::Release);
                page.0.to_server.notify();
                while page.word(Word::Connection).load(Ordering::Acquire) != 0 {
                    page.0.to_guest.wait();
                }
                let [req_prod, rsp_cons] = [Word::ReqProd, Word::RspCons];
                let indices =
                    [req_prod, rsp_cons].map(|word| page.word(word).load(Ordering::Relaxed));
                assert_eq!(indices, [0, 0]);
                page.write(Side::Requests, 0, &[SENT[0]]);
                page.word(req_prod).store(1, Ordering::Release);
                page.0.to_server.notify();
            }
        });
        let cx = &mut Context::from_waker(Waker::noop());
        let mut byte = [0];
        loop {
            match Pin::new(&mut ring).poll_read(cx, &mut byte) {
                Poll::Ready(Ok(count)) => break assert_eq!((count, byte), (1, [SENT[0]])),
                Poll::Pending => page.0.to_server.wait(),
                Poll::Ready(Err(_)) => {
                    while ring.poll_recover(cx, Failure::Transport).is_pending() {
                        page.0.to_server.wait();
                    }
                }
            }
        }
        guest.join().unwrap();
    });
}

// Fails if the server reads bytes after a restart at 0 before the guest has written them, never finds them,
// or reports invalid indices between the first and the last zero. The guest writes the zeros in the order
// of `req_cons = req_prod = rsp_cons = rsp_prod = 0`, or in that of memory.
#[test]
fn zeroed_indices_are_read_after_all_are_written() {
    let ascending = [Word::ReqCons, Word::ReqProd, Word::RspCons, Word::RspProd];
    let mut descending = ascending;
    descending.reverse();
    for order in [ascending, descending] {
        let mut few_switches = loom::model::Builder::new();
        few_switches.preemption_bound = Some(3);
        few_switches.check(move || {
            let page = Model::new([FULL; 4]);
            let channel = RingChannel::resume(page.clone(), page.clone(), Features::NONE);
            let mut ring =
                Ring::resume(channel, DomId(5), Indices { req_cons: FULL, rsp_prod: FULL });
            let guest = thread::spawn({
                let page = page.clone();
                move || {
                    for word in order {
                        page.word(word).store(0, Ordering::Release);
                    }
                    page.write(Side::Requests, 0, &[SENT[0]]);
                    page.word(Word::ReqProd).store(1, Ordering::Release);
                    page.0.to_server.notify();
                }
            });
            let cx = &mut Context::from_waker(Waker::noop());
            let mut byte = [0];
            loop {
                ring.restarts_at_zero();
                match Pin::new(&mut ring).poll_read(cx, &mut byte) {
                    Poll::Ready(Ok(count)) => break assert_eq!((count, byte), (1, [SENT[0]])),
                    // The task would be woken.
                    Poll::Pending if ring.restarts_at_zero() => {}
                    Poll::Pending => page.0.to_server.wait(),
                    failed => panic!("{failed:?}"),
                }
            }
            guest.join().unwrap();
        });
    }
}
