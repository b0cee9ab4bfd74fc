//! The envelope: what the destination gets besides the state. It has the requester and the way back.
//!
//! `docs/formats.md` describes its bytes. Its option is `--errand`.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use xenstore_protocol::stream::Sink;
use xenstore_protocol::{Header, RequestId, TxId};
use xenstore_store::{ConnId, Millis};

/// Returns memory as a close-on-exec descriptor, which can be sealed.
pub(crate) fn memory(name: &str) -> io::Result<File> {
    Ok(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}

/// Appends the pieces that `write` passes to its argument.
pub(crate) fn fill(mut memory: &File, write: impl FnOnce(&mut Sink<'_>)) -> io::Result<()> {
    memory.seek(SeekFrom::End(0))?;
    let mut written = Ok(());
    write(&mut |piece| {
        if written.is_ok() {
            written = memory.write_all(piece);
        }
    });
    written
}

/// Makes memory read-only for every process.
pub(crate) fn seal(memory: &File) -> io::Result<()> {
    let write = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    Ok(fcntl_add_seals(memory, write | SealFlags::SEAL)?)
}

/// Returns read-only memory with these bytes.
pub(crate) fn sealed(name: &str, bytes: &[u8]) -> io::Result<File> {
    let memory = memory(name)?;
    fill(&memory, |sink| sink(bytes))?;
    seal(&memory)?;
    Ok(memory)
}

/// Returns all bytes of a descriptor, from its beginning.
pub(crate) fn read(descriptor: OwnedFd) -> io::Result<Vec<u8>> {
    let mut file = File::from(descriptor);
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What the source passes to the destination besides the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Envelope {
    /// Time since 1970 at which the source paused all connections.
    pub(crate) stopped: Duration,
    /// Descriptor of the program of the source, which the destination executes if it cannot read the state.
    pub(crate) previous: Option<RawFd>,
    /// The clock of the source at that time, in milliseconds.
    pub(crate) clock: Millis,
    /// The connection that has requested the update, and the header of the request.
    pub(crate) requester: Option<(ConnId, Header)>,
    /// Why another destination has failed: this one is the source again.
    pub(crate) failed: Option<String>,
    /// Options of the source.
    pub(crate) args: Vec<OsString>,
}

/// Returns the time since 1970.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl Envelope {
    /// Returns the envelope as bytes: texts that end with NUL.
    pub(crate) fn emit(&self) -> Vec<u8> {
        // Connections are numbered from 1 on.
        let (requester, header) = self.requester.unwrap_or((ConnId(0), Header::default()));
        let texts = [
            self.stopped.as_nanos().to_string(),
            self.clock.to_string(),
            self.previous.unwrap_or(-1).to_string(),
            requester.to_string(),
            header.req_id.to_string(),
            header.tx_id.to_string(),
            self.failed.clone().unwrap_or_default().replace('\0', " "),
        ];
        let args = self.args.iter().map(OsString::as_os_str);
        let all = texts.iter().map(OsStr::new).chain(args);
        all.flat_map(|text| [text.as_bytes(), b"\0"].concat()).collect()
    }

    /// Parses the bytes of [`Envelope::emit`]. Returns `None` for any others.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Envelope> {
        let mut texts = bytes.strip_suffix(b"\0")?.split(|byte| *byte == 0);
        let mut number = || std::str::from_utf8(texts.next()?).ok()?.parse::<i64>().ok();
        let (stopped, clock, previous, requester) = (number()?, number()?, number()?, number()?);
        let mut word = || u32::try_from(number()?).ok();
        let (req_id, tx_id) = (RequestId(word()?), TxId(word()?));
        let failed = String::from_utf8_lossy(texts.next()?).into_owned();
        let header = Header { req_id, tx_id, ..Header::default() };
        Some(Envelope {
            stopped: Duration::from_nanos(u64::try_from(stopped).ok()?),
            clock: u64::try_from(clock).ok()?,
            previous: RawFd::try_from(previous).ok().filter(|number| *number >= 0),
            requester: u64::try_from(requester)
                .ok()
                .filter(|id| *id != 0)
                .map(|id| (ConnId(id), header)),
            failed: Some(failed).filter(|reason| !reason.is_empty()),
            args: texts.map(|text| OsString::from_vec(text.to_vec())).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a field is parsed differently than it was emitted, if garbage is accepted, or if the bytes
    // are not those of `docs/formats.md`.
    #[test]
    fn an_envelope_is_parsed_as_it_was_emitted() {
        let header = Header { req_id: RequestId(u32::MAX), tx_id: TxId(7), ..Header::default() };
        let envelope = Envelope {
            stopped: Duration::from_nanos(1_234_567_890_123_456_789),
            previous: Some(9),
            clock: 86_400_000,
            requester: Some((ConnId(3), header)),
            failed: Some("no such\nthing".into()),
            args: vec!["-N".into(), OsString::new(), OsString::from_vec(vec![0xff])],
        };
        assert_eq!(Envelope::parse(&envelope.emit()), Some(envelope.clone()));
        let bare =
            Envelope { previous: None, requester: None, failed: None, args: vec![], ..envelope };
        assert_eq!(bare.emit(), b"1234567890123456789\x0086400000\0-1\x000\x000\x000\0\0");
        assert_eq!(Envelope::parse(&bare.emit()), Some(bare));
        for garbage in
            [&b""[..], b"1\0", b"x\x001\x001\x001\x001\x001\0\0", b"1\x001\x001\x001\x001"]
        {
            assert_eq!(Envelope::parse(garbage), None);
        }
    }

    // Fails if sealed memory can be changed, if appended bytes do not follow the others, or if it is not
    // read from its beginning.
    #[test]
    fn sealed_memory_cannot_be_changed() {
        let memory = memory("test").unwrap();
        fill(&memory, |sink| [b"st", &b"ate"[..]].into_iter().for_each(sink)).unwrap();
        assert_eq!(read(memory.try_clone().unwrap().into()).unwrap(), b"state");
        fill(&memory, |sink| sink(b" and more")).unwrap();
        seal(&memory).unwrap();
        assert!((&memory).write(b"x").is_err() && memory.set_len(0).is_err());
        assert!(fill(&memory, |sink| sink(b"x")).is_err());
        assert_eq!(read(memory.into()).unwrap(), b"state and more");
    }
}
