//! The domains that the store knows, with their usage and quotas.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::format;
use alloc::vec::Vec;

use xenstore_protocol::{DomId, Features, Quota};

use crate::domain::host::Host;
use crate::domain::quotas::Quotas;
use crate::domain::warnings::Warnings;
use crate::ids::Millis;
use crate::mru_map::MruMap;
use crate::tree::accounting::Charge;
use crate::tree::acl::Era;

/// In place of the identity of a domain in a state that does not say it.
pub(crate) const UNKNOWN_ID: u64 = 0;

/// What is counted for a domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) nodes: i64,
    pub(crate) watches: i64,
    pub(crate) transactions: i64,
    pub(crate) bytes: i64,
}

impl Usage {
    /// The larger of the two, each by itself.
    pub(crate) fn max(self, other: Usage) -> Usage {
        Usage {
            nodes: self.nodes.max(other.nodes),
            watches: self.watches.max(other.watches),
            transactions: self.transactions.max(other.transactions),
            bytes: self.bytes.max(other.bytes),
        }
    }

    /// What a quota limits, for those quotas that limit a sum.
    pub(crate) fn of(&self, quota: Quota) -> Option<i64> {
        match quota {
            Quota::Nodes => Some(self.nodes),
            Quota::Watches => Some(self.watches),
            Quota::Transactions => Some(self.transactions),
            Quota::Memory => Some(self.bytes),
            _ => None,
        }
    }
}

/// The largest amount that was allowed, for each quota that limits a single thing and not a sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Largest(pub(crate) [i64; 4]);

impl Largest {
    fn place(quota: Quota) -> Option<usize> {
        match quota {
            Quota::TransactionNodes => Some(0),
            Quota::NodePermissions => Some(1),
            Quota::PathMax => Some(2),
            Quota::NodeSize => Some(3),
            _ => None,
        }
    }

    /// The same with this amount, if the quota is one of those.
    pub(crate) fn with(mut self, quota: Quota, amount: i64) -> Largest {
        if let Some(at) = Largest::place(quota) {
            self.0[at] = self.0[at].max(amount);
        }
        self
    }

    /// The larger of the two, each by itself.
    pub(crate) fn max(self, other: Largest) -> Largest {
        let mut both = self.0;
        both.iter_mut().zip(other.0).for_each(|(a, b)| *a = (*a).max(b));
        Largest(both)
    }

    /// The amount for a quota; 0 for the others.
    pub(crate) fn of(&self, quota: Quota) -> i64 {
        Largest::place(quota).map_or(0, |at| self.0[at])
    }
}

/// A domain: introduced, or named by a permission list or by a setting.
#[derive(Clone, Debug)]
pub(crate) struct Domain {
    pub(crate) unique_id: u64,
    pub(crate) era: Era,
    pub(crate) introduced: bool,
    /// Its shutdown has been told; reset by RESUME.
    pub(crate) shutdown: bool,
    pub(crate) target: Option<DomId>,
    pub(crate) features: Features,
    pub(crate) quotas: Quotas,
    pub(crate) usage: Usage,
    pub(crate) peak: Usage,
    pub(crate) largest: Largest,
    /// It has more bytes than its soft quota, and when that was told.
    pub(crate) over_soft: bool,
    pub(crate) soft_told: Option<Millis>,
}

/// All domains that the store knows.
#[derive(Clone, Debug)]
pub(crate) struct Domains {
    pub(crate) known: MruMap<DomId, Domain>,
    /// What new domains start with.
    pub(crate) defaults: Quotas,
    pub(crate) warnings: Warnings,
    /// The era of each domid whose era is not 0.
    pub(crate) eras: BTreeMap<DomId, Era>,
    /// Dead domains that still have nodes, and whether they had been introduced. Their domids are not used
    /// again before these nodes are removed.
    pub(crate) dying: BTreeMap<DomId, bool>,
    /// Each target with a domain that has it.
    targets: BTreeSet<(DomId, DomId)>,
    /// Bytes that are charged to all of them, and the most that were since they last had shrunk.
    held: i64,
    peak: i64,
}

/// What has to be gone before memory is worth giving back, in bytes as they are charged.
const SHRUNK_MIN: i64 = 4 << 20;
/// What suffices in a store of any size.
const SHRUNK_MAX: i64 = 8 << 20;

impl Domains {
    /// None, of which new ones start with these quotas.
    pub(crate) fn new(defaults: Quotas) -> Domains {
        Domains {
            known: MruMap::new(),
            defaults,
            warnings: Warnings::default(),
            eras: BTreeMap::new(),
            dying: BTreeMap::new(),
            targets: BTreeSet::new(),
            held: 0,
            peak: 0,
        }
    }

    /// Gives a domain that is known another target, or none.
    pub(crate) fn set_target(&mut self, domid: DomId, target: Option<DomId>) {
        let Some(domain) = self.known.get_mut(&domid) else { return };
        if let Some(old) = core::mem::replace(&mut domain.target, target) {
            self.targets.remove(&(old, domid));
        }
        self.targets.extend(target.map(|target| (target, domid)));
    }

    /// No domain has this one as its target any more.
    pub(crate) fn untarget(&mut self, domid: DomId) {
        let pairs = self.targets.range((domid, DomId(0))..=(domid, DomId(u16::MAX)));
        let others: Vec<DomId> = pairs.map(|(_, other)| *other).collect();
        others.into_iter().for_each(|other| self.set_target(other, None));
    }

    /// Forgets a domain. Was it introduced?
    pub(crate) fn forget(&mut self, domid: DomId) -> bool {
        self.set_target(domid, None);
        *self.eras.entry(domid).or_default() += 1;
        let Some(domain) = self.known.remove(&domid) else { return false };
        self.held -= domain.usage.bytes;
        domain.introduced
    }

    /// The era of a domain, or of the next one with its domid.
    pub(crate) fn era(&self, domid: DomId) -> Era {
        match self.known.get(&domid) {
            Some(domain) => domain.era,
            None => self.eras.get(&domid).copied().unwrap_or(0),
        }
    }

    /// Pairs of a target that is there and a domain that has it, for the invariant checker.
    pub(crate) fn targets(&self) -> &BTreeSet<(DomId, DomId)> {
        &self.targets
    }

    pub(crate) fn get(&self, domid: DomId) -> Option<&Domain> {
        self.known.get(&domid)
    }

    /// The domain if it is introduced.
    pub(crate) fn introduced(&mut self, domid: DomId) -> Option<&mut Domain> {
        self.known.get_mut(&domid).filter(|domain| domain.introduced)
    }

    /// The record of a domain that exists on the machine, made if there is none yet.
    pub(crate) fn find(&mut self, domid: DomId, host: &mut dyn Host) -> Option<&mut Domain> {
        if !self.known.contains_key(&domid) {
            let info = host.domain(domid).filter(|_| domid.is_ordinary())?;
            if self.dying.contains_key(&domid) {
                return None;
            }
            self.add(domid, info.unique_id);
        }
        self.known.get_mut(&domid)
    }

    /// Makes the record of a domain unless there is one.
    pub(crate) fn add(&mut self, domid: DomId, unique_id: u64) -> &mut Domain {
        if !self.known.contains_key(&domid) {
            let domain = Domain {
                unique_id,
                era: self.era(domid),
                introduced: false,
                shutdown: false,
                target: None,
                features: Features::ALL,
                quotas: self.defaults,
                usage: Usage::default(),
                peak: Usage::default(),
                largest: Largest::default(),
                over_soft: false,
                soft_told: None,
            };
            self.known.insert(domid, domain);
        }
        self.known.get_mut(&domid).expect("it is there now")
    }

    /// See [`Engine::has_shrunk`](crate::Engine::has_shrunk).
    pub(crate) fn has_shrunk(&mut self) -> bool {
        let gone = self.peak - self.held;
        let much = gone >= SHRUNK_MIN && gone >= (self.peak / 4).min(SHRUNK_MAX);
        if much {
            self.peak = self.held;
        }
        much
    }

    /// Counts something for a domain. Nothing is counted for one that is gone.
    pub(crate) fn count(&mut self, domid: DomId, count: impl FnOnce(&mut Usage)) {
        let Some(domain) = self.known.get_mut(&domid) else { return };
        let before = domain.usage.bytes;
        count(&mut domain.usage);
        domain.peak = domain.peak.max(domain.usage);
        let bytes = domain.usage.bytes;
        self.held += bytes - before;
        self.peak = self.peak.max(self.held);
        let over = !domain.quotas.allows(Quota::SoftMemory, bytes);
        if core::mem::replace(&mut domain.over_soft, over) != over && over {
            let limit = domain.quotas.get(Quota::SoftMemory);
            self.warnings.push_throttled(&mut domain.soft_told, || {
                format!("domain {domid} has more than its quota soft-memory: {bytes} of {limit}")
            });
        }
    }

    /// May a domain have as much of something? A refusal is counted.
    pub(crate) fn allow(&mut self, domid: DomId, quota: Quota, wanted: i64) -> bool {
        let quotas = self.known.get(&domid).map_or(&self.defaults, |domain| &domain.quotas);
        let allowed = quotas.allows(quota, wanted);
        if !allowed {
            self.refuse(domid, quota, wanted, None);
        }
        allowed
    }

    /// Counts a refusal, and at which path it was, if it was at one.
    pub(crate) fn refuse(&mut self, domid: DomId, quota: Quota, wanted: i64, path: Option<&str>) {
        let quotas = self.known.get(&domid).map_or(&self.defaults, |domain| &domain.quotas);
        self.warnings.refuse(domid, quota, (quotas.get(quota), wanted), path);
    }

    pub(crate) fn charge(&mut self, domid: DomId, charge: Charge) {
        self.count(domid, |usage| {
            usage.nodes += charge.nodes;
            usage.bytes += charge.bytes;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if memory is returned to the system for a small amount, twice for the same amount, or never.
    #[test]
    fn a_store_has_shrunk_once_when_a_quarter_is_gone() {
        let mut domains = Domains::new(Quotas::default());
        let charge = |bytes| Charge { nodes: 0, bytes };
        for domid in [1, 2] {
            domains.add(DomId(domid), 0);
            domains.charge(DomId(domid), charge(10 << 20));
        }
        assert!(!domains.has_shrunk());
        domains.charge(DomId(1), charge(-(4 << 20)));
        assert!(!domains.has_shrunk(), "4 of 20 MiB");
        domains.charge(DomId(1), charge(-(1 << 20)));
        assert!(domains.has_shrunk() && !domains.has_shrunk(), "5 of 20 MiB");
        domains.forget(DomId(2));
        assert!(domains.has_shrunk() && !domains.has_shrunk(), "all but 5 MiB");
        domains.charge(DomId(1), charge(-(3 << 20)));
        assert!(!domains.has_shrunk(), "3 of 5 MiB");
    }
}
