//! Dump and restore.

use xenstore_store::{Config, Engine, State};

use super::against_model::twins;

/// With an odd first byte the rest is a run of operations, during which an engine is replaced by
/// what is restored of it. With an even one it is a state from somewhere: it is refused, or what is
/// made of it is sound and survives.
pub fn dump(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    if kind % 2 == 1 {
        twins(data);
    } else if let Ok(state) = State::decode(data) {
        let config = Config::default();
        if let Ok((engine, conns)) = Engine::restore(&config, &state) {
            engine.check().expect("what is restored is sound");
            assert_eq!(conns.len(), state.connections.len());
            survives(&engine, &config);
        }
    }
}

fn survives(engine: &Engine, config: &Config) {
    let state = engine.dump();
    let decoded = State::decode(&state.encode()).expect("our own stream");
    assert_eq!(decoded, state);
    let (again, conns) = Engine::restore(config, &decoded).expect("our own state");
    again.check().expect("what is restored is sound");
    assert_eq!(again.dump(), state);
    assert_eq!(conns.len(), state.connections.len());
    for version in [1, 2] {
        let (bytes, _) = state.encode_for_c(version);
        let state = State::decode(&bytes).expect("a stream for C");
        let (engine, _) = Engine::restore(config, &state).expect("a state for C");
        engine.check().expect("what is restored is sound");
    }
}
