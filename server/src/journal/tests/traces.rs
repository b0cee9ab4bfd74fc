//! Random traces in a journal, and recovery from truncated and damaged segments.

use std::fs::File;

use proptest::collection::vec;
use proptest::prelude::*;
use xenstore_protocol::{DomId, Operation};
use xenstore_store::{Caller, DomainInfo};
use xxhash_rust::xxh3::xxh3_64;

use super::super::files::segment_file;
use super::super::format::{EXECUTED, HEADER};
use super::super::reader::{Bytes, SegmentReader};
use super::super::*;
use super::{Fixture, fixture};

const DOMAINS: [DomId; 3] = [DomId(1), DomId(2), DomId(3)];
/// Bytes of the constant part of the header.
const HEAD: usize = 48;

/// Of an encoded state.
type Digest = u64;

/// A step of a trace. A connection is an index into the existing ones.
#[derive(Clone, Debug)]
enum Step {
    Connect(Caller),
    Disconnect(usize),
    Restart(usize),
    Events(usize),
    /// A domain dies, or exists again.
    Domain(DomId, bool),
    /// Requests in one turn.
    Ask(usize, Vec<Ask>),
}

type Ask = (Operation, u32, String);

fn path() -> impl Strategy<Value = String> {
    prop_oneof!["[ab]", "/[ab]/[ab]", "/local/domain/[123]/[ab]", Just("@releaseDomain".into())]
}

/// Requests, most of them valid.
fn request() -> impl Strategy<Value = (Operation, String)> {
    let domain = || 1..=3_u16;
    prop_oneof![
        8 => (path(), "[a-z]{0,40}").prop_map(|(at, v)| (Operation::Write, format!("{at}|{v}"))),
        2 => path().prop_map(|at| (Operation::Rm, format!("{at}|"))),
        2 => path().prop_map(|at| (Operation::Read, format!("{at}|"))),
        1 => path().prop_map(|at| (Operation::Directory, format!("{at}|"))),
        1 => path().prop_map(|at| (Operation::GetPerms, format!("{at}|"))),
        1 => domain().prop_map(|d| (Operation::IsDomainIntroduced, format!("{d}|"))),
        1 => domain().prop_map(|d| (Operation::GetDomainPath, format!("{d}|"))),
        2 => (path(), domain()).prop_map(|(at, d)| (Operation::SetPerms, format!("{at}|n{d}|r0|"))),
        4 => (path(), "[xy]").prop_map(|(at, t)| (Operation::Watch, format!("{at}|{t}|"))),
        1 => (path(), "[xy]").prop_map(|(at, t)| (Operation::Unwatch, format!("{at}|{t}|"))),
        3 => Just((Operation::TransactionStart, "|".into())),
        3 => "[TF]".prop_map(|how| (Operation::TransactionEnd, format!("{how}|"))),
        // The replies of the hypervisor to these are separate records.
        3 => (domain(), 0..3_u32).prop_map(|(d, p)| (Operation::Introduce, format!("{d}|7|{p}|"))),
        1 => domain().prop_map(|d| (Operation::Release, format!("{d}|"))),
        1 => Just((Operation::Control, "quota|set|nodes|500|".into())),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let conn = || any::<usize>();
    // Transaction ids are consecutive.
    let ask = (request(), 0..4_u32).prop_map(|((op, payload), tx)| (op, tx % 3, payload));
    let caller = prop_oneof![
        Just(Caller::Socket),
        prop::sample::select(&DOMAINS[..]).prop_map(Caller::Domain)
    ];
    prop_oneof![
        1 => caller.prop_map(Step::Connect),
        1 => conn().prop_map(Step::Disconnect),
        1 => conn().prop_map(Step::Restart),
        3 => conn().prop_map(Step::Events),
        1 => (prop::sample::select(&DOMAINS[..]), any::<bool>())
            .prop_map(|(domid, there)| Step::Domain(domid, there)),
        20 => (conn(), vec(ask, 1..4)).prop_map(|(conn, asks)| Step::Ask(conn, asks)),
    ]
}

impl Fixture {
    fn take(&self, step: &Step) {
        let server = &self.server;
        let conns = server.with(|engine, _| engine.connections());
        let conn = |at: usize| conns.get(at % conns.len().max(1)).copied().unwrap_or(ConnId(0));
        match step {
            Step::Connect(caller) => drop(server.connect(*caller)),
            Step::Disconnect(at) => server.disconnect(conn(*at)),
            Step::Restart(at) => server.restart(conn(*at)),
            Step::Events(at) => drop(server.emit_events(conn(*at), &mut Vec::new())),
            Step::Domain(domid, there) => {
                server.with(|_, machine| match there {
                    true => {
                        let unique_id = 200 + u64::from(domid.0);
                        machine.0.insert(*domid, DomainInfo { unique_id, shutdown: false });
                    }
                    false => drop(machine.0.remove(domid)),
                });
                server.domains_changed();
            }
            Step::Ask(..) if conns.is_empty() => {}
            Step::Ask(at, asks) => {
                let asks: Vec<_> = asks.iter().map(|(op, tx, text)| (*op, *tx, &**text)).collect();
                self.turn(conn(*at), &asks);
            }
        }
        server.commit();
    }

    fn segment(&self) -> SegmentReader {
        let [newest, ..] = numbers(self.dir.path())[..] else { panic!("no journal") };
        SegmentReader::open(File::open(segment_file(self.dir.path(), newest)).unwrap(), &boot_id())
            .unwrap()
    }

    fn state(&self) -> Vec<u8> {
        self.server.with(|engine, _| engine.dump()).encode()
    }

    /// Executes the steps. Returns the end of the records and the state after each.
    fn play(&self, steps: &[Step]) -> Vec<(usize, Digest)> {
        let now = || (self.segment().end(), xxh3_64(&self.state()));
        let mut known = vec![now()];
        for step in steps {
            self.take(step);
            known.push(now());
        }
        known
    }
}

/// Three guests with home directories, and a client on the socket.
fn begin() -> Vec<Step> {
    let mut steps = vec![Step::Connect(Caller::Socket)];
    for domid in DOMAINS {
        let mut ask = |op, payload: String| steps.push(Step::Ask(0, vec![(op, 0, payload)]));
        ask(Operation::Introduce, format!("{domid}|7|8|"));
        ask(Operation::Mkdir, format!("/local/domain/{domid}|"));
        ask(Operation::SetPerms, format!("/local/domain/{domid}|n{domid}|"));
        steps.push(Step::Connect(Caller::Domain(domid)));
    }
    steps
}

/// Recovers an engine from these bytes. Returns its state, and whether the segment is damaged.
fn recovered(bytes: &[u8]) -> Option<(Digest, bool)> {
    let segment = SegmentReader::parse(Bytes::Copied(bytes.to_vec()), &boot_id()).ok()?;
    let recovery = Recovery::replay(&Config::default(), &segment).ok()?;
    recovery.engine.check().ok()?;
    assert_eq!(recovery.interrupted, None);
    Some((xxh3_64(&recovery.engine.dump().encode()), segment.is_damaged()))
}

/// Returns the expected result for a segment whose first `whole` bytes are valid.
fn expected(known: &[(usize, Digest)], whole: usize) -> (Digest, bool) {
    let (_, digest) = known.iter().rfind(|(end, _)| *end <= whole).unwrap();
    (*digest, known.last().unwrap().0 > whole)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    // Fails if recovery from a truncated segment, or one with a changed byte, makes a different engine
    // than the one after the last valid batch; or if the damage is not reported.
    #[test]
    fn recovery_from_a_damaged_segment_ends_at_the_damage(
        steps in vec(step(), 1..40),
        flips in vec((any::<prop::sample::Index>(), 1..=255_u8), 100),
    ) {
        let fixture = fixture();
        let known = fixture.play(&[begin(), steps].concat());
        let (records, (end, last)) = (known[0].0, *known.last().unwrap());
        let segment = fixture.segment();
        let file = &segment.bytes[..end];
        prop_assert_eq!(recovered(file), Some((last, false)));
        for cut in (0..records).step_by(1 + records / 50) {
            prop_assert!(recovered(&file[..cut]).is_none(), "of {} bytes of the state", cut);
        }
        for cut in (records.next_multiple_of(16)..end).step_by(16) {
            prop_assert_eq!(recovered(&file[..cut]), Some(expected(&known, cut)), "cut at {}", cut);
        }
        let flips = flips.iter().map(|(at, bits)| (at.index(end), *bits));
        for (at, bits) in flips.chain((0..HEAD + 32).map(|at| (at, 1 << (at % 8)))) {
            let mut bytes = file.to_vec();
            bytes[at] ^= bits;
            let got = recovered(&bytes);
            let what = format!("byte {at} of {end}");
            if at < HEAD || (HEADER..records).contains(&at) {
                prop_assert!(got.is_none(), "{}", what);
            } else if (EXECUTED..EXECUTED + 8).contains(&at) {
                prop_assert_eq!(got, Some((last, true)), "{}", what);
            } else if at < HEADER {
                prop_assert_eq!(got, Some(expected(&known, end)), "{}", what);
            } else {
                prop_assert_eq!(got, Some(expected(&known, at)), "{}", what);
            }
        }
    }
}
