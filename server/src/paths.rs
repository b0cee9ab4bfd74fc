//! The paths of socket and journal.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use tracing::warn;
use xenstore_sys::own_file;

/// The socket's path, and its directory made if need be: `--socket`, `$XENSTORED_PATH`,
/// `$XENSTORED_RUNDIR/socket`, and otherwise the first of these that this user may write to:
/// `/run/xenstored`, `$XDG_RUNTIME_DIR/xenstored`, `/tmp/xenstored-UID`. An error is one line.
pub(crate) fn socket_path(option: Option<&Path>) -> Result<PathBuf, String> {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let rundir = || variable("XENSTORED_RUNDIR").map(|dir| dir.join("socket"));
    let chosen = option.map(Path::to_owned).or_else(|| variable("XENSTORED_PATH")).or_else(rundir);
    if let Some(path) = chosen {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        return match dir.map(make) {
            Some(Err(error)) => Err(format!("socket {}: {error}", path.display())),
            _ => Ok(path),
        };
    }
    let uid = rustix::process::getuid().as_raw();
    let candidates = [
        Some(PathBuf::from("/run/xenstored")),
        variable("XDG_RUNTIME_DIR").map(|dir| dir.join("xenstored")),
        Some(std::env::temp_dir().join(format!("xenstored-{uid}"))),
    ];
    let mut last = String::new();
    for dir in candidates.into_iter().flatten() {
        // The owner of a directory could replace the socket in it.
        match own(dir) {
            Ok(dir) => return Ok(dir.join("socket")),
            Err(error) => last = error,
        }
    }
    Err(format!("no place for a socket ({last}); choose one with --socket"))
}

/// The directory of state files: `$XENSTORED_RUNDIR` or `/run/xenstored`.
pub(crate) fn run_dir() -> PathBuf {
    let dir = std::env::var_os("XENSTORED_RUNDIR").filter(|dir| !dir.is_empty());
    dir.map_or_else(|| "/run/xenstored".into(), PathBuf::from)
}

fn make(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// A file system in memory, on every Linux.
const MEMORY: &str = "/dev/shm";

/// Returns true if files in this directory are in memory only.
fn is_memory(dir: &Path) -> io::Result<bool> {
    let kind = rustix::fs::statfs(dir)?.f_type;
    // `TMPFS_MAGIC` and `RAMFS_MAGIC` of Linux.
    Ok(kind == 0x0102_1994 || kind == 0x8584_58f6_u32.into())
}

/// The directory of this user in that file system.
fn own_memory() -> PathBuf {
    Path::new(MEMORY).join(format!("xenstored-{}", rustix::process::getuid().as_raw()))
}

/// The directory of the journal for the socket at this path. The path also identifies a daemon without a
/// socket. The directory is beside the socket if that is in memory (tmpfs), otherwise under the socket's
/// path in this user's directory in `/dev/shm`. Only this user can open it. An error is one line.
pub(crate) fn journal_of(socket: &Path) -> Result<PathBuf, String> {
    let mut name = socket.file_name().unwrap_or_default().to_owned();
    name.push(".journal");
    let beside = socket.parent().filter(|dir| !dir.as_os_str().is_empty());
    let beside = beside.unwrap_or(Path::new("."));
    if is_memory(beside).unwrap_or(true) {
        return own(beside.join(name));
    }
    let find = || -> Result<PathBuf, String> {
        let text = |error: io::Error| format!("{}: {error}", beside.display());
        if !is_memory(Path::new(MEMORY)).map_err(text)? {
            return Err("/dev/shm is no memory either".into());
        }
        let mine = own(own_memory())?;
        let beside = beside.canonicalize().map_err(text)?;
        let below = beside.strip_prefix("/").unwrap_or(&beside);
        own(mine.join(below).join(&name))
    };
    find().or_else(|error| {
        warn!(
            dir = %beside.display(), error,
            "the journal is on a disk, which slows the daemon down; choose a directory in memory with --journal"
        );
        own(beside.join(&name))
    })
}

/// The directory for the journal that `--journal` names. An error is one line.
pub(crate) fn chosen_journal(dir: &Path) -> Result<PathBuf, String> {
    // The path may be a symbolic link.
    let found = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    own(found).map_err(|error| format!("--journal {error}"))
}

/// Logs a warning if a daemon of an earlier version has left its journal in the directory of this socket.
pub(crate) fn look_for_earlier(socket: &Path) {
    let Some(dir) = socket.parent() else { return };
    let is_journal = |name: &str| {
        let number = name.strip_prefix("journal.");
        number.is_some_and(|number| number.parse::<u64>().is_ok())
    };
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_journal) {
            warn!(
                file = %entry.path().display(),
                "this journal is not used: it may be that of another socket. To recover from it, start once with --journal and its directory; otherwise remove it"
            );
        }
    }
}

fn own(dir: PathBuf) -> Result<PathBuf, String> {
    match own_file::directory(&dir) {
        Ok(()) => Ok(dir),
        Err(error) => Err(format!("{}: {error}", dir.display())),
    }
}

/// Removes the directory from [`journal_of`], which the daemon no longer needs.
pub(crate) fn leave(dir: &Path) {
    let mine = own_memory();
    if dir.extension().is_none_or(|ending| ending != "journal") || fs::remove_dir(dir).is_err() {
        return;
    }
    // Directories of other users are not empty.
    for dir in dir.ancestors().skip(1).take_while(|dir| dir.starts_with(&mine)) {
        if fs::remove_dir(dir).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    // Fails if a journal is on a disk although memory is available, or other users can read it; if
    // a directory in memory is not used as it is; or if one is left behind.
    #[test]
    fn a_journal_goes_into_memory() {
        let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let socket = disk.path().join("socket");
        let found = journal_of(&socket).unwrap();
        assert!(is_memory(&found).unwrap(), "{}", found.display());
        assert_eq!(found, journal_of(&socket).unwrap());
        let mode = |dir: &Path| fs::metadata(dir).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&found), 0o700);
        if !found.starts_with(disk.path()) {
            assert_eq!(mode(&own_memory()), 0o700);
        }
        fs::write(found.join("journal.1"), "").unwrap();
        leave(&found);
        assert!(found.exists(), "it is not empty");
        fs::remove_file(found.join("journal.1")).unwrap();
        leave(&found);
        assert!(!found.exists());
        let memory = tempfile::tempdir_in(MEMORY).unwrap();
        let found = journal_of(&memory.path().join("s")).unwrap();
        assert_eq!(found, memory.path().join("s.journal"));
    }

    // Fails if two sockets in one directory share a journal, or if a directory is used that another
    // user has created or may write to.
    #[test]
    fn a_journal_belongs_to_one_socket() {
        let memory = tempfile::tempdir_in(MEMORY).unwrap();
        fs::set_permissions(memory.path(), PermissionsExt::from_mode(0o1777)).unwrap();
        let [one, two] = ["one", "two"].map(|name| journal_of(&memory.path().join(name)).unwrap());
        assert_ne!(one, two);
        fs::set_permissions(&one, PermissionsExt::from_mode(0o777)).unwrap();
        let refused = journal_of(&memory.path().join("one")).unwrap_err();
        assert!(refused.contains("one.journal: other users may write"), "{refused}");
        let refused = chosen_journal(memory.path()).unwrap_err();
        assert!(refused.starts_with("--journal ") && refused.contains("may write"), "{refused}");
        std::os::unix::fs::symlink(&two, memory.path().join("three.journal")).unwrap();
        let refused = journal_of(&memory.path().join("three")).unwrap_err();
        assert!(refused.contains("not a directory"), "{refused}");
        assert_eq!(chosen_journal(&memory.path().join("three.journal")).unwrap(), two);
    }
}
