//! The files of a journal.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tracing::warn;
use xenstore_sys::own_file::{self, Access, Others};
use xenstore_sys::{crash, mapped_file};

/// A file that begins with a state.
pub(super) fn file(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("journal.{number}"))
}

/// The next file, until it is complete.
pub(super) fn new_file(dir: &Path) -> PathBuf {
    dir.join("journal.new")
}

/// A recycled segment, which the next file overwrites. Its memory is allocated already: allocating
/// and mapping new memory would be a third of the cost of a record.
pub(super) fn old_file(dir: &Path) -> PathBuf {
    dir.join("journal.old")
}

/// A file without a state.
pub(super) fn carrier_file(dir: &Path) -> PathBuf {
    dir.join("journal.carrier")
}

/// Keeps this file for the next one to overwrite.
pub(super) fn keep_for_later(dir: &Path, number: u64) {
    let file = file(dir, number);
    if std::fs::rename(&file, old_file(dir)).is_err() {
        let _ = std::fs::remove_file(file);
    }
}

/// Keeps the files before file `number` that an earlier process has left and no longer locks, for the
/// next file to overwrite: `keep` bytes of each.
pub(super) fn keep_left(dir: &Path, number: u64, keep: usize) {
    for left in numbers(dir).into_iter().filter(|left| *left < number) {
        let path = file(dir, left);
        let trim = |file: File| {
            mapped_file::lock(&file)?;
            let len = file.metadata()?.len().min(keep as u64);
            file.set_len(len)
        };
        match own_file::open(&path, Access::Write, Others::None).and_then(trim) {
            Ok(()) => keep_for_later(dir, left),
            Err(_) => drop(std::fs::remove_file(path)),
        }
    }
}

/// Numbers of the existing files, the newest first.
pub(super) fn numbers(dir: &Path) -> Vec<u64> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name());
    let number = |name: std::ffi::OsString| name.to_str()?.strip_prefix("journal.")?.parse().ok();
    let mut numbers: Vec<u64> = names.filter_map(number).collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    numbers
}

pub(super) fn remove_file(path: &Path) {
    if crash::point() {
        let _ = std::fs::remove_file(path);
    }
}

/// Removes all files of a journal.
pub(super) fn remove(dir: &Path) {
    remove_file(&new_file(dir));
    remove_file(&old_file(dir));
    remove_file(&carrier_file(dir));
    // The newest last: if this is interrupted, recovery still finds the newest file.
    for number in numbers(dir).into_iter().rev() {
        remove_file(&file(dir, number));
    }
}

/// Why a journal cannot be locked, and what to do. Names the process that has it locked, if the
/// kernel reports it.
pub(super) fn in_use(path: &Path, left: &File, error: &io::Error) -> String {
    let place = path.display();
    if error.kind() != io::ErrorKind::WouldBlock {
        return format!("journal {place} cannot be locked: {error}");
    }
    let pid = left.metadata().ok().and_then(|left| locked_by(left.ino()));
    let pid = pid.map_or("another process".into(), |pid| format!("process {pid}"));
    format!(
        "journal {place}: {pid} has it locked and still runs; two daemons cannot share a journal: stop that process, or start this one with another --socket or --journal"
    )
}

/// The process that has locked this file. In the kernel's table the inode is the last of the numbers
/// between colons.
fn locked_by(inode: u64) -> Option<u32> {
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, "FLOCK", _, _, pid, file, ..] = words[..] else { return None };
        let found = file.rsplit(':').next()?.parse() == Ok(inode);
        found.then(|| pid.parse().ok())?
    })
}

/// Bytes that the next file can take: the free ones, and those of the file that it overwrites.
pub(super) fn available(dir: &Path) -> usize {
    let Ok(found) = rustix::fs::statvfs(dir) else { return usize::MAX };
    let old = std::fs::symlink_metadata(old_file(dir)).map_or(0, |old| old.blocks() * 512);
    let free = found.f_bavail.saturating_mul(found.f_frsize).saturating_add(old);
    usize::try_from(free).unwrap_or(usize::MAX)
}

/// Logs a warning if the file system has less room than the next file takes: `size` bytes.
pub(super) fn watch_room(dir: &Path, size: usize) {
    let free = available(dir);
    if free < size {
        warn!(
            dir = %dir.display(), available_bytes = free, needed_bytes = size,
            "there is little room for the next file of the journal; make room there, or choose another place with --journal"
        );
    }
}
