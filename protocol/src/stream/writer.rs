//! Writing a stream.

use alloc::vec::Vec;
use core::fmt;

use super::format::{IDENT, kind};

/// Receives the pieces of a stream that is not kept in memory.
pub type Sink<'a> = dyn FnMut(&[u8]) + 'a;

/// Bytes after which a piece is complete. A piece fits the cache of a processor.
pub(super) const PIECE: usize = 256 << 10;

/// Writes a stream: [`Writer::begin`] a record, append its fields, begin the next one.
pub struct Writer<'a> {
    bytes: Vec<u8>,
    /// Start of the body of the open record.
    body: Option<usize>,
    sink: Option<&'a mut Sink<'a>>,
}

impl<'a> Writer<'a> {
    /// Begins a stream of this version in memory, with room for `capacity` bytes.
    pub fn new(version: u32, capacity: usize) -> Writer<'a> {
        let mut bytes = Vec::with_capacity(capacity);
        bytes.extend_from_slice(&IDENT);
        bytes.extend_from_slice(&version.to_be_bytes());
        bytes.extend_from_slice(&0_u32.to_be_bytes()); // flags: little-endian
        Writer { bytes, body: None, sink: None }
    }

    /// Begins a stream of this version whose pieces go to `sink`.
    pub fn to(sink: &'a mut Sink<'a>, version: u32) -> Writer<'a> {
        Writer { sink: Some(sink), ..Writer::new(version, 2 * PIECE) }
    }

    /// Ends the open record and begins one of type `kind`.
    pub fn begin(&mut self, kind: u32) {
        self.end();
        self.u32(kind);
        self.u32(0);
        self.body = Some(self.bytes.len());
    }

    /// Pads the open record, and writes the length of the padded body, as C xenstored does.
    fn end(&mut self) {
        let Some(body) = self.body.take() else { return };
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let len = u32::try_from(self.bytes.len() - body).expect("a record is below 4 GiB");
        self.bytes[body - 4..body].copy_from_slice(&len.to_le_bytes());
        if self.bytes.len() >= PIECE {
            self.flush();
        }
    }

    /// Returns true if the open record fills a piece. A record that can be split should end here.
    pub fn is_long(&self) -> bool {
        self.body.is_some_and(|body| self.bytes.len() - body >= PIECE)
    }

    /// Passes all bytes to the sink. Every record begins at a multiple of 8, so alignment does not
    /// depend on the bytes before.
    fn flush(&mut self) {
        if let Some(sink) = &mut self.sink {
            sink(&self.bytes);
            self.bytes.clear();
        }
    }

    /// Ends the stream. Returns all of it, or nothing if it went to a sink.
    pub fn finish(mut self) -> Vec<u8> {
        self.begin(kind::END);
        self.end();
        self.flush();
        self.bytes
    }

    /// Appends zeros up to the next multiple of 8 of the record.
    pub fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// Appends two bytes.
    pub fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Appends a length in two bytes.
    ///
    /// # Panics
    ///
    /// Panics if `len` is over 65,535. A path, token or value fits a message of 4,096 bytes.
    pub fn len16(&mut self, len: usize) {
        self.u16(u16::try_from(len).expect("bounded by the size of a message"));
    }

    /// Appends a length in four bytes.
    ///
    /// # Panics
    ///
    /// Panics if `len` is 4 GiB or more.
    pub fn len32(&mut self, len: usize) {
        self.u32(u32::try_from(len).expect("a record is below 4 GiB"));
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends a variable-length number; see [`put_varint`].
    pub fn varint(&mut self, value: u64) {
        put_varint(&mut self.bytes, value);
    }

    /// Appends a string and its NUL.
    pub fn c_string(&mut self, text: &[u8]) {
        self.bytes(text);
        self.u8(0);
    }
}

impl fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer")
            .field("len", &self.bytes.len())
            .field("body", &self.body)
            .field("has_sink", &self.sink.is_some())
            .finish()
    }
}

/// Appends a number in groups of seven bits, the lowest first. The high bit of a byte is set if
/// another byte follows.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}
