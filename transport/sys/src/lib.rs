//! Operating system and Xen calls of the XenStore daemon.
//!
//! This package contains the only unsafe code of the project, in one private module; everything
//! that it exports is safe.
//!
//! * [`Mapping`]: memory shared with a guest or another process;
//! * [`Sealed`]: memory that no process can change;
//! * [`mapped_file`]: a file that is written as memory;
//! * [`own_file`]: files that only this user can access;
//! * [`inherit`]: descriptors passed from one program to the next through `exec`;
//! * [`xen`]: calls of the Xen devices;
//! * [`crash`]: crash injection for tests.

pub mod crash;
pub mod inherit;
pub mod mapped_file;
pub mod own_file;
mod raw;
pub mod xen;

#[cfg(xenstore_loom)]
pub use raw::Byte;
pub use raw::{Mapping, Sealed, trim_heap};

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
