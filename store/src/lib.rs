//! The XenStore database, without I/O.
#![no_std]
#![forbid(unsafe_code)]
extern crate alloc;
