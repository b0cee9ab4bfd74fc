//! From a state to a migration stream for C xenstored, and what is lost by that.

use alloc::borrow::ToOwned;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use xenstore_protocol::stream::{VERSION, Writer};
use xenstore_protocol::{DomId, Features, Quota, WatchEvent};

use super::encode::{put_domain, put_global_quotas, put_watch, split_input};
use super::nodes::put_nodes;
use super::{ConnectionState, State, WatchState};
use crate::domain::quotas::Quotas;
use crate::ids::Caller;

/// The names of the features, for the operator.
const FEATURES: [(Features, &str); 4] = [
    (Features::RECONNECT, "reconnection"),
    (Features::ERROR, "error field"),
    (Features::WATCH_DEPTH, "watch depth"),
    (Features::DOMID_ANY, "DOMID_ANY"),
];

/// What a C xenstored reads of a migration stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CFormat {
    /// The newest version that it reads; it refuses newer ones, and ends.
    pub version: u32,
    /// The features that it has for its guests.
    pub features: Features,
    /// True if it takes quotas from the stream.
    pub quotas: bool,
}

impl CFormat {
    /// C xenstored up to Xen 4.20.
    pub const XEN_4_20: CFormat = CFormat { version: 1, features: Features::NONE, quotas: false };
    /// C xenstored of Xen 4.21.
    pub const XEN_4_21: CFormat =
        CFormat { version: VERSION, features: Features::ERROR, quotas: false };
    /// C xenstored of Xen 4.22 and 4.23.
    pub const XEN_4_22: CFormat = CFormat {
        version: VERSION,
        features: Features::ERROR.union(Features::WATCH_DEPTH).union(Features::DOMID_ANY),
        quotas: true,
    };

    /// The features that a guest is offered by it when it has read a stream of `version`, if the
    /// stream says `features`. A stream of version 1 has none, and each guest gets all.
    pub fn offered(&self, version: u32, features: Features) -> Features {
        if version > 1 { features & self.features } else { self.features }
    }
}

impl State {
    /// Writes a stream of this version that a C xenstored of this kind reads. Also returns what it
    /// will not know, one text for each thing.
    ///
    /// Waiting events become bytes of replies that are not written yet. Watches with a depth become
    /// watches without, which report more. Quotas go into streams of both versions, as from C
    /// xenstored 4.22 itself.
    pub fn encode_for_c(&self, format: &CFormat, version: u32) -> (Vec<u8>, Vec<String>) {
        let mut lost = Vec::new();
        let mut writer = Writer::new(version, self.rough_size());
        self.put_global(&mut writer);
        match &self.quotas {
            Some(quotas) if format.quotas => put_global_quotas(&mut writer, quotas),
            _ => {}
        }
        let mut met = BTreeSet::new();
        for (number, connection) in (1..).zip(&self.connections) {
            if let Caller::Domain(domid) = connection.caller
                && !met.insert(domid)
            {
                lost.push(format!("a second connection of domain {domid}"));
                continue;
            }
            self.put_connection_for_c(&mut writer, number, connection, &mut lost);
        }
        // A domain without a connection record would end without an event.
        let mut number = u32::try_from(self.connections.len()).unwrap_or(u32::MAX - 1);
        for domain in self.domains.iter().filter(|domain| domain.introduced) {
            if met.insert(domain.domid) {
                number += 1;
                let caller = Caller::Domain(domain.domid);
                let connection = ConnectionState::new(Default::default(), caller);
                self.put_connection(&mut writer, number, &connection, &[]);
            }
        }
        put_nodes(&mut writer, &self.tree, |domid| self.eras.get(&domid).copied().unwrap_or(0));
        if version > 1 || format.quotas {
            // C xenstored ends at a domain that it has met neither at a connection nor at a node.
            met.extend(crate::tree::node::descend(self.tree.root()).map(|node| node.acl().owner()));
            for domain in self.domains.iter().filter(|domain| met.contains(&domain.domid)) {
                let features =
                    if version > 1 { domain.features & format.features } else { Features::NONE };
                put_domain(&mut writer, domain, features, format.quotas);
            }
        }
        self.lose_features(format, version, &mut lost);
        self.lose_permissions(format, &mut lost);
        if !format.quotas {
            self.lose_quotas(&mut lost);
        }
        (writer.finish(), lost)
    }

    /// Adds a text for each feature that guests lose, or are offered again.
    fn lose_features(&self, format: &CFormat, version: u32, lost: &mut Vec<String>) {
        let mut changes: BTreeMap<(&str, &str), Vec<DomId>> = BTreeMap::new();
        for domain in self.domains.iter().filter(|domain| domain.introduced) {
            let offered = format.offered(version, domain.features);
            for (bit, name) in FEATURES {
                let change = match (domain.features.contains(bit), offered.contains(bit)) {
                    (true, false) => "no longer offered to",
                    (false, true) => "offered again to",
                    _ => continue,
                };
                changes.entry((name, change)).or_default().push(domain.domid);
            }
        }
        for ((name, change), domains) in changes {
            lost.push(format!("feature {name}: {change} {}", list(&domains)));
        }
    }

    /// Adds a text if nodes have permissions for all domains, which the other daemon does not heed.
    fn lose_permissions(&self, format: &CFormat, lost: &mut Vec<String>) {
        if format.features.contains(Features::DOMID_ANY) {
            return;
        }
        let (mut first, mut more) = (None, 0_u64);
        self.visit_nodes(|path, _, perms| {
            if perms.0.iter().any(|perm| perm.domid == DomId::ANY) {
                more += u64::from(first.is_some());
                first.get_or_insert_with(|| path.to_owned());
            }
        });
        if let Some(path) = first {
            let more = if more > 0 { format!(" and {more} more nodes") } else { String::new() };
            lost.push(format!("permission of all domains (DOMID_ANY) at {path}{more}"));
        }
    }

    /// Adds a text for each quota that is not the default of both daemons.
    fn lose_quotas(&self, lost: &mut Vec<String>) {
        let global = self.quotas.unwrap_or_default();
        let mut add = |quotas: &Quotas, base: &Quotas, of: &str| {
            for quota in Quota::ALL.iter().filter(|quota| quotas.get(**quota) != base.get(**quota))
            {
                let (name, value) = (quota.name(), quotas.get(*quota));
                lost.push(format!("quota {name} = {value} {of}"));
            }
        };
        add(&global, &Quotas::default(), "of all domains, unless an option sets it");
        for domain in self.domains.iter().filter(|domain| domain.introduced) {
            if let Some(quotas) = &domain.quotas {
                add(quotas, &global, &format!("of domain {}", domain.domid));
            }
        }
    }

    fn put_connection_for_c(
        &self,
        writer: &mut Writer<'_>,
        number: u32,
        connection: &ConnectionState,
        lost: &mut Vec<String>,
    ) {
        let id = connection.id;
        let mut output = connection.io.unsent.clone();
        for event in &connection.events {
            let at = connection.watches.binary_search_by_key(&event.watch, |watch| watch.id);
            let Ok(at) = at else { continue };
            let watch = &connection.watches[at];
            let path = &event.path[watch.prefix(connection.domid)..];
            let event = WatchEvent { path: path.as_bytes(), token: &watch.token };
            // An event that does not fit a message is dropped (XSA-324).
            let _ = event.emit(&mut output);
        }
        self.put_connection(writer, number, connection, &output);
        let (_, more) = split_input(&connection.io.unread);
        if !more.is_empty() {
            let more = more.len();
            lost.push(format!("{more} bytes of requests of connection {id}, too far ahead"));
        }
        for watch in &connection.watches {
            put_watch(writer, number, watch, None);
            if let Some(depth) = watch.depth {
                lost.push(format!("depth {depth} of watch {} of connection {id}", watch.path()));
            }
        }
        for (tx_id, _) in &connection.transactions {
            lost.push(format!("transaction {tx_id} of connection {id}: it will be unknown"));
        }
    }
}

/// "domain 5", or "domains 5, 6".
fn list(domains: &[DomId]) -> String {
    let numbers: Vec<String> = domains.iter().map(ToString::to_string).collect();
    format!("domain{} {}", if numbers.len() > 1 { "s" } else { "" }, numbers.join(", "))
}

impl WatchState {
    /// Bytes of the resolved path that the client did not write.
    fn prefix(&self, domid: Option<DomId>) -> usize {
        let relative = !self.path().starts_with(['/', '@']);
        let prefix = |domid| format!("/local/domain/{domid}/").len();
        domid.filter(|_| relative).map_or(0, prefix)
    }
}
