//! The only unsafe code of the project: memory that others write as well, and calls of devices.
//!
//! * [`mapping`]: a stretch of memory that is shared with a guest or with another process. It is
//!   never referenced, only copied through atomics, so that somebody who changes it at any moment
//!   can do no more than give us strange bytes. A file of one's own is written without them.
//! * [`ioctl`]: one call of a device, with an argument that is initialised as a whole.
//! * [`inherited`]: descriptors that were open before this program started.
//! * [`sealed`]: memory that nobody can change any more.
//! * [`heap`]: giving free memory back.
//!
//! What is done with them is safe code elsewhere.
#![allow(unsafe_code)]

mod heap;
mod inherited;
mod ioctl;
mod mapping;
#[cfg(xenstore_loom)]
mod model;
mod sealed;

pub use heap::trim_heap;
pub(crate) use inherited::{set_blocking, set_inheritable, take};
pub use ioctl::map_frame;
pub(crate) use ioctl::{call, halves, hypercall};
pub use mapping::Mapping;
#[cfg(xenstore_loom)]
pub use model::Byte;
pub use sealed::Sealed;
