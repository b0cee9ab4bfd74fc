//! A Xen of files, for tests on machines without Xen.
//!
//! The directory has a directory for each domain, by domid. A guest is a process that creates the
//! directory, maps or writes its `ring`, and sends events through FIFOs.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, fstat, mkfifoat, openat, readlinkat, statat, symlinkat,
    unlinkat,
};
use rustix::io::Errno;
use xenstore_protocol::{DomId, EvtchnPort, Gfn};
use xenstore_sys::{Mapping, crash};

use super::stored_ports::RemoteEnd;
use super::{
    DomainStatus, Domains, Evtchn, Inherited, Machine, Memory, SharedPage, StoredPorts,
    VIRQ_DOM_EXC,
};
use crate::driver::{Driver, Source};

const PAGE_SIZE: usize = 4096;
/// Words of the page after the ring page: set while an event is pending.
const TO_DAEMON: usize = 0;
const TO_GUEST: usize = 4;
/// Stands for a domid in the record of a virtual interrupt.
const VIRQ_SENDER: u32 = u32::MAX;
/// Kinds of entries of the table of ports.
const FREE: u32 = 0;
const INTERDOMAIN: u32 = 1;
const VIRQ: u32 = 2;
/// The limit of ports, and the bytes of an entry of the table.
const PORTS: u32 = 32767;
const ENTRY: usize = 16;
/// Bytes of records that one read returns.
const RECORDS: usize = 4096;

/// Opens the Xen in `dir`, which is created if it does not exist: with all ports free, or with the
/// ports of an earlier process that has left its FIFO.
///
/// # Errors
///
/// Fails if a file cannot be created, or the inherited descriptor is not a FIFO.
pub fn open(dir: &Path, driver: &Driver, inherited: Option<Inherited>) -> io::Result<Machine> {
    fs::create_dir_all(dir)?;
    let files = Files(Arc::new(openat(CWD, dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?));
    let (is_stored, is_new) =
        (matches!(inherited, Some(Inherited::Stored(_))), inherited.is_none());
    let fifo = match inherited {
        Some(Inherited::HandedOver(fifo) | Inherited::Stored(fifo)) => fifo_of(fifo)?,
        None => files.fifo("events")?,
    };
    rustix::io::ioctl_fionbio(&fifo, true)?;
    if is_new && crash::point() {
        // Discards events for an earlier daemon.
        let mut rest = [0; RECORDS];
        while (&fifo).read(&mut rest).is_ok_and(|count| count > 0) {}
    }
    let truncate = if is_new && crash::point() { OFlags::TRUNC } else { OFlags::empty() };
    let table = files.open("ports", OFlags::CREATE | truncate)?;
    let size = PORTS as usize * ENTRY;
    table.set_len(size as u64)?;
    let ports = Ports::load(&table)?;
    let stored_ports = is_stored.then(|| ports.stored());
    let ports = Mutex::new(ports);
    let table = Mapping::shared(&table, 0, size)?;
    let evtchn = Channels { files: files.clone(), fifo: driver.source(fifo)?, table, ports };
    if is_stored {
        evtchn.clear_events();
    }
    let ids = BTreeMap::new();
    Ok(Machine {
        evtchn: Arc::new(evtchn),
        memory: Box::new(files.clone()),
        domains: Box::new(Directories { files, dir: dir.to_owned(), ids }),
        stored_ports,
    })
}

/// Checks that an inherited descriptor is a FIFO.
fn fifo_of(descriptor: OwnedFd) -> io::Result<File> {
    match FileType::from_raw_mode(fstat(&descriptor)?.st_mode) {
        FileType::Fifo => Ok(File::from(descriptor)),
        other => {
            let text = format!("inherited descriptor of events is {other:?}, not a FIFO");
            Err(io::Error::new(io::ErrorKind::InvalidData, text))
        }
    }
}

/// Checks that such a Xen exists or can be created.
///
/// # Errors
///
/// Fails if the directory cannot be created or opened.
pub fn probe(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    openat(CWD, dir, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    Ok(())
}

/// The directory. Names of files are relative to it, which makes opening them cheap.
#[derive(Clone, Debug)]
struct Files(Arc<OwnedFd>);

impl Files {
    fn open(&self, name: &str, flags: OFlags) -> rustix::io::Result<File> {
        let flags = flags | OFlags::RDWR | OFlags::CLOEXEC;
        openat(&*self.0, name, flags, Mode::from(0o600)).map(File::from)
    }

    /// Opens a FIFO for reading and writing, so that it neither blocks nor ends.
    fn fifo(&self, name: &str) -> rustix::io::Result<File> {
        let existing = self.open(name, OFlags::NONBLOCK);
        if !matches!(existing, Err(Errno::NOENT)) {
            return existing;
        }
        match mkfifoat(&*self.0, name, Mode::from(0o600)) {
            Ok(()) | Err(Errno::EXIST) => self.open(name, OFlags::NONBLOCK),
            Err(error) => Err(error),
        }
    }

    fn text(&self, name: &str) -> io::Result<String> {
        io::read_to_string(self.open(name, OFlags::empty())?)
    }

    fn exists(&self, name: &str) -> bool {
        statat(&*self.0, name, AtFlags::empty()).is_ok()
    }

    fn guest(&self, domid: u32) -> io::Result<Guest> {
        Ok((self.page(domid, 1)?, self.fifo(&format!("{domid}/events"))?))
    }

    /// Maps page 0, the ring, or page 1, the words for events, of a domain.
    fn page(&self, domid: u32, number: u64) -> io::Result<Mapping> {
        let mut file = self.open(&format!("{domid}/ring"), OFlags::CREATE)?;
        let two = 2 * PAGE_SIZE as u64;
        if file.seek(SeekFrom::End(0))? < two {
            file.set_len(two)?;
        }
        Mapping::shared(&file, number * PAGE_SIZE as u64, PAGE_SIZE)
    }
}

impl Memory for Files {
    fn own_ring(&mut self) -> io::Result<(SharedPage, EvtchnPort)> {
        let port = self.text("0/port")?;
        let port = port.trim().parse().map_err(io::Error::other)?;
        Ok((SharedPage::new(self.page(0, 0)?), EvtchnPort(port)))
    }

    fn map_ring(&mut self, domid: DomId, _gfn: Gfn) -> io::Result<SharedPage> {
        Ok(SharedPage::new(self.page(domid.0.into(), 0)?))
    }
}

#[derive(Debug)]
struct Port {
    kind: u32,
    domid: u32,
    remote: u32,
    guest: OnceCell<Guest>,
}

/// The words for events of a guest, and its FIFO.
type Guest = (Mapping, File);

impl Port {
    /// Opens the files of its guest at the first use, so that taking over a port is as cheap as with
    /// the real device.
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
    /// The ports below are bound.
    free: u32,
    /// The buffer for records.
    records: Vec<u8>,
}

impl Ports {
    /// Reads the bound ports from the table.
    fn load(mut table: &File) -> io::Result<Ports> {
        let mut bytes = Vec::new();
        table.read_to_end(&mut bytes)?;
        let mut ports = Ports { records: vec![0; RECORDS], free: 1, ..Ports::default() };
        for (number, entry) in (0..).zip(bytes.as_chunks::<ENTRY>().0) {
            let [kind, domid, remote] = [0, 4, 8].map(|at| {
                u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
            });
            if kind == FREE {
                continue;
            }
            ports.by_remote.insert((domid, remote), number);
            let guest = OnceCell::new();
            ports.by_number.insert(number, Port { kind, domid, remote, guest });
        }
        Ok(ports)
    }

    /// The bound ports with their remote ends.
    fn stored(&self) -> StoredPorts {
        let mut found = StoredPorts::default();
        for (port, Port { kind, domid, remote, .. }) in &self.by_number {
            let end = match u16::try_from(*domid) {
                Ok(domid) if *kind == INTERDOMAIN => {
                    RemoteEnd::Domain(DomId(domid), EvtchnPort(*remote))
                }
                _ => RemoteEnd::DomainExc,
            };
            found.add(EvtchnPort(*port), Some(end));
        }
        found
    }
}

#[derive(Debug)]
struct Channels {
    files: Files,
    fifo: Source<File>,
    /// The ports, for tests and for the next process.
    table: Mapping,
    ports: Mutex<Ports>,
}

impl Channels {
    fn ports(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the entry of a port.
    fn put_entry(&self, number: u32, entry: [u32; 3]) {
        if !crash::point() {
            return;
        }
        for (at, word) in (number as usize * ENTRY..).step_by(4).zip(entry) {
            self.table.word(at).store(word.to_le(), Ordering::Relaxed);
        }
    }

    /// Clears pending events. Unlike Xen, sending an event can be interrupted half-way by SIGKILL: its
    /// word stays set, and no later event is sent. The next process reads all rings and notifies all
    /// guests.
    fn clear_events(&self) {
        for (words, _) in self.ports().by_number.values().filter_map(|p| p.guest(&self.files).ok())
        {
            if crash::point() {
                words.word(TO_GUEST).store(0, Ordering::SeqCst);
                words.word(TO_DAEMON).store(0, Ordering::SeqCst);
            }
        }
    }

    fn add(&self, port: Port) -> io::Result<EvtchnPort> {
        let mut ports = self.ports();
        // Like Xen: the first free port.
        let free = (ports.free..PORTS).find(|n| !ports.by_number.contains_key(n));
        let number = free.ok_or(io::ErrorKind::StorageFull)?;
        ports.free = number + 1;
        self.put_entry(number, [port.kind, port.domid, port.remote]);
        ports.by_remote.insert((port.domid, port.remote), number);
        ports.by_number.insert(number, port);
        Ok(EvtchnPort(number))
    }
}

impl Evtchn for Channels {
    fn bind(&self, domid: DomId, remote: EvtchnPort) -> io::Result<EvtchnPort> {
        let (domid, remote) = (u32::from(domid.0), remote.0);
        // Like Xen: a remote port can be bound once.
        if self.ports().by_remote.contains_key(&(domid, remote)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let (words, fifo) = self.files.guest(domid)?;
        // Xen does this atomically. A new channel has an event: the guest may have sent one before.
        if crash::point() {
            words.word(TO_GUEST).store(0, Ordering::SeqCst);
            words.word(TO_DAEMON).store(1, Ordering::SeqCst);
        }
        let guest = OnceCell::from((words, fifo));
        let number = self.add(Port { kind: INTERDOMAIN, domid, remote, guest })?;
        let record = [domid, remote].map(u32::to_le_bytes).concat();
        if crash::point() {
            self.fifo.get().write_all(&record)?;
        }
        Ok(number)
    }

    fn bind_domain_exc(&self) -> io::Result<EvtchnPort> {
        // Like Xen: it can be bound once.
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

    fn unbind(&self, EvtchnPort(port): EvtchnPort) -> io::Result<()> {
        let mut ports = self.ports();
        let gone = ports.by_number.remove(&port).ok_or(io::ErrorKind::InvalidInput)?;
        if ports.by_remote.get(&(gone.domid, gone.remote)) == Some(&port) {
            ports.by_remote.remove(&(gone.domid, gone.remote));
        }
        ports.free = ports.free.min(port);
        self.put_entry(port, [FREE; 3]);
        Ok(())
    }

    fn notify(&self, EvtchnPort(port): EvtchnPort) -> io::Result<()> {
        let ports = self.ports();
        let port = ports.by_number.get(&port).ok_or(io::ErrorKind::InvalidInput)?;
        let (words, fifo) = port.guest(&self.files)?;
        if crash::point() && words.word(TO_GUEST).swap(1, Ordering::SeqCst) == 0 {
            // If the FIFO is full, the guest has events to wake up for.
            let _ = (&*fifo).write(&port.remote.to_le_bytes());
        }
        Ok(())
    }

    fn poll_ports(
        &self,
        cx: &mut Context<'_>,
        found: &mut Vec<EvtchnPort>,
    ) -> Poll<io::Result<()>> {
        if !crash::point() {
            return Poll::Pending;
        }
        let mut ports = self.ports();
        let Ports { by_number, by_remote, records, .. } = &mut *ports;
        let count = ready!(self.fifo.poll_read(cx, |mut fifo| fifo.read(records)))?;
        if count < RECORDS {
            self.fifo.drained();
        }
        for record in records[..count].as_chunks::<8>().0 {
            let [domid, remote] = [&record[..4], &record[4..]]
                .map(|word| word.try_into().map_or(0, u32::from_le_bytes));
            let Some(number) = by_remote.get(&(domid, remote)) else { continue };
            let port = by_number.get(number);
            let words = port.and_then(|port| port.guest(&self.files).ok());
            // The record of an event that was read already.
            if words.is_none_or(|(words, _)| words.word(TO_DAEMON).swap(0, Ordering::SeqCst) != 0) {
                found.push(EvtchnPort(*number));
            }
        }
        Poll::Ready(Ok(()))
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fifo.as_fd()
    }

    fn unmask(&self, _: &[EvtchnPort]) -> io::Result<()> {
        Ok(())
    }
}

/// Domains by their directories. A domain gets a unique id when it is first queried; a symbolic link
/// stores the id for the next daemon until the domain is found dead. Reading a link is one system call,
/// like asking the hypervisor.
#[derive(Debug)]
struct Directories {
    files: Files,
    dir: PathBuf,
    /// The ids that are known.
    ids: BTreeMap<DomId, u64>,
}

impl Directories {
    fn id(&mut self, domid: DomId) -> io::Result<u64> {
        if let Some(id) = self.ids.get(&domid) {
            return Ok(*id);
        }
        let name = format!("{domid}/id");
        let link = readlinkat(&*self.files.0, &name, Vec::new());
        let known = link.ok().and_then(|id| id.to_str().ok()?.parse().ok());
        let id = known.unwrap_or_else(fresh_id);
        if known.is_none() {
            symlinkat(id.to_string(), &*self.files.0, &name)?;
        }
        self.ids.insert(domid, id);
        Ok(id)
    }
}

/// An id that no domain has had: the time.
fn fresh_id() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| u64::try_from(now.as_nanos()).unwrap_or(1))
}

impl Domains for Directories {
    fn domain(&mut self, domid: DomId) -> io::Result<Option<DomainStatus>> {
        let state = match self.files.text(&format!("{domid}/state")) {
            Ok(state) => state,
            Err(_) if self.files.exists(&domid.to_string()) => "running".into(),
            Err(_) => "gone".into(),
        };
        if state.starts_with("gone") || state.starts_with("dying") {
            self.ids.remove(&domid);
            let _ = unlinkat(&*self.files.0, format!("{domid}/id"), AtFlags::empty());
            return Ok(None);
        }
        let shutdown = ["shutdown", "crashed"].iter().any(|word| state.starts_with(word));
        Ok(Some(DomainStatus { unique_id: Some(self.id(domid)?), shutdown }))
    }

    fn all(&mut self) -> io::Result<Vec<DomId>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            if let Some(domid) = name.to_str().and_then(|name| name.parse().ok()).map(DomId)
                && self.domain(domid)?.is_some()
            {
                found.push(domid);
            }
        }
        found.sort_unstable();
        Ok(found)
    }
}
