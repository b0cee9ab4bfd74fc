//! The worker thread, for jobs that take long: writing states, closing and releasing large files.
//!
//! It is started with the daemon. A thread started on demand could fail at the limit of processes, and
//! the main thread would have to wait for it to start.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use smol::channel::{Sender, bounded};

type Job = Box<dyn FnOnce() + Send>;

/// Jobs that can be queued. `unblock` waits while the queue is full; `dispose` runs the job itself.
const JOBS: usize = 16;

static WORKER: OnceLock<Sender<Job>> = OnceLock::new();

/// Starts the worker thread, once in a process. Without it, jobs run on the thread of their caller. Fails
/// if the process cannot have two more threads.
pub(crate) fn start() -> io::Result<()> {
    let (sender, jobs) = bounded::<Job>(JOBS);
    let work = move || {
        while let Ok(job) = jobs.recv_blocking() {
            // The job sends its own result.
            let _ = catch_unwind(AssertUnwindSafe(job));
        }
    };
    let make = |name: &str| std::thread::Builder::new().name(name.into());
    make("worker").spawn(work)?;
    // async-io starts a thread too at the first wait, and panics if it cannot.
    let _ = make("probe").spawn(|| ())?.join();
    let _ = WORKER.set(sender);
    Ok(())
}

/// Runs a job on the worker thread. Fails if the job panics.
pub(crate) async fn unblock<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let Some(worker) = worker() else { return Ok(work()) };
    let (sender, result) = bounded(1);
    let job = Box::new(move || _ = sender.try_send(work()));
    let failed = |_| io::Error::other("the worker thread has panicked");
    worker.send(job as Job).await.map_err(|_| io::Error::other("there is no worker thread"))?;
    result.recv().await.map_err(failed)
}

/// Drops a value on the worker thread, or on this one if the queue is full.
pub(crate) fn dispose<T: Send + 'static>(value: T) {
    if let Some(worker) = worker() {
        let _ = worker.try_send(Box::new(move || drop(value)));
    }
}

/// `None` in a simulation, whose processes end while the thread would not.
fn worker() -> Option<&'static Sender<Job>> {
    if cfg!(test) { None } else { WORKER.get() }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if a job that panics takes the thread with it.
    #[test]
    fn a_panic_is_the_end_of_one_job() {
        start().unwrap();
        let worker = WORKER.get().unwrap();
        let (sender, receiver) = bounded(1);
        worker.send_blocking(Box::new(|| panic!("a mistake"))).unwrap();
        worker.send_blocking(Box::new(move || sender.try_send(7).unwrap())).unwrap();
        assert_eq!(receiver.recv_blocking().unwrap(), 7);
    }
}
