//! What oxenstored writes when it is asked for a live update: a text file, a record in each line,
//! with texts as hexadecimal digits.
//!
//! It has no identities of domains, targets, quotas, transactions, requests or events; oxenstored
//! only writes it when none of the last three is under way.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;

use xenstore_protocol::stream::{Cursor, StreamError};
use xenstore_protocol::{DomId, Path, Perm, decimal};

use super::State;
use super::decode::Decoder;
use super::nodes::Grower;
use crate::ids::Caller;
use crate::tree::acl::Acl;

type Result<T> = core::result::Result<T, StreamError>;

const HEADER: &[u8] = b"$xenstored-dump-format\n";

/// Does a file begin as oxenstored's do?
pub(super) fn is_dump(bytes: &[u8]) -> bool {
    bytes.starts_with(HEADER)
}

/// A dump that is being read.
struct Dump {
    decoder: Decoder,
    grower: Grower,
    /// Places of connections by the number that watches name: a domid, or a negative descriptor.
    numbers: BTreeMap<i64, usize>,
}

/// Reads a dump. Lines of a kind that is not known are passed over, as by oxenstored.
pub(super) fn decode(bytes: &[u8]) -> Result<State> {
    let (decoder, grower) = (Decoder::new(), Grower::default());
    let mut dump = Dump { decoder, grower, numbers: BTreeMap::new() };
    let mut rest = &bytes[HEADER.len()..];
    while !rest.is_empty() {
        let place = Cursor::at(bytes, bytes.len() - rest.len());
        let len = rest.iter().position(|b| *b == b'\n');
        let len = len.ok_or(place.error("it ends within a line"))?;
        dump.take_line(&rest[..len], &place)?;
        rest = &rest[len + 1..];
    }
    let Dump { mut decoder, grower, .. } = dump;
    let place = Cursor::at(bytes, bytes.len());
    decoder.finish_tree(grower, &place)?;
    decoder.finish(&place)
}

impl Dump {
    fn take_line(&mut self, line: &[u8], place: &Cursor<'_>) -> Result<()> {
        let fields: Vec<&[u8]> = line.split(|b| *b == b',').take(8).collect();
        let (io, wrong) = (&mut self.decoder.io, || place.error("a number that is none"));
        match fields[..] {
            // What follows was a second socket, for reading only.
            [b"global", fd, ..] => io.listener = descriptor(fd).ok_or_else(wrong)?,
            [b"evtchn-dev", fd, port] => {
                io.evtchn = descriptor(fd).ok_or_else(wrong)?;
                io.virq_port = Some(decimal(port).ok_or_else(wrong)?);
            }
            [b"dom", domid, gfn, remote, ref local @ ..] if local.len() <= 1 => {
                let domid: u16 = decimal(domid).ok_or_else(wrong)?;
                self.connect(domid.into(), Caller::Domain(DomId(domid)), place)?;
                self.decoder.domain(DomId(domid)).introduced = true;
                let Some(connection) = self.decoder.connections.last_mut() else { return Ok(()) };
                connection.io.gfn = Some(decimal(gfn).ok_or_else(wrong)?);
                connection.io.remote_port = Some(decimal(remote).ok_or_else(wrong)?);
                if let [local] = local {
                    connection.io.port = Some(decimal(local).ok_or_else(wrong)?);
                }
            }
            [b"socket", fd] => {
                let fd = descriptor(fd).flatten().ok_or_else(wrong)?;
                self.connect(-i64::from(fd), Caller::Socket, place)?.fd = Some(fd);
            }
            [b"watch", id, path, token, ref depth @ ..] if depth.len() <= 1 => {
                let depth = match depth {
                    [depth] => Some(decimal(depth).ok_or_else(wrong)?),
                    _ => None,
                };
                self.take_watch(id, path, token, depth, place)?;
            }
            [b"store", path, perms, value] => self.take_node(path, perms, value, place)?,
            _ => {
                let start = &line[..line.len().min(60)];
                self.decoder.lose(format!("a line that is not known: {}", start.escape_ascii()));
            }
        }
        Ok(())
    }

    fn connect(
        &mut self,
        number: i64,
        caller: Caller,
        place: &Cursor<'_>,
    ) -> Result<&mut super::ConnectionIo> {
        if self.numbers.insert(number, self.decoder.connections.len()).is_some() {
            return Err(place.error("a connection that is there twice"));
        }
        Ok(&mut self.decoder.connect(caller).io)
    }

    fn take_watch(
        &mut self,
        id: &[u8],
        path: &[u8],
        token: &[u8],
        depth: Option<u32>,
        place: &Cursor<'_>,
    ) -> Result<()> {
        let number = match id.strip_prefix(b"-") {
            Some(fd) => decimal::<u32>(fd).map(|fd| -i64::from(fd)),
            None => decimal::<u32>(id).map(i64::from),
        };
        let at = number.and_then(|number| self.numbers.get(&number).copied());
        let at = at.ok_or(place.error("a connection that is not there"))?;
        let path = text(path).ok_or(place.error("no hexadecimal digits"))?;
        let token = text(token).filter(|token| !token.contains(&0));
        let token = token.ok_or(place.error("no hexadecimal digits of a token"))?;
        let path = Path::parse(&path).ok_or(place.error("a watch on what is no path"))?;
        self.decoder.add_watch(at, path.as_str().into(), token.into(), depth);
        Ok(())
    }

    fn take_node(
        &mut self,
        path: &[u8],
        perms: &[u8],
        value: &[u8],
        place: &Cursor<'_>,
    ) -> Result<()> {
        let digits = |digits| text(digits).ok_or(place.error("no hexadecimal digits"));
        let (path, perms, value) = (digits(path)?, digits(perms)?, digits(value)?);
        let perms: Option<Vec<Perm>> = perms.split(|b| *b == 0).map(Perm::parse).collect();
        let acl = perms.and_then(Acl::new).ok_or(place.error("permissions that are none"))?;
        // It keeps the permissions of special nodes below the root.
        let path = path.strip_prefix(b"/").filter(|name| name.starts_with(b"@")).unwrap_or(&path);
        self.grower.add(path, acl, &value, place)
    }
}

/// A descriptor; -1 stands for none.
fn descriptor(text: &[u8]) -> Option<Option<i32>> {
    if text == b"-1" {
        return Some(None);
    }
    decimal::<u32>(text).and_then(|fd| i32::try_from(fd).ok()).map(Some)
}

fn text(digits: &[u8]) -> Option<Vec<u8>> {
    let digit = |b: &u8| char::from(*b).to_digit(16);
    let pair = |pair: &[u8]| match pair {
        [high, low] => u8::try_from(digit(high)? << 4 | digit(low)?).ok(),
        _ => None,
    };
    digits.chunks(2).map(pair).collect()
}
