//! Event channels as doorbells of rings.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use xenstore_protocol::{DomId, EvtchnPort};

use super::Evtchn;
use crate::ring::Doorbell;

/// The local port of an event channel to a domain. The port can change or be missing; it is closed when
/// the doorbell is dropped.
#[derive(Debug)]
pub struct EvtchnDoorbell {
    evtchn: Arc<dyn Evtchn>,
    /// 0, which is no port, if there is no channel.
    port: AtomicU32,
}

impl EvtchnDoorbell {
    /// Binds a local port to the port of a domain.
    ///
    /// # Errors
    ///
    /// Fails if the remote port cannot be bound.
    pub fn bind(
        evtchn: &Arc<dyn Evtchn>,
        domid: DomId,
        remote: EvtchnPort,
    ) -> io::Result<EvtchnDoorbell> {
        Ok(EvtchnDoorbell::adopt(evtchn, Some(evtchn.bind(domid, remote)?)))
    }

    /// Takes over a local port that is bound already. Without a port, the doorbell does nothing.
    pub fn adopt(evtchn: &Arc<dyn Evtchn>, port: Option<EvtchnPort>) -> EvtchnDoorbell {
        EvtchnDoorbell { evtchn: evtchn.clone(), port: port.map_or(0, u32::from).into() }
    }

    /// The local port.
    pub fn port(&self) -> Option<EvtchnPort> {
        Some(self.port.load(Ordering::Acquire)).filter(|port| *port != 0).map(EvtchnPort)
    }

    /// Closes the port and binds another port of the domain; returns the local port.
    ///
    /// # Errors
    ///
    /// Fails if the remote port cannot be bound; the doorbell has no port then.
    pub fn rebind(&self, domid: DomId, remote: EvtchnPort) -> io::Result<EvtchnPort> {
        self.unbind();
        let port = self.evtchn.bind(domid, remote)?;
        self.port.store(port.0, Ordering::Release);
        Ok(port)
    }

    /// Closes the port, if there is one.
    pub fn unbind(&self) {
        let port = self.port.swap(0, Ordering::AcqRel);
        if port != 0 {
            // If the domain is gone, Xen has closed its end: the local port becomes free either way.
            let _ = self.evtchn.unbind(EvtchnPort(port));
        }
    }
}

impl Drop for EvtchnDoorbell {
    fn drop(&mut self) {
        self.unbind();
    }
}

impl Doorbell for EvtchnDoorbell {
    fn notify(&self) {
        if let Some(port) = self.port() {
            let _ = self.evtchn.notify(port);
        }
    }
}
