//! What a live update costs in the engine: 120,000 nodes, 1,000 domains with 10 watches each.

use xenstore_protocol::DomId;
use xenstore_store::{Caller, Config, Engine, State};
use xenstore_tests::raw::op;

use crate::store::Store;
use crate::{once, show};

pub(crate) fn state(name: &str) {
    let mut store = Store::with_nodes(120_000);
    let dom0 = store.dom0;
    for domid in 1..=1000 {
        store.ok(dom0, op::INTRODUCE, 0, format!("{domid}\x001\x001\0").as_bytes());
        let guest = store.engine.connect(Caller::Domain(DomId(domid)));
        for watch in 0..10 {
            let text = format!("device/vif/{watch}/state\0token-{watch}\0");
            store.ok(guest, op::WATCH, 0, text.as_bytes());
        }
        store.engine.emit_events(guest, usize::MAX, &mut Vec::new());
    }
    let mut best = [f64::MAX; 4];
    let mut size = 0;
    for _ in 0..5 {
        let mut state = None;
        let mut bytes = Vec::new();
        let mut again = None;
        let mut engine = None;
        let times = [
            once(|| state = Some(store.engine.dump())),
            once(|| bytes = state.as_ref().map(State::encode).unwrap_or_default()),
            once(|| again = State::decode(&bytes).ok()),
            once(|| {
                let state = again.as_ref().expect("our own stream");
                engine = Engine::restore(&Config::default(), state).ok();
            }),
        ];
        assert!(engine.is_some());
        size = bytes.len();
        best.iter_mut().zip(times).for_each(|(best, time)| *best = best.min(time));
    }
    for (what, time) in ["dump", "encode", "decode", "restore"].iter().zip(best) {
        show(&format!("{name}, {what}"), time);
    }
    show(&format!("{name}, all, {size} bytes"), best.iter().sum());
}
