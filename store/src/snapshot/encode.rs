//! From a state to a migration stream.

use alloc::vec::Vec;

use xenstore_protocol::stream::{Sink, VERSION, Writer, kind};
use xenstore_protocol::{Features, Quota};

use super::difference::put_difference;
use super::transactions::put_transaction;
use super::{
    Base, ConnectionState, DomainState, NEVER, NO_DEPTH, NO_TARGET, State, WatchState, compact,
};
use crate::domain::quotas::Quotas;
use crate::domain::registry::Usage;
use crate::ids::Caller;

/// What a node takes in a stream, mostly; more is made room for.
const NODE_SIZE: usize = 96;

/// Kinds of connections.
const RING: u16 = 0;
const SOCKET: u16 = 1;
/// CONNECTION_DATA has an id that tells the domain from others with its domid.
const HAS_ID: u16 = 1;

impl State {
    /// Writes a migration stream with all that there is.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new(VERSION, self.rough_size());
        self.put_everything(&mut writer, None);
        writer.finish()
    }

    /// The same in pieces, for a stream that goes elsewhere: half of the time goes into memory that
    /// is touched for the first time.
    pub fn encode_to(&self, sink: &mut Sink<'_>) {
        let mut sink = |piece: &[u8]| sink(piece);
        let mut writer = Writer::to(&mut sink, VERSION);
        self.put_everything(&mut writer, None);
        writer.finish();
    }

    /// Writes what is to follow the stream of an earlier state of the same store, in pieces. Both
    /// together are this state.
    pub fn encode_since(&self, base: &Base, sink: &mut Sink<'_>) {
        let mut sink = |piece: &[u8]| sink(piece);
        let mut writer = Writer::to(&mut sink, VERSION);
        self.put_everything(&mut writer, Some(base));
        writer.finish();
    }

    fn put_everything(&self, writer: &mut Writer, base: Option<&Base>) {
        self.put_global(writer);
        if let Some(quotas) = &self.quotas {
            put_global_quotas(writer, quotas);
        }
        self.put_engine(writer);
        for (number, connection) in (1..).zip(&self.connections) {
            self.put_connection(writer, number, connection, &connection.io.unsent);
            put_detail(writer, number, connection);
            for watch in &connection.watches {
                put_watch(writer, number, watch, watch.depth);
            }
        }
        match base {
            None => {
                writer.begin(kind::NODES);
                compact::put_nodes(writer, &self.tree);
            }
            Some(Base(tree)) => {
                writer.begin(kind::NODES_SINCE);
                put_difference(writer, tree, &self.tree);
            }
        }
        for domain in &self.domains {
            put_domain(writer, domain, domain.features, true);
            put_domain_detail(writer, domain);
        }
        self.put_transactions(writer);
    }

    /// Bytes that a stream takes, roughly.
    pub(super) fn rough_size(&self) -> usize {
        let nodes: i64 = self.domains.iter().map(|domain| domain.peak.nodes.max(0)).sum();
        // Not more than would be there: peaks are not counted again.
        usize::try_from(nodes).unwrap_or_default().min(1 << 20) * NODE_SIZE
    }

    pub(super) fn put_global(&self, writer: &mut Writer) {
        writer.begin(kind::GLOBAL_DATA);
        put_fd(writer, self.io.listener);
        put_fd(writer, self.io.evtchn);
    }

    fn put_engine(&self, writer: &mut Writer) {
        let counters = &self.counters;
        writer.begin(kind::ENGINE);
        writer.u64(counters.stamp);
        writer.u64(counters.epoch);
        writer.u64(counters.last_conn);
        writer.u64(counters.last_watch);
        writer.u32(counters.injected_eagain);
        writer.u64(counters.protected);
        writer.u64(counters.held);
        writer.u64(self.retention.retired.cast_unsigned());
        writer.len32(self.retention.due.len());
        for (domid, due) in &self.retention.due {
            writer.u16(domid.0);
            writer.u64(due.cast_unsigned());
        }
        if !self.eras.is_empty() {
            writer.begin(kind::ERAS);
            writer.len32(self.eras.len());
            for (domid, era) in &self.eras {
                writer.u16(domid.0);
                writer.u32(*era);
            }
        }
        writer.begin(kind::SERVER);
        writer.u32(self.io.virq_port.unwrap_or(0));
        writer.len32(self.io.other.len());
        writer.bytes(&self.io.other);
    }

    pub(super) fn put_connection(
        &self,
        writer: &mut Writer,
        number: u32,
        connection: &ConnectionState,
        output: &[u8],
    ) {
        let io = &connection.io;
        writer.begin(kind::CONNECTION_DATA);
        writer.u32(number);
        let id = match connection.caller {
            Caller::Domain(domid) => {
                let at = self.domains.binary_search_by_key(&domid, |domain| domain.domid);
                let domain = at.ok().map(|at| &self.domains[at]);
                let target = domain.and_then(|d| d.target).map_or(NO_TARGET, |target| target.0);
                [RING, HAS_ID, domid.0, target].iter().for_each(|word| writer.u16(*word));
                writer.u32(io.port.unwrap_or(0));
                Some(domain.map_or(0, |domain| domain.unique_id))
            }
            Caller::Socket => {
                [SOCKET, 0].iter().for_each(|word| writer.u16(*word));
                put_fd(writer, io.fd);
                writer.u32(0);
                None
            }
        };
        let (input, _) = split_input(&io.unread);
        writer.len16(input.len());
        // A message has at most 4,112 bytes.
        writer.u16(u16::try_from(io.partly_sent).unwrap_or(0));
        writer.len32(output.len());
        writer.bytes(input);
        writer.bytes(output);
        if let Some(id) = id {
            writer.align();
            writer.u64(id);
        }
    }

    /// The youngest first: each snapshot is written as what differs from that of the next younger,
    /// so that what they share is written once.
    fn put_transactions(&self, writer: &mut Writer) {
        let mut open = Vec::new();
        for (number, connection) in (1..).zip(&self.connections) {
            for (id, transaction) in &connection.transactions {
                open.push((number, connection.domid, *id, transaction));
            }
        }
        open.sort_by_key(|(.., transaction)| core::cmp::Reverse(transaction.stamp));
        let mut base = &self.tree;
        for (number, domid, id, transaction) in open {
            // For those who do not know what follows.
            writer.begin(kind::TRANSACTION_DATA);
            writer.u32(number);
            writer.u32(id.0);
            writer.begin(kind::TRANSACTION_DETAIL);
            writer.u32(number);
            writer.u32(id.0);
            put_transaction(writer, transaction, base, domid);
            if !transaction.is_given_up() {
                base = &transaction.snapshot;
            }
        }
    }
}

/// CONNECTION_DATA has 16 bits for the length of the input; what is more comes in our own record.
pub(super) fn split_input(input: &[u8]) -> (&[u8], &[u8]) {
    input.split_at(input.len().min(u16::MAX.into()))
}

fn put_fd(writer: &mut Writer, fd: Option<i32>) {
    writer.u32(fd.unwrap_or(-1).cast_unsigned());
}

fn put_detail(writer: &mut Writer, number: u32, connection: &ConnectionState) {
    let io = &connection.io;
    writer.begin(kind::CONNECTION_DETAIL);
    writer.u32(number);
    let flags = u32::from(io.failed)
        | u32::from(io.indices.is_some()) << 1
        | u32::from(io.gfn.is_some()) << 2
        | u32::from(connection.domid.is_some()) << 3;
    let indices = io.indices.unwrap_or_default();
    for word in [flags, io.remote_port.unwrap_or(0), indices.0, indices.1] {
        writer.u32(word);
    }
    writer.u64(io.gfn.unwrap_or(0));
    writer.u64(connection.id.0);
    writer.u32(connection.last_transaction.0);
    writer.u16(connection.domid.unwrap_or_default().0);
    writer.u16(connection.failures);
    writer.u64(connection.held.unwrap_or(NEVER));
    let (_, more) = split_input(&io.unread);
    writer.len32(more.len());
    writer.bytes(more);
    writer.len32(connection.watches.len());
    for watch in &connection.watches {
        writer.u64(watch.id.0);
        writer.u32(watch.depth.map_or(u32::MAX, |depth| depth.min(u32::MAX - 1)));
        writer.u8(watch.collapsed.into());
    }
    writer.len32(connection.events.len());
    for event in &connection.events {
        writer.u64(event.watch.0);
        writer.len16(event.path.len() + 1);
        writer.c_string(event.path.as_bytes());
    }
    writer.len32(connection.protected.len());
    for (id, end) in &connection.protected {
        writer.u32(id.0);
        writer.u64(*end);
    }
}

pub(super) fn put_watch(writer: &mut Writer, number: u32, watch: &WatchState, depth: Option<u32>) {
    let kind = if depth.is_some() { kind::WATCH_DATA_EXTENDED } else { kind::WATCH_DATA };
    writer.begin(kind);
    writer.u32(number);
    writer.len16(watch.path().len() + 1);
    writer.len16(watch.token.len() + 1);
    if let Some(depth) = depth {
        // No path has that many levels.
        writer.u16(u16::try_from(depth).unwrap_or(NO_DEPTH).min(NO_DEPTH - 1));
        writer.u16(0);
    }
    writer.c_string(watch.path().as_bytes());
    writer.c_string(&watch.token);
}

pub(super) fn put_global_quotas(writer: &mut Writer, quotas: &Quotas) {
    writer.begin(kind::GLOBAL_QUOTA_DATA);
    writer.len16(Quota::ALL.len());
    writer.u16(0);
    put_quotas(writer, quotas);
}

fn put_quotas(writer: &mut Writer, quotas: &Quotas) {
    for quota in Quota::ALL {
        writer.u32(quotas.get(*quota));
    }
    for quota in Quota::ALL {
        writer.c_string(quota.name().as_bytes());
    }
}

/// Writes a domain with these of its features and, if `with_quotas`, its quotas.
pub(super) fn put_domain(
    writer: &mut Writer,
    domain: &DomainState,
    features: Features,
    with_quotas: bool,
) {
    let quotas = domain.quotas.as_ref().filter(|_| with_quotas);
    writer.begin(kind::DOMAIN_DATA);
    writer.u16(domain.domid.0);
    writer.len16(if quotas.is_some() { Quota::ALL.len() } else { 0 });
    writer.u32(features.bits());
    if let Some(quotas) = quotas {
        put_quotas(writer, quotas);
    }
}

fn put_domain_detail(writer: &mut Writer, domain: &DomainState) {
    writer.begin(kind::DOMAIN_DETAIL);
    writer.u16(domain.domid.0);
    writer.u16(u16::from(domain.introduced) | u16::from(domain.shutdown) << 1);
    writer.u16(domain.target.map_or(NO_TARGET, |target| target.0));
    writer.u16(0);
    writer.u64(domain.unique_id);
    let Usage { nodes, watches, transactions, bytes } = domain.peak;
    for peak in [nodes, watches, transactions, bytes].into_iter().chain(domain.largest.0) {
        writer.u64(peak.cast_unsigned());
    }
}
