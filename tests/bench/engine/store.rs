//! An engine to be measured, spoken to in frames.

use xenstore_protocol::{
    DomId, Errno, EvtchnPort, Features, Gfn, HEADER_LEN, Header, RequestId, TxId,
};
use xenstore_store::{Caller, Config, ConnId, DomainInfo, Engine, Host, Input, Outcome, Quotas};
use xenstore_tests::raw::op;

/// A machine on which every domain exists.
pub(crate) struct AllDomains;

impl Host for AllDomains {
    fn domain(&mut self, _: DomId) -> Option<DomainInfo> {
        Some(DomainInfo { unique_id: 1, shutdown: false })
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

/// An engine without quotas, and a connection of dom0.
pub(crate) struct Store {
    pub(crate) engine: Engine,
    pub(crate) dom0: ConnId,
    frame: Vec<u8>,
    out: Vec<u8>,
}

impl Store {
    pub(crate) fn new() -> Store {
        let config = Config { quotas: Quotas::unlimited(), ..Config::default() };
        let mut engine = Engine::new(&config);
        let dom0 = engine.connect(Caller::Socket);
        Store { engine, dom0, frame: Vec::new(), out: Vec::with_capacity(1 << 16) }
    }

    /// A store with `nodes` nodes besides those that are always there, 100 below each of their
    /// parents, with names and values as they are on a host.
    pub(crate) fn with_nodes(nodes: usize) -> Store {
        let mut store = Store::new();
        (0..nodes).for_each(|i| store.fill(i));
        store
    }

    /// Writes node number `i` of those.
    pub(crate) fn fill(&mut self, i: usize) {
        let text = format!("/n/{}/key-{}\0value-{}", i / 100, i % 100, i % 1000);
        self.ok(self.dom0, op::WRITE, 0, text.as_bytes());
    }

    /// Sends a request, and leaves what comes back in `out`. Is it an error?
    pub(crate) fn call(&mut self, conn: ConnId, ty: u32, tx_id: u32, payload: &[u8]) -> bool {
        self.out.clear();
        let len = u32::try_from(payload.len()).expect("short");
        let header = Header { ty, req_id: RequestId(1), tx_id: TxId(tx_id), len };
        self.frame.clear();
        self.frame.extend_from_slice(&header.emit());
        self.frame.extend_from_slice(payload);
        let input = Input::Requests { conn, now: 0, frames: &self.frame };
        let applied = self.engine.apply(&input, &mut AllDomains, &mut self.out);
        assert_eq!(applied.outcome(), Outcome::Executed);
        self.engine.finish_work();
        self.out.starts_with(&op::ERROR.to_le_bytes())
    }

    /// Sends a request that must succeed.
    pub(crate) fn ok(&mut self, conn: ConnId, ty: u32, tx_id: u32, payload: &[u8]) {
        let failed = self.call(conn, ty, tx_id, payload);
        let text = String::from_utf8_lossy;
        assert!(!failed, "{ty} {:?}: {:?}", text(payload), text(&self.out));
    }

    /// The payload of the last reply, if nothing came before it.
    pub(crate) fn payload(&self) -> &[u8] {
        &self.out[HEADER_LEN..]
    }

    /// Opens a transaction.
    pub(crate) fn start(&mut self, conn: ConnId) -> u32 {
        self.ok(conn, op::TRANSACTION_START, 0, b"\0");
        let digits = self.payload().strip_suffix(b"\0").expect("a string");
        std::str::from_utf8(digits).expect("digits").parse().expect("an id")
    }

    /// Commits a transaction. Is it refused?
    pub(crate) fn commit(&mut self, conn: ConnId, tx_id: u32) -> bool {
        self.call(conn, op::TRANSACTION_END, tx_id, b"T\0")
    }

    /// Fetches all events that wait for `conn`; how many bytes they are.
    pub(crate) fn events(&mut self, conn: ConnId) -> usize {
        self.out.clear();
        self.engine.emit_events(conn, usize::MAX, &mut self.out);
        self.out.len()
    }

    /// Introduces a domain, with a home that it owns.
    pub(crate) fn introduce(&mut self, domid: usize) {
        let home = format!("/local/domain/{domid}\0");
        self.ok(self.dom0, op::INTRODUCE, 0, format!("{domid}\x001\x001\0").as_bytes());
        self.ok(self.dom0, op::WRITE, 0, home.as_bytes());
        self.ok(self.dom0, op::SET_PERMS, 0, format!("{home}n{domid}\0").as_bytes());
    }

    /// A connection of a domain.
    pub(crate) fn connect(&mut self, domid: usize) -> ConnId {
        self.engine.connect(Caller::Domain(DomId(u16::try_from(domid).expect("a domid"))))
    }
}

/// What a toolstack does in one transaction to start a domain with a disk, a network interface and
/// a console: requests with their payloads, some of which answer that there is nothing yet.
pub(crate) fn vm_start(domid: usize) -> Vec<(u32, Vec<u8>)> {
    let home = format!("/local/domain/{domid}");
    let mut script: Vec<(u32, String)> = Vec::new();
    let write = |path: String, value: &str| (op::WRITE, format!("{path}\0{value}"));
    let perms = |path: String| (op::SET_PERMS, format!("{path}\0n0\0r{domid}\0"));
    script.push((op::RM, format!("{home}\0")));
    script.push((op::MKDIR, format!("{home}\0")));
    script.push(perms(home.clone()));
    script.push(write(format!("/vm/{domid}/name"), "guest"));
    script.push(write(format!("{home}/vm"), &format!("/vm/{domid}")));
    for key in ["name", "domid", "cpu/0/availability", "memory/static-max", "memory/target"] {
        script.push(write(format!("{home}/{key}"), "1"));
    }
    for key in ["data", "device", "control", "attr", "error", "drivers"] {
        script.push((op::MKDIR, format!("{home}/{key}\0")));
    }
    for device in ["vbd", "vif", "console"] {
        let front = format!("{home}/device/{device}/0");
        let back = format!("/local/domain/0/backend/{device}/{domid}/0");
        script.push((op::READ, format!("{front}/state\0")));
        script.push((op::MKDIR, format!("{front}\0")));
        script.push(perms(front.clone()));
        script.push((op::MKDIR, format!("{back}\0")));
        script.push(perms(back.clone()));
        script.push(write(format!("{front}/backend"), &back));
        script.push(write(format!("{back}/frontend"), &front));
        script.push(write(format!("{back}/state"), "1"));
    }
    script.into_iter().map(|(ty, payload)| (ty, payload.into_bytes())).collect()
}
