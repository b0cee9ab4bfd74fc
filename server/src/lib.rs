//! The XenStore daemon as a library.
