//! What the fuzz targets of `fuzz/` do with their bytes. It is here, and not there, so that the
//! committed corpora run as an ordinary test as well (`tests/tests/corpus.rs`).

mod against_model;
pub mod dear;
mod dump;
mod fair;
pub mod guests;
mod hostile;
mod ring;
mod wire;

pub use against_model::{canary, engine, merge};
pub use dear::dear;
pub use dump::dump;
pub use fair::fair;
pub use ring::ring;
pub use wire::{packet, request};

/// What a target does with its bytes: panics, if they find something.
pub type Target = fn(&[u8]);

/// Every target by its name; the canary is not among them.
pub const TARGETS: &[(&str, Target)] = &[
    ("packet", packet),
    ("request", request),
    ("engine", engine),
    ("merge", merge),
    ("dump", dump),
    ("ring", ring),
    ("fair", fair),
    ("dear", dear),
];
