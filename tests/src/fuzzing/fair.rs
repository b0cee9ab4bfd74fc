//! Fairness and accounting: arbitrary guests beside a toolstack with a retry loop.

use std::collections::BTreeMap;

use xenstore_protocol::{DomId, Quota};
use xenstore_store::{Config, FAILURES, HELD_FOR, Millis, PROTECTED_FOR};

use super::guests::{Answer, Guests};
use crate::raw::op;

const GUESTS: u16 = 3;
/// The guest that changes nothing that the toolstack reads.
const QUIET: usize = 3;
/// Requests of one transaction of the toolstack.
const SCRIPT: usize = 6;

/// Paths: below `*`, the home of a guest, or below `/shared`, where all guests have all access.
const PATHS: &[&str] =
    &["*/a", "*/a/b", "*/a/b/c", "*/d", "*", "/shared", "/shared/a", "/shared/a/b", "/shared/d"];
const VALUES: &[&str] = &["", "1", "2", "three"];
/// A complete transaction, in place of a message type.
const WHOLE: u32 = 100;
const ACTIONS: &[u32] = &[
    op::WRITE,
    op::WRITE,
    op::WRITE,
    op::MKDIR,
    op::RM,
    op::RM,
    op::SET_PERMS,
    op::READ,
    op::WATCH,
    op::UNWATCH,
    op::DIRECTORY,
    op::TRANSACTION_START,
    op::TRANSACTION_END,
    op::TRANSACTION_END,
    op::RESET_WATCHES,
    WHOLE,
    WHOLE,
];
const SCRIPTED: &[u32] = &[
    op::READ,
    op::READ,
    op::DIRECTORY,
    op::WRITE,
    op::MKDIR,
    op::RM,
    op::GET_PERMS,
    op::SET_PERMS,
];

/// Under all operations of guests, at most [`FAILURES`] tries of a toolstack's transaction fail, no
/// request is deferred longer than announced or without a reason, the charges of a domain cover its
/// nodes, and removed nodes are not charged.
pub fn fair(data: &[u8]) {
    let mut run = Run::new(data);
    let charged: Vec<i64> = run.charged();
    for step in 0..400 {
        if run.data.is_empty() {
            break;
        }
        run.step();
        run.guests.engine.check().expect("the store is sound");
        if step % 16 == 0 {
            run.covered();
        }
    }
    run.finish();
    assert_eq!(run.charged(), charged, "removed nodes are still charged");
}

/// A deferred request of a guest.
struct Held {
    tx_id: u32,
    ty: u32,
    payload: Vec<u8>,
    since: Millis,
    until: Millis,
}

/// The transaction of the toolstack: the same requests until they are committed.
#[derive(Default)]
struct Toolstack {
    script: Vec<(u32, Vec<u8>)>,
    /// The open transaction: its id, its start, and the number of executed requests.
    open: Option<(u32, Millis, usize)>,
    failed: u32,
    /// True if the try cannot count, because something other than a guest has interrupted it.
    disturbed: bool,
}

struct Run<'a> {
    data: &'a [u8],
    guests: Guests,
    held: BTreeMap<usize, Held>,
    transactions: BTreeMap<usize, Vec<u32>>,
    toolstack: Toolstack,
}

impl Run<'_> {
    fn new(data: &[u8]) -> Run<'_> {
        let mut config = Config::default();
        config.quotas.set(Quota::Memory, 60_000);
        config.quotas.set(Quota::Nodes, 12);
        let mut guests = Guests::new(&config, GUESTS);
        guests.ok(0, 0, op::MKDIR, b"/shared\0");
        guests.ok(0, 0, op::SET_PERMS, b"/shared\0b0\0");
        let (first, data) = data.split_first().unwrap_or((&0, data));
        if first % 2 == 1 {
            // All transactions of the toolstack are protected from their start.
            for _ in 0..FAILURES {
                let tx = id(&guests.ok(0, 0, op::TRANSACTION_START, b"\0"));
                guests.ok(0, tx, op::DIRECTORY, b"/shared\0");
                guests.ok(0, tx, op::WRITE, b"/shared\0");
                guests.ok(1, 0, op::WRITE, b"/shared/x\0");
                let end = guests.ask(0, tx, op::TRANSACTION_END, b"T\0");
                assert_eq!(end, Answer::Reply(op::ERROR, b"EAGAIN\0".to_vec()));
                guests.ok(1, 0, op::RM, b"/shared/x\0");
            }
        }
        let (held, transactions) = (BTreeMap::new(), BTreeMap::new());
        Run { data, guests, held, transactions, toolstack: Toolstack::default() }
    }

    fn byte(&mut self) -> usize {
        let Some((byte, rest)) = self.data.split_first() else { return 0 };
        self.data = rest;
        usize::from(*byte)
    }

    fn of<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.byte() % from.len()]
    }

    fn step(&mut self) {
        match self.byte() {
            choice @ 0..140 => self.guest(1 + choice % usize::from(GUESTS)),
            140..230 => self.toolstack(),
            230..252 => {
                self.guests.now += [1, 10, 100, 499][self.byte() % 4];
                self.offer_again();
            }
            _ => {
                let domid = 1 + self.byte() % usize::from(GUESTS);
                self.guests.replace(u16::try_from(domid).expect("small"));
                self.held.remove(&domid);
                self.transactions.remove(&domid);
                self.toolstack.disturbed = true;
                self.offer_again();
            }
        }
    }

    /// A payload with a path in the home of guest `home`, or a shared one.
    fn payload(&mut self, ty: u32, home: usize) -> Vec<u8> {
        let (path, text) = (self.of(PATHS), self.of(VALUES));
        let path = path.replace('*', &format!("/local/domain/{home}"));
        match ty {
            op::WRITE => format!("{path}\0{text}"),
            op::SET_PERMS => format!("{path}\0b{home}\0r1\0"),
            op::WATCH | op::UNWATCH => format!("{path}\0{text}\0"),
            _ => format!("{path}\0"),
        }
        .into_bytes()
    }

    /// Executes a random request of a guest, unless one of it is deferred.
    fn guest(&mut self, who: usize) {
        let ty = self.of(ACTIONS);
        if self.held.contains_key(&who) {
            return;
        }
        if ty == WHOLE {
            return self.whole_transaction(who);
        }
        let open = self.transactions.get(&who).cloned().unwrap_or_default();
        let chosen = self.byte() % (open.len() + 1);
        let tx_id = if chosen == 0 { 0 } else { open[chosen - 1] };
        let payload = match ty {
            op::TRANSACTION_START | op::RESET_WATCHES => b"\0".to_vec(),
            op::TRANSACTION_END => self.of(&[b"T\0", b"T\0", b"F\0"]).to_vec(),
            // The quiet guest uses paths of no other guest.
            _ if who == QUIET => {
                let name = self.byte() % 3;
                let extra = if ty == op::SET_PERMS { "n3\0" } else { "" };
                format!("/local/domain/3/quiet/{name}\0{extra}").into_bytes()
            }
            _ => {
                let home = 1 + self.byte() % 2;
                self.payload(ty, home)
            }
        };
        let tx_id = if ty == op::TRANSACTION_START { 0 } else { tx_id };
        let since = self.guests.now;
        self.offer(who, Held { tx_id, ty, payload, since, until: 0 });
        self.offer_again();
    }

    /// A guest opens a transaction, writes and commits, without a pause.
    fn whole_transaction(&mut self, who: usize) {
        let payload = match who {
            QUIET => b"/local/domain/3/quiet/0\0whole".to_vec(),
            _ => self.payload(op::WRITE, who),
        };
        if let Answer::Reply(op::TRANSACTION_START, reply) =
            self.guests.ask(who, 0, op::TRANSACTION_START, b"\0")
        {
            let tx_id = id(&reply);
            self.transactions.entry(who).or_default().push(tx_id);
            self.guests.ask(who, tx_id, op::WRITE, &payload);
            let (ty, payload, since) = (op::TRANSACTION_END, b"T\0".to_vec(), self.guests.now);
            self.offer(who, Held { tx_id, ty, payload, since, until: 0 });
        }
        self.offer_again();
    }

    /// Offers a request of a guest, which may be deferred.
    fn offer(&mut self, who: usize, request: Held) {
        match self.guests.ask(who, request.tx_id, request.ty, &request.payload) {
            Answer::Later(until) => {
                let Held { ty, ref payload, since, .. } = request;
                let payload = String::from_utf8_lossy(payload);
                assert_ne!(who, QUIET, "type {ty} {payload:?} is deferred without a reason");
                assert!(self.toolstack.open.is_some(), "no transaction is protected");
                assert!(
                    until > self.guests.now && until <= since + HELD_FOR,
                    "deferred for too long"
                );
                self.held.insert(who, Held { until, ..request });
            }
            Answer::Reply(op::TRANSACTION_START, reply) => {
                self.transactions.entry(who).or_default().push(id(&reply));
            }
            Answer::Reply(_, reply) if request.ty == op::TRANSACTION_END => {
                let known = |open: &Vec<u32>| open.contains(&request.tx_id);
                let lost = self.transactions.get(&who).is_some_and(known) && reply == b"ENOENT\0";
                assert!(!lost, "a transaction is lost");
                if let Some(open) = self.transactions.get_mut(&who).filter(|_| reply != b"EINVAL\0")
                {
                    open.retain(|id| *id != request.tx_id);
                }
            }
            Answer::Reply(op::RESET_WATCHES, _) => drop(self.transactions.remove(&who)),
            Answer::Reply(..) => {}
        }
    }

    /// Offers deferred requests again, as a server does: when the engine wakes them, or when their
    /// deadline has passed.
    fn offer_again(&mut self) {
        let mut ready = Vec::new();
        while let Some(conn) = self.guests.engine.pop_ready() {
            ready.extend(self.guests.conns.iter().position(|c| *c == conn));
        }
        let now = self.guests.now;
        ready.extend(self.held.iter().filter(|(_, held)| held.until <= now).map(|(who, _)| *who));
        for who in ready {
            if let Some(held) = self.held.remove(&who) {
                self.offer(who, held);
            }
        }
    }

    /// Executes the next request of the toolstack. A try that takes too long does not count.
    fn toolstack(&mut self) {
        if self.toolstack.script.is_empty() {
            for _ in 0..SCRIPT {
                let ty = self.of(SCRIPTED);
                let home = 1 + self.byte() % 2;
                let payload = self.payload(ty, home);
                self.toolstack.script.push((ty, payload));
            }
        }
        let Some((tx, since, at)) = self.toolstack.open else {
            let tx = id(&self.guests.ok(0, 0, op::TRANSACTION_START, b"\0"));
            self.toolstack.open = Some((tx, self.guests.now, 0));
            self.toolstack.disturbed = false;
            return;
        };
        if let Some((ty, payload)) = self.toolstack.script.get(at).cloned() {
            let answer = self.guests.ask(0, tx, ty, &payload);
            assert!(!matches!(answer, Answer::Later(_)), "a request of the toolstack is deferred");
            self.toolstack.open = Some((tx, since, at + 1));
            return;
        }
        self.toolstack.open = None;
        let counts = !self.toolstack.disturbed && self.guests.now < since + PROTECTED_FOR;
        match self.guests.ask(0, tx, op::TRANSACTION_END, b"T\0") {
            Answer::Reply(op::TRANSACTION_END, _) => self.toolstack = Toolstack::default(),
            Answer::Reply(_, reply) => {
                assert_eq!(reply, b"EAGAIN\0");
                self.toolstack.failed += u32::from(counts);
                assert!(self.toolstack.failed <= FAILURES, "the toolstack starves");
            }
            Answer::Later(_) => panic!("a request of the toolstack is deferred"),
        }
        self.offer_again();
    }

    fn charged(&self) -> Vec<i64> {
        (0..=GUESTS).map(|domid| self.guests.engine.charged(DomId(domid))).collect()
    }

    /// The charge of a domain must be at least the size of its nodes.
    fn covered(&self) {
        let mut sizes: BTreeMap<DomId, usize> = BTreeMap::new();
        self.guests.engine.dump().visit_nodes(|path, value, perms| {
            let name = path.rsplit('/').next().map_or(0, str::len);
            *sizes.entry(perms.0[0].domid).or_default() += name + value.len() + 8 * perms.0.len();
        });
        for (domid, size) in sizes {
            let charged = self.guests.engine.charged(domid);
            assert!(charged >= i64::try_from(size).expect("small"), "domain {domid}: {charged}");
        }
    }

    /// Destroys all guests, and removes the nodes of the toolstack.
    fn finish(&mut self) {
        if let Some((tx, ..)) = self.toolstack.open {
            self.guests.ok(0, tx, op::TRANSACTION_END, b"F\0");
        }
        for domid in 1..=GUESTS {
            self.guests.replace(domid);
        }
        for path in ["/shared", "/local/domain/1", "/local/domain/2"] {
            for ty in [op::RM, op::MKDIR] {
                self.guests.ok(0, 0, ty, format!("{path}\0").as_bytes());
            }
            let owner = path.rsplit('/').next().filter(|last| *last != "shared");
            let perms = owner.map_or("b0".into(), |domid| format!("n{domid}"));
            self.guests.ok(0, 0, op::SET_PERMS, format!("{path}\0{perms}\0").as_bytes());
        }
    }
}

fn id(reply: &[u8]) -> u32 {
    String::from_utf8_lossy(reply).trim_end_matches('\0').parse().expect("an id")
}
