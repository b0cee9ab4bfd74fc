//! A byte of shared memory for the loom model of the ring.

use loom::cell::Cell;

/// A byte that fails the model if one thread writes it while another reads or writes it without a
/// happens-before relation between the two accesses.
#[derive(Debug)]
pub struct Byte(Cell<u8>);

// SAFETY: loom runs one thread at a time and checks each access; a data race fails the model.
unsafe impl Sync for Byte {}
// SAFETY: as above.
unsafe impl Send for Byte {}

impl Byte {
    /// Creates a byte with this value.
    pub fn new(value: u8) -> Byte {
        Byte(Cell::new(value))
    }

    /// Reads the byte.
    pub fn get(&self) -> u8 {
        self.0.get()
    }

    /// Writes the byte.
    pub fn set(&self, value: u8) {
        self.0.set(value);
    }
}
