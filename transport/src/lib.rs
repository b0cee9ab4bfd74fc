//! Byte transports of XenStore.
