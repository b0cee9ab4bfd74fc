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
//! have events to fetch with [`Engine::emit_events`], or a request to be offered again) and
//! [`Engine::pop_closed`]; [`Engine::pop_notice`] has lines for the log. A request is rarely put off; see [`Outcome::Later`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod access;
mod answer;
mod change;
mod charge;
mod check;
mod children;
mod config;
mod connection;
mod control;
mod deferred;
mod domain;
mod engine;
mod execute;
mod fanout;
mod footprint;
mod history;
mod input;
mod lifecycle;
mod node;
mod notices;
mod oracle;
mod owners;
mod pins;
mod protect;
mod recent;
mod restore;
mod settings;
mod sharing;
mod state;
mod text;
mod transaction;
mod transaction_requests;
mod tree;
mod watch;
mod watch_requests;

pub use check::Violation;
pub use config::{Config, Quotas};
pub use connection::{Caller, ConnId};
pub use domain::{DomainInfo, Host};
pub use engine::{Engine, Millis};
pub use history::Conflict;
pub use input::{Input, Recorded, Replayed};
pub use protect::{FAILURES, HELD_FOR, Outcome, PROTECTED_FOR};
pub use restore::RestoreError;
pub use state::{
    Base, CFormat, ConnectionState, DomainState, IoState, ServerIo, State, WatchState,
};
