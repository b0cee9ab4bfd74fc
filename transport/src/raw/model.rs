//! A byte of shared memory for the model of the ring.

use loom::cell::Cell;

/// A byte that the model watches: it fails if one thread writes while another reads or writes, that
/// is, without an order between the two that both have agreed on.
#[derive(Debug)]
pub(crate) struct Byte(Cell<u8>);

// SAFETY: the model runs one thread at a time and checks each access; it exists to find out whether
// the accesses are in order, and stops where they are not.
unsafe impl Sync for Byte {}
// SAFETY: as above.
unsafe impl Send for Byte {}

impl Byte {
    pub(crate) fn new(value: u8) -> Byte {
        Byte(Cell::new(value))
    }

    pub(crate) fn get(&self) -> u8 {
        self.0.get()
    }

    pub(crate) fn set(&self, value: u8) {
        self.0.set(value);
    }
}
