//! Checks of the Debian package: steps of `cargo xtask test`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::deb::{self, output};
use crate::steps::{Steps, Verdict, succeed};
use crate::{project, xen};

/// Packages whose files ours must not contain, even if they are installed later.
const XEN: [&str; 3] = ["xen-utils-4.17", "xen-utils-common", "xenstore-utils"];

/// Runs all checks.
pub fn steps(steps: &mut Steps) {
    match deb::available() {
        Err(why) => steps.step("Debian package", || Verdict::Skip(why)),
        Ok(()) => {
            steps.step("Debian package", content);
            steps.step("removal of the Debian package", || verdict(removal()));
            steps.step("Debian's files and the package's", collisions);
            steps.step("Debian's start scripts with the package", start_up);
        }
    }
}

fn verdict(checks: Result<(), String>) -> Verdict {
    checks.map_or_else(Verdict::Fail, |()| Verdict::Pass)
}

/// The folder in which the package is unpacked.
fn unpacked() -> PathBuf {
    project().join("target/deb-unpacked")
}

/// The package is reproducible, its files belong to root, and its programs run.
fn content() -> Verdict {
    verdict((|| {
        let package = deb::build()?;
        let bytes = |path: &Path| fs::read(path).map_err(|error| error.to_string());
        if bytes(&package)? != bytes(&deb::pack(&project().join("target/deb-again"))?)? {
            return Err("made again, it is another".into());
        }
        let listing = output(Command::new("dpkg-deb").arg("-c").arg(&package))?;
        let odd = |line: &&str| !line.contains(" root/root ") || line[..10].contains(['s', 't']);
        if let Some(line) = listing.lines().find(odd) {
            return Err(format!("odd owner or mode: {line}"));
        }
        let root = unpacked();
        let _ = fs::remove_dir_all(&root);
        output(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&root))?;
        for program in ["usr/lib/xenstored/xenstored", "usr/bin/xs"] {
            let version = output(Command::new(root.join(program)).arg("--version"))?;
            if !version.ends_with(env!("CARGO_PKG_VERSION")) {
                return Err(format!("{program}: {version}"));
            }
        }
        let daemon = root.join("usr/lib/xenstored/xenstored");
        for option in ["--pretend-xen=/nonexistent", "--refuse-state"] {
            let mut command = Command::new(&daemon);
            command.args([option, "--config-test"]).stderr(Stdio::null());
            if command.status().map_err(|error| error.to_string())?.success() {
                return Err(format!("the daemon has the test option {option}"));
            }
        }
        unit(&root)?;
        lintian(&package)
    })())
}

/// systemd understands every line of the unit.
fn unit(root: &Path) -> Result<(), String> {
    let text = fs::read_to_string(root.join("usr/lib/systemd/system/xenstored.service"));
    let text = text.map_err(|error| error.to_string())?;
    let here = format!("={}", root.join("usr/lib/xenstored/xenstored").display());
    let copy = root.join("xenstored.service");
    let text = text.replace("=/usr/lib/xenstored/xenstored ", &(here + " "));
    fs::write(&copy, text).map_err(|error| error.to_string())?;
    let mut verify = Command::new("systemd-analyze");
    let Ok(verify) = verify.args(["verify", "--man=no"]).arg(&copy).output() else {
        println!("the unit is not verified: no systemd-analyze");
        return Ok(());
    };
    let complaints = String::from_utf8_lossy(&verify.stderr).into_owned();
    // systemd-analyze also reports on other units of this machine.
    match complaints.lines().find(|line| line.contains("xenstored.service")) {
        None => Ok(()),
        Some(line) => Err(line.to_owned()),
    }
}

/// Debian's checks, if they are installed.
fn lintian(package: &Path) -> Result<(), String> {
    let mut lintian = Command::new("lintian");
    lintian.args(["--fail-on", "error", "--allow-root"]).arg(package).stdin(Stdio::null());
    match lintian.output() {
        Err(_) => println!("not checked with lintian: it is not installed"),
        Ok(output) if output.status.success() => {}
        Ok(output) => return Err(String::from_utf8_lossy(&output.stdout).into_owned()),
    }
    Ok(())
}

/// The package cannot be removed while the host's next boot would start its daemon; otherwise it can.
fn removal() -> Result<(), String> {
    let root = project().join("target/deb-removal");
    let (default, error) = (root.join("etc/default"), |error: std::io::Error| error.to_string());
    let ours = "XENSTORED=/usr/lib/xenstored/start\n";
    for (file, text, action, is_allowed) in [
        ("xen", ours, "remove", false),
        ("xen", " XENSTORED=\"/usr/lib/xenstored/start\"\n", "remove", false),
        ("xencommons", "XENSTORED=/usr/lib/xenstored/xenstored\n", "remove", false),
        ("xen", ours, "upgrade", true),
        ("xen", "#XENSTORED=/usr/lib/xenstored/start\n", "remove", true),
        ("xen", "XENSTORED=/usr/sbin/oxenstored\n", "remove", true),
        ("other", ours, "remove", true),
    ] {
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&default).map_err(error)?;
        fs::write(default.join(file), text).map_err(error)?;
        let mut script = Command::new(project().join("server/debian/prerm"));
        let script = script.arg(action).env("DPKG_ROOT", &root).output().map_err(error)?;
        let complaint = String::from_utf8_lossy(&script.stderr).into_owned();
        let names_file = complaint.contains(&format!("etc/default/{file}"));
        if script.status.success() != is_allowed || names_file == is_allowed {
            return Err(format!("{action} with {text:?} in {file}: {complaint:?}"));
        }
    }
    Ok(())
}

/// No file of the package belongs to another one.
fn collisions() -> Verdict {
    let installed = |package: &&&str| {
        let mut query = Command::new("dpkg-query");
        query.arg("-L").arg(package).stdout(Stdio::null()).stderr(Stdio::null());
        query.status().is_ok_and(|status| status.success())
    };
    if let Some(absent) = XEN.iter().find(|package| !installed(package)) {
        return Verdict::Skip(format!("{absent} is not installed"));
    }
    verdict((|| {
        let find = ["usr", "-type", "f", "-o", "-type", "l"];
        let files = output(Command::new("find").args(find).current_dir(unpacked()))?;
        if files.lines().count() < 8 {
            return Err(format!("only {files}"));
        }
        for file in files.lines() {
            // /lib is /usr/lib, and older packages say /lib.
            for path in [format!("/{file}"), file.trim_start_matches("usr").to_owned()] {
                let owner = Command::new("dpkg-query").arg("-S").arg(&path).output();
                let owner = owner.map_err(|error| error.to_string())?;
                let owner = String::from_utf8_lossy(&owner.stdout).into_owned();
                if owner.lines().any(|line| !line.starts_with("xenstored:")) {
                    return Err(format!("{path} is a file of {owner}"));
                }
            }
        }
        Ok(())
    })())
}

/// Debian's `/etc/init.d/xen` and `launch-xenstore` start the configured daemon.
fn start_up() -> Verdict {
    let unshare = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut probe = Command::new("unshare");
    probe.args(unshare).arg("true").stderr(Stdio::null());
    if !probe.status().is_ok_and(|status| status.success()) {
        return Verdict::Skip("namespaces are not to be had".into());
    }
    for needed in ["/etc/init.d/xen", "/etc/xen/scripts/launch-xenstore", "/usr/bin/xenstore-read"]
    {
        if !Path::new(needed).exists() {
            return Verdict::Skip(format!("no {needed}"));
        }
    }
    let features = ["--features", "test-doubles"];
    let daemon = match xen::built("xenstored", "xenstored", &features) {
        Ok(daemon) => daemon,
        Err(why) => return Verdict::Fail(why),
    };
    let mut command = Command::new("unshare");
    command.args(unshare).arg(project().join("tests/debian/start-up.sh"));
    succeed(command.arg(unpacked()).arg(daemon))
}

#[cfg(test)]
mod tests {
    // Fails if the package can be removed from a host that would then boot without a XenStore, or cannot
    // be removed from, or upgraded on, any other.
    #[test]
    fn a_package_that_is_needed_at_boot_stays() {
        super::removal().unwrap();
    }
}
