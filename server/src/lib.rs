//! The XenStore daemon as a library.
//!
//! [`Server`] answers any number of connections over any transport, on one thread, with the engine
//! of `xenstore-store`. Nothing here is global: any number of servers live in one process.
//!
//! For tests of XenStore clients there is the package `xenstore-embedded`, a store in memory.

mod clock;
mod connection;
pub mod daemon;
mod handover;
mod journal;
mod log;
mod options;
mod oxenstored_conf;
mod pid_file;
mod place;
mod server;
#[cfg(test)]
mod simulation;
mod standalone;
mod startup;
mod surroundings;
mod systemd;
mod tasks;
mod worker;
mod xen;

pub use clock::Clock;
pub use server::Server;
pub use standalone::Standalone;
pub use tasks::Tasks;
