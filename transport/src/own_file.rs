//! Files and directories that belong to this daemon.
//!
//! A directory may be writable by other users, who can put anything in the place of a file: a link to
//! another file, a FIFO that nobody reads, a file of their own. Nothing of that is followed, waited for
//! or used: what has been opened is looked at before it is read or written.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, Stat, fstat, open as open_at};
use rustix::io::Errno;

/// What is done with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is read.
    Read,
    /// It is read and written.
    Write,
    /// Lines are appended to it.
    Append,
}

/// What other users may do with a file; none of them may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// Nothing: it holds values of the store.
    None,
    /// Read it.
    Read,
}

fn flags(access: Access) -> OFlags {
    let flags = match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
        Access::Append => OFlags::WRONLY | OFlags::APPEND,
    };
    // To open a FIFO would otherwise wait for its other end.
    flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY
}

/// Opens a file that is there.
///
/// # Errors
///
/// Besides those of the kernel: if it is no regular file, belongs to another user, has a second name, or
/// if other users may do more with it than `others` says.
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

/// Makes a file, for this user alone, to be read and written.
///
/// # Errors
///
/// Besides those of the kernel: if anything of this name is there.
pub fn create(path: &Path) -> io::Result<File> {
    create_for(path, Access::Write)
}

fn create_for(path: &Path, access: Access) -> io::Result<File> {
    let flags = flags(access) | OFlags::CREATE | OFlags::EXCL;
    Ok(File::from(open_at(path, flags, Mode::RUSR | Mode::WUSR)?))
}

/// [`open`], or [`create`] if there is none.
///
/// # Errors
///
/// As of [`open`].
pub fn open_or_create(path: &Path, access: Access, others: Others) -> io::Result<File> {
    let found = open(path, access, others);
    match found {
        Err(error) if error.kind() == io::ErrorKind::NotFound => create_for(path, access),
        found => found,
    }
}

/// Makes a directory for this user alone, unless it is there, with those above it.
///
/// # Errors
///
/// Besides those of the kernel: if it is no directory, belongs to another user, or if other users may
/// write there.
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

    /// Why a file cannot be opened, which is the same whatever is to be done with it.
    fn reasons(path: &Path, others: Others) -> String {
        let mut reasons = Vec::new();
        for access in ALL {
            let opened = [open(path, access, others), open_or_create(path, access, others)];
            reasons.extend(opened.map(|opened| opened.unwrap_err().to_string()));
        }
        assert!(create(path).is_err());
        reasons.join("; ")
    }

    // Fails if what other users can put in the place of a file is followed, waited for, read or written.
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

    // Fails if a directory is used into which other users can put anything, or is made so.
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
