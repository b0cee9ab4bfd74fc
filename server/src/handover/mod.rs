//! Live update: another program replaces this one in the same process and continues with its state.
//!
//! ```text
//! source                                                       destination
//! control: CONTROL live-update names the program
//! probe:   it checks a snapshot ([`State`](xenstore_store::State))
//! quiesce: all connections pause
//! snapshot: the difference to the first snapshot follows it
//! guard:   a process of this program waits as a client
//! exec  ────────────────────────────────────────────────────►  reads and checks the state
//!                                                              adopts the descriptors
//!                                                              replies to the guard, which exits
//! ```
//!
//! The state is in sealed memory. An [`envelope`] has the rest: the requester, and the way back. If the
//! new program cannot read the state, it executes the old one ([`destination`]); if it does not serve,
//! the guard does ([`mod@guard`]). C xenstored gets a state in its format ([`c_xenstored`]).

mod c_xenstored;
mod child;
mod control;
mod destination;
mod envelope;
mod error;
mod guard;
mod probe;
mod quiesce;
mod snapshot;
mod source;

pub(crate) use child::reap;
pub(crate) use control::{UpdatableHost, Update};
pub(crate) use destination::{Adoption, ReceivedState, check, receive};
pub(crate) use guard::guard;
pub(crate) use quiesce::{Quiesce, position};
pub(crate) use source::Source;
