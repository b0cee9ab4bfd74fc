//! A pretend Xen, made of files: for tests without Xen, of this daemon and of others alike.
//!
//! The files are described in `tests/peers/README.md`. Whoever plays a guest creates a directory
//! for it, maps or writes its `ring`, and sends events through FIFOs.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::{DomainState, Domains, Evtchn, Machine, Memory, SharedPage};
use crate::crash;
use crate::driver::{Driver, Source};
use crate::inherit;
use crate::raw::Mapping;

const PAGE_SIZE: usize = 4096;
/// Words of the page behind the ring page: set while an event is on its way.
const TO_DAEMON: usize = 0;
const TO_GUEST: usize = 4;
/// In place of a domid in a record, for a virtual interrupt.
const VIRQ_SENDER: u32 = u32::MAX;
const VIRQ_DOM_EXC: u32 = 3;
/// Kinds of entries in the table of ports.
const FREE: u32 = 0;
const INTERDOMAIN: u32 = 1;
const VIRQ: u32 = 2;
/// Ports that there can be.
const PORTS: u32 = 32767;
/// Bytes of the records that are read at once.
const RECORDS: usize = 4096;

/// A Xen of the files in `dir`, which is made if it is not there: with all ports free, or with those
/// of a program before this one, which has left this descriptor of its FIFO.
pub fn pretend(dir: &Path, driver: &Driver, inherited: Option<RawFd>) -> io::Result<Machine> {
    fs::create_dir_all(dir)?;
    let files = Files(dir.to_owned());
    let fifo = match inherited {
        Some(number) => File::from(inherit::fifo(number)?),
        None => files.fifo("events")?,
    };
    if inherited.is_none() && crash::point() {
        // Events for an earlier daemon.
        let mut rest = [0; RECORDS];
        while (&fifo).read(&mut rest).is_ok_and(|count| count > 0) {}
    }
    let mut open = OpenOptions::new();
    open.read(true).write(true).create(true).truncate(inherited.is_none() && crash::point());
    let table = open.open(dir.join("ports"))?;
    let ports = Mutex::new(Ports::load(&table)?);
    let evtchn = Channels { files: files.clone(), fifo: driver.source(fifo)?, table, ports };
    Ok(Machine {
        evtchn: Arc::new(evtchn),
        memory: Box::new(files.clone()),
        domains: Box::new(Lives(files)),
    })
}

#[derive(Clone, Debug)]
struct Files(PathBuf);

impl Files {
    /// Opened at both ends, so that it never blocks and never ends.
    fn fifo(&self, name: &str) -> io::Result<File> {
        let path = self.0.join(name);
        match mknodat(CWD, &path, FileType::Fifo, Mode::from(0o600), 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
    }

    fn guest(&self, domid: u32) -> io::Result<Guest> {
        Ok((self.page(domid, 1)?, self.fifo(&format!("{domid}/events"))?))
    }

    /// The page of a domain, or the one behind it.
    fn page(&self, domid: u32, number: u64) -> io::Result<Mapping> {
        let path = self.0.join(domid.to_string()).join("ring");
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let two = 2 * PAGE_SIZE as u64;
        if file.seek(SeekFrom::End(0))? < two {
            file.set_len(two)?;
        }
        Mapping::shared(&file, number * PAGE_SIZE as u64, PAGE_SIZE)
    }
}

impl Memory for Files {
    fn own_ring(&mut self) -> io::Result<(SharedPage, u32)> {
        let port = fs::read_to_string(self.0.join("0/port"))?;
        let port = port.trim().parse().map_err(io::Error::other)?;
        Ok((SharedPage { mapping: self.page(0, 0)?, _grant: None }, port))
    }

    fn map_ring(&mut self, domid: u16, _gfn: u64) -> io::Result<SharedPage> {
        Ok(SharedPage { mapping: self.page(domid.into(), 0)?, _grant: None })
    }
}

#[derive(Debug)]
struct Port {
    kind: u32,
    domid: u32,
    remote: u32,
    guest: OnceCell<Guest>,
}

/// What events to a guest need: its words and its FIFO.
type Guest = (Mapping, File);

impl Port {
    /// Its guest's, opened when it is needed: a port of the real device costs nothing either when a
    /// program takes it over.
    fn guest(&self, files: &Files) -> io::Result<&Guest> {
        if self.kind != INTERDOMAIN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.guest.get().is_none() {
            let _ = self.guest.set(files.guest(self.domid)?);
        }
        self.guest.get().ok_or(io::ErrorKind::Other.into())
    }
}

#[derive(Debug, Default)]
struct Ports {
    by_number: BTreeMap<u32, Port>,
    by_remote: BTreeMap<(u32, u32), u32>,
    last: u32,
}

impl Ports {
    /// Those that the table says are bound.
    fn load(mut table: &File) -> io::Result<Ports> {
        let mut bytes = Vec::new();
        table.read_to_end(&mut bytes)?;
        let mut ports = Ports::default();
        for (number, entry) in (0..).zip(bytes.as_chunks::<16>().0) {
            let [kind, domid, remote] = [0, 4, 8].map(|at| {
                u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
            });
            if kind == FREE {
                continue;
            }
            ports.last = number;
            ports.by_remote.insert((domid, remote), number);
            let guest = OnceCell::new();
            ports.by_number.insert(number, Port { kind, domid, remote, guest });
        }
        Ok(ports)
    }
}

#[derive(Debug)]
struct Channels {
    files: Files,
    fifo: Source<File>,
    table: File,
    ports: Mutex<Ports>,
}

impl Channels {
    fn ports(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tests count bound ports in the table.
    fn tell(&self, number: u32, [kind, domid, remote]: [u32; 3]) -> io::Result<()> {
        let entry = [kind, domid, remote, 0].map(u32::to_le_bytes);
        if !crash::point() {
            return Ok(());
        }
        self.table.write_all_at(&entry.concat(), u64::from(number) * 16)
    }

    fn add(&self, port: Port) -> io::Result<u32> {
        let mut ports = self.ports();
        let after = ports.last + 1;
        let free = (after..PORTS).chain(1..after).find(|n| !ports.by_number.contains_key(n));
        let number = free.ok_or(io::ErrorKind::StorageFull)?;
        ports.last = number;
        self.tell(number, [port.kind, port.domid, port.remote])?;
        ports.by_remote.insert((port.domid, port.remote), number);
        ports.by_number.insert(number, port);
        Ok(number)
    }
}

impl Evtchn for Channels {
    fn bind(&self, domid: u16, remote: u32) -> io::Result<u32> {
        let (words, fifo) = self.files.guest(domid.into())?;
        // The hypervisor does this at once. A new channel is pending: the guest may have rung before.
        if crash::point() {
            words.word(TO_GUEST).store(0, Ordering::SeqCst);
            words.word(TO_DAEMON).store(1, Ordering::SeqCst);
        }
        let domid = u32::from(domid);
        let guest = OnceCell::from((words, fifo));
        let number = self.add(Port { kind: INTERDOMAIN, domid, remote, guest })?;
        let record = [domid, remote].map(u32::to_le_bytes).concat();
        if crash::point() {
            self.fifo.get().write_all(&record)?;
        }
        Ok(number)
    }

    fn bind_domain_exc(&self) -> io::Result<u32> {
        // As the hypervisor: it is bound once.
        if self.ports().by_remote.contains_key(&(VIRQ_SENDER, VIRQ_DOM_EXC)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.add(Port {
            kind: VIRQ,
            domid: VIRQ_SENDER,
            remote: VIRQ_DOM_EXC,
            guest: OnceCell::new(),
        })
    }

    fn unbind(&self, port: u32) -> io::Result<()> {
        let mut ports = self.ports();
        let gone = ports.by_number.remove(&port).ok_or(io::ErrorKind::InvalidInput)?;
        if ports.by_remote.get(&(gone.domid, gone.remote)) == Some(&port) {
            ports.by_remote.remove(&(gone.domid, gone.remote));
        }
        self.tell(port, [FREE; 3])
    }

    fn notify(&self, port: u32) -> io::Result<()> {
        let ports = self.ports();
        let port = ports.by_number.get(&port).ok_or(io::ErrorKind::InvalidInput)?;
        let (words, fifo) = port.guest(&self.files)?;
        if crash::point() && words.word(TO_GUEST).swap(1, Ordering::SeqCst) == 0 {
            // A guest whose FIFO is full has plenty to wake up for.
            let _ = (&*fifo).write(&port.remote.to_le_bytes());
        }
        Ok(())
    }

    fn poll_ports(&self, cx: &mut Context<'_>, found: &mut Vec<u32>) -> Poll<io::Result<()>> {
        if !crash::point() {
            return Poll::Pending;
        }
        let mut records = [0; RECORDS];
        let count = ready!(self.fifo.poll_read(cx, |mut fifo| fifo.read(&mut records)))?;
        if count < RECORDS {
            self.fifo.drained();
        }
        let ports = self.ports();
        for record in records[..count].as_chunks::<8>().0 {
            let [domid, remote] = [&record[..4], &record[4..]]
                .map(|word| word.try_into().map_or(0, u32::from_le_bytes));
            let Some(number) = ports.by_remote.get(&(domid, remote)) else { continue };
            let port = ports.by_number.get(number);
            if let Some((words, _)) = port.and_then(|port| port.guest(&self.files).ok()) {
                words.word(TO_DAEMON).store(0, Ordering::SeqCst);
            }
            if !found.contains(number) {
                found.push(*number);
            }
        }
        Poll::Ready(Ok(()))
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fifo.as_fd()
    }

    fn unmask(&self, _: &[u32]) -> io::Result<()> {
        Ok(())
    }
}

/// Domains by their directories. Each gets an id when it is first seen, which is kept beside the
/// other files until it is seen gone: the next daemon knows it by the same id. It is what a link
/// says, which is read in one call, as the hypervisor is asked in one.
#[derive(Debug)]
struct Lives(Files);

/// A number that no domain has had.
fn fresh_id() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| u64::try_from(now.as_nanos()).unwrap_or(1))
}

impl Domains for Lives {
    fn domain(&mut self, domid: u16) -> io::Result<Option<DomainState>> {
        let dir = self.0.0.join(domid.to_string());
        let known = fs::read_link(dir.join("id")).ok().and_then(|id| id.to_str()?.parse().ok());
        let state = match fs::read_to_string(dir.join("state")) {
            Ok(state) => state,
            Err(_) if known.is_some() || dir.exists() => "running".into(),
            Err(_) => "gone".into(),
        };
        if state.starts_with("gone") || state.starts_with("dying") {
            let _ = fs::remove_file(dir.join("id"));
            return Ok(None);
        }
        let unique_id = match known {
            Some(id) => id,
            None => {
                let id = fresh_id();
                symlink(id.to_string(), dir.join("id"))?;
                id
            }
        };
        let shutdown = ["shutdown", "crashed"].iter().any(|word| state.starts_with(word));
        Ok(Some(DomainState { unique_id: Some(unique_id), shutdown }))
    }

    fn all(&mut self) -> io::Result<Vec<u16>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0.0)? {
            let name = entry?.file_name();
            if let Some(domid) = name.to_str().and_then(|name| name.parse().ok())
                && self.domain(domid)?.is_some()
            {
                found.push(domid);
            }
        }
        found.sort_unstable();
        Ok(found)
    }
}
