//! Live updates without free descriptors, threads or processes: an error reply, and no other
//! effect.

use std::fs;
use std::process::Command;

use rustix::process::{Resource, getrlimit, getuid};
use xenstore_tests::peers::{Daemon, Kind};
use xenstore_tests::raw::{Conn, op};
use xenstore_tests::skip;

use crate::failures::script;
use crate::{Host, ours};

/// A limited resource.
struct Limited {
    /// Its name for prlimit(1).
    what: &'static str,
    /// The user of the daemon.
    user: u32,
    /// Words that an error may contain.
    named: &'static [&'static str],
    /// The previous limit.
    most: Option<u64>,
}

impl Limited {
    /// Updates the daemon under this limit. All connections must be served as before, whatever the reply.
    /// Returns true if the update was done.
    fn update(&self, host: &mut Host, client: &mut Conn, count: u64, most: Option<u64>) -> bool {
        let most = most.map_or("unlimited".to_owned(), |most| most.to_string());
        // Setting a limit needs the same user, or a privilege that a container lacks.
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={}", self.user), format!("--regid={}", self.user)]);
        command.args(["--clear-groups", "prlimit", "--pid"]);
        command.arg(host.daemon.pid().to_string());
        command.arg(format!("--{}={count}:{most}", self.what));
        assert!(command.status().unwrap().success());
        let before = host.updates();
        let answer = host.update_to(&ours());
        let named = self.named.iter().any(|name| answer.contains(name));
        assert!(named || answer == "OK", "{count}: {answer}");
        host.dom0.ok(op::WRITE, "/x|1").unwrap();
        client.event("/x|t|").unwrap();
        host.dom0.gives(op::CONTROL, "check|", "OK|").unwrap();
        let log = host.daemon.log();
        assert!(host.daemon.is_running() && !log.contains("panic"), "{count}: {log}");
        assert_eq!(host.updates() - before, usize::from(answer == "OK"), "{count}: {log}");
        answer == "OK"
    }

    /// Raises the limit from `least` until an update succeeds, then lowers it, which also applies
    /// to the new program.
    fn play(&self, host: &mut Host, least: u64) {
        let mut client = host.client();
        client.watch("/x|t|").unwrap();
        let like_c = script(host, "like-c", "echo 'xenstored <options>'; exec rm \"$0\"");
        let mut count = least;
        while !self.update(host, &mut client, count, self.most) {
            // The same on the way to C xenstored, which is not checked.
            assert_ne!(host.update_to(&like_c), "OK");
            host.dom0.ok(op::WRITE, "/x|1").unwrap();
            client.event("/x|t|").unwrap();
            count += 1;
            assert!(count < least + 100, "it is never enough");
        }
        assert!(count > least, "the limit has no effect");
        for count in (least..count + 8).rev() {
            self.update(host, &mut client, count, Some(count));
        }
    }
}

// Fails if an update without free descriptors ends the daemon, whichever step lacks them.
#[test]
fn update_fails_cleanly_without_free_descriptors() {
    let mut host = Host::start();
    let descriptors = fs::read_dir(format!("/proc/{}/fd", host.daemon.pid())).unwrap().count();
    let named = &["Too many open files", "os error 24", "refuses the state"];
    // Room for a client.
    let least = u64::try_from(descriptors).unwrap() + 1;
    let most = getrlimit(Resource::Nofile).maximum;
    Limited { what: "nofile", user: getuid().as_raw(), named, most }.play(&mut host, least);
}

// Fails if an update without free threads or processes ends the daemon, whichever step lacks them.
#[test]
fn update_fails_cleanly_without_free_processes() {
    // Root has no limit.
    let user = "chown -R 54321 \"$XENSTORED_RUNDIR/..\" && exec setpriv --reuid=54321 \
                --regid=54321 --clear-groups \"$@\"";
    let wrapper = ["sh", "-c", user, "sh"].map(str::to_owned);
    let started = Daemon::start_under(&wrapper).and_then(|mut daemon| {
        daemon.wait()?;
        Ok(daemon)
    });
    let daemon = match started {
        Ok(daemon) => daemon,
        Err(why) => return skip("updates without processes", &why),
    };
    assert_eq!(daemon.kind, Kind::Ours);
    let dom0 = Conn::connect(&daemon.socket()).unwrap();
    let mut host = Host { daemon, dom0 };
    let named =
        &["no thread", "cannot make a thread", "os error 11", "refuses the state", "no way back"];
    let most = getrlimit(Resource::Nproc).maximum;
    Limited { what: "nproc", user: 54321, named, most }.play(&mut host, 1);
}
