//! Existing clients on this project's daemon: Debian's xenstore-* tools, `test-xenstore`,
//! `xenstore-control`, and the Python client pyxs.

#![allow(clippy::print_stderr)] // it says what is skipped

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use xenstore_tests::fake_guest::FakeGuest;
use xenstore_tests::peers::{Daemon, Kind, Quotas, XEN_BIN};
use xenstore_tests::skip;

fn daemon() -> Daemon {
    Daemon::start(Kind::Ours, Quotas::Default).unwrap()
}

/// Returns the tool as a command for `daemon`, if it is installed.
fn tool(daemon: &Daemon, path: &str) -> Option<Command> {
    if !Path::new(path).exists() {
        skip(path, "not installed (Debian packages xenstore-utils and xen-utils-4.17)");
        return None;
    }
    let mut command = Command::new(path);
    command.env("XENSTORED_PATH", daemon.socket()).stdin(Stdio::null());
    Some(command)
}

fn out(output: Output) -> (bool, String) {
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Runs `xenstore-NAME args`. Returns whether it succeeded, and its output.
fn xenstore(daemon: &Daemon, name: &str, args: &[&str]) -> Option<(bool, String)> {
    let mut command = tool(daemon, &format!("/usr/bin/xenstore-{name}"))?;
    Some(out(command.args(args).output().unwrap()))
}

// Fails if a tool of Debian does not do what it does with C xenstored. The expected texts are its
// output there.
#[test]
fn debian_tools_work_as_with_c_xenstored() {
    let daemon = daemon();
    let run = |name: &str, args: &[&str]| xenstore(&daemon, name, args);
    let Some(written) = run("write", &["/a/b", "hello", "/a/c", "world"]) else { return };
    assert_eq!(written, (true, String::new()));
    let expect = |name: &str, args: &[&str], ok: bool, text: &str| {
        assert_eq!(run(name, args).unwrap(), (ok, text.into()), "xenstore-{name} {args:?}");
    };
    expect("read", &["/a/b"], true, "hello\n");
    expect("read", &["-p", "/a/c"], true, "/a/c: world\n");
    expect("list", &["/a"], true, "b\nc\n");
    expect("exists", &["/a/b"], true, "");
    expect("exists", &["/nope"], false, "");
    expect("read", &["/nope"], false, "xenstore-read: couldn't read path /nope\n");
    expect("chmod", &["/a/b", "r0", "b5"], true, "");
    expect("ls", &["-fp", "/a"], true, "/a/b = \"hello\"   (r0,b5)\n/a/c = \"world\"   (n0)\n");
    expect("chmod", &["-r", "/a", "w0"], true, "");
    expect("ls", &["-fp", "/a"], true, "/a/b = \"hello\"   (w0)\n/a/c = \"world\"   (w0)\n");
    expect("rm", &["/a/b"], true, "");
    expect("rm", &["-t", "/a/c"], true, "");
    let (ok, tree) = run("ls", &["-fp"]).unwrap();
    assert!(ok && tree.contains("/tool/xenstored = \"\"   (n0)\n"), "{tree}");
}

// Fails if xenstore-watch misses the first event or a change.
#[test]
fn xenstore_watch_gets_every_event() {
    let daemon = daemon();
    let Some(mut watch) = tool(&daemon, "/usr/bin/xenstore-watch") else { return };
    let mut watch = watch.args(["-n", "3", "/w"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().as_deref(), Some("/w"));
    for path in ["/w/a", "/w/a/b"] {
        assert!(xenstore(&daemon, "write", &[path, "1"]).unwrap().0);
        assert_eq!(lines.next().as_deref(), Some(path));
    }
    assert!(watch.wait().unwrap().success());
}

// Fails if a list that needs DIRECTORY_PART is incomplete or out of order.
#[test]
fn xenstore_list_is_complete_and_in_order_for_many_children() {
    let daemon = daemon();
    let names: Vec<String> = (0..2000).map(|i| format!("child-number-{i}")).collect();
    for some in names.chunks(200) {
        let args: Vec<String> =
            some.iter().flat_map(|name| [format!("/many/{name}"), "v".into()]).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let Some((ok, text)) = xenstore(&daemon, "write", &args) else { return };
        assert!(ok, "{text}");
    }
    let (ok, listed) = xenstore(&daemon, "list", &["/many"]).unwrap();
    assert!(ok);
    assert_eq!(listed.lines().collect::<Vec<_>>(), names);
}

// Fails if a test of Xen's own client suite fails in any iteration.
#[test]
fn test_xenstore_passes() {
    let daemon = daemon();
    let Some(mut test) = tool(&daemon, &format!("{XEN_BIN}/test-xenstore")) else { return };
    let (ok, text) = out(test.args(["-i", "100"]).output().unwrap());
    assert!(ok, "{text}");
    for name in ["read 1", "write 2000", "dir", "rm dir", "ta empty", "ta rmw", "ta err"] {
        assert!(text.contains(name), "{name} was not run:\n{text}");
    }
    assert!(!text.to_lowercase().contains("fail"), "{text}");
}

/// Mounts the hypervisor's version, which xenstore-control reads, for its process only.
const PRETEND_HOST: &str = "mount -t tmpfs none /sys && mkdir -p /sys/hypervisor/version && \
    echo 4 >/sys/hypervisor/version/major && echo 17 >/sys/hypervisor/version/minor && exec \"$@\"";

// Fails if xenstore-control gets other replies than from C xenstored.
#[test]
fn xenstore_control_gets_the_replies_of_c_xenstored() {
    let daemon = daemon();
    if tool(&daemon, "/usr/bin/xenstore-control").is_none() {
        return;
    }
    let run = |args: &[&str]| {
        let mut command = tool(&daemon, "/usr/bin/unshare").expect("part of util-linux");
        command.args(["-m", "sh", "-c", PRETEND_HOST, "sh", "/usr/bin/xenstore-control"]);
        out(command.args(args).output().unwrap())
    };
    let (ok, text) = run(&["check"]);
    if text.contains("unshare") || text.contains("mount") {
        eprintln!("SKIPPED xenstore-control: needs its own mount namespace ({})", text.trim());
        return;
    }
    assert_eq!((ok, text.as_str()), (true, "OK\n"));
    assert_eq!(run(&["print", "hello"]), (true, "OK\n".into()));
    assert_eq!(run(&["quota", "set", "nodes", "900"]), (true, "OK\n".into()));
    for (args, part) in [
        (&["quota"][..], "nodes            :      900 "),
        (&["quota", "max"], "Max. seen accounting values:"),
        (&["quota", "0"], "Domain 0:"),
        (&["quota-soft"], "memory           :"),
        (&["log"], "io      : o"),
        (&["help"], "quota-soft"),
    ] {
        let (ok, text) = run(args);
        assert!(ok && text.contains(part), "{args:?}: {text}");
    }
    assert!(!run(&["bogus"]).0, "an unknown command is an error");
}

fn python(daemon: &Daemon) -> Option<(Command, PathBuf)> {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let venv = project.join("target/pyxs");
    let python = venv.join("bin/python3");
    let has_pyxs = |python: &Path| {
        Command::new(python)
            .args(["-c", "import pyxs"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    if !has_pyxs(&python) {
        let made = Command::new("python3").args(["-m", "venv"]).arg(&venv).status();
        let pip = Command::new(venv.join("bin/pip")).args(["install", "-q", "pyxs"]).status();
        if made.is_err() || pip.is_err() || !has_pyxs(&python) {
            skip("pyxs", "cannot be installed from PyPI");
            return None;
        }
    }
    let mut command = Command::new(python);
    command.env("XENSTORED_PATH", daemon.socket()).arg("-W").arg("ignore");
    Some((command, project.join("tests/interop")))
}

// Fails if pyxs, a client independent of libxenstore, cannot use this project's daemon.
#[test]
fn pyxs_works() {
    let daemon = daemon();
    // The script introduces it.
    FakeGuest::create(&daemon.xen(), 7).unwrap();
    let Some((mut python, scripts)) = python(&daemon) else { return };
    let (ok, text) = out(python.arg(scripts.join("pyxs_script.py")).output().unwrap());
    assert!(ok && text.ends_with("all of pyxs works\n"), "{text}");
}
