//! Where the daemon of this host listens.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// `$XENSTORED_PATH`, else `$XENSTORED_RUNDIR/socket`, else the first that is there of the places
/// where a daemon puts its socket and that this user may use, else `/run/xenstored/socket`.
pub fn socket_path() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = variable("XENSTORED_PATH") {
        return path;
    }
    if let Some(dir) = variable("XENSTORED_RUNDIR") {
        return dir.join("socket");
    }
    let uid = rustix::process::getuid().as_raw();
    // Like the daemon: outside of /run, another user could have created the socket.
    let usable = |path: &PathBuf| {
        let own = std::fs::symlink_metadata(path).is_ok_and(|socket| socket.uid() == uid);
        own || (uid != 0 && path.starts_with("/run/xenstored") && may_connect(path))
    };
    let places = [
        Some(PathBuf::from("/run/xenstored")),
        variable("XDG_RUNTIME_DIR").map(|dir| dir.join("xenstored")),
        Some(std::env::temp_dir().join(format!("xenstored-{uid}"))),
    ];
    let sockets = places.into_iter().flatten().map(|dir| dir.join("socket"));
    sockets.into_iter().find(usable).unwrap_or_else(|| PathBuf::from("/run/xenstored/socket"))
}

/// May this user write to a socket, which connecting takes?
fn may_connect(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}
