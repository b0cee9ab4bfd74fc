//! From a migration stream, our own or that of C xenstored, to a state. Nothing is taken from one
//! that is malformed, and no more memory is taken than a small multiple of its length.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use triomphe::Arc;
use xenstore_protocol::stream::{Cursor, Reader, StreamError, kind};
use xenstore_protocol::{DomId, Features, Path, Quota, TxId};

use super::difference::take_difference;
use super::nodes::Grower;
use super::transactions::take_transaction;
use super::{
    ConnectionIo, ConnectionState, Counters, DomainState, EventState, NEVER, NO_DEPTH, NO_TARGET,
    ServerIo, State, WatchState, ocaml,
};
use crate::domain::quotas::Quotas;
use crate::domain::registry::{Largest, Usage};
use crate::ids::{Caller, ConnId};
use crate::transaction::Transaction;
use crate::transaction::retention::Retention;
use crate::tree::Tree;
use crate::tree::acl::Era;
use crate::watch::index::WatchId;

type Result<T> = core::result::Result<T, StreamError>;

/// Things lost that are told one by one.
const LOST_MAX: usize = 100;

/// What is known of a watch besides its record.
struct WatchDetail {
    id: WatchId,
    depth: Option<u32>,
    collapsed: bool,
}

/// A state that is being read.
pub(super) struct Decoder {
    /// The version of the stream: only from 2 on are the features of a domain meant.
    version: u32,
    pub(super) quotas: Option<Quotas>,
    domains: BTreeMap<DomId, DomainState>,
    pub(super) connections: Vec<ConnectionState>,
    /// Places of connections by their number in the stream.
    numbers: BTreeMap<u32, usize>,
    pub(super) io: ServerIo,
    pub(super) lost: Vec<String>,
    unknown: BTreeSet<u32>,
    counters: Option<Counters>,
    retention: Retention,
    eras: BTreeMap<DomId, Era>,
    last_watch: u64,
    /// Stamps of the nodes, sorted.
    created: Vec<u64>,
    tree: Option<Tree>,
    /// The snapshot that was read last.
    base: Option<Tree>,
    /// What is known of watches whose records are still to come, the last first.
    pending: BTreeMap<usize, Vec<WatchDetail>>,
    /// Transactions of which only the number is known so far.
    announced: BTreeSet<(u32, TxId)>,
}

impl State {
    /// Reads a migration stream, ours or that of C xenstored, or what oxenstored writes instead.
    pub fn decode(bytes: &[u8]) -> Result<State> {
        State::decode_in_turn(bytes, |_| ())
    }

    /// The same; `read` is called with how many bytes have been read, which come once more only if they
    /// belong to no node.
    pub fn decode_in_turn(bytes: &[u8], read: impl Fn(usize)) -> Result<State> {
        if ocaml::is_dump(bytes) {
            return ocaml::decode(bytes);
        }
        let mut reader = Reader::new(bytes)?;
        let mut decoder = Decoder { version: reader.version(), ..Decoder::new() };
        decoder.look_ahead(&reader)?;
        let limit = decoder.counters.map(|counters| counters.stamp);
        let mut grower = Grower::default();
        let mut in_transactions = 0_u64;
        // What comes with the nodes means nothing if it comes once more behind them.
        let mut others = Vec::new();
        while let Some(mut record) = reader.next_record()? {
            match (record.kind, limit) {
                (kind::NODES, Some(limit)) => grower.take_nodes(&mut record.body, limit)?,
                (kind::NODE_DATA, None) => {
                    in_transactions += u64::from(!grower.take_record(&mut record.body)?);
                }
                (kind::NODES | kind::NODE_DATA, _) => {
                    return Err(record
                        .body
                        .error("a node without its stamps, or without counters"));
                }
                _ => others.push(record),
            }
            read(reader.offset());
        }
        if let Some(mut next) = reader.following()? {
            decoder.follow(&next)?;
            others.clear();
            while let Some(record) = next.next_record()? {
                if matches!(record.kind, kind::NODES | kind::NODE_DATA) {
                    return Err(record.body.error("a node in place of what has changed"));
                }
                others.push(record);
            }
            reader = next;
        }
        if in_transactions > 0 {
            decoder.lose(format!("{in_transactions} nodes of open transactions"));
        }
        let differ = |kind| matches!(kind, kind::NODES_SINCE | kind::TRANSACTION_DETAIL);
        for record in others.iter_mut().filter(|record| !differ(record.kind)) {
            decoder.take_record(record.kind, &mut record.body)?;
        }
        decoder.finish_tree(grower, &reader.position())?;
        for record in others.iter_mut().filter(|record| differ(record.kind)) {
            match record.kind {
                kind::NODES_SINCE => decoder.take_nodes_since(&mut record.body)?,
                _ => decoder.take_transaction(&mut record.body)?,
            }
        }
        decoder.finish(&reader.position())
    }
}

impl Decoder {
    pub(super) fn new() -> Decoder {
        Decoder {
            version: 1,
            quotas: None,
            domains: BTreeMap::new(),
            connections: Vec::new(),
            numbers: BTreeMap::new(),
            io: ServerIo::default(),
            lost: Vec::new(),
            unknown: BTreeSet::new(),
            counters: None,
            retention: Retention::default(),
            eras: BTreeMap::new(),
            last_watch: 0,
            created: Vec::new(),
            tree: None,
            base: None,
            pending: BTreeMap::new(),
            announced: BTreeSet::new(),
        }
    }

    /// Reads the counters, which everything else is checked against. Those who write them do so
    /// before the nodes.
    fn look_ahead(&mut self, reader: &Reader<'_>) -> Result<()> {
        let mut reader = reader.clone();
        while let Some(record) = reader.next_record()? {
            let mut body = record.body;
            match record.kind {
                kind::ENGINE => {
                    let [stamp, epoch, last_conn, last_watch] =
                        [body.u64()?, body.u64()?, body.u64()?, body.u64()?];
                    let injected_eagain = body.u32()?;
                    // They must be able to grow for ever.
                    if [stamp, epoch, last_conn, last_watch].iter().any(|n| *n > u64::MAX / 2) {
                        return Err(body.error("a counter that has nearly run out"));
                    }
                    let (protected, held) = (body.u64()?, body.u64()?);
                    self.take_pins(&mut body)?;
                    self.counters = Some(Counters {
                        stamp,
                        epoch,
                        last_conn,
                        last_watch,
                        injected_eagain,
                        protected,
                        held,
                    });
                    break;
                }
                kind::NODES | kind::NODE_DATA => break,
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads the counters of the stream that follows, which count from now on.
    fn follow(&mut self, next: &Reader<'_>) -> Result<()> {
        let before = self.counters.take();
        self.retention = Retention::default();
        self.look_ahead(next)?;
        match (before, self.counters) {
            (Some(before), Some(now)) if before.stamp <= now.stamp => Ok(()),
            _ => Err(next.position().error("it does not follow what is before it")),
        }
    }

    fn take_pins(&mut self, body: &mut Cursor<'_>) -> Result<()> {
        self.retention.retired = body.u64()?.cast_signed();
        for _ in 0..body.u32()? {
            self.retention.due.insert(DomId(body.u16()?), body.u64()?.cast_signed());
        }
        let all = self.retention.due.values().chain([&self.retention.retired]);
        match all.copied().all(|bytes| (0..=i64::MAX / 4).contains(&bytes)) {
            true => Ok(()),
            false => Err(body.error("a counter that has nearly run out")),
        }
    }

    pub(super) fn lose(&mut self, what: String) {
        if self.lost.len() < LOST_MAX {
            self.lost.push(what);
        }
    }

    fn take_record(&mut self, kind: u32, body: &mut Cursor<'_>) -> Result<()> {
        match kind {
            kind::GLOBAL_DATA => {
                self.io.listener = take_fd(body)?;
                self.io.evtchn = take_fd(body)?;
            }
            kind::SERVER => {
                self.io.virq_port = Some(body.u32()?).filter(|port| *port != 0);
                let len = body.u32()?;
                self.io.other = body.take(len as usize)?.into();
            }
            kind::GLOBAL_QUOTA_DATA => {
                // Values per domain and global ones, which differ in nothing here.
                let count = u32::from(body.u16()?) + u32::from(body.u16()?);
                self.quotas = Some(self.take_quotas(body, count)?);
            }
            kind::CONNECTION_DATA => self.take_connection(body)?,
            kind::CONNECTION_DETAIL => self.take_detail(body)?,
            kind::WATCH_DATA => self.take_watch(body, false)?,
            kind::WATCH_DATA_EXTENDED => self.take_watch(body, true)?,
            kind::TRANSACTION_DATA => {
                self.announced.insert((body.u32()?, TxId(body.u32()?)));
            }
            kind::DOMAIN_DATA => {
                let domid = DomId(body.u16()?);
                let count = body.u16()?;
                let features = body.u32()?;
                let quotas = self.take_quotas(body, count.into())?;
                let has_features = self.version > 1;
                let domain = self.domain(domid);
                if has_features {
                    domain.features = Features::from(features) & Features::ALL;
                }
                domain.quotas = (count > 0).then_some(quotas);
            }
            kind::DOMAIN_DETAIL => {
                let (domid, flags) = (DomId(body.u16()?), body.u16()?);
                let (target, _) = (body.u16()?, body.u16()?);
                let unique_id = body.u64()?;
                let mut peaks = [0; 4];
                for peak in &mut peaks {
                    *peak = body.u64()?.cast_signed();
                }
                let [nodes, watches, transactions, bytes] = peaks;
                let mut largest = Largest::default();
                // Earlier versions did not write them.
                if !body.is_empty() {
                    for amount in &mut largest.0 {
                        *amount = body.u64()?.cast_signed();
                    }
                }
                let domain = self.domain(domid);
                domain.unique_id = unique_id;
                (domain.introduced, domain.shutdown) = (flags & 1 != 0, flags & 2 != 0);
                domain.target = (target != NO_TARGET).then_some(DomId(target));
                domain.peak = Usage { nodes, watches, transactions, bytes };
                domain.largest = largest;
            }
            kind::ERAS => {
                for _ in 0..body.u32()? {
                    self.eras.insert(DomId(body.u16()?), body.u32()?);
                }
            }
            kind::ENGINE => {}
            _ if self.unknown.len() < LOST_MAX && self.unknown.insert(kind) => {
                self.lose(format!("records of type {kind:#x}, which is not known"));
            }
            _ => {}
        }
        Ok(())
    }

    /// The domain with this domid, made if there is none yet.
    pub(super) fn domain(&mut self, domid: DomId) -> &mut DomainState {
        self.domains.entry(domid).or_insert_with(|| DomainState {
            domid,
            unique_id: crate::domain::registry::UNKNOWN_ID,
            introduced: false,
            shutdown: false,
            target: None,
            features: Features::ALL,
            quotas: None,
            peak: Usage::default(),
            largest: Largest::default(),
        })
    }

    /// The connection that a record is about.
    fn connection(&mut self, body: &mut Cursor<'_>) -> Result<usize> {
        let number = body.u32()?;
        self.numbers.get(&number).copied().ok_or(body.error("a connection that is not there"))
    }

    /// Adds a connection, with the next number.
    pub(super) fn connect(&mut self, caller: Caller) -> &mut ConnectionState {
        let at = self.connections.len();
        self.connections.push(ConnectionState::new(ConnId(at as u64 + 1), caller));
        &mut self.connections[at]
    }

    fn take_connection(&mut self, body: &mut Cursor<'_>) -> Result<()> {
        let number = body.u32()?;
        if self.numbers.insert(number, self.connections.len()).is_some() {
            return Err(body.error("a connection that is there twice"));
        }
        let (ring, has_id) = (body.u16()? == 0, body.u16()? & 1 != 0);
        let mut io = ConnectionIo::default();
        let mut domid = None;
        if ring {
            let (own, target) = (DomId(body.u16()?), body.u16()?);
            io.port = Some(body.u32()?).filter(|port| *port != 0);
            domid = Some((own, (target != NO_TARGET).then_some(DomId(target))));
        } else {
            io.fd = take_fd(body)?;
            body.take(4)?;
        }
        let (input, output_rest, output) = (body.u16()?, body.u16()?, body.u32()?);
        io.unread = body.take(input.into())?.into();
        io.unsent = body.take(output as usize)?.into();
        io.partly_sent = output_rest.into();
        if io.partly_sent > io.unsent.len() {
            return Err(body.error("more is left of a message than of all"));
        }
        let mut caller = Caller::Socket;
        if let Some((domid, target)) = domid {
            caller = Caller::Domain(domid);
            let mut unique_id = crate::domain::registry::UNKNOWN_ID;
            if has_id {
                body.align()?;
                unique_id = body.u64()?;
            }
            let domain = self.domain(domid);
            (domain.introduced, domain.unique_id, domain.target) = (true, unique_id, target);
        }
        self.connect(caller).io = io;
        Ok(())
    }

    /// Comes before the watches that it is about.
    fn take_detail(&mut self, body: &mut Cursor<'_>) -> Result<()> {
        let at = self.connection(body)?;
        let connection = &mut self.connections[at];
        let io = &mut connection.io;
        let (flags, remote, indices) = (body.u32()?, body.u32()?, (body.u32()?, body.u32()?));
        io.failed = flags & 1 != 0;
        io.indices = (flags & 2 != 0).then_some(indices);
        io.gfn = Some(body.u64()?).filter(|_| flags & 4 != 0);
        io.remote_port = Some(remote).filter(|port| *port != 0);
        connection.id = ConnId(body.u64()?);
        connection.last_transaction = TxId(body.u32()?);
        connection.domid = Some(DomId(body.u16()?)).filter(|_| flags & 8 != 0);
        connection.failures = body.u16()?;
        connection.held = Some(body.u64()?).filter(|until| *until != NEVER);
        let more = body.u32()?;
        io.unread.extend_from_slice(body.take(more as usize)?);
        if !connection.watches.is_empty() || !connection.events.is_empty() {
            return Err(body.error("details that come too late"));
        }
        let mut pending = Vec::new();
        for _ in 0..body.u32()? {
            let id = WatchId(body.u64()?);
            let depth = Some(body.u32()?).filter(|depth| *depth != u32::MAX);
            pending.push(WatchDetail { id, depth, collapsed: body.u8()? != 0 });
        }
        pending.reverse();
        for _ in 0..body.u32()? {
            let watch = WatchId(body.u64()?);
            let len = body.u16()?;
            let path = Path::parse(body.string(len.into())?);
            let path = path.ok_or(body.error("an event about what is no path"))?.as_str().into();
            connection.events.push(EventState { watch, path });
        }
        for _ in 0..body.u32()? {
            connection.protected.push((TxId(body.u32()?), body.u64()?));
        }
        self.pending.insert(at, pending);
        Ok(())
    }

    fn take_watch(&mut self, body: &mut Cursor<'_>, extended: bool) -> Result<()> {
        let at = self.connection(body)?;
        let lens = [body.u16()?, body.u16()?];
        let mut depth = None;
        let mut plain = body.clone();
        let mut texts = None;
        if extended {
            let (levels, _) = (body.u16()?, body.u16()?);
            depth = Some(u32::from(levels)).filter(|_| levels != NO_DEPTH);
            texts = take_texts(body, lens).ok();
        }
        // C xenstored of Xen 4.22 and 4.23 announces a depth and writes none.
        if texts.is_none() {
            depth = None;
            texts = Some(take_texts(&mut plain, lens)?);
            if extended {
                self.lose(format!("depth of a watch of connection {}", at + 1));
            }
        }
        let (path, token) = texts.unwrap_or_default();
        let path = Path::parse(path).ok_or(body.error("a watch on what is no path"))?;
        let token = Box::from(token);
        self.add_watch(at, path.as_str().into(), token, depth);
        Ok(())
    }

    /// Adds a watch to the connection at this place.
    pub(super) fn add_watch(
        &mut self,
        at: usize,
        path: String,
        token: Box<[u8]>,
        depth: Option<u32>,
    ) {
        self.last_watch += 1;
        let mut watch = WatchState {
            id: WatchId(self.last_watch),
            path: path.into(),
            prefix: 0,
            token: token.into(),
            depth,
            collapsed: false,
        };
        if let Some(known) = self.pending.get_mut(&at).and_then(Vec::pop) {
            (watch.id, watch.depth, watch.collapsed) = (known.id, known.depth, known.collapsed);
        }
        self.connections[at].watches.push(watch);
    }

    fn take_transaction(&mut self, body: &mut Cursor<'_>) -> Result<()> {
        let number = body.clone().u32()?;
        let at = self.connection(body)?;
        let id = TxId(body.u32()?);
        let (Some(counters), Some(tree)) = (&self.counters, &self.tree) else {
            return Err(body.error("a transaction without counters"));
        };
        let base = self.base.as_ref().unwrap_or(tree);
        let domid = self.connections[at].domid;
        let transaction = take_transaction(body, base, counters.stamp, domid)?;
        let too_old = transaction.snapshot.is_same(tree) && transaction.stamp < self.youngest();
        if transaction.epoch > counters.epoch || too_old {
            return Err(body.error("a transaction of another time"));
        }
        if !transaction.is_given_up() {
            self.base = Some(transaction.snapshot.clone());
        }
        self.announced.remove(&(number, id));
        self.connections[at].transactions.push((id, Arc::new(transaction)));
        Ok(())
    }

    fn take_quotas(&mut self, body: &mut Cursor<'_>, count: u32) -> Result<Quotas> {
        let mut values = body.clone();
        body.take(usize::try_from(count).map_or(usize::MAX, |count| count * 4))?;
        let mut quotas = self.quotas.unwrap_or_default();
        for _ in 0..count {
            let value = values.u32()?;
            let name = body.c_string()?;
            match Quota::parse(name) {
                Some(quota) => quotas.set(quota, value),
                None => self.lose(format!("quota {} = {value}", name.escape_ascii())),
            }
        }
        Ok(quotas)
    }

    /// The stamp of the youngest node.
    fn youngest(&self) -> u64 {
        self.created.last().copied().unwrap_or(0)
    }

    fn take_nodes_since(&mut self, body: &mut Cursor<'_>) -> Result<()> {
        let (Some(counters), Some(tree)) = (&self.counters, &self.tree) else {
            return Err(body.error("changes of no nodes"));
        };
        let (tree, effect) = take_difference(body, tree, counters.stamp)?;
        self.tree = Some(tree);
        // Also those of nodes that have gone: a number is given once.
        self.created.extend(effect.created);
        self.check_stamps(body)
    }

    /// Sorts the stamps of nodes, no two of which may be the same.
    fn check_stamps(&mut self, place: &Cursor<'_>) -> Result<()> {
        self.created.sort_unstable();
        match self.created.windows(2).all(|pair| pair[0] < pair[1]) {
            true => Ok(()),
            false => Err(place.error("two nodes with the same stamp")),
        }
    }

    pub(super) fn finish_tree(&mut self, grower: Grower, place: &Cursor<'_>) -> Result<()> {
        let (tree, created, last) = grower.finish(place)?;
        self.created = created;
        self.check_stamps(place)?;
        // Another daemon's are given numbers in their order.
        self.counters.get_or_insert(Counters {
            stamp: last,
            last_conn: self.connections.len() as u64,
            last_watch: self.last_watch,
            ..Counters::default()
        });
        self.tree = Some(tree);
        Ok(())
    }

    pub(super) fn finish(mut self, place: &Cursor<'_>) -> Result<State> {
        if self.pending.values().any(|watches| !watches.is_empty()) {
            return Err(place.error("details of watches that are not there"));
        }
        let (Some(counters), Some(tree)) = (self.counters, self.tree) else {
            return Err(place.error("no nodes"));
        };
        // What another daemon only has the number of is answered, but never committed.
        for (number, id) in core::mem::take(&mut self.announced) {
            let Some(at) = self.numbers.get(&number).copied() else { continue };
            let mut transaction = Transaction::new(&tree, counters.epoch, counters.stamp, 0);
            transaction.lost = true;
            let connection = &mut self.connections[at];
            connection.transactions.push((id, Arc::new(transaction)));
            connection.last_transaction = connection.last_transaction.max(id);
            let what = format!("transaction {id} of connection {}: it ends in EAGAIN", at + 1);
            if self.lost.len() < LOST_MAX {
                self.lost.push(what);
            }
        }
        for connection in &mut self.connections {
            connection.transactions.sort_by_key(|(id, _)| *id);
        }
        Ok(State {
            quotas: self.quotas,
            domains: self.domains.into_values().collect(),
            connections: self.connections,
            io: self.io,
            lost: self.lost,
            counters,
            retention: self.retention,
            eras: self.eras,
            tree,
        })
    }
}

fn take_fd(body: &mut Cursor<'_>) -> Result<Option<i32>> {
    Ok(i32::try_from(body.u32()?).ok())
}

/// The path and the token of a watch.
fn take_texts<'a>(body: &mut Cursor<'a>, lens: [u16; 2]) -> Result<(&'a [u8], &'a [u8])> {
    let path = body.string(lens[0].into())?;
    let token = body.string(lens[1].into())?;
    Path::parse(path).ok_or(body.error("a watch on what is no path"))?;
    Ok((path, token))
}
