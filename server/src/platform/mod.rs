//! The platform that the daemon runs on: Xen, a pretend Xen in files, or none.

pub(crate) mod machine;
mod standalone;
pub(crate) mod xen;

use std::os::fd::OwnedFd;

use smol::channel::Sender;
use tracing::warn;
use xenstore_protocol::{DomId, EvtchnPort};
use xenstore_store::{Caller, Config, ConnId, DomainInfo, Host, State};
use xenstore_sys::inherit;
use xenstore_transport::driver::Driver;
use xenstore_transport::xen::{Inherited, Machine, XenRing};

use crate::daemon::options::Options;
use crate::daemon::systemd::{self, Keep};
use crate::journal::RingResume;
use crate::log::Trace;
pub use standalone::Standalone;
use xen::{Rings, Xen};

/// The platform, and the domains that exist already.
pub(crate) struct Platform {
    pub(crate) host: Box<dyn Host>,
    /// A description for the log.
    pub(crate) kind: String,
    pub(crate) events: Option<xen::Events>,
    pub(crate) rings: Rings,
    /// Domains that exist already, and their ports.
    pub(crate) waiting: Vec<(DomId, EvtchnPort)>,
    /// Rings that another program has served.
    pub(crate) resumed: Resumed,
}

/// Rings that another program has served, and the way to resume each.
pub(crate) type Resumed = Vec<(ConnId, XenRing, RingResume)>;

/// The receiver of new rings, the trace, and the driver.
type Tools<'a> = (Sender<XenRing>, &'a Trace, &'a Driver);

impl Platform {
    /// Opens Xen, a pretend Xen, or neither: then every domain exists and there are no rings. A
    /// state determines the kind of platform; `kept` is a stored event channel device.
    pub(crate) fn find(
        options: &Options,
        config: &Config,
        state: Option<&State>,
        kept: Option<OwnedFd>,
        tools: Tools<'_>,
    ) -> Result<Platform, String> {
        let device = state.and_then(|state| state.io.evtchn);
        let (_, trace, driver) = &tools;
        let open = |inherited| machine::open(options, driver, inherited);
        let machine = match (device, kept) {
            (Some(_), Some(kept)) => open(Some(Inherited::Stored(kept))),
            (Some(number), None) => {
                inherit::adopt(number).and_then(|fd| open(Some(Inherited::HandedOver(fd))))
            }
            (None, Some(kept)) => open(Some(Inherited::Stored(kept))).or_else(|error| {
                warn!(%error, "systemd has not stored the event channels: they are bound again");
                systemd::forget(&[Keep::Evtchn]);
                open(None)
            }),
            (None, None) => open(None),
        };
        match machine {
            Ok(machine) => Platform::with_xen(machine, config, state, tools),
            Err(error) if options.require_xen => Err(format!("--require-xen: {error}")),
            Err(error) if device.is_some() => {
                Err(format!("the state is one of a Xen host: {error}"))
            }
            Err(error) => {
                let mut host = Standalone::with_trace((*trace).clone());
                known(state, |domid, info| host.knows(domid, info));
                Ok(Platform {
                    host: Box::new(host),
                    kind: format!("standalone store (no Xen here: {error})"),
                    events: None,
                    rings: Rings::default(),
                    waiting: Vec::new(),
                    resumed: Vec::new(),
                })
            }
        }
    }

    fn with_xen(
        mut machine: Machine,
        config: &Config,
        state: Option<&State>,
        (fresh, trace, _): Tools<'_>,
    ) -> Result<Platform, String> {
        let own = Caller::Domain(config.store);
        let connections = state.map_or(&[][..], |state| &state.connections);
        // Otherwise no daemon has connected the kernel before.
        let continues = connections.iter().any(|connection| connection.caller == own);
        if !continues {
            // The hypervisor notifies a process that binds `VIRQ_DOM_EXC` of all domains.
            xen::give_back(&mut machine);
        }
        let bound = state.and_then(|state| state.io.virq_port).map(EvtchnPort);
        let (mut host, events) = Xen::new(machine, fresh, trace.clone(), bound)?;
        known(state, |domid, info| host.knows(domid, info));
        let resumed = state.map_or_else(Vec::new, |state| resume_rings(&mut host, config, state));
        host.give_back_rest();
        let waiting = match continues {
            true => Vec::new(),
            false => {
                host.connect_own_kernel(config.store)?;
                let mut waiting = host.built_before(config.store);
                waiting.retain(|(domid, _)| !is_introduced(state, *domid));
                waiting
            }
        };
        // The previous program may have read an event and not processed it.
        if let Err(error) = events.bound.evtchn.unmask(&[events.bound.domain_exc.get()]) {
            warn!(%error, "cannot unmask VIRQ_DOM_EXC");
        }
        let rings = host.rings();
        let (host, kind) = (Box::new(host), "store".into());
        Ok(Platform { host, kind, events: Some(events), rings, waiting, resumed })
    }
}

fn is_introduced(state: Option<&State>, domid: DomId) -> bool {
    let mut domains = state.iter().flat_map(|state| &state.domains);
    domains.any(|domain| domain.domid == domid && domain.introduced)
}

/// Reports each domain whose identity is in the state.
fn known(state: Option<&State>, mut tell: impl FnMut(DomId, DomainInfo)) {
    for domain in state.iter().flat_map(|state| &state.domains) {
        if domain.unique_id != 0 {
            let info = DomainInfo { unique_id: domain.unique_id, shutdown: domain.shutdown };
            tell(domain.domid, info);
        }
    }
}

/// Resumes the rings of a state. A ring that cannot be mapped is logged and left out.
fn resume_rings(host: &mut Xen, config: &Config, state: &State) -> Resumed {
    let mut rings = Vec::new();
    for connection in &state.connections {
        let Caller::Domain(domid) = connection.caller else { continue };
        let domain = state.domains.binary_search_by_key(&domid, |domain| domain.domid);
        let domain = domain.ok().map(|at| &state.domains[at]);
        let io = &connection.io;
        let features = domain.map_or(xenstore_protocol::Features::ALL, |domain| domain.features);
        let (own, after_crash) = (domid == config.store, state.io.evtchn.is_none());
        match host.resume(domid, own, io, features, after_crash) {
            Ok((ring, settled)) => rings.push((connection.id, ring, settled)),
            Err(error) => warn!(%domid, %error, "cannot resume the ring of this domain"),
        }
    }
    rings
}
