//! The engine and the model: every reply and every event must be the same.

use std::collections::BTreeMap;

use xenstore_protocol::{
    Deframer, DomId, Errno, EvtchnPort, Features, Frame, Gfn, Header, Quota, RequestId, TxId,
    WatchEvent,
};
use xenstore_store::{Base, Caller, Config, ConnId, DomainInfo, Engine, Host, Outcome, State};

use crate::model::Model;
use crate::raw::{op, text};

/// Limits that short runs reach.
pub(super) const QUOTAS: &[(&str, u32)] = &[
    ("nodes", 6),
    ("watches", 3),
    ("transactions", 2),
    ("transaction-nodes", 5),
    ("node-permissions", 3),
    ("path-max", 12),
    ("node-size", 60),
    ("memory", 0),
    ("soft-memory", 0),
];

/// Few paths, so that operations meet at the same nodes.
const PATHS: &[&str] = &[
    "/",
    "/a",
    "/a/b",
    "/a/b/c",
    "/a/d",
    "/e",
    "b",
    "b/c",
    "/local/domain/1",
    "/local/domain/1/b",
    "/local/domain/2",
    "/local/domain/2/b",
    "/tool",
    "@releaseDomain",
    "@introduceDomain",
    "@releaseDomain/1",
    "@other",
    "/a//b",
    "/longer-than-12",
    "d/e/f",
    "",
];
const PERMS: &[&str] = &[
    "n0|",
    "b0|",
    "n1|",
    "n0|r1|",
    "n0|b1|",
    "n0|w2|r1|",
    "r0|n1|",
    "n0|b32757|",
    "n2|b1|",
    "n0|r3|",
    "n0|r1|r2|b3|",
    "n7|",
    "n0|x1|",
    "",
];
const VALUES: &[&str] = &["", "1", "2", "a value that is rather long, to reach the limit on size"];
const DOMIDS: &[&str] = &["1", "2", "3", "0", "7", "32752", "x"];
const DOMAINS: u16 = 3;

/// Operations, by their frequency: message types, and other operations from 100 on.
const ANYTHING: &[u32] = &[
    11, 11, 11, 2, 1, 3, 12, 13, 14, 14, 4, 4, 5, 6, 7, 7, 22, 21, 8, 9, 10, 17, 18, 19, 23, 24,
    25, 26, 0, 15, 20, 100, 100, 101, 102, 103, 104, 105,
];
/// Operations that make transactions conflict.
const TRANSACTIONS: &[u32] =
    &[11, 11, 11, 11, 2, 2, 1, 3, 12, 13, 13, 14, 22, 6, 6, 6, 7, 7, 7, 100, 4];

const DRAIN: u32 = 100;
const KILL: u32 = 101;
const CREATE: u32 = 102;
const SHUT_DOWN: u32 = 103;
const RECONNECT: u32 = 104;
const RAW: u32 = 105;
const RENEW: u32 = 106;
/// All operations, with transactions that stay open while the twin is renewed.
const RENEWALS: &[u32] = &[
    RENEW, RENEW, RENEW, RENEW, 11, 11, 11, 2, 1, 3, 12, 13, 13, 14, 14, 4, 4, 4, 5, 6, 6, 6, 7, 7,
    22, 22, 21, 8, 9, 17, 18, 19, 24, 25, 26, 0, 0, 100, 101, 102, 103, 104, 105,
];

/// Arbitrary operations of several connections, inside and outside transactions.
pub fn engine(data: &[u8]) {
    Pair::new(false).run(data, ANYTHING);
}

/// Interleaved transactions: a commit must have the same result as a serial replay in the model.
pub fn merge(data: &[u8]) {
    Pair::new(false).run(data, TRANSACTIONS);
}

/// The target `merge` with a bug in the model, which must fail.
pub fn canary(data: &[u8]) {
    Pair::new(true).run(data, TRANSACTIONS);
}

/// An engine and its twin, which is encoded and decoded at arbitrary points. Both must send the same
/// bytes, and the same replies and events as the model.
pub(super) fn twins(data: &[u8]) {
    let mut pair = Pair::new(false);
    pair.renew();
    pair.run(data, RENEWALS);
    pair.renew();
}

pub(super) fn config() -> Config {
    let mut config = Config::default();
    for (name, limit) in QUOTAS {
        config.quotas.set(Quota::parse(name.as_bytes()).expect("a quota"), *limit);
    }
    config
}

#[derive(Default)]
struct Machine {
    domains: BTreeMap<u16, DomainInfo>,
    last_id: u64,
}

impl Host for Machine {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        self.domains.get(&domid.0).copied()
    }
    fn introduce(&mut self, _: DomId, _: Gfn, _: EvtchnPort, _: Features) -> Result<(), Errno> {
        Ok(())
    }
    fn release(&mut self, _: DomId) {}
    fn control(&mut self, _: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        None
    }
    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}

struct Slot {
    domid: Option<u16>,
    /// The ids of the open connection in the engine and in the model.
    conn: Option<(ConnId, u32)>,
    transactions: Vec<u32>,
}

struct Pair {
    engine: Engine,
    /// A second engine with the same inputs; see [`twins`].
    twin: Option<Engine>,
    /// An earlier state, encoded.
    earlier: Option<(Vec<u8>, Base)>,
    machine: Machine,
    model: Model,
    slots: Vec<Slot>,
    /// Prints each operation, to debug a failing input (`XENSTORE_FUZZ_TRACE`).
    trace: bool,
}

/// Decides by the bytes of the input; 0 after the last one.
struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((byte, rest)) => {
                self.0 = rest;
                *byte
            }
            None => 0,
        }
    }

    fn of<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()]
    }
}

impl Pair {
    fn new(has_bug: bool) -> Pair {
        let mut model = Model::new(QUOTAS);
        if has_bug {
            model.plant_bug();
        }
        let mut pair = Pair {
            engine: Engine::new(&config()),
            twin: None,
            earlier: None,
            machine: Machine::default(),
            model,
            slots: Vec::new(),
            trace: std::env::var_os("XENSTORE_FUZZ_TRACE").is_some(),
        };
        let info = DomainInfo { unique_id: 0, shutdown: false };
        pair.machine.domains.insert(0, info);
        for domid in [None, None, Some(1), Some(1), Some(2)] {
            pair.slots.push(Slot { domid, conn: None, transactions: Vec::new() });
        }
        pair.connect(0);
        pair.connect(1);
        for domid in 1..=DOMAINS {
            pair.create(domid);
        }
        for domid in 1..=2 {
            pair.request(0, op::INTRODUCE, 0, format!("{domid}\x001\x001\0").as_bytes());
            let home = format!("/local/domain/{domid}\0");
            pair.request(0, op::WRITE, 0, home.as_bytes());
            pair.request(0, op::SET_PERMS, 0, format!("{home}n{domid}\0").as_bytes());
        }
        (2..5).for_each(|slot| pair.connect(slot));
        pair
    }

    /// Applies `act` to the engine, and to its twin if there is one.
    fn each<T: PartialEq + std::fmt::Debug>(
        &mut self,
        mut act: impl FnMut(&mut Engine, &mut Machine) -> T,
    ) -> T {
        let done = act(&mut self.engine, &mut self.machine);
        if let Some(twin) = &mut self.twin {
            assert_eq!(act(twin, &mut self.machine), done, "the twin returns another result");
        }
        done
    }

    /// Replaces the twin by what is restored from its state.
    fn renew(&mut self) {
        let now = self.engine.dump();
        let written = now.encode();
        if let Some(twin) = &self.twin {
            assert!(twin.dump().encode() == written, "the twin has another state");
        }
        let state = State::decode(&written).expect("our own stream");
        assert_eq!(state.lost, [""; 0]);
        if let Some((mut bytes, base)) = self.earlier.take() {
            now.encode_since(&base, &mut |piece| bytes.extend_from_slice(piece));
            let both = State::decode(&bytes).expect("our own streams");
            assert!(both.encode() == written, "the difference gives another state");
        }
        self.earlier = Some((written.clone(), now.into_base()));
        let (twin, _) = Engine::restore(&config(), &state).expect("our own state");
        twin.check().expect("the restored engine is sound");
        assert!(twin.dump().encode() == written, "the restored engine has another state");
        self.twin = Some(twin);
    }

    fn run(&mut self, data: &[u8], operations: &[u32]) {
        let mut choices = Choices(data);
        // Longer runs find nothing more.
        for _ in 0..200 {
            if choices.0.is_empty() {
                break;
            }
            self.step(&mut choices, operations);
            self.each(|engine, _| engine.check().expect("the engine is sound"));
        }
        for slot in 0..self.slots.len() {
            self.drain(slot);
        }
    }

    fn step(&mut self, choices: &mut Choices<'_>, operations: &[u32]) {
        let slot = usize::from(choices.byte()) % self.slots.len();
        let domid = u16::from(choices.0.first().copied().unwrap_or(0)) % DOMAINS + 1;
        let operation = choices.of(operations);
        if self.trace && operation >= DRAIN {
            eprintln!("operation {operation} connection {slot} domain {domid}");
        }
        match operation {
            DRAIN => self.drain(slot),
            RENEW => self.renew(),
            KILL => self.kill(domid),
            CREATE => self.create(domid),
            SHUT_DOWN => {
                if let Some(info) = self.machine.domains.get_mut(&domid) {
                    info.shutdown = true;
                    self.each(|engine, machine| engine.domains_changed(machine));
                    self.model.domain_shut_down(domid);
                }
            }
            RECONNECT => {
                if let Some((conn, model)) = self.slots[slot].conn.take() {
                    self.each(|engine, _| engine.disconnect(conn));
                    self.model.disconnect(model);
                }
                self.connect(slot);
            }
            RAW => {
                let ty = u32::from(choices.byte()) % 30;
                let len = usize::from(choices.byte()).min(choices.0.len());
                let (payload, rest) = choices.0.split_at(len);
                choices.0 = rest;
                if !matches!(ty, op::CONTROL | op::WATCH) {
                    self.request(slot, ty, 0, payload);
                }
            }
            ty => {
                let tx = match usize::from(choices.byte()) {
                    250.. => 77,
                    choice => {
                        let open = &self.slots[slot].transactions;
                        let odds = open.len() + 1;
                        if choice % odds == 0 { 0 } else { open[choice % odds - 1] }
                    }
                };
                let payload = payload(ty, choices);
                self.request(slot, ty, tx, &payload);
            }
        }
    }

    fn connect(&mut self, slot: usize) {
        let domid = self.slots[slot].domid;
        if domid.is_some_and(|domid| !self.model.is_introduced(domid)) {
            return;
        }
        let caller = domid.map_or(Caller::Socket, |domid| Caller::Domain(DomId(domid)));
        let conn = (self.each(|engine, _| engine.connect(caller)), self.model.connect(domid));
        self.slots[slot].conn = Some(conn);
        self.slots[slot].transactions.clear();
    }

    fn create(&mut self, domid: u16) {
        if !self.machine.domains.contains_key(&domid) {
            self.machine.last_id += 1;
            let info = DomainInfo { unique_id: self.machine.last_id, shutdown: false };
            self.machine.domains.insert(domid, info);
            self.model.domain_created(domid);
        }
    }

    fn kill(&mut self, domid: u16) {
        if self.machine.domains.remove(&domid).is_some() {
            self.each(|engine, machine| engine.domains_changed(machine));
            self.model.domain_died(domid);
        }
    }

    fn drain(&mut self, slot: usize) {
        let Some((conn, model)) = self.slots[slot].conn else { return };
        let out = self.each(|engine, _| {
            let mut out = Vec::new();
            engine.emit_events(conn, usize::MAX, &mut out);
            out
        });
        let got: Vec<String> =
            frames(&out).into_iter().map(|(_, payload)| text(&payload)).collect();
        assert_eq!(got, self.model_events(model), "events of connection {slot}");
    }

    fn model_events(&mut self, model: u32) -> Vec<String> {
        let events = self.model.take_events(model).into_iter();
        events.map(|(path, token)| format!("{path}|{}|", text(&token))).collect()
    }

    /// Sends a request to engine and model, and compares replies and events.
    fn request(&mut self, slot: usize, ty: u32, tx: u32, payload: &[u8]) {
        self.notice_ended();
        let Some((conn, model)) = self.slots[slot].conn else { return };
        let len = u32::try_from(payload.len()).expect("short");
        let header = Header { ty, req_id: RequestId(5), tx_id: TxId(tx), len };
        // The record of past conflicts is not part of a state.
        let twin = self.twin.take_if(|_| ty == op::CONTROL && payload.starts_with(b"conflicts"));
        let out = self.each(|engine, machine| {
            let mut out = Vec::new();
            if ty == op::TRANSACTION_END {
                engine
                    .check_commit(conn, TxId(tx), machine)
                    .expect("a commit equals a serial replay");
            }
            // A deferred request has the same result as one sent after the delay.
            let mut now = 0;
            while let Outcome::Deferred(until) =
                engine.request(conn, &Frame { header, payload }, now, machine, &mut out)
            {
                now = until;
            }
            out
        });
        if let Some(mut twin) = twin {
            let (frame, machine) = (Frame { header, payload }, &mut self.machine);
            let _ = twin.request(conn, &frame, 0, machine, &mut Vec::new());
            self.twin = Some(twin);
        }
        let mut frames = frames(&out);
        let what = format!("connection {slot} type {ty} tx {tx} {:?}", text(payload));
        // The model has no CONTROL: only the number of replies is checked.
        if ty == op::CONTROL {
            assert_ne!(frames.pop().expect("a reply").0, op::WATCH_EVENT, "{what}");
            let got: Vec<String> = frames.iter().map(|(_, payload)| text(payload)).collect();
            assert_eq!(got, self.model_events(model), "events with the reply to {what}");
            return;
        }
        let (expected_ty, expected) = self.model.request(model, ty, tx, payload);
        let at = frames.iter().position(|(ty, _)| *ty != op::WATCH_EVENT).expect("a reply");
        let after = frames.split_off(at + 1);
        let (got_ty, mut got) = frames.pop().expect("the reply");
        if got_ty == op::DIRECTORY_PART {
            let end = got.iter().position(|b| *b == 0).expect("a generation");
            got.splice(..end, [b'0']);
        }
        if self.trace {
            let events: Vec<String> = frames.iter().map(|(_, payload)| text(payload)).collect();
            eprintln!("{what}: {got_ty} {:?} events {events:?}", text(&got));
        }
        assert_eq!((got_ty, text(&got)), (expected_ty, text(&expected)), "{what}");
        let got: Vec<String> = frames.iter().map(|(_, payload)| text(payload)).collect();
        assert_eq!(got, self.model_events(model), "events with the reply to {what}");
        if ty == op::WATCH && got_ty == op::WATCH {
            let first = after.first().map(|(_, payload)| payload.as_slice());
            let event = WatchEvent::parse(first.expect("a first event")).expect("well-formed");
            assert!(payload.starts_with(event.path) && after.len() == 1, "{what}");
        } else {
            assert!(after.is_empty(), "{what}: a frame follows the reply");
        }
        if got_ty == op::TRANSACTION_START {
            let id = text(&expected).trim_end_matches('|').parse().expect("an id");
            self.slots[slot].transactions.push(id);
        }
        if ty == op::TRANSACTION_END && expected != b"EINVAL\0" {
            self.slots[slot].transactions.retain(|id| *id != tx);
        }
        self.notice_ended();
    }

    /// Engine and model must have closed the same connections.
    fn notice_ended(&mut self) {
        for (number, slot) in self.slots.iter_mut().enumerate() {
            if let Some((conn, model)) = slot.conn {
                let open = self.engine.is_connected(conn);
                let twin = self.twin.as_ref().map(|twin| twin.is_connected(conn));
                assert_eq!(twin.unwrap_or(open), open);
                assert_eq!(open, self.model.is_connected(model), "connection {number}");
                slot.conn = slot.conn.filter(|_| open);
            }
        }
    }
}

/// The payload of a request of this type.
fn payload(ty: u32, choices: &mut Choices<'_>) -> Vec<u8> {
    let at = usize::from(choices.byte()) % PATHS.len();
    let path = PATHS[at];
    let text = match ty {
        op::WRITE => format!("{path}|{}", choices.of(VALUES)),
        op::SET_PERMS => format!("{path}|{}", choices.of(PERMS)),
        // Each path has one token, so that the events of two watches differ.
        op::WATCH => format!("{path}|t{at}|{}", choices.of(&["", "", "", "0|", "1|", "2|"])),
        op::UNWATCH => format!("{path}|t{at}|"),
        op::TRANSACTION_START | op::RESET_WATCHES => "|".into(),
        op::TRANSACTION_END => choices.of(&["T|", "T|", "T|", "F|", "X|"]).into(),
        op::INTRODUCE => format!("{}|1|{}|", choices.of(DOMIDS), choices.of(&["1", "1", "0"])),
        op::SET_TARGET => format!("{}|{}|", choices.of(DOMIDS), choices.of(DOMIDS)),
        op::RELEASE | op::GET_DOMAIN_PATH | op::IS_DOMAIN_INTRODUCED | op::RESUME => {
            format!("{}|", choices.of(DOMIDS))
        }
        op::DIRECTORY_PART => format!("{path}|{}|", choices.of(&["0", "1", "3", "99", "x"])),
        op::GET_FEATURE => choices.of(&["", "1|", "3|", "7|"]).into(),
        op::SET_FEATURE => format!("{}|{}|", choices.of(DOMIDS), choices.of(&["3", "7", "16"])),
        op::GET_QUOTA => choices.of(&["", "nodes|", "1|nodes|", "7|nodes|", "bogus|"]).into(),
        op::SET_QUOTA => {
            let name = choices.of(&["nodes", "watches", "node-size", "path-max", "bogus"]);
            let whose = choices.of(&["", "1|", "2|", "3|"]);
            format!("{whose}{name}|{}|", choices.of(&["0", "2", "8", "70", "x"]))
        }
        op::CONTROL => choices
            .of(&["check|", "quota|", "conflicts|", "watches|", "help|", "quota|1|", "x"])
            .into(),
        _ => format!("{path}|"),
    };
    crate::raw::bytes(&text)
}

pub(super) fn frames(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut deframer = Deframer::default();
    let mut found = Vec::new();
    while let Ok(Some(frame)) = deframer.next(&mut bytes) {
        found.push((frame.header.ty, frame.payload.to_vec()));
    }
    assert!(deframer.partial().is_empty());
    found
}
