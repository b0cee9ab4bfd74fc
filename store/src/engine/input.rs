//! Everything that is done to an engine, as data.
//!
//! An engine is deterministic: two that start alike and are given the same inputs, and the same
//! answers of the machine, stay alike and say the same. A server that keeps its inputs can therefore
//! make its engine again.

use alloc::vec::Vec;

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Frame, Gfn, HEADER_LEN};

use crate::domain::registry::{DomainInfo, Host};
use crate::engine::Engine;
use crate::engine::fairness::Outcome;
use crate::ids::{Caller, ConnId, Millis};

/// Something that is done to an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input<'a> {
    /// [`Engine::connect`].
    Connect(Caller),
    /// [`Engine::disconnect`].
    Disconnect(ConnId),
    /// [`Engine::restart`].
    Restart(ConnId),
    /// [`Engine::handle`], once for each. The machine has been asked by none but the last.
    Requests {
        /// Who asks.
        conn: ConnId,
        /// When.
        now: Millis,
        /// Whole requests, as they came.
        frames: &'a [u8],
    },
    /// [`Engine::emit_events`], into an empty buffer.
    Events {
        /// Whose events.
        conn: ConnId,
        /// The limit, in bytes.
        limit: u32,
    },
    /// [`Engine::domains_changed`].
    DomainsChanged,
    /// [`Engine::work`].
    Work {
        /// How much is done at the most.
        budget: u32,
    },
}

/// Takes the front of some bytes.
pub(crate) fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (front, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*front)
}

fn conn(bytes: &mut &[u8]) -> Option<ConnId> {
    take(bytes).map(u64::from_le_bytes).map(ConnId)
}

/// The requests at the front of some bytes, as far as they are whole.
fn requests(mut frames: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    core::iter::from_fn(move || {
        let (frame, rest) = Frame::split_first(frames)?;
        frames = rest;
        Some(frame)
    })
}

impl<'a> Input<'a> {
    /// Appends it as bytes.
    #[inline]
    pub fn emit(&self, out: &mut Vec<u8>) {
        match self {
            Input::Connect(Caller::Socket) => out.push(0),
            Input::Connect(Caller::Domain(domid)) => {
                out.push(1);
                out.extend_from_slice(&domid.0.to_le_bytes());
            }
            Input::Disconnect(conn) => {
                out.push(2);
                out.extend_from_slice(&conn.0.to_le_bytes());
            }
            Input::Restart(conn) => {
                out.push(3);
                out.extend_from_slice(&conn.0.to_le_bytes());
            }
            Input::Requests { conn, now, frames } => {
                out.push(4);
                out.extend_from_slice(&conn.0.to_le_bytes());
                out.extend_from_slice(&now.to_le_bytes());
                out.extend_from_slice(frames);
            }
            Input::Events { conn, limit } => {
                out.push(5);
                out.extend_from_slice(&conn.0.to_le_bytes());
                out.extend_from_slice(&limit.to_le_bytes());
            }
            Input::DomainsChanged => out.push(6),
            Input::Work { budget } => {
                out.push(7);
                out.extend_from_slice(&budget.to_le_bytes());
            }
        }
    }

    /// The reverse of [`Input::emit`]; `None` for anything else.
    pub fn parse(mut bytes: &'a [u8]) -> Option<Input<'a>> {
        let bytes = &mut bytes;
        let input = match take::<1>(bytes)? {
            [0] => Input::Connect(Caller::Socket),
            [1] => Input::Connect(Caller::Domain(DomId(u16::from_le_bytes(take(bytes)?)))),
            [2] => Input::Disconnect(conn(bytes)?),
            [3] => Input::Restart(conn(bytes)?),
            [4] => {
                let (conn, now) = (conn(bytes)?, u64::from_le_bytes(take(bytes)?));
                let frames = core::mem::take(bytes);
                let whole = requests(frames).map(|frame| HEADER_LEN + frame.payload.len());
                if frames.is_empty() || whole.sum::<usize>() != frames.len() {
                    return None;
                }
                Input::Requests { conn, now, frames }
            }
            [5] => Input::Events { conn: conn(bytes)?, limit: u32::from_le_bytes(take(bytes)?) },
            [6] => Input::DomainsChanged,
            [7] => Input::Work { budget: u32::from_le_bytes(take(bytes)?) },
            _ => return None,
        };
        bytes.is_empty().then_some(input)
    }
}

impl Engine {
    /// Does what an input says. What is said to the connection is appended to `out`. How many bytes
    /// of requests have been answered.
    pub fn apply(&mut self, input: &Input<'_>, host: &mut dyn Host, out: &mut Vec<u8>) -> usize {
        let mut answered = 0;
        match input {
            Input::Connect(caller) => drop(self.connect(*caller)),
            Input::Disconnect(conn) => self.disconnect(*conn),
            Input::Restart(conn) => self.restart(*conn),
            Input::Requests { conn, now, frames } => {
                for Frame { header, payload } in requests(frames) {
                    match self.handle(*conn, &header, payload, *now, host, out) {
                        Outcome::Executed => answered += HEADER_LEN + payload.len(),
                        Outcome::Deferred(_) => {}
                    }
                }
            }
            Input::Events { conn, limit } => {
                let limit = usize::try_from(*limit).unwrap_or(usize::MAX);
                self.emit_events(*conn, out.len().saturating_add(limit), out);
            }
            Input::DomainsChanged => self.domains_changed(host),
            Input::Work { budget } => self.work(*budget),
        }
        answered
    }
}

/// A machine whose answers are written down.
#[derive(Debug)]
pub struct Recorded<'a, H: ?Sized> {
    /// The machine.
    pub host: &'a mut H,
    /// Its answers, in the order in which they were given.
    pub answers: &'a mut Vec<u8>,
}

/// What stands for an answer without an error; names of errors have other numbers.
const FINE: u8 = 0xff;

fn put_error(error: Option<Errno>, out: &mut Vec<u8>) {
    let number = |error| Errno::ALL.iter().position(|known| *known == error);
    out.push(error.and_then(number).and_then(|at| u8::try_from(at).ok()).unwrap_or(FINE));
}

impl<H: Host + ?Sized> Host for Recorded<'_, H> {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        let info = self.host.domain(domid);
        self.answers.push(info.map_or(0, |info| 1 | u8::from(info.shutdown) << 1));
        self.answers.extend_from_slice(&info.map_or(0, |info| info.unique_id).to_le_bytes());
        info
    }

    fn introduce(
        &mut self,
        domid: DomId,
        gfn: Gfn,
        port: EvtchnPort,
        features: Features,
    ) -> Result<(), Errno> {
        let result = self.host.introduce(domid, gfn, port, features);
        put_error(result.err(), self.answers);
        result
    }

    fn release(&mut self, domid: DomId) {
        self.host.release(domid);
    }

    fn control(&mut self, command: &[u8], args: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        let result = self.host.control(command, args);
        let known = u8::from(result.is_some());
        let output = result.as_ref().and_then(|result| result.as_ref().ok());
        let output = output.map_or(&[][..], |output| output);
        self.answers.push(known);
        put_error(result.as_ref().and_then(|result| result.as_ref().err().copied()), self.answers);
        let len = u32::try_from(output.len()).unwrap_or(u32::MAX);
        self.answers.extend_from_slice(&len.to_le_bytes());
        self.answers.extend_from_slice(output);
        result
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        self.host.control_commands()
    }
}

/// A machine that gives the answers that were written down.
#[derive(Debug)]
pub struct Replayed<'a> {
    /// What is left of them.
    pub answers: &'a [u8],
    /// It was asked for more, or for something else, than was written down.
    pub astray: bool,
    /// Domains that were introduced, with gfn and port of the guest, in order.
    pub introduced: Vec<(DomId, Gfn, EvtchnPort)>,
    /// Commands that the machine of this server knows.
    pub commands: &'static [(&'static str, &'static str)],
}

impl<'a> Replayed<'a> {
    /// One that gives these answers.
    pub fn new(answers: &'a [u8]) -> Replayed<'a> {
        Replayed { answers, astray: false, introduced: Vec::new(), commands: &[] }
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        take(&mut self.answers).unwrap_or_else(|| {
            self.astray = true;
            [0; N]
        })
    }

    fn error(&mut self) -> Option<Errno> {
        let [number] = self.take();
        Errno::ALL.get(usize::from(number)).copied()
    }
}

impl Host for Replayed<'_> {
    fn domain(&mut self, _: DomId) -> Option<DomainInfo> {
        let [flags] = self.take();
        let unique_id = u64::from_le_bytes(self.take());
        (flags & 1 != 0).then_some(DomainInfo { unique_id, shutdown: flags & 2 != 0 })
    }

    fn introduce(
        &mut self,
        domid: DomId,
        gfn: Gfn,
        port: EvtchnPort,
        _: Features,
    ) -> Result<(), Errno> {
        match self.error() {
            Some(error) => Err(error),
            None => {
                self.introduced.push((domid, gfn, port));
                Ok(())
            }
        }
    }

    fn release(&mut self, _: DomId) {}

    fn control(&mut self, _: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        let [known] = self.take();
        let error = self.error();
        let len = usize::try_from(u32::from_le_bytes(self.take())).unwrap_or(usize::MAX);
        let Some((output, rest)) = self.answers.split_at_checked(len) else {
            self.astray = true;
            return None;
        };
        self.answers = rest;
        (known != 0).then(|| error.map_or_else(|| Ok(output.to_vec()), Err))
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        self.commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::String;
    use xenstore_protocol::Header;

    // Fails if an input comes back otherwise than it was written, or if one that is cut or has
    // something behind it is taken for another.
    #[test]
    fn inputs_survive_being_bytes() {
        let one = [&Header { ty: 2, len: 3, ..Header::default() }.emit()[..], b"/a\0"].concat();
        let (conn, now) = (ConnId(0x1_0000_0005), 0x1234_5678_9abc);
        let inputs = [
            Input::Connect(Caller::Socket),
            Input::Connect(Caller::Domain(DomId(7))),
            Input::Disconnect(conn),
            Input::Restart(conn),
            Input::Requests { conn, now, frames: &one },
            Input::Events { conn, limit: 70_000 },
            Input::DomainsChanged,
            Input::Work { budget: 0x1234_5678 },
        ];
        for input in inputs {
            let mut bytes = Vec::new();
            input.emit(&mut bytes);
            assert_eq!(Input::parse(&bytes), Some(input));
            for len in 0..bytes.len() {
                assert_eq!(Input::parse(&bytes[..len]), None, "{len} bytes of {input:?}");
            }
            bytes.push(0);
            assert_eq!(Input::parse(&bytes), None, "{input:?} and a byte");
        }
        let two = [&one[..], &Header::default().emit()].concat();
        let (input, mut bytes) = (Input::Requests { conn, now, frames: &two }, Vec::new());
        input.emit(&mut bytes);
        assert_eq!(Input::parse(&bytes), Some(input));
        assert_eq!(Input::parse(&bytes[..bytes.len() - 1]), None);
    }

    struct Odd;

    impl Host for Odd {
        fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
            let exists = !domid.0.is_multiple_of(2);
            let unique_id = 1 << 40 | u64::from(domid.0);
            exists.then_some(DomainInfo { unique_id, shutdown: domid.0 == 3 })
        }
        fn introduce(
            &mut self,
            domid: DomId,
            _: Gfn,
            _: EvtchnPort,
            _: Features,
        ) -> Result<(), Errno> {
            if domid.0 == 3 { Err(Errno::Einval) } else { Ok(()) }
        }
        fn release(&mut self, _: DomId) {}
        fn control(&mut self, name: &[u8], _: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
            match name {
                b"a" => Some(Ok(b"text".to_vec())),
                b"b" => Some(Err(Errno::Ebusy)),
                _ => None,
            }
        }
        fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
            &[]
        }
    }

    // Fails if the machine that is replayed gives another answer than the one that was recorded, or
    // does not notice that it was asked for something else.
    #[test]
    fn answers_of_the_machine_are_given_again() {
        fn ask(host: &mut dyn Host) -> String {
            let domains = [1, 2, 3].map(|domid| host.domain(DomId(domid)));
            let introduced = [1, 3]
                .map(|domid| host.introduce(DomId(domid), Gfn(5), EvtchnPort(6), Features::NONE));
            let said = [&b"a"[..], b"b", b"c"].map(|name| host.control(name, &[]));
            format!("{:?}", (domains, introduced, said))
        }
        let (mut host, mut answers) = (Odd, Vec::new());
        let first = ask(&mut Recorded { host: &mut host, answers: &mut answers });
        let mut replayed = Replayed::new(&answers);
        assert_eq!(ask(&mut replayed), first);
        assert!(!replayed.astray && replayed.answers.is_empty());
        assert_eq!(replayed.introduced, [(DomId(1), Gfn(5), EvtchnPort(6))]);
        replayed.domain(DomId(1));
        assert!(replayed.astray);
    }
}
