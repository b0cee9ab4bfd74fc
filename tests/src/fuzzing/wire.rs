//! Parsing and emission of frames and payloads.

use xenstore_protocol::{Deframer, HEADER_LEN, Header, Operation, Reply, Request, WatchEvent};

/// The frames of a stream must not depend on its pieces. The first eight bytes are the lengths of
/// pieces, in rotation.
pub fn packet(data: &[u8]) {
    let Some((cuts, stream)) = data.split_first_chunk::<8>() else { return };
    let frames = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let mut deframer = Deframer::default();
        let mut found = Vec::new();
        for mut piece in pieces {
            loop {
                match deframer.next(&mut piece) {
                    Ok(Some(frame)) => found.push((frame.header, frame.payload.to_vec())),
                    Ok(None) => break,
                    Err(error) => return (found, Some(error)),
                }
            }
            assert!(deframer.partial().len() <= HEADER_LEN + 4096);
        }
        (found, None)
    };
    let whole = frames(&mut std::iter::once(stream));
    let mut rest = stream;
    let mut lengths = cuts.iter().cycle();
    let mut pieces = std::iter::from_fn(|| {
        let len = usize::from(*lengths.next()?).max(1).min(rest.len());
        let (piece, after) = rest.split_at(len);
        rest = after;
        (!piece.is_empty()).then_some(piece)
    });
    assert_eq!(whole, frames(&mut pieces));
    // Each frame has the bytes of the stream.
    let mut at = 0;
    for (header, payload) in &whole.0 {
        assert_eq!(stream[at..at + HEADER_LEN], header.emit());
        assert_eq!(&stream[at + HEADER_LEN..at + HEADER_LEN + payload.len()], payload.as_slice());
        at += HEADER_LEN + payload.len();
    }
}

/// An accepted payload must round-trip to an equal message, and the emitted bytes must not depend on
/// ignored ones. The first byte is the type.
pub fn request(data: &[u8]) {
    let Some((ty, payload)) = data.split_first() else { return };
    let Some(op) = Operation::from_wire(u32::from(*ty) % 27) else { return };
    if let Ok(request) = Request::parse(op, payload) {
        let mut out = Vec::new();
        request.emit(&mut out);
        assert_eq!(request.operation(), op);
        assert_eq!(Request::parse(op, &out).as_ref(), Ok(&request));
        let canonical = out.clone();
        out.clear();
        Request::parse(op, &canonical).unwrap().emit(&mut out);
        assert_eq!(out, canonical);
    }
    for is_error in [false, true] {
        if let Ok(reply) = Reply::parse(op, is_error, payload) {
            let mut out = Vec::new();
            reply.emit(&Header { ty: op.as_wire(), ..Header::default() }, &mut out);
            let header = Header::parse(out.first_chunk().unwrap());
            let is_error = header.ty == Operation::Error.as_wire();
            let again = Reply::parse(op, is_error, &out[HEADER_LEN..]).unwrap();
            assert!(again == reply || payload.len() > 4096);
        }
    }
    if let Some(event) = WatchEvent::parse(payload) {
        let mut out = Vec::new();
        if event.emit(&mut out).is_ok() {
            assert_eq!(&out[HEADER_LEN..], payload);
        }
    }
}
