//! A server on rings, one of which belongs to a hostile guest.
//!
//! Dom0 and guest 2 follow the protocol, and read nothing that guest 1 may change. For all changes that
//! guest 1 makes to its page, they must get the replies of a model in which guest 1 does nothing.

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

use xenstore_protocol::ring::{Word, connection};
use xenstore_protocol::{Deframer, Features};
use xenstore_transport::ring::Page;
use xenstored::{Clock, Server};

use super::against_model::{QUOTAS, config};
use super::hostile::{Machine, Shared, Tape};
use crate::model::Model;
use crate::raw::{bytes, frame, op, text};

/// The hostile guest.
const HOSTILE: u16 = 1;
/// The domains that follow the protocol.
const HONEST: [u16; 2] = [0, 2];
/// Turns within which a server must finish the work of a step. A hostile guest can cause one turn for
/// each of its bytes, which are at most 4,096.
const TURNS: u32 = 10_000;

/// Paths of the honest domains. The hostile guest has no access to them.
const PATHS: &[&str] = &[
    "/a",
    "/a/b",
    "/a/b/c",
    "/a/d",
    "/e",
    "b",
    "b/c",
    "/local/domain/2",
    "/local/domain/2/b",
    "/tool",
    "@releaseDomain",
    "@introduceDomain",
    "@releaseDomain/1",
    "/a//b",
    "",
];
const PERMS: &[&str] = &["n0|", "n2|", "n0|r2|", "n0|b2|", "n2|r0|", "n0|n1|", "n0|x2|", ""];
const TEXTS: &[&str] = &["", "1", "2", "a value that is rather long, to reach the limit on size"];
const DOMIDS: &[&str] = &["1", "1", "1", "7", "x"];
const REQUESTS: &[u32] = &[
    11, 11, 11, 2, 2, 1, 3, 12, 13, 14, 4, 4, 5, 6, 6, 7, 7, 22, 21, 8, 8, 8, 9, 10, 17, 18, 23, 15,
];

/// Requests of the hostile guest.
const ITS_REQUESTS: &[u32] = &[11, 11, 2, 1, 3, 12, 13, 14, 4, 4, 5, 6, 7, 21, 22, 9, 0, 20];
const ITS_PAYLOADS: &[&str] = &[
    "/local/domain/1|",
    "/local/domain/1/b|1",
    "x|y",
    "x|n1|b32757|",
    "x|n1|r2|",
    "/|t|",
    "/a|t|",
    "@releaseDomain|t|",
    "/a|1",
    "T|",
    "2|",
    "|",
    "",
];

#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Task<'a> {
    run: Pin<Box<dyn Future<Output = ()> + 'a>>,
    woken: Arc<Flag>,
}

/// A domain that follows the protocol.
struct Honest {
    domid: u16,
    page: Shared,
    /// The connection in the model.
    conn: u32,
    deframer: Deframer,
    transactions: Vec<u32>,
}

type Message = (u32, String);

struct World<'a> {
    server: &'a Server<Machine>,
    tasks: Vec<Task<'a>>,
    model: Model,
    honest: Vec<Honest>,
    tape: Tape,
    /// Prints each operation, to debug a failing input (`XENSTORE_FUZZ_TRACE`).
    trace: bool,
}

/// Dom0 and two guests with rings. The page of one guest changes between any two accesses.
pub fn ring(data: &[u8]) {
    let tape = Tape::new(data);
    let mut machine = Machine::default();
    for domid in [0, HOSTILE, 2] {
        let hostile = (domid == HOSTILE).then(|| tape.clone());
        machine.create(domid, Shared::new(hostile));
    }
    machine.connect(0, Features::ALL);
    let server = Server::new(&config(), machine, Clock::Manual(Cell::new(0)));
    let mut world = World::new(&server, tape);
    for _ in 0..200 {
        if world.tape.is_used_up() {
            break;
        }
        world.step();
        server.with(|engine, _| engine.check()).expect("the engine is sound");
    }
}

impl<'a> World<'a> {
    fn new(server: &'a Server<Machine>, tape: Tape) -> World<'a> {
        let mut model = Model::new(QUOTAS);
        model.domain_created(HOSTILE);
        model.domain_created(2);
        let trace = std::env::var_os("XENSTORE_FUZZ_TRACE").is_some();
        let mut world = World { server, tasks: Vec::new(), model, honest: Vec::new(), tape, trace };
        world.settle();
        world.join(0);
        for domid in [1, 2] {
            world.request(0, op::INTRODUCE, 0, &format!("{domid}|1|1|"));
            world.make_home(domid);
        }
        world.join(2);
        world
    }

    /// Connects an honest domain.
    fn join(&mut self, domid: u16) {
        let page = self.server.with(|_, machine| machine.pages[&domid].clone());
        let (conn, deframer) = (self.model.connect(Some(domid)), Deframer::default());
        self.honest.push(Honest { domid, page, conn, deframer, transactions: Vec::new() });
    }

    fn make_home(&mut self, domid: u16) {
        self.request(0, op::WRITE, 0, &format!("/local/domain/{domid}|"));
        self.request(0, op::SET_PERMS, 0, &format!("/local/domain/{domid}|n{domid}|"));
    }

    fn step(&mut self) {
        let what = self.tape.byte() % 16;
        if self.trace && what > 4 {
            eprintln!("step {what}");
        }
        match what {
            0..=4 => {
                let who = usize::from(self.tape.byte()) % HONEST.len();
                let ty = self.tape.of(REQUESTS);
                let payload = self.payload(ty);
                let mut ids = vec![0, 0, 77];
                ids.extend(&self.honest[who].transactions);
                let id = self.tape.of(&ids);
                self.request(who, ty, id, &payload);
            }
            5..=9 => {
                let (ty, id) = (self.tape.of(ITS_REQUESTS), self.tape.byte() % 3);
                let payload = bytes(self.tape.of(ITS_PAYLOADS));
                self.hostile_does(|page| page.send(&frame(ty, 1, id.into(), &payload)));
            }
            10 => {
                let junk: Vec<u8> = (0..self.tape.byte()).map(|_| self.tape.byte()).collect();
                self.hostile_does(|page| page.send(&junk));
            }
            11 => self.hostile_does(|page| drop(page.take())),
            12 => self.hostile_does(|page| page.store(Word::Connection, connection::RECONNECT)),
            13 => {
                let (who, zeros) =
                    (usize::from(self.tape.byte()), self.tape.byte().is_multiple_of(2));
                match zeros {
                    // As the first driver of OpenBSD does: watches and transactions remain.
                    true => self.honest[who % HONEST.len()].page.zero(),
                    false => self.reconnect(who % HONEST.len()),
                }
            }
            14 => self.kill_or_create(),
            _ => self.shut_down(),
        }
        self.compare(None);
    }

    fn payload(&mut self, ty: u32) -> String {
        let tape = &self.tape;
        let at = usize::from(tape.byte()) % PATHS.len();
        let path = PATHS[at];
        match ty {
            op::WRITE => format!("{path}|{}", tape.of(TEXTS)),
            op::SET_PERMS => format!("{path}|{}", tape.of(PERMS)),
            // Each path has one token, so that the events of two watches differ.
            op::WATCH => format!("{path}|t{at}|{}", tape.of(&["", "", "0|", "1|"])),
            op::UNWATCH => format!("{path}|t{at}|"),
            op::TRANSACTION_START | op::RESET_WATCHES => "|".into(),
            op::TRANSACTION_END => tape.of(&["T|", "T|", "F|", "X|"]).into(),
            op::INTRODUCE => format!("{}|1|1|", tape.of(DOMIDS)),
            op::RELEASE | op::GET_DOMAIN_PATH | op::IS_DOMAIN_INTRODUCED | op::RESUME => {
                format!("{}|", tape.of(DOMIDS))
            }
            op::DIRECTORY_PART => format!("{path}|{}|", tape.of(&["0", "1", "99"])),
            op::GET_FEATURE => tape.of(&["", "1|", "7|"]).into(),
            _ => format!("{path}|"),
        }
    }

    /// Runs all woken tasks until none is left.
    fn settle(&mut self) {
        let mut next = 0;
        for _ in 0..TURNS {
            for ring in self.server.with(|_, machine| std::mem::take(&mut machine.fresh)) {
                let woken = Arc::new(Flag(true.into()));
                self.tasks.push(Task { run: Box::pin(self.server.serve(ring)), woken });
            }
            let count = self.tasks.len();
            let order = (next..count).chain(0..next.min(count));
            let ready = |at: &usize| self.tasks[*at].woken.0.swap(false, Ordering::Relaxed);
            let Some(at) = order.into_iter().find(ready) else { return };
            let task = &mut self.tasks[at];
            let waker = Waker::from(task.woken.clone());
            if task.run.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                self.tasks.remove(at);
            }
            next = at + 1;
        }
        panic!("the server does not become idle");
    }

    fn ring_for(&mut self, domid: u16) {
        self.server.with(|_, machine| {
            if let Some(channel) = machine.channels.get(&domid) {
                channel.notify();
            }
        });
        self.settle();
    }

    fn hostile_does(&mut self, act: impl FnOnce(&Shared)) {
        let page = self.server.with(|_, machine| machine.pages.get(&HOSTILE).cloned());
        if let Some(page) = page {
            act(&page.inside());
        }
        self.ring_for(HOSTILE);
    }

    /// Sends a request of an honest domain to the model and over its ring.
    fn request(&mut self, who: usize, ty: u32, id: u32, payload: &str) {
        let honest = &self.honest[who];
        let payload = bytes(payload);
        let (reply_ty, reply) = self.model.request(honest.conn, ty, id, &payload);
        if self.trace {
            let (domid, payload) = (honest.domid, text(&payload));
            eprintln!(
                "domain {domid} type {ty} in {id} {payload:?}: {reply_ty} {:?}",
                text(&reply)
            );
        }
        honest.page.send(&frame(ty, 5, id, &payload));
        let (domid, done) = (honest.domid, reply_ty == ty);
        self.ring_for(domid);
        let mut after = vec![(reply_ty, text(&reply))];
        if done && ty == op::WATCH {
            let first: Vec<&str> = std::str::from_utf8(&payload)
                .map(|payload| payload.split('\0').take(2).collect())
                .expect("of texts");
            after.push((op::WATCH_EVENT, format!("{}|", first.join("|"))));
        }
        let transactions = &mut self.honest[who].transactions;
        if done && ty == op::TRANSACTION_START {
            transactions.push(text(&reply).trim_end_matches('|').parse().expect("an id"));
        }
        if ty == op::TRANSACTION_END && reply != b"EINVAL\0" {
            transactions.retain(|open| *open != id);
        }
        self.compare(Some((who, after)));
    }

    /// Compares the events of all honest domains with the model. `after` follows them.
    fn compare(&mut self, after: Option<(usize, Vec<Message>)>) {
        for who in 0..self.honest.len() {
            let events = self.model.take_events(self.honest[who].conn).into_iter();
            let event = |(path, token): (String, Vec<u8>)| format!("{path}|{}|", text(&token));
            let mut expected: Vec<Message> =
                events.map(event).map(|event| (op::WATCH_EVENT, event)).collect();
            if let Some((_, after)) = after.iter().find(|(of, _)| *of == who) {
                expected.extend(after.iter().cloned());
            }
            let got = self.received(who);
            assert_eq!(got, expected, "messages to domain {}", self.honest[who].domid);
        }
    }

    /// All messages that an honest domain has received.
    fn received(&mut self, who: usize) -> Vec<Message> {
        let mut found = Vec::new();
        loop {
            let honest = &mut self.honest[who];
            let taken = honest.page.take();
            if taken.is_empty() {
                return found;
            }
            let mut input = &taken[..];
            while let Some(frame) = honest.deframer.next(&mut input).expect("frames") {
                let mut payload = frame.payload.to_vec();
                if frame.header.ty == op::DIRECTORY_PART {
                    // The generation is opaque.
                    let end = payload.iter().position(|b| *b == 0).expect("a generation");
                    payload.splice(..end, [b'0']);
                }
                found.push((frame.header.ty, text(&payload)));
            }
            let domid = honest.domid;
            self.ring_for(domid);
        }
    }

    fn reconnect(&mut self, who: usize) {
        let honest = &mut self.honest[who];
        honest.page.store(Word::Connection, connection::RECONNECT);
        (honest.deframer, honest.transactions) = Default::default();
        self.model.restart(honest.conn);
        let (domid, page) = (honest.domid, honest.page.clone());
        self.ring_for(domid);
        let words = [Word::Connection, Word::ReqCons, Word::ReqProd, Word::RspCons, Word::RspProd];
        assert_eq!(words.map(|word| page.load(word)), [0; 5]);
    }

    fn kill_or_create(&mut self) {
        let exists = self.server.with(|engine, machine| {
            let exists = machine.domains.remove(&HOSTILE).is_some();
            match exists {
                true => engine.domains_changed(machine),
                false => machine.create(HOSTILE, Shared::new(Some(self.tape.clone()))),
            }
            exists
        });
        if exists {
            self.model.domain_died(HOSTILE);
            self.settle();
            return;
        }
        self.model.domain_created(HOSTILE);
        self.request(0, op::INTRODUCE, 0, "1|1|1|");
        self.make_home(HOSTILE);
    }

    fn shut_down(&mut self) {
        let exists = self.server.with(|engine, machine| {
            let Some(info) = machine.domains.get_mut(&HOSTILE) else { return false };
            info.shutdown = true;
            engine.domains_changed(machine);
            true
        });
        if exists {
            self.model.domain_shut_down(HOSTILE);
        }
        self.settle();
    }
}
