//! Dump and restore of an engine.

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Frame, Gfn, Header, Operation, TxId};
use xenstore_store::{CFormat, Config, ConnId, DomainInfo, Engine, Host, State};

use super::against_model::twins;

/// With an odd first byte, the rest is a run of operations during which an engine is replaced by
/// one restored from its state. With an even one, the rest is an arbitrary state: it is refused, or the
/// restored engine is sound, can be dumped and restored again, and is sound until it is empty.
pub fn dump(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    if kind % 2 == 1 {
        twins(data);
    } else if let Ok(state) = State::decode(data) {
        let config = Config::default();
        if let Ok((engine, conns)) = Engine::restore(&config, &state) {
            engine.check().expect("the restored engine is sound");
            assert_eq!(conns.len(), state.connections.len());
            survives(&engine, &config);
            ends(engine, &state);
        }
    }
}

fn survives(engine: &Engine, config: &Config) {
    let state = engine.dump();
    let decoded = State::decode(&state.encode()).expect("our own stream");
    assert_eq!(decoded, state);
    let (again, conns) = Engine::restore(config, &decoded).expect("our own state");
    again.check().expect("the restored engine is sound");
    assert_eq!(again.dump(), state);
    assert_eq!(conns.len(), state.connections.len());
    let formats = [
        (CFormat::XEN_4_20, 1),
        (CFormat::XEN_4_21, 2),
        (CFormat::XEN_4_22, 1),
        (CFormat::XEN_4_22, 2),
    ];
    for (format, version) in formats {
        let (bytes, _) = state.encode_for_c(&format, version);
        let state = State::decode(&bytes).expect("a stream for C");
        let (engine, _) = Engine::restore(config, &state).expect("a state for C");
        engine.check().expect("the restored engine is sound");
    }
}

/// A host without domains.
struct Empty;

impl Host for Empty {
    fn domain(&mut self, _: DomId) -> Option<DomainInfo> {
        None
    }
    fn introduce(&mut self, _: DomId, _: Gfn, _: EvtchnPort, _: Features) -> Result<(), Errno> {
        Err(Errno::Enosys)
    }
    fn release(&mut self, _: DomId) {}
    fn control(&mut self, _: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        None
    }
    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}

/// Commits all transactions, fetches all events, destroys all domains and closes all connections.
fn ends(mut engine: Engine, state: &State) {
    let sound = |engine: &Engine| engine.check().expect("the engine is sound");
    let request = |engine: &mut Engine, conn: ConnId, op: Operation, tx_id, payload: &[u8]| {
        let len = u32::try_from(payload.len()).expect("short");
        let header = Header { ty: op.as_wire(), tx_id, len, ..Header::default() };
        let _ = engine.request(conn, &Frame { header, payload }, 0, &mut Empty, &mut Vec::new());
        engine.check().expect("the engine is sound");
    };
    for connection in &state.connections {
        request(&mut engine, connection.id, Operation::Write, TxId::NONE, b"/local/domain/0/x\0y");
        for id in connection.transactions() {
            request(&mut engine, connection.id, Operation::Write, id, b"/tool/x\0y");
            request(&mut engine, connection.id, Operation::TransactionEnd, id, b"T\0");
        }
        request(&mut engine, connection.id, Operation::Rm, TxId::NONE, b"/tool\0");
        engine.emit_events(connection.id, usize::MAX, &mut Vec::new());
    }
    engine.domains_changed(&mut Empty);
    sound(&engine);
    for connection in &state.connections {
        engine.disconnect(connection.id);
    }
    sound(&engine);
}
