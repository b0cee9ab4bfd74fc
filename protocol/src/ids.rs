//! Newtypes for the numbers of the protocol.

use core::fmt;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident($int:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl From<$int> for $name {
            #[inline]
            fn from(number: $int) -> Self {
                $name(number)
            }
        }

        impl From<$name> for $int {
            #[inline]
            fn from(id: $name) -> Self {
                id.0
            }
        }
    )*};
}

ids! {
    /// A domain id (`domid_t`).
    DomId(u16);
    /// A transaction id. TRANSACTION_START returns it; it is unique within its connection.
    TxId(u32);
    /// A request id. The client chooses it and the server copies it into the reply.
    RequestId(u32);
    /// A port of an event channel (`evtchn_port_t`), valid in one domain.
    EvtchnPort(u32);
    /// A guest frame number: the address of a guest page, in pages.
    Gfn(u64);
}

impl DomId {
    /// The control domain.
    pub const DOM0: DomId = DomId(0);
    /// The domain that sends the request (`DOMID_SELF`).
    pub const SELF: DomId = DomId(0x7ff0);
    /// No domain (`DOMID_INVALID`).
    pub const INVALID: DomId = DomId(0x7ff4);
    /// Every domain, in a permission entry (`DOMID_ANY`, server feature bit 3).
    pub const ANY: DomId = DomId(0x7ff5);
    /// The first id that Xen assigns to no domain (`DOMID_FIRST_RESERVED`).
    pub const FIRST_RESERVED: DomId = DomId(0x7ff0);

    /// Returns true if Xen can assign this id to a domain.
    #[inline]
    pub const fn is_ordinary(self) -> bool {
        self.0 < Self::FIRST_RESERVED.0
    }
}

impl TxId {
    /// Stands in the header of a request outside any transaction.
    pub const NONE: TxId = TxId(0);
}

impl RequestId {
    /// Stands in the header of a watch event.
    pub const EVENT: RequestId = RequestId(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a conversion changes the number, or an id prints anything but its number.
    #[test]
    fn ids_convert_and_print_as_their_number() {
        assert_eq!(DomId::from(7), DomId(7));
        assert_eq!(u64::from(Gfn(7)), 7);
        assert_eq!(alloc::format!("{:>4}", EvtchnPort(7)), "   7");
    }

    // Fails if a reserved domid counts as one that Xen assigns.
    #[test]
    fn reserved_domids_are_not_ordinary() {
        assert!(DomId(0x7fef).is_ordinary());
        for reserved in [DomId::SELF, DomId::INVALID, DomId::ANY, DomId(0xffff)] {
            assert!(!reserved.is_ordinary(), "{reserved}");
        }
    }
}
