//! An engine with guests and a toolstack, driven by frames. Requests can be deferred.

use std::collections::BTreeMap;

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Frame, Gfn, Header, RequestId, TxId};
use xenstore_store::{Caller, Config, ConnId, DomainInfo, Engine, Host, Millis, Outcome};

use crate::raw::op;

#[derive(Debug, Default)]
struct Machine(BTreeMap<u16, DomainInfo>);

impl Host for Machine {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        self.0.get(&domid.0).copied()
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

/// The result of a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Type and payload of the reply.
    Reply(u32, Vec<u8>),
    /// It is deferred, at most until this time.
    Later(Millis),
}

/// An engine with a toolstack and guests `1..=count`. Each has a connection, and each guest a home.
#[derive(Debug)]
pub struct Guests {
    /// The engine.
    pub engine: Engine,
    machine: Machine,
    /// The connections: of the toolstack, then of the guests.
    pub conns: Vec<ConnId>,
    /// The time, in milliseconds.
    pub now: Millis,
    out: Vec<u8>,
    last_id: u64,
}

impl Guests {
    /// An engine with this number of guests.
    pub fn new(config: &Config, count: u16) -> Guests {
        let mut engine = Engine::new(config);
        let dom0 = engine.connect(Caller::Socket);
        let mut machine = Machine::default();
        machine.0.insert(0, DomainInfo { unique_id: 0, shutdown: false });
        let (conns, out) = (vec![dom0], Vec::with_capacity(128 * 1024));
        let mut guests = Guests { engine, machine, conns, now: 0, out, last_id: 0 };
        for domid in 1..=count {
            let conn = guests.introduce(domid);
            guests.conns.push(conn);
        }
        guests
    }

    fn introduce(&mut self, domid: u16) -> ConnId {
        self.last_id += 1;
        let info = DomainInfo { unique_id: self.last_id, shutdown: false };
        self.machine.0.insert(domid, info);
        for (ty, payload) in [
            (op::INTRODUCE, format!("{domid}\x001\x001\0")),
            (op::WRITE, format!("/local/domain/{domid}\0")),
            (op::SET_PERMS, format!("/local/domain/{domid}\0n{domid}\0")),
        ] {
            self.ok(0, 0, ty, payload.as_bytes());
        }
        self.engine.connect(Caller::Domain(DomId(domid)))
    }

    /// Capacity of the buffer for replies, which does not belong to the engine.
    pub fn buffer(&self) -> usize {
        self.out.capacity()
    }

    /// Destroys a guest and creates another with the same domid.
    pub fn replace(&mut self, domid: u16) {
        self.dies(domid);
        self.comes_back(domid);
    }

    /// Destroys a guest.
    pub fn dies(&mut self, domid: u16) {
        self.machine.0.remove(&domid);
        self.engine.domains_changed(&mut self.machine);
    }

    /// Creates a guest with the domid of a destroyed one.
    pub fn comes_back(&mut self, domid: u16) {
        self.conns[usize::from(domid)] = self.introduce(domid);
    }

    /// Sends a request of guest `who`. Drops the events before the reply.
    pub fn ask(&mut self, who: usize, tx_id: u32, ty: u32, payload: &[u8]) -> Answer {
        let len = u32::try_from(payload.len()).expect("short");
        let header = Header { ty, req_id: RequestId(1), tx_id: TxId(tx_id), len };
        let (conn, machine, now) = (self.conns[who], &mut self.machine, self.now);
        self.out.clear();
        match self.engine.request(conn, &Frame { header, payload }, now, machine, &mut self.out) {
            Outcome::Deferred(until) => Answer::Later(until),
            Outcome::Executed => {
                let frames = super::against_model::frames(&self.out);
                let reply = frames.into_iter().find(|(ty, _)| *ty != op::WATCH_EVENT);
                let (ty, payload) = reply.expect("a reply");
                Answer::Reply(ty, payload)
            }
        }
    }

    /// Sends a request that must succeed. Returns the payload of its reply.
    pub fn ok(&mut self, who: usize, tx_id: u32, ty: u32, payload: &[u8]) -> Vec<u8> {
        match self.ask(who, tx_id, ty, payload) {
            Answer::Reply(got, reply) if got == ty => reply,
            other => panic!("{ty} {:?}: {other:?}", String::from_utf8_lossy(payload)),
        }
    }

    /// Drops the queued events of guest `who`.
    pub fn drain(&mut self, who: usize) {
        self.out.clear();
        // In pieces, so that the buffer does not grow.
        while self.engine.emit_events(self.conns[who], 64 * 1024, &mut self.out) {
            self.out.clear();
        }
    }
}
