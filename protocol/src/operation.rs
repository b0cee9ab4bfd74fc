//! The table of operations: one row for each message type.

use core::fmt;

use crate::ids::TxId;

/// The part of a node that a request on the tree reads.
///
/// Every request on the tree also reads which nodes on its path exist, and their permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Facet {
    /// Whether the node exists.
    Existence,
    /// The value.
    Value,
    /// The permission list.
    Permissions,
    /// The names of the children.
    Children,
}

/// Who may send an operation.
#[derive(Clone, Copy)]
enum Sender {
    /// Every client.
    Any,
    /// Only the control domain.
    Control,
    /// Only the server: it is not a request.
    Server,
}

/// What an operation does with the transaction id in the header.
#[derive(Clone, Copy)]
enum IdRule {
    /// Runs on the tree of the transaction, or on the committed tree if the id is 0.
    Tree,
    /// Requires an open transaction or 0.
    Checked,
    /// Accepts any id.
    Ignored,
}

/// What an operation changes outside a transaction.
#[derive(Clone, Copy)]
enum OpEffect {
    /// Nothing.
    Reads,
    /// Nothing that a reply shows, but the server may create its record of a domain.
    Caches,
    /// The state.
    Changes,
}

/// One row of the table.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    sender: Sender,
    id_rule: IdRule,
    effect: OpEffect,
    facet: Option<Facet>,
}

impl Row {
    /// Fills the place of a number without a message type.
    const HOLE: Row = Row {
        name: "",
        sender: Sender::Server,
        id_rule: IdRule::Ignored,
        effect: OpEffect::Reads,
        facet: None,
    };
}

macro_rules! operations {
    ($(
        $variant:ident $number:literal $name:literal
        $sender:ident $id_rule:ident $effect:ident $facet:ident;
    )*) => {
        /// A message type (`enum xsd_sockmsg_type`), under the name that the protocol gives it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Operation { $(#[doc = concat!("`", $name, "`")] $variant = $number,)* }

        impl Operation {
            /// All message types, by number.
            pub const ALL: &'static [Operation] = &[$(Operation::$variant,)*];

            /// The message type with this number, or `None` if there is none.
            #[inline]
            pub const fn from_wire(number: u32) -> Option<Operation> {
                match number { $($number => Some(Operation::$variant),)* _ => None }
            }
        }

        /// The rows, by number.
        static TABLE: [Row; 27] = {
            let mut table = [Row::HOLE; 27];
            $(table[$number] = Row {
                name: $name,
                sender: Sender::$sender,
                id_rule: IdRule::$id_rule,
                effect: OpEffect::$effect,
                facet: operations!(@facet $facet),
            };)*
            table
        };
    };
    (@facet None) => { None };
    (@facet $facet:ident) => { Some(Facet::$facet) };
}

// The columns are those of `Row`.
operations! {
    // type            number name              sender  id rule effect  facet
    Control             0 "CONTROL"              Control Checked Changes None;
    Directory           1 "DIRECTORY"            Any     Tree    Reads   Children;
    Read                2 "READ"                 Any     Tree    Reads   Value;
    GetPerms            3 "GET_PERMS"            Any     Tree    Reads   Permissions;
    Watch               4 "WATCH"                Any     Ignored Changes None;
    Unwatch             5 "UNWATCH"              Any     Ignored Changes None;
    TransactionStart    6 "TRANSACTION_START"    Any     Checked Changes None;
    TransactionEnd      7 "TRANSACTION_END"      Any     Checked Changes None;
    Introduce           8 "INTRODUCE"            Control Checked Changes None;
    Release             9 "RELEASE"              Control Checked Changes None;
    GetDomainPath      10 "GET_DOMAIN_PATH"      Any     Checked Reads   None;
    Write              11 "WRITE"                Any     Tree    Changes Existence;
    Mkdir              12 "MKDIR"                Any     Tree    Changes Existence;
    Rm                 13 "RM"                   Any     Tree    Changes Existence;
    SetPerms           14 "SET_PERMS"            Any     Tree    Changes Existence;
    WatchEvent         15 "WATCH_EVENT"          Server  Ignored Changes None;
    Error              16 "ERROR"                Server  Ignored Changes None;
    IsDomainIntroduced 17 "IS_DOMAIN_INTRODUCED" Control Checked Reads   None;
    Resume             18 "RESUME"               Control Checked Changes None;
    SetTarget          19 "SET_TARGET"           Control Checked Changes None;
    ResetWatches       21 "RESET_WATCHES"        Any     Checked Changes None;
    DirectoryPart      22 "DIRECTORY_PART"       Any     Tree    Reads   Children;
    GetFeature         23 "GET_FEATURE"          Any     Checked Caches  None;
    SetFeature         24 "SET_FEATURE"          Control Checked Changes None;
    GetQuota           25 "GET_QUOTA"            Control Checked Caches  None;
    SetQuota           26 "SET_QUOTA"            Control Checked Changes None;
}

impl Operation {
    #[inline]
    const fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// The number in the header.
    #[inline]
    pub const fn as_wire(self) -> u32 {
        self as u32
    }

    /// The protocol's name, for example `GET_PERMS`.
    #[inline]
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Returns true if a client may send it. Only a server sends WATCH_EVENT and ERROR.
    #[inline]
    pub const fn is_request(self) -> bool {
        !matches!(self.row().sender, Sender::Server)
    }

    /// Returns true if only the control domain may send it, with any payload. GET_FEATURE is not
    /// privileged: a domain may query its own features.
    #[inline]
    pub const fn is_privileged(self) -> bool {
        matches!(self.row().sender, Sender::Control)
    }

    /// Returns true if it runs on the tree of the transaction that its header names.
    #[inline]
    pub const fn is_transactional(self) -> bool {
        matches!(self.row().id_rule, IdRule::Tree)
    }

    /// Returns true if the reply does not depend on the transaction id. A WATCH or UNWATCH with an
    /// unknown id succeeds (`docs/misc/xenstore.txt`).
    #[inline]
    pub const fn ignores_transaction_id(self) -> bool {
        matches!(self.row().id_rule, IdRule::Ignored)
    }

    /// Returns true if it does not change what a later request returns.
    #[inline]
    pub const fn is_read_only(self) -> bool {
        !matches!(self.row().effect, OpEffect::Changes)
    }

    /// Returns true if a journal must record the request with this transaction id, so that replaying
    /// the journal gives the same state. A request in a transaction always changes the state: the
    /// transaction records what it has read.
    #[inline]
    pub const fn is_journaled(self, tx_id: TxId) -> bool {
        !matches!(self.row().effect, OpEffect::Reads) || tx_id.0 != TxId::NONE.0
    }

    /// The part of the node that it reads, or `None` if it is not a request on the tree.
    #[inline]
    pub const fn facet(self) -> Option<Facet> {
        self.row().facet
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn names(holds: impl Fn(Operation) -> bool) -> Vec<&'static str> {
        let rows = Operation::ALL.iter().copied().filter(|op| holds(*op));
        rows.map(Operation::name).collect()
    }

    // Fails if a number maps to no type or to a wrong one; 20 (RESTRICT) and 27 on are unknown.
    #[test]
    fn every_known_number_round_trips_and_no_other_parses() {
        for number in 0..40 {
            match Operation::from_wire(number) {
                Some(op) => assert_eq!(op.as_wire(), number),
                None => assert!(number == 20 || number > 26, "{number}"),
            }
        }
        assert_eq!(Operation::from_wire(0xffff), None);
        assert_eq!(Operation::ALL.len(), 26);
    }

    // Fails if a row changes: these lists are written from docs/misc/xenstore.txt.
    #[test]
    fn columns_list_the_documented_operations() {
        let tree = "DIRECTORY READ GET_PERMS WRITE MKDIR RM SET_PERMS DIRECTORY_PART";
        let privileged = "CONTROL INTRODUCE RELEASE IS_DOMAIN_INTRODUCED RESUME SET_TARGET \
                          SET_FEATURE GET_QUOTA SET_QUOTA";
        let unrecorded = "DIRECTORY READ GET_PERMS GET_DOMAIN_PATH IS_DOMAIN_INTRODUCED \
                          DIRECTORY_PART";
        let words = |text: &'static str| text.split_whitespace().collect::<Vec<_>>();
        assert_eq!(names(Operation::is_transactional), words(tree));
        assert_eq!(names(|op| op.facet().is_some()), words(tree));
        assert_eq!(names(Operation::is_privileged), words(privileged));
        assert_eq!(names(|op| !op.is_request()), ["WATCH_EVENT", "ERROR"]);
        let ignoring = names(|op| op.is_request() && op.ignores_transaction_id());
        assert_eq!(ignoring, ["WATCH", "UNWATCH"]);
        assert_eq!(names(|op| !op.is_journaled(TxId::NONE)), words(unrecorded));
        assert!(Operation::ALL.iter().all(|op| op.is_journaled(TxId(1))));
        let reading = names(|op| op.is_transactional() && op.is_read_only());
        assert_eq!(reading, ["DIRECTORY", "READ", "GET_PERMS", "DIRECTORY_PART"]);
    }
}
