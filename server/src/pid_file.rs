//! The pid file, locked as long as the daemon runs.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

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
        let open = OpenOptions::new().write(true).create(true).truncate(false).open(path);
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
