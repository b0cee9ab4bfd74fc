//! Live update: another program goes on with everything that this one has, in the same process.
//!
//! The requester names the program ([`control`]). That program is asked whether it could go on, with
//! a copy of the state ([`probe`]). If so, all connections stand still ([`quiesce`]), what has changed
//! since goes behind that copy, in memory that nobody can change any more, as what goes with it
//! ([`envelope`]) does, and the program is run in place of this one ([`source`]), with the descriptors
//! that the state names. It reads the state, checks it, and only then touches a descriptor
//! ([`destination`]); if the state is not to be read after all, it runs the first program again. C
//! xenstored is given what it takes ([`c_xenstored`]).

mod c_xenstored;
mod child;
mod control;
mod destination;
mod envelope;
mod guard;
mod probe;
mod quiesce;
mod source;

pub(crate) use child::reap;
pub(crate) use control::{UpdatableHost, Update};
pub(crate) use destination::{Adoption, ReceivedState, check, receive};
pub(crate) use guard::guard;
pub(crate) use quiesce::{Quiesce, position};
pub(crate) use source::Source;
