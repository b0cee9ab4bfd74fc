//! Dump and restore.

use xenstore_store::{Config, Engine, State};

use super::against_model::engine_after;

/// With an odd first byte the rest is a run of operations, whose outcome must survive dump, encode,
/// decode and restore unchanged. With an even one it is a state from somewhere: it is refused, or
/// what is made of it is sound and survives the same.
pub fn dump(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    if kind % 2 == 1 {
        let (engine, config) = engine_after(data);
        survives(&engine, &config);
    } else if let Ok(state) = State::decode(data) {
        let config = Config::default();
        if let Ok((engine, _)) = Engine::restore(&config, &state) {
            engine.check().expect("what is restored is sound");
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
}
