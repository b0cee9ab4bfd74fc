//! The whole state as plain data, and as a migration stream.
//!
//! Carried: nodes with their order and permissions, domains, quotas, features, targets, connections
//! with their watches. Not carried: open transactions, events that have not been fetched, and
//! generations, which are assigned anew. Connections of one domain are one ring connection in the
//! stream.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;

use xenstore_protocol::stream::{Cursor, Reader, StreamError, Writer, kind};
use xenstore_protocol::{ABS_PATH_MAX, AbsPath, Access, DomId, Path, Perm, Quota};

use crate::config::Quotas;
use crate::connection::{Caller, ConnId};

/// In place of a target that is not there (`DOMID_INVALID`).
const NO_TARGET: u16 = 0x7ff4;
/// In place of a depth that is not there.
const NO_DEPTH: u16 = 0xffff;

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeState {
    /// Absolute, or the name of a special node.
    pub path: String,
    /// Its value.
    pub value: Box<[u8]>,
    /// Its permission entries; those that are ignored named nobody when they were set.
    pub perms: Vec<(Perm, bool)>,
}

/// A domain that the store knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainState {
    /// Its domid.
    pub domid: DomId,
    /// Tells it from others with the same domid.
    pub unique_id: u64,
    /// Is it connected?
    pub introduced: bool,
    /// Has its shutdown been told?
    pub shutdown: bool,
    /// The domain whose rights it has as well.
    pub target: Option<DomId>,
    /// Feature bits that it is offered.
    pub features: u32,
    /// Its quotas.
    pub quotas: Quotas,
}

/// A watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchState {
    /// As the client wrote it: a relative path stays relative.
    pub path: String,
    /// As the client gave it.
    pub token: Box<[u8]>,
    /// Levels below the path; all if absent.
    pub depth: Option<u16>,
}

/// What a server knows of a connection besides what the engine does: descriptors, and bytes on
/// their way. The engine leaves it alone: [`Engine::dump`](crate::Engine::dump) gives defaults, and
/// `restore` does not look at it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoState {
    /// Descriptor of a socket.
    pub fd: Option<i32>,
    /// Bytes that have been read and not executed: whole requests, then a part of one.
    pub input: Vec<u8>,
    /// Bytes that have been answered and not written: the rest of a message, then whole ones.
    pub output: Vec<u8>,
    /// How many bytes of `output` are the rest of a message that was written in part; 0 if it
    /// begins with a whole one.
    pub output_rest: u16,
    /// The local port of a ring's event channel, bound on [`ServerIo::evtchn`].
    pub port: Option<u32>,
    /// The port of that channel in the domain.
    pub remote_port: Option<u32>,
    /// The page of a ring, if it was introduced with one.
    pub gfn: Option<u64>,
    /// Our indices into the ring: what has been taken from the requests, and put into the replies.
    /// None if the page is all that is known of them.
    pub indices: Option<(u32, u32)>,
    /// The guest has broken the protocol and is not heard until it starts anew.
    pub broken: bool,
}

/// What belongs to the server as a whole. The engine leaves it alone, as [`IoState`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerIo {
    /// Descriptor of the listening socket.
    pub listener: Option<i32>,
    /// Descriptor of the event channel device.
    pub evtchn: Option<i32>,
    /// The local port on which `VIRQ_DOM_EXC` is bound.
    pub virq_port: Option<u32>,
    /// Whatever else a server wants to find again; only it knows what it means.
    pub other: Vec<u8>,
}

/// A connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionState {
    /// Its number, which it keeps.
    pub id: ConnId,
    /// Who is at the other end.
    pub caller: Caller,
    /// What the server keeps for it.
    pub io: IoState,
    /// Its watches, in order of registration.
    pub watches: Vec<WatchState>,
}

/// Everything that is carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// What new domains start with.
    pub quotas: Quotas,
    /// In order of domids.
    pub domains: Vec<DomainState>,
    /// In order of connection.
    pub connections: Vec<ConnectionState>,
    /// Parents before children, siblings in order of creation; special nodes last.
    pub nodes: Vec<NodeState>,
    /// What belongs to the server.
    pub io: ServerIo,
    /// What a stream that was read could not carry or has in it that we do not know, to be told to
    /// the operator. Not written.
    pub lost: Vec<String>,
}

/// A length in a record; paths, tokens, values and counts are far below 64 KiB.
fn len16(len: usize) -> [u8; 2] {
    u16::try_from(len).expect("bounded by the size of a message").to_le_bytes()
}

fn len32(len: usize) -> [u8; 4] {
    u32::try_from(len).expect("far below 4 GiB").to_le_bytes()
}

impl State {
    /// Writes a migration stream.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        let mut global = Vec::new();
        for fd in [self.io.listener, self.io.evtchn] {
            global.extend_from_slice(&fd.unwrap_or(-1).to_le_bytes());
        }
        writer.record(kind::GLOBAL_DATA, &global);
        let mut quota = len16(Quota::ALL.len()).to_vec();
        quota.extend_from_slice(&len16(0));
        put_quotas(&mut quota, &self.quotas);
        writer.record(kind::GLOBAL_QUOTA_DATA, &quota);
        let mut server = self.io.virq_port.unwrap_or(0).to_le_bytes().to_vec();
        server.extend_from_slice(&len32(self.io.other.len()));
        server.extend_from_slice(&self.io.other);
        writer.record(kind::SERVER, &server);
        for (number, connection) in (1..).zip(&self.connections) {
            self.put_connection(&mut writer, number, connection);
        }
        for node in &self.nodes {
            writer.record(kind::NODE_DATA, &node_record(node));
        }
        for domain in &self.domains {
            let mut body = domain.domid.0.to_le_bytes().to_vec();
            body.extend_from_slice(&len16(Quota::ALL.len()));
            body.extend_from_slice(&domain.features.to_le_bytes());
            put_quotas(&mut body, &domain.quotas);
            writer.record(kind::DOMAIN_DATA, &body);
            let flags = u16::from(domain.introduced) | u16::from(domain.shutdown) << 1;
            let target = domain.target.map_or(NO_TARGET, |target| target.0);
            let words = [domain.domid.0, flags, target, 0];
            let mut body = words.map(u16::to_le_bytes).concat();
            body.extend_from_slice(&domain.unique_id.to_le_bytes());
            writer.record(kind::DOMAIN_IDENTITY, &body);
        }
        writer.finish()
    }

    fn put_connection(&self, writer: &mut Writer, number: u32, connection: &ConnectionState) {
        let mut body = number.to_le_bytes().to_vec();
        let io = &connection.io;
        // The record has 16 bits for this length; what is more comes in our own.
        let (input, more_input) = io.input.split_at(io.input.len().min(u16::MAX.into()));
        let id = match connection.caller {
            Caller::Domain(domid) => {
                let domain = self.domains.iter().find(|domain| domain.domid == domid);
                let target = domain.and_then(|d| d.target).map_or(NO_TARGET, |target| target.0);
                body.extend_from_slice(&[0, 1, domid.0, target].map(u16::to_le_bytes).concat());
                body.extend_from_slice(&io.port.unwrap_or(0).to_le_bytes());
                Some(domain.map_or(0, |d| d.unique_id))
            }
            Caller::Socket => {
                body.extend_from_slice(&[1_u16, 0].map(u16::to_le_bytes).concat());
                body.extend_from_slice(&io.fd.unwrap_or(-1).to_le_bytes());
                body.extend_from_slice(&[0; 4]);
                None
            }
        };
        body.extend_from_slice(&len16(input.len()));
        body.extend_from_slice(&io.output_rest.to_le_bytes());
        body.extend_from_slice(&len32(io.output.len()));
        body.extend_from_slice(input);
        body.extend_from_slice(&io.output);
        if let Some(id) = id {
            body.resize(body.len().next_multiple_of(8), 0);
            body.extend_from_slice(&id.to_le_bytes());
        }
        writer.record(kind::CONNECTION_DATA, &body);
        let mut detail = number.to_le_bytes().to_vec();
        let indices = io.indices.unwrap_or_default();
        let flags = u32::from(io.broken)
            | u32::from(io.indices.is_some()) << 1
            | u32::from(io.gfn.is_some()) << 2;
        for word in [flags, io.remote_port.unwrap_or(0), indices.0, indices.1] {
            detail.extend_from_slice(&word.to_le_bytes());
        }
        detail.extend_from_slice(&len32(more_input.len()));
        detail.extend_from_slice(&io.gfn.unwrap_or(0).to_le_bytes());
        detail.extend_from_slice(&connection.id.0.to_le_bytes());
        detail.extend_from_slice(more_input);
        writer.record(kind::CONNECTION_DETAIL, &detail);
        for watch in &connection.watches {
            let mut body = number.to_le_bytes().to_vec();
            body.extend_from_slice(&len16(watch.path.len() + 1));
            body.extend_from_slice(&len16(watch.token.len() + 1));
            if let Some(depth) = watch.depth {
                body.extend_from_slice(&[depth, 0].map(u16::to_le_bytes).concat());
            }
            for text in [watch.path.as_bytes(), &watch.token] {
                body.extend_from_slice(text);
                body.push(0);
            }
            let extended = watch.depth.is_some();
            let kind = if extended { kind::WATCH_DATA_EXTENDED } else { kind::WATCH_DATA };
            writer.record(kind, &body);
        }
    }

    /// Reads a migration stream, ours or that of another daemon. Nothing is taken from one that is
    /// malformed.
    pub fn decode(bytes: &[u8]) -> Result<State, StreamError> {
        let mut reader = Reader::new(bytes)?;
        let mut state = State {
            quotas: Quotas::default(),
            domains: Vec::new(),
            connections: Vec::new(),
            nodes: Vec::new(),
            io: ServerIo::default(),
            lost: Vec::new(),
        };
        let mut numbers = Vec::new();
        while let Some(record) = reader.next_record()? {
            let mut body = record.body;
            match record.kind {
                kind::GLOBAL_QUOTA_DATA => {
                    // Values per domain and global ones, which differ in nothing here.
                    let count = u32::from(body.u16()?) + u32::from(body.u16()?);
                    state.quotas = take_quotas(&mut body, count)?;
                }
                kind::GLOBAL_DATA => {
                    state.io.listener = take_fd(&mut body)?;
                    state.io.evtchn = take_fd(&mut body)?;
                }
                kind::SERVER => {
                    state.io.virq_port = Some(body.u32()?).filter(|port| *port != 0);
                    let len = body.u32()?;
                    state.io.other = body.take(len as usize)?.into();
                }
                kind::CONNECTION_DATA => {
                    numbers.push(body.u32()?);
                    state.take_connection(&mut body)?;
                }
                kind::CONNECTION_DETAIL => {
                    let number = body.u32()?;
                    let at = numbers.iter().position(|known| *known == number);
                    let at = at.ok_or(body.error("details of no connection"))?;
                    take_detail(&mut body, &mut state.connections[at])?;
                }
                kind::WATCH_DATA | kind::WATCH_DATA_EXTENDED => {
                    let number = body.u32()?;
                    let at = numbers.iter().position(|known| *known == number);
                    let at = at.ok_or(body.error("a watch of no connection"))?;
                    let extended = record.kind == kind::WATCH_DATA_EXTENDED;
                    state.connections[at].watches.push(take_watch(&mut body, extended)?);
                }
                kind::NODE_DATA => {
                    let node = take_node(&mut body)?;
                    state.nodes.extend(node);
                }
                kind::DOMAIN_DATA => {
                    let domid = DomId(body.u16()?);
                    let count = body.u16()?.into();
                    let features = body.u32()?;
                    let quotas = take_quotas(&mut body, count)?;
                    let domain = state.domain(domid);
                    (domain.features, domain.quotas) = (features, quotas);
                }
                kind::DOMAIN_IDENTITY => {
                    let (domid, flags) = (DomId(body.u16()?), body.u16()?);
                    let (target, _) = (body.u16()?, body.u16()?);
                    let unique_id = body.u64()?;
                    let domain = state.domain(domid);
                    domain.unique_id = unique_id;
                    (domain.introduced, domain.shutdown) = (flags & 1 != 0, flags & 2 != 0);
                    domain.target = (target != NO_TARGET).then_some(DomId(target));
                }
                _ => {}
            }
        }
        state.domains.sort_by_key(|domain| domain.domid);
        Ok(state)
    }

    /// The domain with this domid, made if there is none yet.
    fn domain(&mut self, domid: DomId) -> &mut DomainState {
        let at = self.domains.iter().position(|domain| domain.domid == domid);
        let at = at.unwrap_or_else(|| {
            self.domains.push(DomainState {
                domid,
                unique_id: 0,
                introduced: false,
                shutdown: false,
                target: None,
                features: xenstore_protocol::feature::ALL,
                quotas: Quotas::default(),
            });
            self.domains.len() - 1
        });
        &mut self.domains[at]
    }

    fn take_connection(&mut self, body: &mut Cursor<'_>) -> Result<(), StreamError> {
        let (ring, has_id) = (body.u16()? == 0, body.u16()? & 1 != 0);
        let mut own = body.clone();
        let (domid, target) = (DomId(body.u16()?), body.u16()?);
        let mut io = IoState::default();
        if ring {
            io.port = Some(body.u32()?).filter(|port| *port != 0);
        } else {
            io.fd = take_fd(&mut own)?;
            body.take(4)?;
        }
        let (input, output_rest, output) = (body.u16()?, body.u16()?, body.u32()?);
        io.input = body.take(input.into())?.into();
        io.output = body.take(output as usize)?.into();
        io.output_rest = output_rest;
        if output_rest as usize > io.output.len() {
            return Err(body.error("more is left of a message than of all"));
        }
        let caller = if ring { Caller::Domain(domid) } else { Caller::Socket };
        if ring {
            body.align()?;
            let unique_id = if has_id { body.u64()? } else { 0 };
            let domain = self.domain(domid);
            (domain.introduced, domain.unique_id) = (true, unique_id);
            domain.target = (target != NO_TARGET).then_some(DomId(target));
        }
        let id = ConnId(self.connections.len() as u64 + 1);
        self.connections.push(ConnectionState { id, caller, io, watches: Vec::new() });
        Ok(())
    }
}

fn take_fd(body: &mut Cursor<'_>) -> Result<Option<i32>, StreamError> {
    Ok(i32::try_from(body.u32()?).ok())
}

fn take_detail(body: &mut Cursor<'_>, connection: &mut ConnectionState) -> Result<(), StreamError> {
    let (flags, remote) = (body.u32()?, body.u32()?);
    let indices = (body.u32()?, body.u32()?);
    let (more_input, gfn) = (body.u32()?, body.u64()?);
    connection.id = ConnId(body.u64()?);
    let io = &mut connection.io;
    io.input.extend_from_slice(body.take(more_input as usize)?);
    io.broken = flags & 1 != 0;
    io.indices = (flags & 2 != 0).then_some(indices);
    io.gfn = (flags & 4 != 0).then_some(gfn);
    io.remote_port = Some(remote).filter(|port| *port != 0);
    Ok(())
}

fn put_quotas(body: &mut Vec<u8>, quotas: &Quotas) {
    for quota in Quota::ALL {
        body.extend_from_slice(&quotas.get(*quota).to_le_bytes());
    }
    for quota in Quota::ALL {
        body.extend_from_slice(quota.name().as_bytes());
        body.push(0);
    }
}

/// Quotas that we do not have are left out, as the design document asks.
fn take_quotas(body: &mut Cursor<'_>, count: u32) -> Result<Quotas, StreamError> {
    let mut values = body.clone();
    body.take(usize::try_from(count).map_or(usize::MAX, |count| count * 4))?;
    let mut quotas = Quotas::default();
    for _ in 0..count {
        let value = values.u32()?;
        if let Some(quota) = Quota::parse(body.c_string()?) {
            quotas.set(quota, value);
        }
    }
    Ok(quotas)
}

fn take_watch(body: &mut Cursor<'_>, extended: bool) -> Result<WatchState, StreamError> {
    let (path, token) = (body.u16()?, body.u16()?);
    let depth = if extended { (body.u16()?, body.u16()?).0 } else { NO_DEPTH };
    let path = body.string(path.into())?;
    let token = body.string(token.into())?;
    let path = Path::parse(path).ok_or(body.error("a watch on what is no path"))?;
    let depth = (depth != NO_DEPTH).then_some(depth);
    Ok(WatchState { path: path.as_str().into(), token: token.into(), depth })
}

fn node_record(node: &NodeState) -> Vec<u8> {
    let mut body = [0; 8].to_vec(); // committed: no connection, no transaction
    body.extend_from_slice(&len16(node.path.len() + 1));
    body.extend_from_slice(&len16(node.value.len()));
    body.extend_from_slice(&len16(0));
    body.extend_from_slice(&len16(node.perms.len()));
    for (perm, ignored) in &node.perms {
        body.extend_from_slice(&[perm.access.letter(), u8::from(*ignored)]);
        body.extend_from_slice(&perm.domid.0.to_le_bytes());
    }
    body.extend_from_slice(node.path.as_bytes());
    body.push(0);
    body.extend_from_slice(&node.value);
    body
}

/// Nothing for a node that belongs to a transaction.
fn take_node(body: &mut Cursor<'_>) -> Result<Option<NodeState>, StreamError> {
    let committed = body.u32()? == 0;
    body.u32()?;
    let (path, value, _access) = (body.u16()?, body.u16()?, body.u16()?);
    let mut perms = Vec::new();
    for _ in 0..body.u16()? {
        let access = Access::parse(body.u8()?).ok_or(body.error("no permission letter"))?;
        let ignored = body.u8()? & 1 != 0;
        perms.push((Perm { access, domid: DomId(body.u16()?) }, ignored));
    }
    let path = AbsPath::parse(body.string(path.into())?);
    let path = path.filter(|path| path.as_str().len() <= ABS_PATH_MAX);
    let path = path.ok_or(body.error("a node whose path is none"))?;
    if perms.is_empty() {
        return Err(body.error("a node without permissions"));
    }
    let value = body.take(value.into())?.into();
    Ok(committed.then(|| NodeState { path: path.as_str().into(), value, perms }))
}
