//! Reading a stream.

use super::cursor::Cursor;
use super::format::{HEADER, IDENT, StreamError, StreamErrorKind, VERSION, kind};
use super::watch_length::watch_length;

/// Reads a stream record by record, without allocation.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
    version: u32,
    big_endian: bool,
    ended: bool,
}

/// A record of a stream.
#[derive(Clone, Debug)]
pub struct StreamRecord<'a> {
    /// Its type; see [`kind`].
    pub kind: u32,
    /// A cursor at the start of its body.
    pub body: Cursor<'a>,
}

impl<'a> Reader<'a> {
    /// Reads the header.
    ///
    /// # Errors
    ///
    /// Fails if the bytes are not a stream, or one of an unknown version.
    pub fn new(bytes: &'a [u8]) -> Result<Reader<'a>, StreamError> {
        let error = |offset, kind| Err(StreamError { offset, kind });
        let mut header = Cursor { bytes, at: 0, offset: 0, big_endian: true };
        if header.take(8)? != IDENT {
            return error(0, StreamErrorKind::NotAStream);
        }
        let version = header.u32()?;
        if !(1..=VERSION).contains(&version) {
            return error(8, StreamErrorKind::UnknownVersion);
        }
        let big_endian = match header.u32()? {
            0 => false,
            1 => true,
            _ => return error(12, StreamErrorKind::UnknownFlags),
        };
        Ok(Reader { bytes, offset: HEADER, version, big_endian, ended: false })
    }

    /// The stream that follows in the same bytes, or `None` if none does. Call it when this stream
    /// has been read to its end.
    ///
    /// # Errors
    ///
    /// Fails if the bytes that follow do not begin with a valid header.
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

    /// The number of bytes that have been read.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// A cursor at the next record, for errors.
    pub fn position(&self) -> Cursor<'a> {
        Cursor::at(self.bytes, self.offset)
    }

    /// Reads the next record. Returns `None` from the END record on.
    ///
    /// # Errors
    ///
    /// Fails if the stream ends without an END record or within a record.
    #[inline]
    pub fn next_record(&mut self) -> Result<Option<StreamRecord<'a>>, StreamError> {
        if self.ended {
            return Ok(None);
        }
        let Reader { bytes, offset, big_endian, .. } = *self;
        let mut head = Cursor { bytes: &bytes[offset..], at: 0, offset, big_endian };
        let kind = head.u32()?;
        let mut len = head.u32()? as usize;
        if kind == kind::WATCH_DATA_EXTENDED {
            len = watch_length(&head, len);
        }
        let body = head.take(len)?;
        let padding = len.next_multiple_of(8) - len;
        head.take(padding)?;
        self.offset = offset + 8 + len + padding;
        self.ended = kind == kind::END;
        let body = Cursor { bytes: body, at: 0, offset: offset + 8, big_endian };
        Ok(if self.ended { None } else { Some(StreamRecord { kind, body }) })
    }
}
