//! Every option of the daemon at a live update, valid and not: served before, served after.

use std::fs;

use xenstore_tests::raw::op;

use crate::{Host, ours};

// Fails if there is an option with which the new program takes over and ends, or a mistake that is not
// told to the requester. The list is held against the daemon's options by a test beside those.
#[test]
fn no_option_ends_the_daemon() {
    let mut host = Host::start();
    let dir = host.daemon.xen().parent().unwrap().display().to_string();
    let mut guest = host.guest(5);
    guest.watch("x|t|").unwrap();
    let pid = host.daemon.pid();
    let mut done = 0;
    for case in include_str!("options.txt").lines().filter(|line| !line.starts_with('#')) {
        let case = case.replace("DIR", &dir);
        let mut words = case.split(' ');
        let outcome = words.next().unwrap();
        let named = if outcome == "done" { None } else { words.next() };
        // An option that is given twice counts as it was given last.
        let own = format!("-N --journal {dir}/run --pretend-xen {dir}/xen");
        let args: Vec<&str> = own.split(' ').chain(words).collect();
        assert_eq!(host.control(&["-f", ours().to_str().unwrap()]), Ok("OK".into()));
        let options = [&["-c"][..], &args].concat();
        assert_eq!(host.control(&options), Ok("OK".into()));
        let answer = host.control(&["-s", "-t", "5"]).unwrap();
        assert_eq!(answer == "OK", outcome == "done", "{case}: {answer}");
        assert!(named.is_none_or(|name| answer.contains(name)), "{case}: {answer}");
        host.dom0.ok(op::WRITE, "/local/domain/5/x|1").unwrap();
        guest.event("x|t|").unwrap();
        assert!(host.daemon.pid() == pid && host.daemon.is_running(), "{case}");
        done += usize::from(outcome != "refused");
        assert_eq!(host.updates(), done, "{case}");
        host.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
    }
    assert!(!fs::exists(format!("{dir}/other")).unwrap());
}
