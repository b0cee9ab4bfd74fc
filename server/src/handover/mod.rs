//! Live update: another program goes on with everything that this one has, in the same process.
//!
//! The requester names the program ([`session`]). That program is asked whether it could go on, with
//! a copy of the state ([`candidate`]). If so, all connections stand still ([`hold`]), what has changed
//! since goes behind that copy, in memory that nobody can change any more, as what goes with it
//! ([`errand`]) does, and the program is run in place of this one ([`outgoing`]), with the descriptors
//! that the state names. It reads the state, checks it, and only then touches a descriptor
//! ([`incoming`]); if the state is not to be read after all, it runs the first program again. C
//! xenstored is given what it takes ([`for_c`]).

mod candidate;
mod child;
mod errand;
mod for_c;
mod guard;
mod hold;
mod incoming;
mod outgoing;
mod session;

pub(crate) use child::reap;
pub(crate) use guard::guard;
pub(crate) use hold::{Hold, UnderWay};
pub(crate) use incoming::{Incoming, Taken, check, receive};
pub(crate) use outgoing::Outgoing;
pub(crate) use session::{Updatable, Update};
