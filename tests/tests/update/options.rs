//! Every option of the daemon at a live update, valid and invalid: the daemon serves before and
//! after.

use std::fs;

use xenstore_tests::raw::op;

use crate::{Host, ours};

// Fails if an option makes the new program end after it has taken over, or if an invalid option is
// not reported to the requester. A test beside the daemon's options checks that the list is
// complete.
#[test]
fn no_option_ends_the_daemon_at_an_update() {
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
        // The last occurrence of an option counts.
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
