//! The pid file, locked as long as the daemon runs.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use xenstore_sys::own_file::{self, Access, Others};

/// Removed when dropped.
#[derive(Debug)]
pub(crate) struct PidFile {
    path: PathBuf,
    _locked: File,
}

impl PidFile {
    /// Writes the process id. An error is one line.
    pub(crate) fn create(path: &Path) -> Result<PidFile, String> {
        let complain = |error: std::io::Error| format!("--pid-file {}: {error}", path.display());
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            std::fs::create_dir_all(dir).map_err(complain)?;
        }
        let open = own_file::open_or_create(path, Access::Write, Others::Read);
        let mut file = open.map_err(complain)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let pid = std::fs::read_to_string(path).unwrap_or_default();
            let pid = pid.trim();
            return Err(format!(
                "--pid-file {}: locked, another daemon runs (pid {pid})",
                path.display()
            ));
        }
        file.set_len(0).map_err(complain)?;
        writeln!(file, "{}", std::process::id()).map_err(complain)?;
        Ok(PidFile { path: path.to_owned(), _locked: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use rustix::fs::{CWD, Mode, mkfifoat};

    use super::*;

    // Fails if the daemon waits for a FIFO at the path of its pid file, writes through a link, or
    // into a file that other users can change; or if its error lacks path and reason.
    #[test]
    fn a_pid_file_of_others_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let [fifo, link, open] = ["fifo", "link", "open"].map(|name| dir.path().join(name));
        mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
        symlink(dir.path().join("target"), &link).unwrap();
        std::fs::write(&open, "1\n").unwrap();
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o666)).unwrap();
        for (path, reason) in [(fifo, "FIFO"), (link, "symbolic link"), (open, "may write")] {
            let error = PidFile::create(&path).unwrap_err();
            assert!(error.contains(path.to_str().unwrap()) && error.contains(reason), "{error}");
        }
        assert!(!dir.path().join("target").exists());
    }
}
