//! The fuzz targets of `fuzz/`. They are in this package so that the committed corpora also run as an
//! ordinary test (`tests/tests/corpus.rs`).

mod against_model;
pub mod dear;
mod dump;
mod fair;
pub mod guests;
#[cfg(feature = "daemons")]
mod hostile;
#[cfg(feature = "daemons")]
mod ring;
mod wire;

pub use against_model::{canary, engine, merge};
pub use dear::dear;
pub use dump::dump;
pub use fair::fair;
#[cfg(feature = "daemons")]
pub use ring::ring;
pub use wire::{packet, request};

/// A fuzz target. It panics if the bytes reveal a bug.
pub type Target = fn(&[u8]);

/// Every target by its name. The canary, which has a planted bug, is not among them.
pub const TARGETS: &[(&str, Target)] = &[
    ("packet", packet),
    ("request", request),
    ("engine", engine),
    ("merge", merge),
    ("dump", dump),
    #[cfg(feature = "daemons")]
    ("ring", ring),
    ("fair", fair),
    ("dear", dear),
];
