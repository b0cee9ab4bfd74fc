//! The agreement between a thread that waits in the kernel and those that wake it.

use std::sync::atomic::Ordering;

#[cfg(all(test, xenstore_loom))]
use loom::sync::atomic::{AtomicBool, fence};
#[cfg(not(all(test, xenstore_loom)))]
use std::sync::atomic::{AtomicBool, fence};

/// Records wake-ups of one thread, and whether the thread may be waiting. A wake-up of a thread that
/// runs costs no system call.
#[derive(Debug)]
pub(crate) struct Sleep {
    waiting: AtomicBool,
    woken: AtomicBool,
}

impl Sleep {
    /// Begins with a wake-up, so that the thread polls its task once.
    pub(crate) fn new() -> Sleep {
        Sleep { waiting: AtomicBool::new(false), woken: AtomicBool::new(true) }
    }

    /// Records a wake-up. Returns true if the caller has to end the wait of the thread.
    pub(crate) fn wake(&self) -> bool {
        // Not a store: what earlier wakers did must be visible to the thread as well.
        self.woken.swap(true, Ordering::AcqRel);
        // With the fence in `begin`: this thread sees `waiting`, or the other one sees `woken`.
        fence(Ordering::SeqCst);
        self.waiting.load(Ordering::Relaxed)
    }

    /// Returns true if there was a wake-up since the last call.
    pub(crate) fn take_wake(&self) -> bool {
        self.woken.swap(false, Ordering::AcqRel)
    }

    /// Begins a wait. Returns true if the thread may block until a wake-up.
    pub(crate) fn begin(&self) -> bool {
        self.waiting.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.woken.load(Ordering::Relaxed)
    }

    /// Ends a wait.
    pub(crate) fn end(&self) {
        self.waiting.store(false, Ordering::Relaxed);
    }
}

#[cfg(all(test, xenstore_loom))]
mod model {
    use loom::sync::atomic::AtomicU32;
    use loom::sync::{Arc, Notify};
    use loom::thread;

    use super::*;

    // Fails if the thread waits although it was woken, or does not see what was done before the wake-up.
    #[test]
    fn no_wake_up_is_lost() {
        // Two wakers and a loop have too many executions otherwise.
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(|| {
            let shared = Arc::new((Sleep::new(), AtomicU32::new(0), Notify::new()));
            let wakers = [1, 2].map(|bit| {
                let shared = shared.clone();
                thread::spawn(move || {
                    let (sleep, done, eventfd) = &*shared;
                    done.fetch_or(bit, Ordering::Relaxed);
                    if sleep.wake() {
                        eventfd.notify();
                    }
                })
            });
            let (sleep, done, eventfd) = &*shared;
            while !sleep.take_wake() || done.load(Ordering::Relaxed) != 3 {
                if sleep.begin() {
                    eventfd.wait();
                }
                sleep.end();
            }
            for waker in wakers {
                waker.join().unwrap();
            }
        });
    }
}
