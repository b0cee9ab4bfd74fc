//! Debian packages that the tests need.

use std::process::{Command, Stdio};

/// A package, and a file that exists if it is installed.
type Package = (&'static str, &'static str);

/// For running the real Xen.
pub const FOR_XEN: &[Package] = &[
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("cpio", "/usr/bin/cpio"),
    ("xz-utils", "/usr/bin/xz"),
    ("gcc", "/usr/bin/gcc"),
];

/// For the packaged daemons and clients, for strace, and for the systemd unit.
pub const FOR_INTEROP: &[Package] = &[
    ("xenstore-utils", "/usr/bin/xenstore-ls"),
    ("xen-utils-4.17", "/usr/lib/xen-4.17/bin/xenstored"),
    ("libxen-dev", "/usr/include/xenevtchn.h"),
    ("gcc", "/usr/bin/gcc"),
    ("dpkg-dev", "/usr/bin/dpkg-shlibdeps"),
    ("binutils", "/usr/bin/strip"),
    ("strace", "/usr/bin/strace"),
    ("systemd", "/lib/systemd/systemd"),
    ("python3", "/usr/bin/python3"),
    ("python3-venv", PYTHON_MODULES),
];

/// Python modules, in place of a file.
const PYTHON_MODULES: &str = "import venv, ensurepip";

fn present(sign: &str) -> bool {
    match sign {
        PYTHON_MODULES => Command::new("python3")
            .args(["-c", sign])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success()),
        file => std::path::Path::new(file).exists(),
    }
}

fn missing(packages: &[Package]) -> Vec<&'static str> {
    let absent = |(_, sign): &&Package| !present(sign);
    packages.iter().filter(absent).map(|(package, _)| *package).collect()
}

/// Installs missing packages, if this user may.
///
/// # Errors
///
/// Names the packages that are still missing, and why.
pub fn install(packages: &[Package]) -> Result<(), String> {
    let wanted = missing(packages);
    if wanted.is_empty() {
        return Ok(());
    }
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout == b"0\n");
    if !is_root {
        return Err(format!("not installed: {} (only root may)", wanted.join(" ")));
    }
    let apt = |args: &[&str]| {
        Command::new("apt-get")
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    println!("installing {}", wanted.join(" "));
    let _ = apt(&["update"]);
    for package in &wanted {
        // One at a time: a distribution that lacks one may have the others.
        let _ = apt(&["install", "-y", "--no-install-recommends", package]);
    }
    match missing(packages) {
        none if none.is_empty() => Ok(()),
        some => Err(format!("cannot be installed here: {}", some.join(" "))),
    }
}
