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
    /// The domain whose rights it has as well (SET_TARGET).
    pub(crate) target: Option<DomId>,
}

impl Rights {
    fn ids(&self) -> impl Iterator<Item = DomId> {
        [Some(self.domid), self.target].into_iter().flatten()
    }
}

/// An entry of a permission list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AclEntry {
    pub(crate) perm: Perm,
    /// Named a domain that did not exist: never grants anything, not even to a later domain with
    /// this domid (XSA-322, XSA-417).
    pub(crate) ignored: bool,
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

    /// A list of entries that are all in force.
    pub(crate) fn new(perms: impl IntoIterator<Item = Perm>) -> Option<Acl> {
        Acl::from_entries(perms.into_iter().map(|perm| AclEntry { perm, ignored: false }).collect())
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

    /// Does any entry name the domain, the owner's included?
    pub(crate) fn mentions(&self, domid: DomId) -> bool {
        self.entries().iter().any(|entry| entry.perm.domid == domid)
    }

    /// The same list for another owner.
    pub(crate) fn with_owner(&self, owner: DomId) -> Acl {
        if self.owner() == owner {
            return self.clone();
        }
        let mut entries = self.entries().to_vec();
        entries[0].perm.domid = owner;
        Acl::of(&entries)
    }

    /// The list without what it grants to `domid`; the owner stays. Nothing if it names no such
    /// entry.
    pub(crate) fn without(&self, domid: DomId) -> Option<Acl> {
        let stays = |(i, entry): &(usize, &AclEntry)| *i == 0 || entry.perm.domid != domid;
        let entries: Vec<AclEntry> =
            self.entries().iter().enumerate().filter(stays).map(|(_, entry)| *entry).collect();
        (entries.len() < self.entries().len()).then(|| Acl::of(&entries))
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

    /// Owner, then the first entry that names the domain or every domain, then the default.
    fn access_of(&self, id: DomId) -> Access {
        if self.owner() == id {
            return Access::Both;
        }
        let names_it =
            |e: &&AclEntry| !e.ignored && (e.perm.domid == id || e.perm.domid == DomId::ANY);
        self.entries()[1..].iter().find(names_it).unwrap_or(&self.entries()[0]).perm.access
    }

    /// May `who` change the list?
    pub(crate) fn is_owner(&self, who: &Rights) -> bool {
        who.privileged || who.ids().any(|id| id == self.owner())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acl(text: &str) -> Acl {
        Acl::new(text.split(' ').map(|t| Perm::parse(t.as_bytes()).unwrap())).unwrap()
    }

    fn guest(domid: u16, target: Option<u16>) -> Rights {
        Rights { privileged: false, domid: DomId(domid), target: target.map(DomId) }
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

    // Fails if removing a domain's entries touches the owner or another domain.
    #[test]
    fn entries_of_a_domain_can_be_removed() {
        assert_eq!(acl("n5 r5 r6 w5").without(DomId(5)), Some(acl("n5 r6")));
        assert_eq!(acl("n5 r6").without(DomId(5)), None);
    }
}
