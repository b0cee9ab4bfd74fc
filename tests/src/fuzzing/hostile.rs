//! Rings in memory, and a host whose domains have them. The page of a hostile guest changes between
//! any two accesses of the server.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use xenstore_protocol::ring::{SIZE, Side, Word};
use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Gfn};
use xenstore_store::{DomainInfo, Host};
use xenstore_transport::ring::{Doorbell, Page, Ring, RingChannel};

/// Values for the words of a page.
const VALUES: [u32; 12] =
    [0, 1, 2, 16, 1023, 1024, 1025, 5000, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1023, u32::MAX];
/// Values for the lengths in headers.
const LENGTHS: [u32; 6] = [0, 5, 4096, 4097, 0x8000_0000, u32::MAX];
/// The number of accesses, out of 256, that follow a change by the guest.
const CHANGES: u8 = 80;

/// Decides by the bytes of the input, which all users share; 0 after the last one.
#[derive(Clone, Debug)]
pub(super) struct Tape(Rc<RefCell<std::vec::IntoIter<u8>>>);

impl Tape {
    pub(super) fn new(data: &[u8]) -> Tape {
        Tape(Rc::new(RefCell::new(Vec::from(data).into_iter())))
    }

    pub(super) fn is_used_up(&self) -> bool {
        self.0.borrow().len() == 0
    }

    pub(super) fn byte(&self) -> u8 {
        self.0.borrow_mut().next().unwrap_or(0)
    }

    pub(super) fn of<T: Copy>(&self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()]
    }
}

/// A page. Clones are the same page.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    bytes: Rc<RefCell<Vec<u8>>>,
    hostile: Option<Tape>,
}

impl Shared {
    pub(super) fn new(hostile: Option<Tape>) -> Shared {
        Shared { bytes: Rc::new(RefCell::new(vec![0; 4096])), hostile }
    }

    /// The same page, accessed by its guest.
    pub(super) fn inside(&self) -> Shared {
        Shared { bytes: self.bytes.clone(), hostile: None }
    }

    /// Writes requests of the guest, also beyond the free space.
    pub(super) fn send(&self, bytes: &[u8]) {
        let prod = self.load(Word::ReqProd);
        for (at, byte) in bytes.iter().enumerate() {
            let at = (prod % SIZE) as usize + at;
            self.write(Side::Requests, at % SIZE as usize, &[*byte]);
        }
        let count = u32::try_from(bytes.len()).expect("short");
        self.store(Word::ReqProd, prod.wrapping_add(count));
    }

    /// Reads all replies.
    pub(super) fn take(&self) -> Vec<u8> {
        let (cons, prod) = (self.load(Word::RspCons), self.load(Word::RspProd));
        let mut bytes = vec![0; prod.wrapping_sub(cons).min(SIZE) as usize];
        for (at, byte) in bytes.iter_mut().enumerate() {
            let at = (cons % SIZE) as usize + at;
            self.read(Side::Replies, at % SIZE as usize, std::slice::from_mut(byte));
        }
        self.store(Word::RspCons, prod);
        bytes
    }

    /// Sets all indices to 0.
    pub(super) fn zero(&self) {
        for word in [Word::ReqCons, Word::ReqProd, Word::RspCons, Word::RspProd] {
            self.store(word, 0);
        }
    }

    /// Changes the page as a hostile guest, between two accesses of the server.
    fn interfere(&self) {
        let Some(tape) = self.hostile.as_ref() else { return };
        if tape.byte() >= CHANGES {
            return;
        }
        let page = self.inside();
        match tape.byte() % 8 {
            0 => page.store(tape.of(&Word::ALL), tape.of(&VALUES)),
            1 => page.nudge(tape.of(&Word::ALL), tape.byte().into()),
            2 => page.nudge(Word::ReqProd, tape.byte().into()),
            3 => {
                let at = usize::from(tape.byte()) * 4;
                page.write(Side::Requests, at, &[tape.byte()]);
            }
            4 => {
                // Most likely in the bytes that the server reads next.
                let at = (page.load(Word::ReqCons).wrapping_add(12) % SIZE) as usize & !3;
                page.write(Side::Requests, at, &tape.of(&LENGTHS).to_le_bytes());
            }
            5 if tape.byte().is_multiple_of(2) => page.zero(),
            5 => page.store(Word::Connection, 1),
            6 => page.store(Word::RspCons, page.load(Word::RspProd)),
            _ => page.store(Word::ReqProd, page.load(Word::ReqCons)),
        }
    }

    fn nudge(&self, word: Word, by: u32) {
        self.store(word, self.load(word).wrapping_add(by));
    }
}

impl Page for Shared {
    fn load(&self, word: Word) -> u32 {
        self.interfere();
        let page = self.bytes.borrow();
        u32::from_le_bytes(*page[word.offset()..].first_chunk().expect("a word"))
    }

    fn store(&self, word: Word, value: u32) {
        self.interfere();
        self.bytes.borrow_mut()[word.offset()..][..4].copy_from_slice(&value.to_le_bytes());
    }

    fn read(&self, side: Side, at: usize, bytes: &mut [u8]) {
        self.interfere();
        bytes.copy_from_slice(&self.bytes.borrow()[side.offset() + at..][..bytes.len()]);
        // A copy must not leave its ring.
        assert!(at + bytes.len() <= SIZE as usize);
    }

    fn write(&self, side: Side, at: usize, bytes: &[u8]) {
        self.interfere();
        self.bytes.borrow_mut()[side.offset() + at..][..bytes.len()].copy_from_slice(bytes);
        assert!(at + bytes.len() <= SIZE as usize);
    }
}

/// A doorbell that counts its notifications.
#[derive(Clone, Debug, Default)]
pub(super) struct CountingDoorbell(pub(super) Rc<Cell<u32>>);

impl Doorbell for CountingDoorbell {
    fn notify(&self) {
        self.0.set(self.0.get() + 1);
    }
}

/// A host: domains and their rings.
#[derive(Default)]
pub(super) struct Machine {
    pub(super) domains: BTreeMap<u16, DomainInfo>,
    pub(super) pages: BTreeMap<u16, Shared>,
    pub(super) channels: BTreeMap<u16, Arc<RingChannel<Shared, CountingDoorbell>>>,
    /// Rings that the server has not begun to serve.
    pub(super) fresh: Vec<Ring<Shared, CountingDoorbell>>,
    last_id: u64,
}

impl Machine {
    /// Creates a domain with an empty page.
    pub(super) fn create(&mut self, domid: u16, page: Shared) {
        let info = DomainInfo { unique_id: self.last_id, shutdown: false };
        self.last_id += 1;
        self.domains.insert(domid, info);
        self.pages.insert(domid, page);
    }

    pub(super) fn connect(&mut self, domid: u16, features: Features) {
        let page = self.pages[&domid].clone();
        let channel = RingChannel::new(page, CountingDoorbell::default(), features);
        self.fresh.push(Ring::new(channel.clone(), DomId(domid)));
        self.channels.insert(domid, channel);
    }
}

impl Host for Machine {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        self.domains.get(&domid.0).copied()
    }

    fn introduce(
        &mut self,
        domid: DomId,
        _: Gfn,
        _: EvtchnPort,
        features: Features,
    ) -> Result<(), Errno> {
        match self.channels.get(&domid.0) {
            Some(channel) => channel.start(),
            None => self.connect(domid.0, features),
        }
        Ok(())
    }

    fn release(&mut self, domid: DomId) {
        if let Some(channel) = self.channels.remove(&domid.0) {
            channel.close();
        }
    }

    fn control(&mut self, _: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        None
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }
}
