//! The table of message types.

macro_rules! operations {
    ($($variant:ident $number:literal $text:literal,)*) => {
        /// A message type (`enum xsd_sockmsg_type`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs)] // the names are the protocol's own
        pub enum Operation { $($variant = $number,)* }

        impl Operation {
            /// Every type, by number.
            pub const ALL: &'static [Operation] = &[$(Operation::$variant,)*];

            /// The type with this number.
            pub fn from_wire(number: u32) -> Option<Operation> {
                match number { $($number => Some(Operation::$variant),)* _ => None }
            }

            /// The protocol's name of the type.
            pub fn name(self) -> &'static str {
                match self { $(Operation::$variant => $text,)* }
            }
        }
    };
}

operations! {
    Control 0 "CONTROL",
    Directory 1 "DIRECTORY",
    Read 2 "READ",
    GetPerms 3 "GET_PERMS",
    Watch 4 "WATCH",
    Unwatch 5 "UNWATCH",
    TransactionStart 6 "TRANSACTION_START",
    TransactionEnd 7 "TRANSACTION_END",
    Introduce 8 "INTRODUCE",
    Release 9 "RELEASE",
    GetDomainPath 10 "GET_DOMAIN_PATH",
    Write 11 "WRITE",
    Mkdir 12 "MKDIR",
    Rm 13 "RM",
    SetPerms 14 "SET_PERMS",
    WatchEvent 15 "WATCH_EVENT",
    Error 16 "ERROR",
    IsDomainIntroduced 17 "IS_DOMAIN_INTRODUCED",
    Resume 18 "RESUME",
    SetTarget 19 "SET_TARGET",
    ResetWatches 21 "RESET_WATCHES",
    DirectoryPart 22 "DIRECTORY_PART",
    GetFeature 23 "GET_FEATURE",
    SetFeature 24 "SET_FEATURE",
    GetQuota 25 "GET_QUOTA",
    SetQuota 26 "SET_QUOTA",
}

impl Operation {
    /// The number that stands in the header.
    pub fn as_wire(self) -> u32 {
        self as u32
    }

    /// May a client send it? WATCH_EVENT and ERROR only ever go the other way.
    pub fn is_request(self) -> bool {
        !matches!(self, Operation::WatchEvent | Operation::Error)
    }

    /// Is it reserved to the control domain whatever its payload says? (GET_FEATURE is not: a
    /// domain may ask for its own.)
    pub fn is_privileged(self) -> bool {
        use Operation::*;
        matches!(
            self,
            Control
                | Introduce
                | Release
                | IsDomainIntroduced
                | Resume
                | SetTarget
                | SetFeature
                | GetQuota
                | SetQuota
        )
    }

    /// Does it work on the tree of the transaction that its header names?
    pub fn is_transactional(self) -> bool {
        use Operation::*;
        matches!(self, Directory | DirectoryPart | Read | GetPerms | Write | Mkdir | Rm | SetPerms)
    }

    /// WATCH and UNWATCH are answered whatever their transaction id is (`docs/misc/xenstore.txt`).
    pub fn ignores_transaction_id(self) -> bool {
        matches!(self, Operation::Watch | Operation::Unwatch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a number maps to no or to another type; 20 (RESTRICT) and 27 on are unknown.
    #[test]
    fn numbers_round_trip_and_holes_stay_holes() {
        for number in 0..40 {
            match Operation::from_wire(number) {
                Some(op) => assert_eq!(op.as_wire(), number),
                None => assert!(number == 20 || number > 26, "{number}"),
            }
        }
        assert_eq!(Operation::from_wire(0xffff), None);
        assert_eq!(Operation::ALL.len(), 26);
    }
}
