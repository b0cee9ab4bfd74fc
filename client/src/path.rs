//! The socket of this host's daemon.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Returns the path of the daemon's socket: `$XENSTORED_PATH`, else `$XENSTORED_RUNDIR/socket`, else the
/// first socket that this user may use in `/run/xenstored`, `$XDG_RUNTIME_DIR/xenstored` and
/// `/tmp/xenstored-UID`, else `/run/xenstored/socket`.
pub fn socket_path() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = variable("XENSTORED_PATH") {
        return path;
    }
    if let Some(dir) = variable("XENSTORED_RUNDIR") {
        return dir.join("socket");
    }
    let uid = rustix::process::getuid().as_raw();
    // Outside of /run, another user could have created the socket. The daemon has the same rule.
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

/// Returns true if this user may write to a socket, which `connect` requires.
fn may_connect(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
}
