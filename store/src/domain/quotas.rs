//! What can be set when an engine is made.

use xenstore_protocol::{DomId, Quota};

/// A limit for each quota; 0 means none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas([u32; Quota::ALL.len()]);

impl Default for Quotas {
    fn default() -> Self {
        let mut limits = [0; Quota::ALL.len()];
        for quota in Quota::ALL {
            limits[*quota as usize] = quota.default_limit();
        }
        Quotas(limits)
    }
}

impl Quotas {
    /// No limit at all.
    pub fn unlimited() -> Quotas {
        Quotas([0; Quota::ALL.len()])
    }

    /// The limit as set; 0 for none.
    pub fn get(&self, quota: Quota) -> u32 {
        self.0[quota as usize]
    }

    /// Sets a limit; 0 for none.
    pub fn set(&mut self, quota: Quota, limit: u32) {
        self.0[quota as usize] = limit;
    }

    /// May there be `amount`? A quota of N allows N.
    pub fn allows(&self, quota: Quota, amount: i64) -> bool {
        let limit = self.get(quota);
        limit == 0 || amount <= i64::from(limit)
    }
}

/// What an engine is made with.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The domain that may do everything (`--priv-domid`).
    pub privileged: DomId,
    /// The domain that the server runs in and that its socket clients speak for
    /// (`--master-domid`).
    pub store: DomId,
    /// Give the nodes of a domain that is gone to the privileged domain instead of removing them
    /// (`--keep-orphans`).
    pub keep_orphans: bool,
    /// What new domains start with.
    pub quotas: Quotas,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            privileged: DomId::DOM0,
            store: DomId::DOM0,
            keep_orphans: false,
            quotas: Quotas::default(),
        }
    }
}
