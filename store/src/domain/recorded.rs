//! Hosts that record the replies of the machine, and that replay them.

use alloc::vec::Vec;

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Gfn};

use crate::domain::host::{DomainInfo, Host};

/// Takes the front of some bytes.
pub(crate) fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (front, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*front)
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
