//! The quotas of GET_QUOTA, SET_QUOTA and CONTROL `quota`.

macro_rules! quotas {
    ($($variant:ident $text:literal $default:literal $meaning:literal,)*) => {
        /// A limit on the resources of the server that one domain may use. A quota of N allows N; 0
        /// means no limit. The control domain has no limits.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Quota { $(#[doc = $meaning] $variant,)* }

        impl Quota {
            /// All quotas, in the order of GET_QUOTA.
            pub const ALL: &'static [Quota] = &[$(Quota::$variant,)*];

            /// The name on the wire.
            pub fn name(self) -> &'static str {
                match self { $(Quota::$variant => $text,)* }
            }

            /// The resource that it limits, as CONTROL `quota` prints it.
            pub fn meaning(self) -> &'static str {
                match self { $(Quota::$variant => $meaning,)* }
            }

            /// The default, which is that of C xenstored.
            pub fn default_limit(self) -> u32 {
                match self { $(Quota::$variant => $default,)* }
            }
        }
    };
}

quotas! {
    Nodes "nodes" 1000 "number of nodes a domain owns",
    Watches "watches" 128 "number of watches of a domain",
    Outstanding "outstanding" 20 "number of unread replies of a domain",
    Memory "memory" 2_621_440 "bytes the server keeps for a domain",
    SoftMemory "soft-memory" 2_097_152 "bytes for a domain above which the server warns",
    Transactions "transactions" 10 "number of open transactions of a domain",
    TransactionNodes "transaction-nodes" 1024 "number of requests in one transaction",
    NodePermissions "node-permissions" 5 "number of permission entries of a node",
    PathMax "path-max" 2048 "bytes of a path below the domain's own",
    NodeSize "node-size" 2048 "bytes of one node: value, names of children, permissions",
}

impl Quota {
    /// The quota with this name, or `None` if there is none.
    pub fn parse(name: &[u8]) -> Option<Quota> {
        Self::ALL.iter().copied().find(|q| q.name().as_bytes() == name)
    }
}
