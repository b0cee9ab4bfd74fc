//! The daemon in one thread with all that is around it, ending between any two of its operations.
//!
//! Everything but the process is real or pretend files: pages of rings, event channels, the journal,
//! a socket. A process that has ended continues for a moment without any effect
//! (`transport/sys/src/crash.rs`), and is dropped; the next one finds the state that it has left. Guests do not
//! notice, the tool connects again.

mod clients;
mod script;
mod world;

use std::fs::File;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use futures_lite::future;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use smol::lock::Mutex;
use xenstore_store::{Base, Config, Host, Millis};
use xenstore_sys::{crash, inherit};
use xenstore_transport::driver::Driver;
use xenstore_transport::socket::Socket;

use crate::daemon::options::Options;
use crate::daemon::serving;
use crate::handover::{ReceivedState, Source, UpdatableHost, Update};
use crate::journal::{self, Journal};
use crate::log::Trace;
use crate::platform::Platform;
use crate::platform::xen::introduce_all;
use crate::serve::Tasks;

use script::{DOMIDS, Step, script};
use world::World;

/// Turns without an effect after which all participants are idle.
const REST: u32 = 4;

/// How a process ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Killed when it has done so many operations.
    Killed(u64),
    /// Another one takes its place then.
    Updated(u64),
}

/// What came of a process.
enum Ended {
    Killed,
    /// The state for the next one, and what the clock says.
    Updated(Vec<u8>, Millis),
    /// The script is at its end; operations.
    Done(u64),
}

/// A copy of a descriptor that the next process is given: this one closes its own.
fn passed_on(number: RawFd) -> RawFd {
    let own = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let copy = pidfd_getfd(own, number, PidfdGetfdFlags::empty()).unwrap().into_raw_fd();
    inherit::set_inheritable(&[copy], true).unwrap();
    copy
}

/// All that a live update does until the other program runs.
async fn hand_over(outgoing: &Source<'_>, (mut stream, base): (Vec<u8>, Base)) -> Ended {
    let held = outgoing.server.pause_all(false).await;
    let mut state = outgoing.state(held);
    let clock = outgoing.server.clock().now();
    crash::start(0);
    state.io.evtchn = state.io.evtchn.map(passed_on);
    for connection in &mut state.connections {
        connection.io.fd = connection.io.fd.map(passed_on);
    }
    state.encode_since(&base, &mut |piece| stream.extend_from_slice(piece));
    Ended::Updated(stream, clock)
}

/// The life of a process, as in `daemon.rs`.
fn live(world: &mut World<'_>, end: Option<End>, handed_over: Option<(Vec<u8>, Millis)>) -> Ended {
    crash::start(if let Some(End::Killed(after)) = end { after } else { u64::MAX });
    let dir = world.run_dir();
    let config = Config::default();
    let mut options = Options::default();
    (options.pretend_xen, options.require_xen) = (Some(world.xen()), true);
    let mut incoming = match handed_over {
        None => journal::recover(&dir, &config).unwrap().map(ReceivedState::recovered),
        Some((state, clock)) => Some(ReceivedState::handed_over(&config, &state, clock)),
    };
    let (trace, driver) = (Trace::new(), Driver::new().unwrap());
    let (fresh, rings) = smol::channel::unbounded();
    let state = incoming.as_ref().map(|incoming| &incoming.state);
    let tools = (fresh, &trace, &driver);
    let found = Platform::find(&options, &config, state, world.kept_channels(), tools);
    if crash::is_over() {
        // The kernel closes also what it has not come to.
        let connections = incoming.iter().flat_map(|incoming| &incoming.state.connections);
        let sockets = connections.filter_map(|connection| connection.io.fd);
        sockets.for_each(|number| drop(inherit::adopt(number)));
        return Ended::Killed;
    }
    let found = found.unwrap();
    if let Some(incoming) = incoming.as_mut().filter(|incoming| !incoming.is_handed_over()) {
        incoming.apply_pages(&found.resumed);
    }
    let update = Update::default();
    let host: Box<dyn Host> = Box::new(UpdatableHost { host: found.host, update: update.clone() });
    let (server, taken) = serving(incoming, host, &config, Some(dir));
    let server = server.driven(driver.clone()).updated(update.clone());
    let events = found.events.unwrap();
    let xen = Some((events.bound.clone(), found.rings));
    let tasks = Tasks::new();
    let ended = driver.block_on(tasks.run(async {
        if let Some(taken) = taken {
            taken.adopt(&server, found.resumed, &tasks, &driver);
        }
        introduce_all(&server, &found.waiting);
        tasks.spawn(events.deliver(&server));
        tasks.spawn(server.do_work());
        let program = File::open("/proc/self/exe").unwrap();
        let (server, update, pausing) = (&server, &update, Mutex::default());
        let welcome = &|_| Ok(());
        let outgoing = Source { server, welcome, update, listener: None, xen, pausing, program };
        let serve_rings = async {
            while let Ok(ring) = rings.recv().await {
                tasks.spawn(server.serve(ring));
            }
            future::pending().await
        };
        let keep = async {
            outgoing.keep_journal().await;
            future::pending().await
        };
        let played = play(world, end, &outgoing, &tasks, &driver);
        future::or(played, future::or(serve_rings, keep)).await
    }));
    // What it does at its end has no effect.
    crash::start(0);
    ended
}

/// Plays the rest of the script.
async fn play<'a>(
    world: &mut World<'_>,
    end: Option<End>,
    outgoing: &Source<'a>,
    tasks: &Tasks<'a>,
    driver: &Driver,
) -> Ended {
    let (server, mut quiet) = (outgoing.server, 0);
    let mut written = None;
    loop {
        let before = crash::count();
        if let Some(client) = world.connects() {
            tasks.spawn(server.serve(Socket::adopt(client, driver).unwrap()));
        }
        let active = world.turn(|| _ = server.with_journal(Journal::invalidate));
        server.next_turn().await;
        if crash::is_over() {
            return Ended::Killed;
        }
        if let Some(End::Updated(after)) = end {
            // A while before all participants are idle.
            if written.is_none() && crash::count() >= after / 2 {
                let state = server.with(|engine, _| engine.dump());
                written = Some((state.encode(), state.into_base()));
            }
            if let Some(written) = written.take_if(|_| crash::count() >= after) {
                return hand_over(outgoing, written).await;
            }
        }
        quiet = if active || crash::count() != before { 0 } else { quiet + 1 };
        if quiet == REST {
            if !world.rests() {
                return Ended::Done(crash::count());
            }
            quiet = 0;
        }
    }
}

/// Runs the script with processes that end as `ends` says, and stores their event channels if `stores`.
/// Returns the bytes that each guest got, and the number of operations of the last process.
fn run(script: &[Step], ends: &[End], stores: bool) -> ([Vec<u8>; 3], u64) {
    let mut world = World::new(script, stores);
    let (mut ends, mut handed_over) = (ends.iter(), None);
    loop {
        match live(&mut world, ends.next().copied(), handed_over.take()) {
            Ended::Killed => {}
            Ended::Updated(state, clock) => handed_over = Some((state, clock)),
            Ended::Done(operations) => return (world.guests.map(|guest| guest.seen), operations),
        }
    }
}

/// Bytes as messages, for people.
fn readable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\0', "|")
}

/// Runs the script with each of these ends; the bytes of guests must not change.
fn assert_unnoticed(stores: bool, ends: impl Fn(u64) -> Vec<End> + Sync) {
    let script = script();
    let (expected, operations) = run(&script, &[], stores);
    let all: usize = expected.iter().map(Vec::len).sum();
    assert!(all > 9_000 && operations > 1_000, "{all} bytes, {operations} operations");
    let next = AtomicU64::new(0);
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at > operations {
                return;
            }
            let ends = ends(at);
            let (seen, _) = run(&script, &ends, stores);
            for ((seen, expected), domid) in seen.iter().zip(&expected).zip(DOMIDS) {
                let same = seen.iter().zip(expected).take_while(|(a, b)| a == b).count();
                assert!(
                    seen == expected,
                    "{ends:?}: domain {domid} from byte {same} on\n{}\nin place of\n{}",
                    readable(&seen[same.saturating_sub(40)..]),
                    readable(&expected[same.saturating_sub(40)..]),
                );
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
}

// Fails if a process that is killed between any two operations takes anything of a guest with it, or
// if a request is executed twice.
#[test]
fn nothing_is_lost_when_killed_between_any_two_operations() {
    assert_unnoticed(false, |at| vec![End::Killed(at)]);
}

// Fails if a stored event channel is mistaken for another, is leaked, or is bound again, because the
// process ended between binding or closing it and recording that.
#[test]
fn nothing_is_lost_when_event_channels_are_stored() {
    assert_unnoticed(true, |at| match at % 2 {
        0 => vec![End::Killed(at)],
        _ => vec![End::Killed(at), End::Killed(at % 61)],
    });
}

// Fails if a process that is killed while it comes back does.
#[test]
fn nothing_is_lost_when_the_next_process_is_killed_too() {
    assert_unnoticed(false, |at| vec![End::Killed(at), End::Killed(at % 61)]);
}

// Fails if a live update between any two operations loses anything, also if the new program is killed.
#[test]
fn nothing_is_lost_by_an_update_at_any_operation() {
    assert_unnoticed(false, |at| match at % 2 {
        0 => vec![End::Updated(at)],
        _ => vec![End::Updated(at), End::Killed(at % 211)],
    });
}
