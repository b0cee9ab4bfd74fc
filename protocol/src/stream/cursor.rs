//! Reading the fields of a record.

use super::format::{StreamError, StreamErrorKind};

/// A position in the body of a record.
#[derive(Clone, Debug)]
pub struct Cursor<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
    /// Position of the first byte in the whole stream.
    pub(super) offset: usize,
    pub(super) big_endian: bool,
}

impl<'a> Cursor<'a> {
    /// A cursor at byte `at` of any little-endian bytes, which are read as if they were a record.
    pub fn at(bytes: &'a [u8], at: usize) -> Cursor<'a> {
        Cursor { bytes, at, offset: 0, big_endian: false }
    }

    /// The error that the content at this position is invalid.
    pub fn error(&self, reason: &'static str) -> StreamError {
        self.error_of(StreamErrorKind::Invalid(reason))
    }

    fn error_of(&self, kind: StreamErrorKind) -> StreamError {
        StreamError { offset: self.offset + self.at, kind }
    }

    /// Reads `count` bytes.
    ///
    /// # Errors
    ///
    /// Fails if fewer are left.
    #[inline]
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], StreamError> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or(self.error_of(StreamErrorKind::Truncated))?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// Skips to the next multiple of 8 of the record.
    ///
    /// # Errors
    ///
    /// Fails if the record ends before.
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

    /// Reads one byte.
    ///
    /// # Errors
    ///
    /// Fails at the end of the record.
    #[inline]
    pub fn u8(&mut self) -> Result<u8, StreamError> {
        self.word().map(|[byte]| byte)
    }

    /// Reads two bytes.
    ///
    /// # Errors
    ///
    /// Fails if fewer are left.
    #[inline]
    pub fn u16(&mut self) -> Result<u16, StreamError> {
        self.word().map(u16::from_le_bytes)
    }

    /// Reads four bytes.
    ///
    /// # Errors
    ///
    /// Fails if fewer are left.
    #[inline]
    pub fn u32(&mut self) -> Result<u32, StreamError> {
        self.word().map(u32::from_le_bytes)
    }

    /// Reads eight bytes.
    ///
    /// # Errors
    ///
    /// Fails if fewer are left.
    #[inline]
    pub fn u64(&mut self) -> Result<u64, StreamError> {
        self.word().map(u64::from_le_bytes)
    }

    /// Reads a number that [`put_varint`](super::put_varint) wrote.
    ///
    /// # Errors
    ///
    /// Fails if the record ends in it, or if it does not fit 64 bits.
    #[inline]
    pub fn varint(&mut self) -> Result<u64, StreamError> {
        let first = self.u8()?;
        // Most numbers are small.
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
        Err(self.error_of(StreamErrorKind::NumberTooLarge))
    }

    /// Returns true at the end of the record.
    pub fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    /// Reads a string of `len` bytes, the last of which is its only NUL. Returns it without the NUL.
    ///
    /// # Errors
    ///
    /// Fails if fewer bytes are left, or if the NUL is elsewhere.
    pub fn string(&mut self, len: usize) -> Result<&'a [u8], StreamError> {
        match self.take(len)?.split_last() {
            Some((0, text)) if !text.contains(&0) => Ok(text),
            _ => Err(self.error_of(StreamErrorKind::MisplacedNul)),
        }
    }

    /// Reads a string up to the next NUL. Returns it without the NUL.
    ///
    /// # Errors
    ///
    /// Fails if there is no NUL.
    pub fn c_string(&mut self) -> Result<&'a [u8], StreamError> {
        let end = self.bytes[self.at..].iter().position(|b| *b == 0);
        let end = end.ok_or(self.error_of(StreamErrorKind::MisplacedNul))?;
        self.string(end + 1)
    }
}
