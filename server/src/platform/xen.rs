//! The platform on a Xen host.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_lite::future::yield_now;
use smol::Timer;
use smol::channel::Sender;
use tracing::{error, info, warn};
use xenstore_protocol::ring::{Side, Word};
use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Gfn, Operation};
use xenstore_store::{ConnectionIo, DomainInfo, Host};
use xenstore_transport::ring::{Indices, Page, RingChannel};
use xenstore_transport::xen::{
    DomainStatus, Evtchn, EvtchnDoorbell, Machine, Released, SharedPage, XenRing, XenRingChannel,
};

use crate::journal::{RingResume, settle};
use crate::log::Trace;
use crate::serve::Server;

/// Pause after a failed wait for events.
const EVENTS_PAUSE: Duration = Duration::from_secs(1);

/// The ring of each bound port.
type Ports = Rc<RefCell<BTreeMap<EvtchnPort, Arc<XenRingChannel>>>>;

/// The rings of domains. Clones are the same.
pub(crate) type Rings = Rc<RefCell<BTreeMap<DomId, Ringed>>>;

/// Domains of a hypervisor, and their rings.
#[derive(Debug)]
pub(crate) struct Xen {
    machine: Machine,
    rings: Rings,
    ports: Ports,
    /// New rings, which the receiver serves.
    fresh: Sender<XenRing>,
    seen: BTreeMap<DomId, DomainInfo>,
    last_id: u64,
    trace: Trace,
}

/// The ring of a domain.
#[derive(Debug)]
pub(crate) struct Ringed {
    channel: Arc<XenRingChannel>,
    /// The local port of its event channel.
    pub(crate) port: Option<EvtchnPort>,
    /// The domain's port, if it is known.
    pub(crate) remote: Option<EvtchnPort>,
    /// The frame of its page, from INTRODUCE.
    pub(crate) gfn: Gfn,
}

impl Ringed {
    /// Writes the features into the page.
    pub(crate) fn offer(&self, features: Features) {
        self.channel.page().store(Word::ServerFeatures, features.bits());
    }

    /// Closes the event channel, if there is one.
    fn unplug(&mut self, ports: &Ports) {
        if let Some(port) = self.port.take() {
            ports.borrow_mut().remove(&port);
        }
        self.unbind();
    }

    /// The same when the daemon ends.
    pub(crate) fn unbind(&self) {
        self.channel.doorbell().unbind();
    }
}

/// The event channels of this daemon.
#[derive(Clone, Debug)]
pub(crate) struct Bound {
    /// The event channel device.
    pub(crate) evtchn: Arc<dyn Evtchn>,
    /// The port of `VIRQ_DOM_EXC`, by which the hypervisor reports changes of domains.
    pub(crate) domain_exc: Rc<Cell<EvtchnPort>>,
}

impl Bound {
    /// Releases `VIRQ_DOM_EXC`, which one program can bind, for another program of this domain.
    pub(crate) fn give_up_domain_exc(&self) -> io::Result<()> {
        self.evtchn.unbind(self.domain_exc.get())
    }

    /// Binds `VIRQ_DOM_EXC` again.
    pub(crate) fn bind_domain_exc(&self) -> io::Result<()> {
        self.domain_exc.set(self.evtchn.bind_domain_exc()?);
        Ok(())
    }
}

/// The receiver of events.
pub(crate) struct Events {
    pub(crate) bound: Bound,
    ports: Ports,
}

impl Xen {
    /// Binds `VIRQ_DOM_EXC`, unless it is bound to `bound` already or its port was stored.
    ///
    /// # Errors
    ///
    /// Fails if another process has bound `VIRQ_DOM_EXC`.
    pub(crate) fn new(
        mut machine: Machine,
        fresh: Sender<XenRing>,
        trace: Trace,
        bound: Option<EvtchnPort>,
    ) -> Result<(Xen, Events), String> {
        let evtchn = machine.evtchn.clone();
        let bound = bound.or_else(|| machine.stored_ports.as_mut()?.adopt_domain_exc());
        let domain_exc = bound.map_or_else(|| evtchn.bind_domain_exc(), Ok).map_err(|error| {
            format!("VIRQ_DOM_EXC: {error}; does another XenStore run on this host?")
        })?;
        let ports = Ports::default();
        let (rings, seen) = (Rings::default(), BTreeMap::new());
        let events = Events {
            bound: Bound { evtchn, domain_exc: Rc::new(Cell::new(domain_exc)) },
            ports: ports.clone(),
        };
        Ok((Xen { machine, rings, ports, fresh, seen, last_id: 0, trace }, events))
    }

    /// Connects the kernel of the daemon's domain. Its ring is notified when it is served, not before: the
    /// kernel then sends requests, and from then on the next process must know of the ring.
    pub(crate) fn connect_own_kernel(&mut self, domid: DomId) -> Result<(), String> {
        let (page, remote) = self.machine.memory.own_ring().map_err(|error| error.to_string())?;
        let doorbell = EvtchnDoorbell::bind(&self.machine.evtchn, domid, remote)
            .map_err(|error| format!("event channel of domain {domid}: {error}"))?;
        let channel = self.add(domid, page, doorbell, Features::ALL, (Gfn(0), remote));
        let _ = self.fresh.try_send(XenRing::new(channel, domid).notify_on_flush());
        Ok(())
    }

    /// The rings of domains, for a live update.
    pub(crate) fn rings(&self) -> Rings {
        self.rings.clone()
    }

    /// Restores the identity of a domain.
    pub(crate) fn knows(&mut self, domid: DomId, info: DomainInfo) {
        self.last_id = self.last_id.max(info.unique_id);
        self.seen.insert(domid, info);
    }

    /// Resumes the ring of a domain, `own` or not, where another process was. The guest was offered
    /// `features`. After a crash, the number of replies that were sent is unknown.
    pub(crate) fn resume(
        &mut self,
        domid: DomId,
        own: bool,
        io: &ConnectionIo,
        features: Features,
        after_crash: bool,
    ) -> io::Result<(XenRing, RingResume)> {
        let (port, remote) = (io.port.map(EvtchnPort), io.remote_port.map(EvtchnPort));
        let gfn = Gfn(io.gfn.unwrap_or(0));
        let (page, remote) = match own {
            true => self.machine.memory.own_ring().map(|(page, port)| (page, Some(port)))?,
            false => (self.machine.memory.map_ring(domid, gfn)?, remote),
        };
        // A guest may have bound its end of a stored channel again, so the journal cannot be used.
        let stored = self.machine.stored_ports.as_mut().and_then(|ports| ports.adopt(domid));
        let port = port.or(stored.map(|channel| channel.port));
        let remote = stored.map(|channel| channel.remote).or(remote);
        let doorbell = EvtchnDoorbell::adopt(&self.machine.evtchn, port);
        if let (None, Some(remote)) = (port, remote)
            && let Err(error) = doorbell.rebind(domid, remote)
        {
            // As in `again`: it can be introduced once more.
            warn!(%domid, port = remote.0, %error, "cannot bind the event channel");
        }
        let port = doorbell.port();
        // A daemon that has handed over has notified all guests.
        let indices = io.indices.map(|(req_cons, rsp_prod)| Indices { req_cons, rsp_prod });
        let notified = indices.is_some() && !after_crash;
        let (known, req_prod) = (Indices::of(&page), page.load(Word::ReqProd));
        let (indices, settled) = match indices {
            Some(before) if after_crash => {
                let mut ring = vec![0; io.requests.len()];
                page.read(Side::Requests, 0, &mut ring);
                let untold =
                    ring == io.requests && u32::try_from(io.requests.len()) == Ok(before.req_cons);
                settle(before, io.unsent.len(), known, req_prod, untold)
            }
            indices => (indices.unwrap_or(known), RingResume::Continued),
        };
        if after_crash && settled == RingResume::Continued {
            // The new journal does not contain the requests before it. Without this write, the page
            // could not be distinguished from one that the guest has set to 0.
            indices.publish_req_cons(&page);
        }
        let channel = RingChannel::resume(page, doorbell, features);
        if let Some(port) = port {
            self.ports.borrow_mut().insert(port, channel.clone());
            // The other process may have read an event and not processed it.
            self.machine.evtchn.unmask(&[port])?;
        }
        let ringed = Ringed { channel: channel.clone(), port, remote, gfn };
        self.rings.borrow_mut().insert(domid, ringed);
        let ring = XenRing::resume(channel, domid, indices);
        Ok((if notified { ring } else { ring.notify_on_flush() }, settled))
    }

    /// Closes stored ports that no ring has adopted.
    pub(crate) fn give_back_rest(&mut self) {
        give_back(&mut self.machine);
    }

    /// Returns domids and ports of domains that were built without a toolstack (dom0less),
    /// according to their pages.
    pub(crate) fn built_before(&mut self, own: DomId) -> Vec<(DomId, EvtchnPort)> {
        let all = self.machine.domains.all().unwrap_or_else(|error| {
            warn!(%error, "the hypervisor does not list its domains");
            Vec::new()
        });
        let others = all.into_iter().filter(|domid| *domid != own);
        let waiting = others.filter_map(|domid| {
            let page = self.machine.memory.map_ring(domid, Gfn(0)).ok()?;
            let port = EvtchnPort(page.load(Word::EvtchnPort));
            Some((domid, port)).filter(|_| port != EvtchnPort(0))
        });
        waiting.collect()
    }

    fn add(
        &mut self,
        domid: DomId,
        page: SharedPage,
        doorbell: EvtchnDoorbell,
        features: Features,
        (gfn, remote): (Gfn, EvtchnPort),
    ) -> Arc<XenRingChannel> {
        let port = doorbell.port();
        let channel = RingChannel::new(page, doorbell, features);
        self.ports.borrow_mut().extend(port.map(|port| (port, channel.clone())));
        let ringed = Ringed { channel: channel.clone(), port, remote: Some(remote), gfn };
        self.rings.borrow_mut().insert(domid, ringed);
        channel
    }

    /// Introduces a domain with a ring again, usually because its event channel has changed.
    fn again(&mut self, domid: DomId, remote: EvtchnPort) {
        let mut rings = self.rings.borrow_mut();
        let Some(ringed) = rings.get_mut(&domid) else { return };
        ringed.unplug(&self.ports);
        ringed.remote = Some(remote);
        let Ringed { channel, port, .. } = ringed;
        match channel.doorbell().rebind(domid, remote) {
            Ok(bound) => {
                *port = Some(bound);
                self.ports.borrow_mut().insert(bound, channel.clone());
            }
            // Like C xenstored: the domain can be introduced once more.
            Err(error) => warn!(%domid, port = remote.0, %error, "cannot bind the event channel"),
        }
        channel.start();
    }
}

impl Host for Xen {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        let status = match self.machine.domains.domain(domid) {
            Ok(Some(status)) => status,
            Ok(None) => {
                self.seen.remove(&domid);
                return None;
            }
            Err(error) => {
                // A failed query must not remove the nodes of a domain.
                warn!(%domid, %error, "cannot query this domain");
                return self.seen.get(&domid).copied();
            }
        };
        let DomainStatus { unique_id, shutdown } = status;
        // A hypervisor without unique ids: each domain gets one here, until it is gone.
        let known = self.seen.get(&domid).map(|info| info.unique_id);
        let unique_id = unique_id.or(known).unwrap_or_else(|| {
            self.last_id += 1;
            self.last_id
        });
        let info = DomainInfo { unique_id, shutdown };
        self.seen.insert(domid, info);
        Some(info)
    }

    fn introduce(
        &mut self,
        domid: DomId,
        gfn: Gfn,
        port: EvtchnPort,
        features: Features,
    ) -> Result<(), Errno> {
        if self.rings.borrow().contains_key(&domid) {
            self.again(domid, port);
            return Ok(());
        }
        let page = self.machine.memory.map_ring(domid, gfn).map_err(|error| {
            warn!(%domid, gfn = gfn.0, %error, "cannot map the ring page of this domain");
            Errno::Einval
        })?;
        let known = EvtchnPort(page.load(Word::EvtchnPort));
        let port = if known == EvtchnPort(0) { port } else { known };
        let doorbell =
            EvtchnDoorbell::bind(&self.machine.evtchn, domid, port).map_err(|error| {
                warn!(%domid, port = port.0, %error, "cannot bind the event channel of this domain");
                Errno::Einval
            })?;
        let channel = self.add(domid, page, doorbell, features, (gfn, port));
        let _ = self.fresh.try_send(XenRing::new(channel, domid));
        Ok(())
    }

    fn release(&mut self, domid: DomId) {
        let Some(mut ringed) = self.rings.borrow_mut().remove(&domid) else { return };
        // The page is unmapped with the connection, which ends now, or as soon as it is served if the domain
        // is released right after it was introduced.
        ringed.channel.close();
        ringed.unplug(&self.ports);
    }

    fn control(&mut self, command: &[u8], args: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        self.trace.control(command, args)
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        &Trace::COMMANDS
    }
}

/// Closes all stored ports that no ring has adopted.
pub(crate) fn give_back(machine: &mut Machine) {
    let Some(stored) = machine.stored_ports.take() else { return };
    let Released { adopted, released, error } = stored.release(&*machine.evtchn);
    if let Some(error) = error {
        warn!(%error, "cannot query event channels: they are bound again");
    }
    info!(adopted, released, "event channels were stored");
}

impl Events {
    /// Delivers events without end: those of rings to their tasks, and those about domains to the
    /// store.
    pub(crate) async fn deliver(self, server: &Server<Box<dyn Host>>) {
        let Bound { evtchn, domain_exc } = &self.bound;
        let mut ports = Vec::new();
        loop {
            ports.clear();
            match poll_fn(|cx| evtchn.poll_ports(cx, &mut ports)).await {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                    ports.extend(self.ports.borrow().keys().copied());
                    ports.push(domain_exc.get());
                }
                Err(error) => {
                    error!(%error, "cannot read events; trying again");
                    Timer::after(EVENTS_PAUSE).await;
                    continue;
                }
            }
            for port in &ports {
                if let Some(channel) = self.ports.borrow().get(port) {
                    channel.notify();
                }
            }
            if ports.contains(&domain_exc.get()) {
                server.domains_changed();
            }
            // A guest that rings without end gets no more events than turns (XSA-332).
            yield_now().await;
            if let Err(error) = evtchn.unmask(&ports) {
                error!(%error, "cannot unmask event channels");
            }
        }
    }
}

/// Introduces domains that are older than the daemon.
pub(crate) fn introduce_all(server: &Server<Box<dyn Host>>, waiting: &[(DomId, EvtchnPort)]) {
    for (domid, port) in waiting {
        let payload = format!("{domid}\x000\0{port}\0");
        let (ty, reply) = server.request(Operation::Introduce, payload.as_bytes());
        let reply = String::from_utf8_lossy(&reply);
        match ty == Operation::Error.as_wire() {
            true => warn!(%domid, %port, %reply, "a domain that waits cannot be introduced"),
            false => info!(%domid, %port, "introduced a domain that was waiting"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::{Context, Poll};

    use futures_lite::future;
    use xenstore_store::Config;
    use xenstore_transport::driver::Driver;
    use xenstore_transport::xen::pretend;

    use super::*;
    use crate::platform::Standalone;
    use crate::serve::Clock;

    /// A device that has lost events.
    #[derive(Debug)]
    struct Full {
        device: Arc<dyn Evtchn>,
        told: AtomicBool,
        unmasked: Mutex<Vec<EvtchnPort>>,
    }

    impl Evtchn for Full {
        fn bind(&self, domid: DomId, remote: EvtchnPort) -> io::Result<EvtchnPort> {
            self.device.bind(domid, remote)
        }
        fn bind_domain_exc(&self) -> io::Result<EvtchnPort> {
            self.device.bind_domain_exc()
        }
        fn unbind(&self, port: EvtchnPort) -> io::Result<()> {
            self.device.unbind(port)
        }
        fn notify(&self, port: EvtchnPort) -> io::Result<()> {
            self.device.notify(port)
        }
        fn poll_ports(&self, _: &mut Context<'_>, _: &mut Vec<EvtchnPort>) -> Poll<io::Result<()>> {
            match self.told.swap(true, Ordering::Relaxed) {
                false => Poll::Ready(Err(io::Error::from(rustix::io::Errno::FBIG))),
                true => Poll::Pending,
            }
        }
        fn descriptor(&self) -> BorrowedFd<'_> {
            self.device.descriptor()
        }
        fn unmask(&self, ports: &[EvtchnPort]) -> io::Result<()> {
            self.unmasked.lock().unwrap().extend(ports);
            Ok(())
        }
    }

    // Fails if guests whose events were lost because the device had no room are not served.
    #[test]
    fn all_rings_are_served_when_events_are_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut machine = pretend::open(dir.path(), &Driver::new().unwrap(), None).unwrap();
        let (told, unmasked) = (AtomicBool::new(false), Mutex::default());
        let full = Arc::new(Full { device: machine.evtchn.clone(), told, unmasked });
        machine.evtchn = full.clone();
        let (fresh, _rings) = smol::channel::unbounded();
        let (mut xen, events) = Xen::new(machine, fresh, Trace::new(), None).unwrap();
        for domid in [1, 2] {
            std::fs::create_dir(dir.path().join(domid.to_string())).unwrap();
            xen.introduce(DomId(domid), Gfn(0), EvtchnPort(1), Features::NONE).unwrap();
        }
        let host: Box<dyn Host> = Box::new(Standalone::default());
        let server = Server::new(&Config::default(), host, Clock::Manual(0.into()));
        future::block_on(async {
            let mut deliver = std::pin::pin!(events.deliver(&server));
            // The second turn comes after the first of each task.
            for _ in 0..2 {
                assert!(future::poll_once(&mut deliver).await.is_none());
            }
        });
        let mut unmasked = full.unmasked.lock().unwrap().clone();
        unmasked.sort_unstable();
        assert_eq!(unmasked, [1, 2, 3].map(EvtchnPort), "VIRQ_DOM_EXC and two rings");
    }
}
