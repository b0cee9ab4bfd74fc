//! The files of a journal in its directory.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tracing::warn;
use xenstore_sys::own_file::{self, Access, Others};
use xenstore_sys::{crash, mapped_file};

use super::error::RecoveryError;

/// A segment that recovery reads.
pub(super) fn segment_file(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("journal.{number}"))
}

/// The next segment, until it is complete.
pub(super) fn new_file(dir: &Path) -> PathBuf {
    dir.join("journal.new")
}

/// The recycled segment, which the next one overwrites. Its memory is allocated already: allocating
/// and mapping new memory would be a third of the cost of a record.
pub(super) fn old_file(dir: &Path) -> PathBuf {
    dir.join("journal.old")
}

/// A segment without a snapshot.
pub(super) fn carrier_file(dir: &Path) -> PathBuf {
    dir.join("journal.carrier")
}

/// Makes this segment the recycled one.
pub(super) fn recycle(dir: &Path, number: u64) {
    let file = segment_file(dir, number);
    if std::fs::rename(&file, old_file(dir)).is_err() {
        let _ = std::fs::remove_file(file);
    }
}

/// Recycles the segments before `number`, which an earlier process has written and no longer locks:
/// `keep` bytes of each.
pub(super) fn recycle_before(dir: &Path, number: u64, keep: usize) {
    for old in numbers(dir).into_iter().filter(|old| *old < number) {
        let path = segment_file(dir, old);
        let trim = |file: File| {
            mapped_file::lock(&file)?;
            let len = file.metadata()?.len().min(keep as u64);
            file.set_len(len)
        };
        match own_file::open(&path, Access::Write, Others::None).and_then(trim) {
            Ok(()) => recycle(dir, old),
            Err(_) => drop(std::fs::remove_file(path)),
        }
    }
}

/// Returns the numbers of the existing segments, the newest first.
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
    // The newest last: if this is interrupted, recovery still finds the newest segment.
    for number in numbers(dir).into_iter().rev() {
        remove_file(&segment_file(dir, number));
    }
}

/// Returns why a journal cannot be locked.
pub(super) fn lock_error(path: &Path, journal: &File, error: io::Error) -> RecoveryError {
    let path = path.to_owned();
    if error.kind() != io::ErrorKind::WouldBlock {
        return RecoveryError::Lock { path, error };
    }
    let pid = journal.metadata().ok().and_then(|journal| lock_holder(journal.ino()));
    RecoveryError::InUse { path, pid }
}

/// Returns the process that has locked this file. In the table of the kernel, the inode is the last of
/// the numbers between colons.
fn lock_holder(inode: u64) -> Option<u32> {
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, "FLOCK", _, _, pid, file, ..] = words[..] else { return None };
        let found = file.rsplit(':').next()?.parse() == Ok(inode);
        found.then(|| pid.parse().ok())?
    })
}

/// Returns the bytes that the next segment can take: the free ones, and those of the recycled segment.
pub(super) fn available(dir: &Path) -> usize {
    let Ok(found) = rustix::fs::statvfs(dir) else { return usize::MAX };
    let old = std::fs::symlink_metadata(old_file(dir)).map_or(0, |old| old.blocks() * 512);
    let free = found.f_bavail.saturating_mul(found.f_frsize).saturating_add(old);
    usize::try_from(free).unwrap_or(usize::MAX)
}

/// Logs a warning if the file system has less than `size` bytes for the next segment.
pub(super) fn warn_if_little_room(dir: &Path, size: usize) {
    let free = available(dir);
    if free < size {
        warn!(
            dir = %dir.display(), available_bytes = free, needed_bytes = size,
            "there is little room for the next file of the journal; make room there, or choose another place with --journal"
        );
    }
}
