//! An engine with a pretend machine, spoken to in frames.
#![allow(dead_code, unreachable_pub)] // each test file uses its part
#![allow(clippy::cast_possible_truncation)]

use std::collections::BTreeMap;

use xenstore_protocol::{Deframer, EvtchnPort, Features, Gfn, Quota, RequestId, TxId};
use xenstore_protocol::{DomId, Errno, Frame, Header, Operation, Reply, WatchEvent};
use xenstore_store::{Caller, Config, ConnId, DomainInfo, Engine, Host, Millis, Outcome};

/// A machine whose domains the test makes and ends.
#[derive(Default)]
pub struct Machine {
    pub domains: BTreeMap<u16, DomainInfo>,
    pub released: Vec<u16>,
    pub refuse_introduce: Option<Errno>,
}

impl Host for Machine {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        self.domains.get(&domid.0).copied()
    }
    fn introduce(&mut self, _: DomId, _: Gfn, _: EvtchnPort, _: Features) -> Result<(), Errno> {
        self.refuse_introduce.map_or(Ok(()), Err)
    }
    fn release(&mut self, domid: DomId) {
        self.released.push(domid.0);
    }
    fn control(&mut self, _: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        None
    }
    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}

pub struct Store {
    pub engine: Engine,
    pub machine: Machine,
    pub dom0: ConnId,
    /// What the time is.
    pub now: Millis,
    next_id: u64,
}

/// What came back: the payload, or the name of the error.
pub type Answer = Result<String, String>;

impl Store {
    pub fn new() -> Store {
        Store::with(&Config::default())
    }

    pub fn with(config: &Config) -> Store {
        let mut engine = Engine::new(config);
        let dom0 = engine.connect(Caller::Socket);
        let mut machine = Machine::default();
        machine.domains.insert(0, DomainInfo { unique_id: 0, shutdown: false });
        Store { engine, machine, dom0, now: 0, next_id: 1 }
    }

    /// A store whose domains have this quota.
    pub fn with_quota(quota: Quota, limit: u32) -> Store {
        let mut config = Config::default();
        config.quotas.set(quota, limit);
        Store::with(&config)
    }

    /// Makes a domain on the machine that the store has not met.
    pub fn create(&mut self, domid: u16) {
        self.next_id += 1;
        let info = DomainInfo { unique_id: self.next_id, shutdown: false };
        self.machine.domains.insert(domid, info);
    }

    /// Makes a domain unless it is there, its home in the store and a connection.
    pub fn guest(&mut self, domid: u16) -> ConnId {
        if !self.machine.domains.contains_key(&domid) {
            self.create(domid);
        }
        self.ok(self.dom0, 8, &format!("{domid}|1|1|"));
        self.ok(self.dom0, 11, &format!("/local/domain/{domid}|"));
        self.ok(self.dom0, 14, &format!("/local/domain/{domid}|n{domid}|"));
        self.engine.connect(Caller::Domain(DomId(domid)))
    }

    /// Ends a domain on the machine and lets the store notice.
    pub fn kill(&mut self, domid: u16) {
        self.machine.domains.remove(&domid);
        self.engine.domains_changed(&mut self.machine);
        self.engine.check().unwrap();
    }

    /// Sends a frame in transaction `tx`; `|` in the payload stands for NUL.
    pub fn tx(&mut self, conn: ConnId, tx: u32, ty: u32, payload: &str) -> Answer {
        let payload = payload.replace('|', "\0");
        let (ty, bytes) = self.raw(conn, tx, ty, payload.as_bytes());
        let text = String::from_utf8_lossy(&bytes).replace('\0', "|");
        if ty == 16 { Err(text.trim_end_matches('|').into()) } else { Ok(text) }
    }

    /// Sends a frame; the reply's type and payload, without events that come along.
    pub fn raw(&mut self, conn: ConnId, tx: u32, ty: u32, payload: &[u8]) -> (u32, Vec<u8>) {
        let frames = self.all(conn, tx, ty, payload);
        let replies: Vec<_> = frames.into_iter().filter(|(ty, _)| *ty != 15).collect();
        assert_eq!(replies.len(), 1, "exactly one reply");
        replies.into_iter().next().unwrap()
    }

    /// Sends a frame; all frames that come back, types and payloads.
    pub fn all(&mut self, conn: ConnId, tx: u32, ty: u32, payload: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let (outcome, out) = self.offer(conn, tx, ty, payload);
        assert_eq!(outcome, Outcome::Executed);
        let frames = frames(&out);
        for frame in frames.iter().filter(|(header, _)| header.ty != 15) {
            assert_eq!(
                (frame.0.req_id, frame.0.tx_id),
                (RequestId(77), TxId(tx)),
                "ids are echoed"
            );
        }
        frames.into_iter().map(|(header, payload)| (header.ty, payload)).collect()
    }

    /// Sends a frame that may be deferred. Returns the outcome and the bytes of the reply.
    pub fn offer(&mut self, conn: ConnId, tx: u32, ty: u32, payload: &[u8]) -> (Outcome, Vec<u8>) {
        let header =
            Header { ty, req_id: RequestId(77), tx_id: TxId(tx), len: payload.len() as u32 };
        let mut out = Vec::new();
        let (machine, now) = (&mut self.machine, self.now);
        let outcome = self.engine.request(conn, &Frame { header, payload }, now, machine, &mut out);
        self.engine.check().unwrap();
        (outcome, out)
    }

    pub fn call(&mut self, conn: ConnId, ty: u32, payload: &str) -> Answer {
        self.tx(conn, 0, ty, payload)
    }

    /// Sends a frame that must be answered `OK` or with a value.
    pub fn ok(&mut self, conn: ConnId, ty: u32, payload: &str) -> String {
        self.call(conn, ty, payload).unwrap_or_else(|e| panic!("{ty} {payload}: {e}"))
    }

    /// Sends a frame that must fail; the name of the error.
    pub fn err(&mut self, conn: ConnId, ty: u32, payload: &str) -> String {
        match self.call(conn, ty, payload) {
            Err(name) => name,
            Ok(text) => panic!("{ty} {payload} succeeded: {text:?}"),
        }
    }

    /// Opens a transaction.
    pub fn start(&mut self, conn: ConnId) -> u32 {
        self.ok(conn, 6, "|").trim_end_matches('|').parse().unwrap()
    }

    /// Ends a transaction.
    pub fn end(&mut self, conn: ConnId, tx: u32, commit: bool) -> Answer {
        self.tx(conn, tx, 7, if commit { "T|" } else { "F|" })
    }

    /// Events that wait for a connection, as `path token`.
    pub fn events(&mut self, conn: ConnId) -> Vec<String> {
        let mut out = Vec::new();
        self.engine.emit_events(conn, usize::MAX, &mut out);
        self.engine.check().unwrap();
        let event = |payload: &[u8]| {
            let event = WatchEvent::parse(payload).unwrap();
            let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
            format!("{} {}", text(event.path), text(event.token))
        };
        frames(&out).iter().map(|(_, payload)| event(payload)).collect()
    }

    /// Registers a watch and takes its first event away.
    pub fn watch(&mut self, conn: ConnId, payload: &str) {
        let bytes = payload.replace('|', "\0");
        let frames = self.all(conn, 0, 4, bytes.as_bytes());
        assert_eq!(frames.iter().map(|(ty, _)| *ty).collect::<Vec<_>>(), [4, 15], "{payload}");
    }
}

fn frames(mut bytes: &[u8]) -> Vec<(Header, Vec<u8>)> {
    let mut deframer = Deframer::default();
    let mut found = Vec::new();
    while let Some(Frame { header, payload }) = deframer.next(&mut bytes).unwrap() {
        found.push((header, payload.to_vec()));
    }
    assert!(deframer.partial().is_empty());
    found
}

/// The typed form of an answer, where the text is not enough.
pub fn typed(op: Operation, payload: &[u8]) -> Reply<'_> {
    Reply::parse(op, false, payload).unwrap()
}
