//! Domains: their lifecycle, quotas, usage, and warnings about them.

pub(crate) mod host;
pub(crate) mod quotas;
pub(crate) mod recorded;
pub(crate) mod registry;
pub(crate) mod warnings;
