//! XenStore clients.
