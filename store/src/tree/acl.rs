//! Who may do what: permission lists as the tree keeps them, and their evaluation.

use alloc::vec::Vec;

use triomphe::ThinArc;
use xenstore_protocol::{Access, DomId, Perm, Perms};

/// On whose behalf a request runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rights {
    /// May do everything, and no quota applies.
    pub(crate) privileged: bool,
    pub(crate) domid: DomId,
    pub(crate) era: Era,
    /// The domain whose rights it has as well (SET_TARGET).
    pub(crate) target: Option<(DomId, Era)>,
}

impl Rights {
    fn ids(&self) -> impl Iterator<Item = (DomId, Era)> {
        [Some((self.domid, self.era)), self.target].into_iter().flatten()
    }
}

/// Number of earlier domains with the same domid: distinguishes a domain from its predecessors.
pub(crate) type Era = u32;

/// An entry of a permission list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AclEntry {
    pub(crate) perm: Perm,
    /// Named a domain that did not exist: never grants anything, not even to a later domain with
    /// this domid (XSA-322, XSA-417).
    pub(crate) ignored: bool,
    /// The entry is stale once another domain has this domid: it grants nothing and is not shown, so
    /// that the death of a domain does not visit the nodes that name it (XSA-322).
    pub(crate) era: Era,
}

/// A permission list: never empty, shared between the nodes that inherit it.
#[derive(Clone, Debug)]
pub(crate) struct Acl(ThinArc<(), AclEntry>);

impl PartialEq for Acl {
    fn eq(&self, other: &Acl) -> bool {
        self.is_same(other) || self.entries() == other.entries()
    }
}

impl Eq for Acl {}

impl Acl {
    /// Only the owner may do anything.
    pub(crate) fn private(owner: DomId) -> Acl {
        Acl::new([Perm { access: Access::None, domid: owner }]).expect("one entry")
    }

    /// A list of entries for domains none of whose predecessors has died.
    pub(crate) fn new(perms: impl IntoIterator<Item = Perm>) -> Option<Acl> {
        let entry = |perm| AclEntry { perm, ignored: false, era: 0 };
        Acl::from_entries(perms.into_iter().map(entry).collect())
    }

    /// A list of entries, unless there are none.
    pub(crate) fn from_entries(entries: Vec<AclEntry>) -> Option<Acl> {
        (!entries.is_empty()).then(|| Acl::of(&entries))
    }

    pub(crate) fn entries(&self) -> &[AclEntry] {
        &self.0.slice
    }

    fn of(entries: &[AclEntry]) -> Acl {
        Acl(ThinArc::from_header_and_slice((), entries))
    }

    /// Is it one list, not only an equal one?
    pub(crate) fn is_same(&self, other: &Acl) -> bool {
        self.0.ptr() == other.0.ptr()
    }

    pub(crate) fn owner(&self) -> DomId {
        self.entries()[0].perm.domid
    }

    /// The same list for another owner.
    pub(crate) fn with_owner(&self, owner: DomId, era: Era) -> Acl {
        if self.owner() == owner && self.entries()[0].era == era {
            return self.clone();
        }
        let mut entries = self.entries().to_vec();
        (entries[0].perm.domid, entries[0].era) = (owner, era);
        Acl::of(&entries)
    }

    /// The list without its stale entries; the owner stays. `None` if there are none.
    pub(crate) fn without_stale(&self, era_of: impl Fn(DomId) -> Era) -> Option<Acl> {
        let (owner, others) = self.entries().split_first()?;
        let stays = |entry: &&AclEntry| entry.era == era_of(entry.perm.domid);
        if others.iter().all(|entry| stays(&entry)) {
            return None;
        }
        let kept = others.iter().filter(stays);
        Acl::from_entries(core::iter::once(owner).chain(kept).copied().collect())
    }

    /// What GET_PERMS shows: every entry, also those that are ignored.
    pub(crate) fn perms(&self) -> Perms {
        Perms(self.entries().iter().map(|entry| entry.perm).collect())
    }

    /// What `who` may do. A domain with a target has the rights of both.
    pub(crate) fn access(&self, who: &Rights) -> Access {
        if who.privileged {
            return Access::Both;
        }
        who.ids().map(|id| self.access_of(id)).fold(Access::None, Access::union)
    }

    fn is_owned_by(&self, (domid, era): (DomId, Era)) -> bool {
        let owner = &self.entries()[0];
        owner.perm.domid == domid && owner.era == era
    }

    /// Owner, then the first entry that names the domain or every domain, then the default.
    fn access_of(&self, id: (DomId, Era)) -> Access {
        if self.is_owned_by(id) {
            return Access::Both;
        }
        let names_it = |e: &&AclEntry| {
            !e.ignored && ((e.perm.domid, e.era) == id || e.perm.domid == DomId::ANY)
        };
        self.entries()[1..].iter().find(names_it).unwrap_or(&self.entries()[0]).perm.access
    }

    /// May `who` change the list?
    pub(crate) fn is_owner(&self, who: &Rights) -> bool {
        who.privileged || who.ids().any(|id| self.is_owned_by(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(text: &str) -> Acl {
        Acl::new(text.split(' ').map(|t| Perm::parse(t.as_bytes()).unwrap())).unwrap()
    }

    fn guest(domid: u16, target: Option<u16>) -> Rights {
        let target = target.map(|target| (DomId(target), 0));
        Rights { privileged: false, domid: DomId(domid), era: 0, target }
    }

    // Fails if the rules of evaluation change: owner, first own entry, default letter.
    #[test]
    fn first_matching_entry_wins() {
        assert_eq!(acl("n5").access(&guest(5, None)), Access::Both);
        assert_eq!(acl("r0").access(&guest(5, None)), Access::Read);
        assert_eq!(acl("b0 n5 r5").access(&guest(5, None)), Access::None);
        assert_eq!(acl("n0 r6").access(&guest(5, None)), Access::None);
        assert_eq!(acl("n0 r32757").access(&guest(5, None)), Access::Read);
        assert_eq!(acl("n0 w32757 r5").access(&guest(5, None)), Access::Write);
    }

    // Fails if a device model gets less than its own rights and those of its guest together.
    #[test]
    fn a_target_adds_its_rights() {
        assert_eq!(acl("n0 n7 r5").access(&guest(7, Some(5))), Access::Read);
        assert_eq!(acl("n0 w7 r5").access(&guest(7, Some(5))), Access::Both);
        assert_eq!(acl("n5").access(&guest(7, Some(5))), Access::Both);
        assert!(acl("n5").is_owner(&guest(7, Some(5))));
        assert!(!acl("b0 b7").is_owner(&guest(7, Some(5))));
    }

    // Fails if an entry for a domain that did not exist becomes valid for a later one (XSA-322).
    #[test]
    fn ignored_entries_grant_nothing() {
        let mut entries = acl("n0 r5").entries().to_vec();
        entries[1].ignored = true;
        let acl = Acl::from_entries(entries).unwrap();
        assert_eq!(acl.access(&guest(5, None)), Access::None);
        assert_eq!(acl.perms().0.len(), 2, "GET_PERMS still shows it");
    }

    // Fails if an entry or an owner of before a domain's death counts for its successor (XSA-322), or if
    // removing stale entries touches the owner or another domain.
    #[test]
    fn stale_entries_grant_nothing_and_are_not_shown() {
        let successor = Rights { era: 1, ..guest(5, None) };
        assert_eq!(acl("n0 r5").access(&successor), Access::None);
        assert_eq!(acl("n5").access(&successor), Access::None);
        assert!(!acl("n5").is_owner(&successor));
        let era_of = |domid| if domid == DomId(5) { 1 } else { 0 };
        assert_eq!(acl("n5 r5 r6 w5").without_stale(era_of), Some(acl("n5 r6")));
        assert_eq!(acl("n5 r6").without_stale(era_of), None);
    }
}
