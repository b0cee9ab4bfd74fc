//! The clock of a server.

use std::cell::Cell;
use std::time::Instant;

use xenstore_store::Millis;

/// The source of time.
#[derive(Debug)]
pub enum Clock {
    /// The machine's monotonic clock, from this moment on.
    Real(Instant),
    /// A time that tests set.
    Manual(Cell<Millis>),
}

impl Clock {
    /// Returns milliseconds.
    pub fn now(&self) -> Millis {
        match self {
            Clock::Real(start) => {
                let time = start.elapsed();
                time.as_secs() * 1000 + u64::from(time.subsec_millis())
            }
            Clock::Manual(now) => now.get(),
        }
    }
}
