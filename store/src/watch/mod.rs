//! Watches, indexed by path, and their queued events.

pub(crate) mod index;
