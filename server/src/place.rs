//! Where the socket goes.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

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

fn make(dir: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// A directory that somebody else owns could lead clients to somebody else's socket.
fn own(dir: &Path, uid: u32) -> std::io::Result<()> {
    let metadata = fs::symlink_metadata(dir)?;
    if !metadata.is_dir() || metadata.uid() != uid {
        return Err(std::io::Error::other("belongs to somebody else"));
    }
    Ok(())
}
