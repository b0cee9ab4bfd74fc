//! The XenStore wire protocol, without I/O.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;
