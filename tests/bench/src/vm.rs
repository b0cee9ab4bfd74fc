//! What a toolstack asks for when a VM starts and stops.
//!
//! The requests of libxl's domain creation with one network device, in one transaction where libxl
//! has several: what may be left over from an earlier domain is removed, nodes are made and given
//! their permissions one by one, and each reply is waited for.

use xenstore_tests::raw::op;

use crate::meter::Result;
use crate::ring::make_domain;
use crate::rows::Stage;
use crate::tx_loads::Requests;

/// Nodes that are there on a host before its first VM, and domains that are not introduced yet.
pub(crate) fn prepare_for_vms(stage: &Stage, count: u32) -> Result<()> {
    let (mut dom0, xen) = (stage.connect()?, stage.subject.xen_directory());
    (1..=count).try_for_each(|domid| make_domain(&xen, domid))?;
    for path in ["/local/domain", "/local/domain/0/backend/vif", "/vm", "/libxl"] {
        dom0.ok(op::MKDIR, &format!("{path}|"))?;
    }
    Ok(())
}

/// Paths of a domain.
struct Paths {
    domain: String,
    vm: String,
    libxl: String,
    front: String,
    backs: String,
    back: String,
}

fn paths(domid: u32) -> Paths {
    let domain = format!("/local/domain/{domid}");
    Paths {
        vm: format!("/vm/1f0c4a4e-6d1e-4d53-9c2a-{domid:012x}"),
        libxl: format!("/libxl/{domid}"),
        front: format!("{domain}/device/vif/0"),
        backs: format!("/local/domain/0/backend/vif/{domid}"),
        back: format!("/local/domain/0/backend/vif/{domid}/0"),
        domain,
    }
}

/// The start of a VM: with the transaction's start and end, 42 requests.
pub(crate) fn start_of_vm(domid: u32) -> Requests {
    let Paths { domain, vm, libxl, front, backs, back } = paths(domid);
    let mut requests = Vec::new();
    let (read_only, writable) = (format!("n0|r{domid}|"), format!("n{domid}|"));
    let mut node = |path: &str, permissions: &str| {
        requests.push((op::MKDIR, format!("{path}|")));
        requests.push((op::SET_PERMS, format!("{path}|{permissions}")));
    };
    node(&domain, &read_only);
    node(&vm, &read_only);
    node(&libxl, "n0|");
    node(&format!("{domain}/memory"), &read_only);
    node(&format!("{domain}/device"), &read_only);
    node(&format!("{domain}/control"), &read_only);
    node(&format!("{domain}/control/shutdown"), &writable);
    node(&format!("{domain}/data"), &writable);
    node(&front, &format!("n{domid}|r0|"));
    node(&back, &read_only);
    let leftovers = [&domain, &vm, &libxl, &backs];
    requests.splice(0..0, leftovers.map(|path| (op::RM, format!("{path}|"))));
    let values = [
        (format!("{domain}/vm"), vm.clone()),
        (format!("{domain}/name"), format!("guest-{domid}")),
        (format!("{domain}/domid"), domid.to_string()),
        (format!("{domain}/memory/target"), "1048576".into()),
        (format!("{domain}/store/port"), "1".into()),
        (format!("{vm}/name"), format!("guest-{domid}")),
        (format!("{libxl}/type"), "pvh".into()),
        (format!("{front}/backend"), back.clone()),
        (format!("{front}/backend-id"), "0".into()),
        (format!("{front}/state"), "1".into()),
        (format!("{front}/mac"), "00:16:3e:00:00:01".into()),
        (format!("{back}/frontend"), front.clone()),
        (format!("{back}/frontend-id"), domid.to_string()),
        (format!("{back}/online"), "1".into()),
        (format!("{back}/state"), "1".into()),
        (format!("{back}/script"), "/etc/xen/scripts/vif-bridge".into()),
    ];
    requests.extend(values.into_iter().map(|(path, value)| (op::WRITE, format!("{path}|{value}"))));
    requests
}

/// The stop of a VM.
pub(crate) fn stop_of_vm(domid: u32) -> Requests {
    let Paths { domain, vm, libxl, front, backs, back } = paths(domid);
    let mut requests = vec![(op::READ, format!("{back}/state|"))];
    let gone = [front, backs, domain, vm, libxl];
    requests.extend(gone.map(|path| (op::RM, format!("{path}|"))));
    requests
}
