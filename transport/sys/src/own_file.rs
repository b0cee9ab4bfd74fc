//! Files and directories that belong to this daemon.
//!
//! Other users may be able to write to the directory of a file, and replace the file with a symbolic
//! link, a FIFO without a reader, or a file that they own. This module neither follows, waits for, nor
//! uses any of these: it checks the opened file before it is read or written.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, open as open_at};
use rustix::io::Errno;

/// How a file is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    Write,
    /// Append only.
    Append,
}

/// The access that other users may have to a file; write access is never allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// None: the file contains values of the store.
    None,
    /// Read access.
    Read,
}

fn flags(access: Access) -> OFlags {
    let flags = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
        Access::Append => OFlags::WRONLY | OFlags::APPEND,
    };
    // Opening a FIFO would otherwise wait for its other end.
    flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY
}

/// Opens an existing file.
///
/// # Errors
///
/// Fails if the kernel refuses, or if the file is not a regular one, belongs to another user, has a second
/// link, or if other users have more access to it than `others` allows.
pub fn open(path: &Path, access: Access, others: Others) -> io::Result<File> {
    let file = match open_at(path, flags(access), Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::LOOP) => return Err(refused("it is a symbolic link")),
        Err(Errno::NXIO) => return Err(refused("it is a FIFO or a socket, not a regular file")),
        Err(error) => return Err(error.into()),
    };
    check(&fstat(&file)?, others)?;
    Ok(file)
}

/// Creates a file for reading and writing that only this user can access.
///
/// # Errors
///
/// Fails if the kernel refuses, or if the path exists.
pub fn create(path: &Path) -> io::Result<File> {
    create_for(path, Access::Write)
}

fn create_for(path: &Path, access: Access) -> io::Result<File> {
    let flags = flags(access) | OFlags::CREATE | OFlags::EXCL;
    Ok(File::from(open_at(path, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Opens a file like [`open`], or creates it like [`create`] if it does not exist.
///
/// # Errors
///
/// Fails like [`open`].
pub fn open_or_create(path: &Path, access: Access, others: Others) -> io::Result<File> {
    let found = open(path, access, others);
    match found {
        Err(error) if error.kind() == io::ErrorKind::NotFound => create_for(path, access),
        found => found,
    }
}

/// Creates a directory, with its parents, that only this user can access, unless it exists.
///
/// # Errors
///
/// Fails if the kernel refuses, or if the path is not a directory, belongs to another user, or if other
/// users may write to it.
pub fn directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = match open_at(path, flags, Mode::empty()) {
        Err(Errno::LOOP | Errno::NOTDIR) => return Err(refused("it is not a directory")),
        found => fstat(found?)?,
    };
    owned(&found)
}

fn check(found: &Stat, others: Others) -> io::Result<()> {
    match FileType::from_raw_mode(found.st_mode) {
        FileType::RegularFile => {}
        FileType::Fifo => return Err(refused("it is a FIFO, not a regular file")),
        _ => return Err(refused("it is not a regular file")),
    }
    owned(found)?;
    if found.st_nlink != 1 {
        return Err(refused(&format!("it has {} names instead of one", found.st_nlink)));
    }
    if others == Others::None && found.st_mode & 0o077 != 0 {
        let mode = found.st_mode & 0o777;
        return Err(refused(&format!("other users may open it (mode {mode:04o}, not 0600)")));
    }
    Ok(())
}

fn owned(found: &Stat) -> io::Result<()> {
    let (mode, uid) = (found.st_mode & 0o777, rustix::process::geteuid().as_raw());
    if found.st_uid != uid {
        return Err(refused(&format!("it belongs to user {}, not to user {uid}", found.st_uid)));
    }
    if mode & 0o022 != 0 {
        return Err(refused(&format!("other users may write to it (mode {mode:04o})")));
    }
    Ok(())
}

fn refused(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, reason)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use rustix::fs::{CWD, mkfifoat};

    use super::*;

    const ALL: [Access; 3] = [Access::Read, Access::Write, Access::Append];

    /// Why a file cannot be opened. The reason is the same for every access.
    fn reasons(path: &Path, others: Others) -> String {
        let mut reasons = Vec::new();
        for access in ALL {
            let opened = [open(path, access, others), open_or_create(path, access, others)];
            reasons.extend(opened.map(|opened| opened.unwrap_err().to_string()));
        }
        assert!(create(path).is_err());
        reasons.join("; ")
    }

    // Fails if an object that another user has put in place of a file is followed, waited for, read or
    // written.
    #[test]
    fn what_others_put_there_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let [target, link, dangling, fifo, hard, open] =
            ["target", "link", "dangling", "fifo", "hard", "open"]
                .map(|name| dir.path().join(name));
        drop(create(&target).unwrap());
        symlink(&target, &link).unwrap();
        symlink(dir.path().join("nothing"), &dangling).unwrap();
        mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
        assert!(reasons(&link, Others::Read).contains("symbolic link"));
        assert!(reasons(&dangling, Others::Read).contains("symbolic link"));
        assert!(!dir.path().join("nothing").exists());
        assert!(reasons(&fifo, Others::Read).contains("FIFO"));
        assert!(reasons(dir.path(), Others::Read).contains("irectory"));
        drop(create(&open).unwrap());
        let allow =
            |mode| std::fs::set_permissions(&open, PermissionsExt::from_mode(mode)).unwrap();
        allow(0o666);
        assert!(reasons(&open, Others::Read).contains("may write to it (mode 0666)"));
        allow(0o644);
        assert!(reasons(&open, Others::None).contains("mode 0644"));
        assert!(super::open(&open, Access::Append, Others::Read).is_ok());
        if chown(&open, Some(1), None).is_ok() {
            assert!(reasons(&open, Others::Read).contains("belongs to user 1"));
        }
        std::fs::hard_link(&target, &hard).unwrap();
        assert!(reasons(&hard, Others::None).contains("2 names"));
    }

    // Fails if a directory to which other users can write is used or created.
    #[test]
    fn a_directory_of_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (made, link) = (dir.path().join("a/b"), dir.path().join("link"));
        directory(&made).unwrap();
        directory(&made).unwrap();
        assert_eq!(made.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        symlink(&made, &link).unwrap();
        assert!(directory(&link).unwrap_err().to_string().contains("not a directory"));
        std::fs::set_permissions(&made, PermissionsExt::from_mode(0o1777)).unwrap();
        assert!(directory(&made).unwrap_err().to_string().contains("may write"));
        std::fs::set_permissions(&made, PermissionsExt::from_mode(0o700)).unwrap();
        if chown(&made, Some(1), None).is_ok() {
            assert!(directory(&made).unwrap_err().to_string().contains("belongs to user 1"));
        }
    }
}
