//! Where the socket goes, and the journal.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use tracing::warn;

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
        match make(&dir).and_then(|()| own(&dir, uid)) {
            Ok(()) => return Ok(dir.join("socket")),
            Err(error) => last = format!("{}: {error}", dir.display()),
        }
    }
    Err(format!("no place for a socket ({last}); choose one with --socket"))
}

/// Where daemons leave what the next is to find: `$XENSTORED_RUNDIR` or `/run/xenstored`.
pub(crate) fn run_dir() -> PathBuf {
    let dir = std::env::var_os("XENSTORED_RUNDIR").filter(|dir| !dir.is_empty());
    dir.map_or_else(|| "/run/xenstored".into(), PathBuf::from)
}

fn make(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// A directory that somebody else owns could lead clients to somebody else's socket.
fn own(dir: &Path, uid: u32) -> io::Result<()> {
    let metadata = fs::symlink_metadata(dir)?;
    if !metadata.is_dir() || metadata.uid() != uid {
        return Err(io::Error::other("belongs to somebody else"));
    }
    Ok(())
}

/// Memory of the machine as files, on every Linux.
const MEMORY: &str = "/dev/shm";

/// Is what is written there never written to a disk?
fn is_memory(dir: &Path) -> io::Result<bool> {
    let kind = rustix::fs::statfs(dir)?.f_type;
    // `TMPFS_MAGIC` and `RAMFS_MAGIC` of Linux.
    Ok(kind == 0x0102_1994 || kind == 0x8584_58f6_u32.into())
}

/// What this user has of that memory.
fn own_memory() -> PathBuf {
    Path::new(MEMORY).join(format!("xenstored-{}", rustix::process::getuid().as_raw()))
}

/// Where the journal of a daemon goes that has this directory: there, if that is memory, otherwise
/// into memory of this user's own, under the name of that directory.
pub(crate) fn in_memory(dir: PathBuf) -> PathBuf {
    let beside = if dir.as_os_str().is_empty() { Path::new(".") } else { &dir };
    if is_memory(beside).unwrap_or(true) {
        return dir;
    }
    let find = || -> io::Result<PathBuf> {
        if !is_memory(Path::new(MEMORY))? {
            return Err(io::Error::other("/dev/shm is no memory either"));
        }
        let mine = own_memory();
        make(&mine)?;
        own(&mine, rustix::process::getuid().as_raw())?;
        let beside = beside.canonicalize()?;
        let found = mine.join(beside.strip_prefix("/").map_err(io::Error::other)?);
        make(&found)?;
        Ok(found)
    };
    find().unwrap_or_else(|error| {
        warn!(
            dir = %dir.display(), %error,
            "the journal is on a disk, which slows the daemon down; choose a directory in memory with --journal"
        );
        dir
    })
}

/// The daemon does not need the directory any more that it got from [`in_memory`].
pub(crate) fn leave(dir: &Path) {
    let mine = own_memory();
    // Those that others use are not empty.
    for dir in dir.ancestors().take_while(|dir| dir.starts_with(&mine)) {
        if fs::remove_dir(dir).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    // Fails if a journal goes to a disk although there is memory, or others can read it; or if a
    // directory that is memory is not taken as it is; or if one stays behind.
    #[test]
    fn a_journal_goes_into_memory() {
        let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let found = in_memory(disk.path().to_owned());
        assert!(is_memory(&found).unwrap(), "{}", found.display());
        if found != disk.path() {
            assert_eq!(found, in_memory(disk.path().to_owned()));
            let mode = fs::metadata(own_memory()).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700);
            fs::write(found.join("journal.1"), "").unwrap();
            leave(&found);
            assert!(found.exists(), "it is not empty");
            fs::remove_file(found.join("journal.1")).unwrap();
            leave(&found);
            assert!(!found.exists());
        }
        let memory = tempfile::tempdir_in(MEMORY).unwrap();
        assert_eq!(in_memory(memory.path().to_owned()), memory.path());
    }
}
