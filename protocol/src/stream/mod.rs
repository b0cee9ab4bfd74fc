//! The migration stream: how one XenStore daemon hands its state to another.
//!
//! The format is that of `docs/designs/xenstore-migration.md` in the Xen sources, version 2: a
//! header, then records of type, length and body, each padded to 8 bytes. Bodies are read in either
//! byte order and written little-endian.

mod watch;

use alloc::vec::Vec;
use core::fmt;

/// What a record is about. Types that are not listed are skipped by a reader.
#[allow(missing_docs)] // the names are those of the design document
pub mod kind {
    pub const END: u32 = 0;
    pub const GLOBAL_DATA: u32 = 1;
    pub const CONNECTION_DATA: u32 = 2;
    pub const WATCH_DATA: u32 = 3;
    pub const TRANSACTION_DATA: u32 = 4;
    pub const NODE_DATA: u32 = 5;
    pub const GLOBAL_QUOTA_DATA: u32 = 6;
    pub const DOMAIN_DATA: u32 = 7;
    pub const WATCH_DATA_EXTENDED: u32 = 8;
    /// Our own, as all that follow: the counters of an engine. Others skip them.
    pub const ENGINE: u32 = 0x8000_0000;
    /// What is known of a domain besides its quotas.
    pub const DOMAIN_DETAIL: u32 = 0x8000_0001;
    /// What is known of a connection besides its watches.
    pub const CONNECTION_DETAIL: u32 = 0x8000_0002;
    /// What belongs to the server.
    pub const SERVER: u32 = 0x8000_0003;
    /// Nodes, with all that is known of them.
    pub const NODES: u32 = 0x8000_0006;
    /// Nodes as what differs from those of the stream before.
    pub const NODES_SINCE: u32 = 0x8000_0004;
    /// An open transaction, whole.
    pub const TRANSACTION_DETAIL: u32 = 0x8000_0005;
    /// How many domains with each domid have died.
    pub const ERAS: u32 = 0x8000_0007;
}

const IDENT: [u8; 8] = *b"xenstore";
/// Bytes of the header: that, version and flags.
const HEADER: usize = 16;
/// The newest version of the format.
pub const VERSION: u32 = 2;

/// What is wrong with a stream, and at which byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamError {
    /// Byte of the stream.
    pub offset: usize,
    /// What is wrong there.
    pub reason: &'static str,
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "state at byte {}: {}", self.offset, self.reason)
    }
}

impl core::error::Error for StreamError {}

/// Where a stream goes that is not kept, piece by piece.
pub type Sink<'a> = dyn FnMut(&[u8]) + 'a;

/// Bytes of a piece: what stays in the cache of a processor.
const PIECE: usize = 256 << 10;

/// Writes a stream: [`Writer::begin`] a record, append its fields, begin the next.
pub struct Writer<'a> {
    bytes: Vec<u8>,
    /// Where the body of the record that is being written begins.
    body: Option<usize>,
    sink: Option<&'a mut Sink<'a>>,
}

impl<'a> Writer<'a> {
    /// Begins a stream of this version, with room for `capacity` bytes.
    pub fn new(version: u32, capacity: usize) -> Writer<'a> {
        let mut bytes = Vec::with_capacity(capacity);
        bytes.extend_from_slice(&IDENT);
        bytes.extend_from_slice(&version.to_be_bytes());
        bytes.extend_from_slice(&0_u32.to_be_bytes()); // flags: little-endian
        Writer { bytes, body: None, sink: None }
    }

    /// The same for a stream that is not kept.
    pub fn to(sink: &'a mut Sink<'a>, version: u32) -> Writer<'a> {
        Writer { sink: Some(sink), ..Writer::new(version, 2 * PIECE) }
    }

    /// Ends the record before and begins one of this type.
    pub fn begin(&mut self, kind: u32) {
        self.end();
        self.u32(kind);
        self.u32(0);
        self.body = Some(self.bytes.len());
    }

    /// Pads the record, and writes the length of the padded body, as C xenstored does.
    fn end(&mut self) {
        let Some(body) = self.body.take() else { return };
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let len = u32::try_from(self.bytes.len() - body).expect("a record is far below 4 GiB");
        self.bytes[body - 4..body].copy_from_slice(&len.to_le_bytes());
        if self.bytes.len() >= PIECE {
            self.hand_over();
        }
    }

    /// Is it time for another record, if what is to be written can go on in one?
    pub fn is_long(&self) -> bool {
        self.body.is_some_and(|body| self.bytes.len() - body >= PIECE)
    }

    /// Gives what there is to whoever wants it. All records begin at a multiple of 8, so that what
    /// comes then does not depend on what was before.
    fn hand_over(&mut self) {
        if let Some(sink) = &mut self.sink {
            sink(&self.bytes);
            self.bytes.clear();
        }
    }

    /// Ends the stream. All of it, unless it has gone elsewhere.
    pub fn finish(mut self) -> Vec<u8> {
        self.begin(kind::END);
        self.end();
        self.hand_over();
        self.bytes
    }

    /// Zeros up to the next multiple of 8 of the record; all records begin at one.
    pub fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// Two bytes.
    pub fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// A length in two bytes. Paths, tokens, values and lists are far below 64 KiB.
    pub fn len16(&mut self, len: usize) {
        self.u16(u16::try_from(len).expect("bounded by the size of a message"));
    }

    /// A length in four bytes.
    pub fn len32(&mut self, len: usize) {
        self.u32(u32::try_from(len).expect("a record is far below 4 GiB"));
    }

    /// Bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// A number in as few bytes as it needs; see [`put_varint`].
    pub fn varint(&mut self, value: u64) {
        put_varint(&mut self.bytes, value);
    }

    /// Text and its NUL.
    pub fn c_string(&mut self, text: &[u8]) {
        self.bytes(text);
        self.u8(0);
    }
}

impl fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Writer { bytes, body, sink } = self;
        write!(f, "Writer({} bytes, body {body:?}, kept {})", bytes.len(), sink.is_none())
    }
}

/// Appends a number in as few bytes as it needs, seven bits in each, the lowest first.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

/// Reads a stream, record by record. Never keeps or allocates anything.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
    version: u32,
    big_endian: bool,
    ended: bool,
}

/// A record's type and a cursor on its body.
#[derive(Clone, Debug)]
pub struct Record<'a> {
    /// Its type; see [`kind`].
    pub kind: u32,
    /// Its body.
    pub body: Cursor<'a>,
}

impl<'a> Reader<'a> {
    /// Reads the header.
    pub fn new(bytes: &'a [u8]) -> Result<Reader<'a>, StreamError> {
        let mut header = Cursor { bytes, at: 0, offset: 0, big_endian: true };
        if header.take(8)? != IDENT {
            return Err(StreamError { offset: 0, reason: "not a XenStore state" });
        }
        let version = header.u32()?;
        if !(1..=VERSION).contains(&version) {
            return Err(StreamError { offset: 8, reason: "unknown version of the format" });
        }
        let big_endian = match header.u32()? {
            0 => false,
            1 => true,
            _ => return Err(StreamError { offset: 12, reason: "unknown flags" }),
        };
        Ok(Reader { bytes, offset: HEADER, version, big_endian, ended: false })
    }

    /// The stream that follows this one, which has been read to its end; `None` if nothing does.
    pub fn following(&self) -> Result<Option<Reader<'a>>, StreamError> {
        let rest = &self.bytes[self.offset..];
        if !self.ended || rest.is_empty() {
            return Ok(None);
        }
        let at = |error: StreamError| StreamError { offset: self.offset + error.offset, ..error };
        let Reader { version, big_endian, .. } = Reader::new(rest).map_err(at)?;
        let offset = self.offset + HEADER;
        Ok(Some(Reader { bytes: self.bytes, offset, version, big_endian, ended: false }))
    }

    /// The version of the format that the header states.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes that have been read.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Where the next record begins.
    pub fn place(&self) -> Cursor<'a> {
        Cursor::at(self.bytes, self.offset)
    }

    /// The next record; nothing after the END record. A stream without one is an error.
    #[inline]
    pub fn next_record(&mut self) -> Result<Option<Record<'a>>, StreamError> {
        if self.ended {
            return Ok(None);
        }
        let Reader { bytes, offset, big_endian, .. } = *self;
        let mut head = Cursor { bytes: &bytes[offset..], at: 0, offset, big_endian };
        let kind = head.u32()?;
        let mut len = head.u32()? as usize;
        if kind == kind::WATCH_DATA_EXTENDED {
            len = watch::length(&head, len);
        }
        let body = head.take(len)?;
        let padding = len.next_multiple_of(8) - len;
        head.take(padding)?;
        self.offset = offset + 8 + len + padding;
        self.ended = kind == kind::END;
        let body = Cursor { bytes: body, at: 0, offset: offset + 8, big_endian };
        Ok(if self.ended { None } else { Some(Record { kind, body }) })
    }
}

/// Reads the fields of a record.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Of the first byte, in the whole stream.
    offset: usize,
    big_endian: bool,
}

impl<'a> Cursor<'a> {
    /// A cursor at this byte of a stream, or of another text, that is read without records.
    pub fn at(bytes: &'a [u8], at: usize) -> Cursor<'a> {
        Cursor { bytes, at, offset: 0, big_endian: false }
    }

    /// An error at the place of this cursor.
    pub fn error(&self, reason: &'static str) -> StreamError {
        StreamError { offset: self.offset + self.at, reason }
    }

    /// The next `count` bytes.
    #[inline]
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], StreamError> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let taken = &self.bytes[self.at..end.ok_or(self.error("it ends too early"))?];
        self.at += count;
        Ok(taken)
    }

    /// Bytes up to the next multiple of 8 of the record.
    pub fn align(&mut self) -> Result<(), StreamError> {
        self.take(self.at.next_multiple_of(8) - self.at).map(drop)
    }

    #[inline]
    fn word<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        if self.big_endian {
            bytes.reverse();
        }
        Ok(bytes)
    }

    /// One byte.
    #[inline]
    pub fn u8(&mut self) -> Result<u8, StreamError> {
        self.word().map(|[byte]| byte)
    }

    /// Two bytes.
    #[inline]
    pub fn u16(&mut self) -> Result<u16, StreamError> {
        self.word().map(u16::from_le_bytes)
    }

    /// Four bytes.
    #[inline]
    pub fn u32(&mut self) -> Result<u32, StreamError> {
        self.word().map(u32::from_le_bytes)
    }

    /// Eight bytes.
    #[inline]
    pub fn u64(&mut self) -> Result<u64, StreamError> {
        self.word().map(u64::from_le_bytes)
    }

    /// A number as [`put_varint`] writes it.
    #[inline]
    pub fn varint(&mut self) -> Result<u64, StreamError> {
        let first = self.u8()?;
        // Most are small.
        if first < 0x80 {
            return Ok(first.into());
        }
        let mut value = u64::from(first & 0x7f);
        for shift in (7..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.error("a number that is too large"))
    }

    /// Is nothing left?
    pub fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// A string of `len` bytes, the last of which is its only NUL.
    pub fn string(&mut self, len: usize) -> Result<&'a [u8], StreamError> {
        match self.take(len)?.split_last() {
            Some((0, text)) if !text.contains(&0) => Ok(text),
            _ => Err(self.error("a string without its NUL")),
        }
    }

    /// A string that ends at the next NUL.
    pub fn c_string(&mut self) -> Result<&'a [u8], StreamError> {
        let rest = &self.bytes[self.at..];
        let end =
            rest.iter().position(|b| *b == 0).ok_or(self.error("a string without its NUL"))?;
        self.string(end + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if header or records are laid out otherwise than in the design document.
    #[test]
    fn layout_is_that_of_the_design_document() {
        let mut writer = Writer::new(VERSION, 0);
        writer.begin(kind::NODE_DATA);
        writer.bytes(b"abc");
        let bytes = writer.finish();
        let expected = *b"xenstore\0\0\0\x02\0\0\0\0\
                          \x05\0\0\0\x08\0\0\0abc\0\0\0\0\0\
                          \0\0\0\0\0\0\0\0";
        assert_eq!(bytes, expected);
        let mut reader = Reader::new(&bytes).unwrap();
        let mut record = reader.next_record().unwrap().unwrap();
        assert_eq!((record.kind, record.body.take(3)), (kind::NODE_DATA, Ok(&b"abc"[..])));
        assert!(reader.next_record().unwrap().is_none());
        assert!(reader.next_record().unwrap().is_none());
    }

    // Fails if a stream that is given away in pieces is another than one that is kept.
    #[test]
    fn pieces_are_the_whole() {
        let write = |mut writer: Writer<'_>| {
            for len in (0..4000).chain([3 * PIECE, 1]) {
                writer.begin(kind::NODE_DATA);
                writer.bytes(&alloc::vec![7; len]);
            }
            writer.finish()
        };
        let mut pieces = Vec::new();
        let mut sink = |piece: &[u8]| pieces.push(Vec::from(piece));
        assert!(write(Writer::to(&mut sink, VERSION)).is_empty());
        assert!(pieces.len() > 3 && pieces.concat() == write(Writer::new(VERSION, 0)));
    }

    // Fails if a stream that is cut anywhere is taken for a whole one, or panics.
    #[test]
    fn truncated_streams_are_errors() {
        let mut writer = Writer::new(VERSION, 0);
        writer.begin(kind::WATCH_DATA);
        writer.bytes(b"0123456789");
        let bytes = writer.finish();
        for len in 0..bytes.len() {
            let read = || {
                let mut reader = Reader::new(&bytes[..len])?;
                while reader.next_record()?.is_some() {}
                Ok::<(), StreamError>(())
            };
            assert!(read().is_err(), "{len} bytes");
        }
    }

    // Fails if the record behind a watch with a depth is missed, for any lengths of path and token,
    // with the fields that the design document has and with those that C xenstored of Xen 4.23
    // writes: it announces 4 bytes more than it writes, and both numbers are rounded up.
    #[test]
    #[allow(clippy::cast_possible_truncation)] // all lengths are below 256
    fn the_record_behind_a_watch_with_a_depth_is_found() {
        for (path, token, documented) in (2..20_usize).flat_map(|path| {
            (1..20_usize).flat_map(move |token| [(path, token, false), (path, token, true)])
        }) {
            let mut body = alloc::vec![1, 0, 0, 0, path as u8, 0, token as u8, 0];
            if documented {
                body.extend_from_slice(&[path as u8, 0, 0, 0]);
            }
            for len in [path, token] {
                body.extend((1..len).map(|_| b'/').chain([0]));
            }
            let announced = (12 + path + token).next_multiple_of(8);
            body.resize(body.len().next_multiple_of(8), 0);
            let mut bytes = b"xenstore\0\0\0\x02\0\0\0\0".to_vec();
            for (kind, len, body) in [
                (kind::WATCH_DATA_EXTENDED, announced, &body[..]),
                (kind::NODE_DATA, 0, b""),
                (kind::END, 0, b""),
            ] {
                bytes.extend_from_slice(&kind.to_le_bytes());
                bytes.extend_from_slice(&(len as u32).to_le_bytes());
                bytes.extend_from_slice(body);
            }
            let mut reader = Reader::new(&bytes).unwrap();
            let mut next = || reader.next_record().map(|record| record.map(|record| record.kind));
            let read = [next(), next(), next()];
            let all = [Some(kind::WATCH_DATA_EXTENDED), Some(kind::NODE_DATA), None];
            assert_eq!(read, all.map(Ok), "{path} {token} {documented}");
        }
    }

    // Fails if big-endian bodies are read wrongly, or lengths that are not rounded up.
    #[test]
    fn streams_of_other_writers_are_read() {
        let bytes = *b"xenstore\0\0\0\x01\0\0\0\x01\
                       \0\0\0\x07\0\0\0\x06\0\x05\0\0\0\x0e\0\0\
                       \0\0\0\0\0\0\0\0";
        let mut reader = Reader::new(&bytes).unwrap();
        let mut record = reader.next_record().unwrap().unwrap();
        assert_eq!(record.kind, kind::DOMAIN_DATA);
        assert_eq!((record.body.u16(), record.body.u32()), (Ok(5), Ok(14)));
        assert!(record.body.u8().is_err());
        assert!(reader.next_record().unwrap().is_none());
        assert!(Reader::new(b"xenstore\0\0\0\x03\0\0\0\0").is_err());
        assert!(Reader::new(b"xenstorf\0\0\0\x02\0\0\0\0").is_err());
    }
}
