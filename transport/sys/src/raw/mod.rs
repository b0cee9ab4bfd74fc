//! The only unsafe code of the project.
//!
//! * [`mapping`]: memory shared with a guest or another process. No reference into it is made; all access
//!   is through atomics, so that a concurrent writer can cause strange bytes and nothing else.
//! * [`ioctl`]: calls of a device with an initialised argument.
//! * [`inherited`]: descriptors that were open before this program started.
//! * [`sealed`]: memory that no process can change.
//! * [`heap`]: returning free memory to the system.
#![allow(unsafe_code)]

mod heap;
mod inherited;
mod ioctl;
mod mapping;
#[cfg(xenstore_loom)]
mod model;
mod sealed;

pub use heap::trim_heap;
pub(crate) use inherited::{adopt, set_blocking, set_inheritable};
pub use ioctl::map_frame;
pub(crate) use ioctl::{call, halves, hypercall};
pub use mapping::Mapping;
#[cfg(xenstore_loom)]
pub use model::Byte;
pub use sealed::Sealed;
