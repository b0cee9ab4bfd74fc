//! The conformance suite on all systems that can run here.
#![allow(clippy::print_stdout)] // counts, for the reader of the test's output

use std::collections::BTreeMap;

use xenstore_embedded::Store;
use xenstore_tests::conformance::{Differences, Verdict, run};
use xenstore_tests::peers::{self, Kind};
use xenstore_tests::skip;
use xenstore_tests::target::Target;

fn hold(what: &str, start: impl FnMut() -> Result<Target, String>, list: &str) {
    let differences = Differences::parse(list).unwrap();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut failures = Vec::new();
    run(start, &differences, "", |case, verdict| {
        let word = match verdict {
            Verdict::Passed => "passed",
            Verdict::Differs(_) => "differ as listed",
            Verdict::Skipped(_) => "skipped",
            Verdict::Failed(why) => {
                failures.push(format!(
                    "{}: {why}\n  to list it: {}",
                    case.name,
                    differences.line(case.name, why)
                ));
                "failed"
            }
        };
        *counts.entry(word).or_default() += 1;
    })
    .unwrap();
    println!("{what}: {counts:?}");
    assert!(failures.is_empty(), "{what}:\n{}", failures.join("\n"));
    assert!(counts["passed"] > 100, "the suite has shrunk");
}

// Fails if the embedded store differs from the daemon in a case that is not in its list.
#[test]
fn embedded_store_matches_the_suite_and_its_list() {
    hold("memory", || Ok(Target::Memory(Store::start())), EMBEDDED_DIFFERENCES);
}

// Fails if the daemon, over its socket, differs from the suite.
#[test]
fn daemon_matches_the_suite_over_a_socket() {
    hold("socket", || Target::start(Kind::Ours), "");
}

/// The same for a packaged daemon and its list of differences, if it can run here.
fn hold_peer(what: &str, kind: Kind, start: fn(Kind) -> Result<Target, String>, list: &str) {
    match peers::available(kind) {
        Err(why) => skip(&format!("conformance of {what}"), &why),
        Ok(()) => hold(what, || start(kind), list),
    }
}

const EMBEDDED_DIFFERENCES: &str = include_str!("../differences/embedded.txt");
const C_DIFFERENCES: &str = include_str!("../differences/c-4.17.txt");
const OCAML_DIFFERENCES: &str = include_str!("../differences/oxenstored-4.17.txt");

// Fails if C xenstored differs from the suite in a case that its list does not name, so that an
// independent daemon confirms the suite.
#[test]
fn c_xenstored_differs_only_as_listed() {
    hold_peer("C xenstored", Kind::C, Target::start, C_DIFFERENCES);
}

// The same for oxenstored.
#[test]
fn oxenstored_differs_only_as_listed() {
    hold_peer("oxenstored", Kind::Ocaml, Target::start, OCAML_DIFFERENCES);
}

// Fails if a reply over dom0's ring differs from one over the socket: the suite is about the
// protocol, not the transport.
#[test]
fn daemon_matches_the_suite_over_the_ring_of_dom0() {
    hold("ring", || Target::start_ring(Kind::Ours), "");
}

#[test]
fn c_xenstored_differs_only_as_listed_over_the_ring_of_dom0() {
    hold_peer("C xenstored over a ring", Kind::C, Target::start_ring, C_DIFFERENCES);
}

#[test]
fn oxenstored_differs_only_as_listed_over_the_ring_of_dom0() {
    hold_peer("oxenstored over a ring", Kind::Ocaml, Target::start_ring, OCAML_DIFFERENCES);
}

// Fails if a daemon that does not run counts as one that differs in all cases.
#[test]
fn suite_fails_at_once_without_a_daemon() {
    let differences = Differences::parse(C_DIFFERENCES).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let start = || Ok(Target::Socket(dir.path().join("socket")));
    let error = run(start, &differences, "", |case, _| panic!("{} was run", case.name));
    assert!(error.unwrap_err().starts_with("the daemon does not answer"));
}
