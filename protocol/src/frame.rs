//! Frames, and their boundaries in a stream of bytes.

use alloc::vec::Vec;
use core::fmt;

use crate::header::Header;
use crate::limits::{HEADER_LEN, PAYLOAD_MAX};

/// A complete message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The header.
    pub header: Header,
    /// The payload, `header.len` bytes.
    pub payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Splits the first frame off `bytes`. Returns `None` if it is incomplete.
    pub fn split_first(bytes: &'a [u8]) -> Option<(Frame<'a>, &'a [u8])> {
        let (header, rest) = bytes.split_first_chunk()?;
        let header = Header::parse(header);
        let (payload, rest) = rest.split_at_checked(usize::try_from(header.len).ok()?)?;
        Some((Frame { header, payload }, rest))
    }
}

/// A header announces a payload over [`PAYLOAD_MAX`]. The next frame boundary is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameTooLong(
    /// The announced length, in bytes.
    pub u32,
);

impl fmt::Display for FrameTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "payload of {} bytes announced, the limit is {PAYLOAD_MAX}", self.0)
    }
}

impl core::error::Error for FrameTooLong {}

/// Splits a stream of bytes, which may arrive in pieces of any size, into frames.
///
/// It stores at most one incomplete frame: [`HEADER_LEN`] + [`PAYLOAD_MAX`] bytes. Call
/// [`Deframer::next`] until it returns `Ok(None)`:
///
/// ```
/// # use xenstore_protocol::Deframer;
/// let mut deframer = Deframer::default();
/// let received = *b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x03\0\0\0/a\0\x02\0";
/// let mut input = &received[..];
/// let frame = deframer.next(&mut input).unwrap().unwrap();
/// assert_eq!(frame.payload, b"/a\0");
/// assert_eq!(deframer.next(&mut input), Ok(None)); // two bytes of the next frame are stored
/// ```
#[derive(Debug, Default)]
pub struct Deframer {
    partial: Vec<u8>,
    /// `partial` is a frame that `next` has returned.
    taken: bool,
}

impl Deframer {
    /// Takes the next frame from the stored bytes and the front of `input`. Returns `None` if the
    /// frame is incomplete; all of `input` is stored then.
    ///
    /// # Errors
    ///
    /// Fails if the frame announces more than [`PAYLOAD_MAX`] bytes. The connection must be closed.
    pub fn next<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<Frame<'s>>, FrameTooLong> {
        if self.taken {
            // Idle connections are many: they keep no capacity.
            self.partial = Vec::new();
            self.taken = false;
        }
        if self.partial.is_empty()
            && let Some(len) = frame_len(input)?
            && input.len() >= len
        {
            let (frame, rest) = input.split_at(len);
            *input = rest;
            return Ok(Some(split(frame)));
        }
        // First the header, then the payload.
        loop {
            let wanted = frame_len(&self.partial)?.unwrap_or(HEADER_LEN);
            let missing = wanted - self.partial.len();
            if missing == 0 {
                self.taken = true;
                return Ok(Some(split(&self.partial)));
            }
            if input.is_empty() {
                return Ok(None);
            }
            let (now, rest) = input.split_at(missing.min(input.len()));
            self.partial.extend_from_slice(now);
            *input = rest;
        }
    }

    /// The stored bytes of an incomplete frame.
    pub fn partial(&self) -> &[u8] {
        if self.taken { &[] } else { &self.partial }
    }
}

/// The length of the frame at the start of `bytes`, if its header is complete.
fn frame_len(bytes: &[u8]) -> Result<Option<usize>, FrameTooLong> {
    let Some(header) = bytes.first_chunk::<HEADER_LEN>().map(Header::parse) else {
        return Ok(None);
    };
    match usize::try_from(header.len) {
        Ok(len) if len <= PAYLOAD_MAX => Ok(Some(HEADER_LEN + len)),
        _ => Err(FrameTooLong(header.len)),
    }
}

fn split(frame: &[u8]) -> Frame<'_> {
    Frame::split_first(frame).expect("frame_len() returned this length").0
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn frame(ty: u32, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).unwrap();
        let mut bytes = Header { ty, len, ..Header::default() }.emit().to_vec();
        bytes.extend_from_slice(payload);
        bytes
    }

    // Fails if the frames depend on the sizes of the pieces.
    #[test]
    fn frames_are_the_same_for_pieces_of_any_size() {
        let payloads = [&b"/a\0"[..], b"", &[7; PAYLOAD_MAX], b"x"];
        let stream: Vec<u8> = payloads.iter().flat_map(|p| frame(2, p)).collect();
        for cut in (1..40).chain([4111, 4112, 4113, stream.len()]) {
            let mut deframer = Deframer::default();
            let mut found: Vec<Vec<u8>> = vec![];
            for mut piece in stream.chunks(cut) {
                while let Some(frame) = deframer.next(&mut piece).unwrap() {
                    assert_eq!(frame.header.len as usize, frame.payload.len());
                    found.push(frame.payload.to_vec());
                }
                assert!(piece.is_empty());
            }
            assert_eq!(found, payloads, "cut every {cut}");
            assert!(deframer.partial().is_empty());
        }
    }

    // Fails if a length over the limit is accepted, truncated or read as negative (XSA-72, XSA-420).
    #[test]
    fn length_over_the_limit_fails_once_the_header_is_complete() {
        for len in [4097, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            let header = Header { ty: 2, len, ..Header::default() }.emit();
            let mut deframer = Deframer::default();
            assert_eq!(deframer.next(&mut &header[..15]), Ok(None));
            assert_eq!(deframer.next(&mut &header[15..]), Err(FrameTooLong(len)));
            assert_eq!(Deframer::default().next(&mut &header[..]), Err(FrameTooLong(len)));
        }
    }
}
