//! The XenStore daemon as a library.
//!
//! [`Server`] serves any number of connections over any transport, on one thread, with the engine of
//! `xenstore-store`. The library has no global state: a process can run any number of servers.
//!
//! For tests of XenStore clients there is the package `xenstore-embedded`, a store in memory.
//!
//! | module | holds |
//! |---|---|
//! | [`daemon`] | the program: options, start, systemd |
//! | `platform` | the machine: Xen, a pretend Xen in files, or none |
//! | `serve` | connections, their inputs to the engine, tasks, the clock |
//! | `journal` | the log of inputs, and recovery from it |
//! | `handover` | live update: the state moves to the next process |
//! | `log` | the log on standard error, and the trace of requests |

pub mod daemon;
mod handover;
mod journal;
mod log;
mod paths;
mod platform;
mod serve;
#[cfg(test)]
mod simulation;
mod worker;

pub use platform::Standalone;
pub use serve::{Clock, Server, Tasks};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
