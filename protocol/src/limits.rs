//! Limits of the protocol, in bytes.

/// Bytes of a frame before its payload.
pub const HEADER_LEN: usize = 16;
/// Largest payload of a frame in either direction (`XENSTORE_PAYLOAD_MAX`).
pub const PAYLOAD_MAX: usize = 4096;
/// Longest absolute path (`XENSTORE_ABS_PATH_MAX`).
pub const ABS_PATH_MAX: usize = 3072;
/// Longest path below a domain's `/local/domain/N/` (`XENSTORE_REL_PATH_MAX`).
pub const REL_PATH_MAX: usize = 2048;
