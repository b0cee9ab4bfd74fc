//! CONTROL: commands to the server.

use alloc::borrow::Cow;
use alloc::vec::Vec;

use xenstore_protocol::{Control, ErrorName, Reply};

use crate::domain::Host;
use crate::engine::{Engine, Millis};

impl Engine {
    pub(crate) fn control(
        &mut self,
        control: &Control<'_>,
        _now: Millis,
        host: &mut dyn Host,
    ) -> Result<Reply<'static>, ErrorName> {
        let args: Vec<&[u8]> = control.args().collect();
        match (control.command(), args.as_slice()) {
            (b"check", []) => match self.check() {
                Ok(()) => Ok(Reply::Ok),
                Err(_) => Err(ErrorName::Eio),
            },
            (command, args) => match host.control(command, args) {
                Some(output) => Ok(Reply::Bytes(Cow::Owned(output?))),
                None => Err(ErrorName::Einval),
            },
        }
    }
}
