//! Finding frames in a stream of bytes.

use alloc::vec::Vec;
use core::fmt;

use crate::{HEADER_LEN, Header, PAYLOAD_MAX};

/// One whole message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its header.
    pub header: Header,
    /// Its payload, `header.len` bytes.
    pub payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// The frame at the front of these bytes, and what comes behind it; `None` if it is not whole.
    pub fn split_first(bytes: &'a [u8]) -> Option<(Frame<'a>, &'a [u8])> {
        let (header, rest) = bytes.split_first_chunk()?;
        let header = Header::parse(header);
        let (payload, rest) = rest.split_at_checked(usize::try_from(header.len).ok()?)?;
        Some((Frame { header, payload }, rest))
    }
}

/// The peer announced a payload over [`PAYLOAD_MAX`]. The stream cannot be followed any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameTooLong(
    /// What it announced, in bytes.
    pub u32,
);

impl fmt::Display for FrameTooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "payload of {} bytes announced, the limit is {PAYLOAD_MAX}", self.0)
    }
}

impl core::error::Error for FrameTooLong {}

/// Takes bytes in any cut and gives back whole frames. Keeps at most one incomplete frame, so at
/// most [`HEADER_LEN`] + [`PAYLOAD_MAX`] bytes.
///
/// Call [`Deframer::next`] until it says that the input is used up:
///
/// ```
/// # use xenstore_protocol::Deframer;
/// let mut deframer = Deframer::default();
/// let received = *b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x03\0\0\0/a\0\x02\0";
/// let mut input = &received[..];
/// let frame = deframer.next(&mut input).unwrap().unwrap();
/// assert_eq!(frame.payload, b"/a\0");
/// assert_eq!(deframer.next(&mut input), Ok(None)); // two bytes of the next one are kept
/// ```
#[derive(Debug, Default)]
pub struct Deframer {
    partial: Vec<u8>,
    /// `partial` holds a frame that has been handed out already.
    taken: bool,
}

impl Deframer {
    /// Takes the next frame from what was kept and from the front of `input`. `Ok(None)` means that
    /// all of `input` has been taken and more is needed.
    pub fn next<'s, 'i: 's>(
        &'s mut self,
        input: &mut &'i [u8],
    ) -> Result<Option<Frame<'s>>, FrameTooLong> {
        if self.taken {
            // Capacity is kept only while the stream is busy: idle connections are many.
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
        // The header first, then the payload that it announces.
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

    /// The incomplete frame at the end of what has been taken so far.
    pub fn partial(&self) -> &[u8] {
        if self.taken { &[] } else { &self.partial }
    }
}

/// Length of the frame at the start of `bytes`, once its header is there.
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
    Frame::split_first(frame).expect("frame_len() has measured it").0
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

    // Fails if any cut of the stream changes, loses or invents a frame.
    #[test]
    fn frames_do_not_depend_on_how_the_stream_is_cut() {
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

    // Fails if a length over the limit is waited for, truncated or taken for negative
    // (XSA-72, XSA-420).
    #[test]
    fn too_long_is_an_error_as_soon_as_the_header_is_there() {
        for len in [4097, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            let header = Header { ty: 2, len, ..Header::default() }.emit();
            let mut deframer = Deframer::default();
            assert_eq!(deframer.next(&mut &header[..15]), Ok(None));
            assert_eq!(deframer.next(&mut &header[15..]), Err(FrameTooLong(len)));
            assert_eq!(Deframer::default().next(&mut &header[..]), Err(FrameTooLong(len)));
        }
    }
}
