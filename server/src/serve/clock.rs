//! What a server takes for the time.

use std::cell::Cell;
use std::time::Instant;

use xenstore_store::Millis;

/// Where the time comes from.
#[derive(Debug)]
pub enum Clock {
    /// The machine's monotonic clock, from this moment on.
    Real(Instant),
    /// Whatever it was set to.
    Manual(Cell<Millis>),
}

impl Clock {
    /// Milliseconds.
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
