//! The XenStore database, without I/O.
//!
//! An [`Engine`] holds the tree, its permissions, transactions, watches, domains and quotas, and
//! answers one request at a time. It is deterministic: what it answers depends only on what it was
//! told before, in which order; time is an argument and the machine is behind the [`Host`] trait.
//!
//! ```text
//!            ┌──────────── Engine ─────────────────────────────────────────┐
//! request ──►│ admit ─► execute on Work (tree + charges) ─► fire watches ──┼─► reply
//!            │             ▲                                    │          │
//!            │        Transaction (snapshot, Work, log)     queue per      │
//!            │        commit = replay of the log            connection ────┼─► events
//!            └─────────────────────────────────────────────────────────────┘
//! ```
//!
//! Call [`Engine::handle`] for each request, then drain [`Engine::pop_ready`] (connections that
//! have events to fetch with [`Engine::emit_events`], or a deferred request to retry) and
//! [`Engine::pop_closed`]; [`Engine::pop_warning`] returns lines for the log. A request is rarely
//! deferred; see [`Outcome::Deferred`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod domain;
mod engine;
mod ids;
mod mru_map;
mod snapshot;
mod transaction;
mod tree;
mod watch;

pub use domain::host::{DomainInfo, Host, NoHost};
pub use domain::quotas::{Config, Quotas};
pub use domain::recorded::{Recorded, Replayed};
pub use engine::Engine;
pub use engine::apply::Applied;
pub use engine::conflicts::Conflict;
pub use engine::fairness::{FAILURES, HELD_FOR, Outcome, PROTECTED_FOR};
pub use engine::input::Input;
pub use engine::invariants::Violation;
pub use engine::restore::RestoreError;
pub use ids::{Caller, ConnId, Millis};
pub use snapshot::{
    Base, CFormat, ConnectionIo, ConnectionState, DomainState, ServerIo, State, WatchState,
};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
