//! The unit of the package, run by systemd itself: a user manager in a mount namespace that looks
//! like a machine started with systemd.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use xenstore_tests::fake_guest::{FakeGuest, PORT};
use xenstore_tests::fdstore::FdStore;
use xenstore_tests::peers;
use xenstore_tests::raw::{Conn, frame, op};

use crate::stored::{Table, port_of, table, update};

const UNIT: &str = "xenstored.service";
/// Lines that check the host, or that a user manager does not support.
const OTHERWISE: [&str; 7] = [
    "RequiresMountsFor=",
    "ConditionPathExists=",
    "ExecCondition=",
    "EnvironmentFile=",
    "ExecStart=",
    "ProtectSystem=",
    "ProtectHome=",
];
const MANAGER: &str = "/lib/systemd/systemd";

struct Systemd {
    dir: TempDir,
    manager: Child,
    _alone: MutexGuard<'static, ()>,
}

/// Two managers below one control group use the same group for units of the same name: one would
/// kill the processes of the other.
static ALONE: Mutex<()> = Mutex::new(());

impl Systemd {
    /// Returns `None`, and reports why, if systemd cannot run here.
    fn start() -> Option<Systemd> {
        let systemd = Systemd::try_start();
        if let Err(why) = &systemd {
            eprintln!("SKIPPED the unit under systemd: {why}");
        }
        systemd.ok()
    }

    fn try_start() -> Result<Systemd, String> {
        if !Path::new(MANAGER).exists() {
            return Err("there is no systemd (Debian package systemd)".into());
        }
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let units = dir.path().join("systemd/user");
        fs::create_dir_all(&units).unwrap();
        fs::create_dir(dir.path().join("manager")).unwrap();
        peers::lay_out(dir.path()).unwrap();
        fs::write(units.join(UNIT), unit(dir.path())).unwrap();
        fs::write(units.join("probe.service"), "[Service]\nType=oneshot\nExecStart=/bin/true\n")
            .unwrap();
        // The folder of the project may be hidden from services.
        let program = peers::program("xenstored").unwrap();
        fs::copy(program, dir.path().join("xenstored")).unwrap();
        let mut fdstore = FdStore::new(dir.path()).unwrap();
        let script = "mount -t tmpfs none /run && mkdir -p /run/systemd/system && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, "sh", MANAGER, "--user"]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", dir.path());
        command.env("XDG_RUNTIME_DIR", dir.path().join("manager"));
        command.env("XDG_CONFIG_HOME", dir.path()).env("NOTIFY_SOCKET", dir.path().join("notify"));
        let manager = command.spawn().map_err(|error| format!("unshare: {error}"))?;
        let systemd = Systemd { dir, manager, _alone: alone };
        while !fdstore
            .message(Duration::from_secs(10))
            .map_err(|e| format!("no manager: {e}"))?
            .contains("READY=1")
        {}
        systemd.ctl(&["start", "probe.service"]).map_err(|why| format!("no services: {why}"))?;
        Ok(systemd)
    }

    fn ctl(&self, args: &[&str]) -> Result<String, String> {
        let mut command = Command::new("systemctl");
        command.arg("--user").args(args).env("XDG_RUNTIME_DIR", self.dir.path().join("manager"));
        let output = command.output().map_err(|error| error.to_string())?;
        let text = |bytes| String::from_utf8_lossy(bytes).trim().to_owned();
        output.status.success().then(|| text(&output.stdout)).ok_or_else(|| text(&output.stderr))
    }

    fn property(&self, name: &str) -> String {
        self.ctl(&["show", "--value", "--property", name, UNIT]).unwrap()
    }

    /// Waits until this many descriptors are stored. systemd reads messages with a delay, and drops
    /// those of a process that has ended.
    fn has_stored(&self, count: &str) {
        let late = Instant::now() + crate::LIMIT;
        while self.property("NFileDescriptorStore") != count {
            assert!(Instant::now() < late, "not {count} descriptors are stored");
        }
    }

    fn program(&self) -> PathBuf {
        self.dir.path().join("xenstored")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/socket")
    }

    fn xen(&self) -> PathBuf {
        self.dir.path().join("xen")
    }
}

impl Systemd {
    /// Stops the services, then the manager.
    fn end(&mut self) {
        if self.ctl(&["exit"]).is_err() {
            let _ = self.manager.kill();
        }
        let _ = self.manager.wait();
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        self.end();
    }
}

/// Returns the unit, changed for a daemon on a pretend Xen.
fn unit(dir: &Path) -> String {
    let watchdog = "WatchdogSec=60s";
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../server/debian/xenstored.service");
    let text = fs::read_to_string(shipped).unwrap();
    for start in OTHERWISE {
        assert!(text.lines().any(|line| line.starts_with(start)), "{start}");
    }
    assert!(text.contains(watchdog));
    let text = text.replace(watchdog, "WatchdogSec=5s");
    let kept = text.lines().filter(|line| !OTHERWISE.iter().any(|start| line.starts_with(start)));
    let service = format!(
        "[Service]\nExecStart={0}/xenstored --no-fork --pid-file {0}/run/pid --journal {0}/run \
         --pretend-xen {0}/xen\nEnvironment=XENSTORED_RUNDIR={0}/run",
        dir.display()
    );
    let lines = kept.map(|line| if line == "[Service]" { &service } else { line });
    lines.flat_map(|line| [line, "\n"]).collect()
}

// Fails if systemd does not start the daemon from its unit; if socket and event channels are not
// stored when it is killed, also after a live update, or are not adopted by the next process; or if
// a stop leaves anything behind.
#[test]
fn systemd_stores_descriptors_of_the_unit() {
    let Some(mut systemd) = Systemd::start() else { return };
    systemd.ctl(&["start", UNIT]).unwrap();
    let (socket, xen) = (systemd.socket(), systemd.xen());
    let mut dom0 = Conn::connect(&socket).unwrap();
    let mut guest = Conn::new(FakeGuest::create(&xen, 5).unwrap());
    dom0.gives(op::INTRODUCE, &format!("5|1|{PORT}|"), "OK|").unwrap();
    dom0.ok(op::WRITE, "/local/domain/5|").unwrap();
    dom0.ok(op::SET_PERMS, "/local/domain/5|n5|").unwrap();
    guest.watch("n|w|").unwrap();
    let before = table(&xen);
    assert!(port_of(&before, 5) > 0);
    for round in 1..=3 {
        if round == 2 {
            update(&mut Conn::connect(&socket).unwrap(), &systemd.program());
        }
        systemd.has_stored("2");
        systemd.ctl(&["kill", "--signal=KILL", UNIT]).unwrap();
        guest.send(&frame(op::WRITE, 77, 0, format!("x\0{round}").as_bytes())).unwrap();
        // The next process may not run yet.
        let mut client = Conn::connect(&socket).unwrap();
        client.gives(op::READ, "/local/domain/5|", "").unwrap();
        let answer = guest.message(crate::LIMIT).unwrap().unwrap();
        assert_eq!((answer.req_id, &answer.payload[..]), (77, &b"OK\0"[..]));
        guest.gives(op::WRITE, &format!("n|{round}"), "OK|").unwrap();
        guest.event("n|w|").unwrap();
        assert_eq!(table(&xen), before);
        assert_eq!(systemd.property("NRestarts"), round.to_string());
        systemd.has_stored("2");
    }
    let why = systemd.ctl(&["stop", UNIT]).unwrap_err();
    assert!(why.contains("refuse"), "{why}");
    systemd.end();
    assert_eq!(table(&xen), Table::new());
}

// Fails if systemd ends the unit together with a program that fails at a live update, takes the
// wrong process for the daemon, or does not detect a daemon that hangs; or if its watchdog ends C
// xenstored, which does not notify it.
#[test]
fn systemd_follows_an_update_that_fails() {
    let Some(mut systemd) = Systemd::start() else { return };
    systemd.ctl(&["start", UNIT]).unwrap();
    let (socket, first) = (systemd.socket(), systemd.property("MainPID"));
    let mut dom0 = Conn::connect(&socket).unwrap();
    dom0.ok(op::WRITE, "/a|kept|").unwrap();
    let program = systemd.dir.path().join("ends");
    let text =
        "#!/bin/sh\ncase \"$*\" in --help) echo --check-state;; *--check*) echo 5 us;; esac\n";
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let begin = format!("live-update|-f|{}|", program.display());
    dom0.gives(op::CONTROL, &begin, "OK|").unwrap();
    let answer = dom0.ok(op::CONTROL, "live-update|-s|").unwrap();
    assert!(answer.contains("has ended"), "{answer}");
    dom0.gives(op::READ, "/a|", "kept|").unwrap();
    let second = systemd.property("MainPID");
    assert_ne!(second, first);
    let state = |systemd: &Systemd| systemd.property("SubState") + &systemd.property("NRestarts");
    assert_eq!(state(&systemd), "running0");
    // After a successful update the daemon is the same process.
    update(&mut Conn::connect(&socket).unwrap(), &systemd.program());
    let pid = || systemd.property("MainPID") == second && state(&systemd) == "running0";
    assert!((0..500).any(|_| pid()), "{second} {}", systemd.ctl(&["show", UNIT]).unwrap());
    systemd.ctl(&["kill", "--signal=STOP", UNIT]).unwrap();
    // The next process answers; the socket was stored.
    let mut client = Conn::connect(&socket).unwrap();
    client.send(&frame(op::READ, 1, 0, b"/a\0")).unwrap();
    let came = (0..10).find_map(|_| client.reply().ok()).expect("an answer");
    assert_eq!(came.payload, b"kept\0");
    assert_eq!(systemd.property("NRestarts"), "1");
    systemd.end();
}
