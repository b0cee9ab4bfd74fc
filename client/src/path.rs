//! Where the daemon of this host listens.

use std::path::PathBuf;

/// `$XENSTORED_PATH`, else `$XENSTORED_RUNDIR/socket`, else the first that is there of the places
/// where a daemon puts its socket, else `/run/xenstored/socket`.
pub fn socket_path() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = variable("XENSTORED_PATH") {
        return path;
    }
    if let Some(dir) = variable("XENSTORED_RUNDIR") {
        return dir.join("socket");
    }
    let uid = rustix::process::getuid().as_raw();
    let places = [
        Some(PathBuf::from("/run/xenstored")),
        variable("XDG_RUNTIME_DIR").map(|dir| dir.join("xenstored")),
        Some(std::env::temp_dir().join(format!("xenstored-{uid}"))),
    ];
    let sockets = places.into_iter().flatten().map(|dir| dir.join("socket"));
    sockets
        .into_iter()
        .find(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from("/run/xenstored/socket"))
}
