//! The Debian package: `cargo xtask deb`. What goes into it is in `server/debian/`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crate::steps::Steps;
use crate::{cargo, licences, project};

/// Programs that build the package, and Debian's packages that have them.
const TOOLS: &[(&str, &str)] = &[
    ("dpkg-deb", "dpkg"),
    ("dpkg-gencontrol", "dpkg-dev"),
    ("dpkg-shlibdeps", "dpkg-dev"),
    ("strip", "binutils"),
    ("gzip", "gzip"),
];

/// Source in the project, target in the package, and mode. A target that ends in `.gz` is
/// compressed.
const FILES: &[(&str, &str, &str)] = &[
    ("target/release/xenstored", "usr/lib/xenstored/xenstored", "755"),
    ("target/release/xs", "usr/bin/xs", "755"),
    ("server/debian/start", "usr/lib/xenstored/start", "755"),
    ("server/debian/xenstored.service", "usr/lib/systemd/system/xenstored.service", "644"),
    ("server/debian/preinst", "DEBIAN/preinst", "755"),
    ("server/debian/prerm", "DEBIAN/prerm", "755"),
    ("server/debian/copyright", "usr/share/doc/xenstored/copyright", "644"),
    ("server/debian/xenstored.8", "usr/share/man/man8/xenstored.8.gz", "644"),
    ("server/debian/xs.1", "usr/share/man/man1/xs.1.gz", "644"),
    ("docs/operating.md", "usr/share/doc/xenstored/operating.md.gz", "644"),
    ("docs/live-update.md", "usr/share/doc/xenstored/live-update.md.gz", "644"),
    ("CHANGELOG.md", "usr/share/doc/xenstored/changelog.gz", "644"),
];

/// `cargo xtask deb [check]`.
pub fn run(args: &[String]) -> ExitCode {
    match args.first().map(String::as_str) {
        Some("check") => {
            let mut steps = Steps::default();
            crate::deb_check::steps(&mut steps);
            return steps.summary();
        }
        Some(_) => {
            eprintln!("xtask: deb [check]");
            return ExitCode::from(2);
        }
        None => {}
    }
    match build() {
        Ok(package) => {
            println!("{}", package.display());
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("xtask: deb: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Returns the reason if the package cannot be built on this machine.
pub fn available() -> Result<(), String> {
    let works = |program: &str| {
        let mut command = Command::new(program);
        command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let missing: Vec<String> = TOOLS
        .iter()
        .filter(|(program, _)| !works(program))
        .map(|(program, package)| format!("{program} (package {package})"))
        .collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("missing: {}", missing.join(", "))) }
}

/// Builds the programs and packs them. Returns the path of the package.
pub fn build() -> Result<PathBuf, String> {
    available()?;
    let release = ["build", "--release", "--quiet", "-p", "xenstored", "-p", "xenstore-xs"];
    output(cargo(&release).args(["--target-dir", "target"]))?;
    pack(&project().join("target/deb"))
}

/// Packs the built files, in a tree in this folder.
pub fn pack(scratch: &Path) -> Result<PathBuf, String> {
    let root = scratch.join("root");
    let _ = fs::remove_dir_all(scratch);
    fs::create_dir_all(&root).map_err(|error| error.to_string())?;
    let epoch = epoch()?;
    for (from, to, mode) in FILES {
        install(&project().join(from), &root, to, mode)?;
    }
    for program in ["usr/lib/xenstored/xenstored", "usr/bin/xs"] {
        output(Command::new("strip").arg("--strip-unneeded").arg(root.join(program)))?;
    }
    let version = format!("{}-1", env!("CARGO_PKG_VERSION"));
    let date = output(Command::new("date").args(["-u", "-R", "-d", &format!("@{epoch}")]))?;
    let control = fs::read_to_string(project().join("server/debian/control"));
    let control = control.map_err(|error| format!("server/debian/control: {error}"))?;
    let maintainer = control.lines().find_map(|line| line.strip_prefix("Maintainer: "));
    let changelog = format!(
        "xenstored ({version}) unstable; urgency=medium\n\n  * Version {}; see changelog.gz.\n\n -- {}  {date}\n",
        env!("CARGO_PKG_VERSION"),
        maintainer.unwrap_or_default(),
    );
    let written = |name: &str, text: String, to: &str| {
        fs::write(scratch.join(name), text).map_err(|error| error.to_string())?;
        install(&scratch.join(name), &root, to, "644")
    };
    written("changelog", changelog, "usr/share/doc/xenstored/changelog.Debian.gz")?;
    written("crates", licences::of_libraries()?, "usr/share/doc/xenstored/crates.gz")?;
    let sums = "find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum";
    let sums = output(Command::new("sh").args(["-c", sums]).current_dir(&root))?;
    written("md5sums", sums + "\n", "DEBIAN/md5sums")?;

    // Both programs read debian/control.
    let server = project().join("server");
    let mut libraries = Command::new("dpkg-shlibdeps");
    libraries.arg("-O").arg(root.join("usr/lib/xenstored/xenstored")).arg(root.join("usr/bin/xs"));
    let libraries = output(libraries.current_dir(&server))?;
    let mut gencontrol = Command::new("dpkg-gencontrol");
    gencontrol.current_dir(&server).args(["-pxenstored", &format!("-V{libraries}")]);
    for (option, path) in
        [("-l", "changelog"), ("-f", "files"), ("-T", "substvars"), ("-P", "root")]
    {
        gencontrol.arg(format!("{option}{}", scratch.join(path).display()));
    }
    fs::write(scratch.join("substvars"), "").map_err(|error| error.to_string())?;
    output(&mut gencontrol)?;
    output(Command::new("chmod").args(["-R", "u=rwX,go=rX"]).arg(&root))?;
    let architecture = output(Command::new("dpkg").arg("--print-architecture"))?;
    let package = scratch.join(format!("xenstored_{version}_{architecture}.deb"));
    let mut dpkg_deb = Command::new("dpkg-deb");
    dpkg_deb.args(["--root-owner-group", "-Zxz", "--build"]).arg(&root).arg(&package);
    output(dpkg_deb.env("SOURCE_DATE_EPOCH", epoch))?;
    Ok(package)
}

/// Copies a file into the tree, compressed if its name there ends in `.gz`.
fn install(from: &Path, root: &Path, to: &str, mode: &str) -> Result<(), String> {
    let target = root.join(to.trim_end_matches(".gz"));
    output(Command::new("install").args(["-D", "-m", mode]).arg(from).arg(&target))?;
    if to.ends_with(".gz") {
        output(Command::new("gzip").arg("-9n").arg(&target))?;
    }
    Ok(())
}

/// The time stamp of the package: `$SOURCE_DATE_EPOCH`, else that of the last commit, else, without
/// git, that of the changelog.
fn epoch() -> Result<String, String> {
    if let Ok(epoch) = std::env::var("SOURCE_DATE_EPOCH") {
        return Ok(epoch);
    }
    let mut commit = Command::new("git");
    commit.current_dir(project()).args(["log", "-1", "--format=%ct"]);
    let mut changelog = Command::new("date");
    changelog.current_dir(project()).args(["-r", "CHANGELOG.md", "+%s"]);
    output(&mut commit).or_else(|_| output(&mut changelog))
}

/// Returns the output of a command; an error has its standard error.
pub fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().display().to_string();
    let output = command.output().map_err(|error| format!("{name}: {error}"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{name}: {}: {}", output.status, complaint.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}
