//! The tasks of one thread.
//!
//! Does what `smol::LocalExecutor` does, which is made for more: a wake-up there costs about as much
//! as answering a request does here (`docs/benchmarks/README.md`).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Tasks that get a turn before the driver is polled.
const ROUND: usize = 256;
/// The number of the future that [`Tasks::run`] was called with.
const MAIN: usize = usize::MAX;

/// Futures that run beside the one that [`Tasks::run`] is called with. Unfinished ones are dropped
/// with this.
#[derive(Default)]
pub struct Tasks<'a> {
    slots: RefCell<Slots<'a>>,
    queue: Arc<Mutex<Queue>>,
}

#[derive(Default)]
struct Slots<'a> {
    all: Vec<Option<Running<'a>>>,
    free: Vec<usize>,
}

/// A task; its future is not here during its turn.
struct Running<'a> {
    future: Option<Pin<Box<dyn Future<Output = ()> + 'a>>>,
    waker: Waker,
}

/// Woken tasks, in the order in which they were woken.
#[derive(Default)]
struct Queue {
    ready: VecDeque<Arc<Task>>,
    /// The waker of the runner, and whether it will run anyway.
    runner: Option<Waker>,
    busy: bool,
}

/// The waker of a task.
struct Task {
    number: usize,
    /// Set from a wake-up to the next turn.
    woken: AtomicBool,
    queue: Arc<Mutex<Queue>>,
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        if self.woken.swap(true, Ordering::AcqRel) {
            return;
        }
        let queue = self.queue.clone();
        let mut queue = lock(&queue);
        queue.ready.push_back(self);
        if !std::mem::replace(&mut queue.busy, true)
            && let Some(runner) = &queue.runner
        {
            runner.wake_by_ref();
        }
    }
}

impl<'a> Tasks<'a> {
    /// Creates an empty list.
    pub fn new() -> Tasks<'a> {
        Tasks::default()
    }

    /// Runs `future` while [`Tasks::run`] runs, from its next turn on.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'a) {
        let mut slots = self.slots.borrow_mut();
        let number = slots.free.pop().unwrap_or(slots.all.len());
        let waker = self.waker(number);
        let running = Some(Running { future: Some(Box::pin(future)), waker: waker.clone() });
        match slots.all.get_mut(number) {
            Some(slot) => *slot = running,
            None => slots.all.push(running),
        }
        drop(slots);
        waker.wake();
    }

    /// Runs `main` and the tasks until `main` is done. Each is polled only when it has been woken.
    pub async fn run<T>(&self, main: impl Future<Output = T>) -> T {
        let mut main = pin!(main);
        let waker = self.waker(MAIN);
        waker.wake_by_ref();
        poll_fn(|cx| {
            self.watch(cx.waker());
            for _ in 0..ROUND {
                let Some(task) = self.next() else { return Poll::Pending };
                if task.number != MAIN {
                    self.turn(task.number);
                } else if let Poll::Ready(value) =
                    main.as_mut().poll(&mut Context::from_waker(&waker))
                {
                    return Poll::Ready(value);
                }
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }

    fn waker(&self, number: usize) -> Waker {
        let queue = self.queue.clone();
        Waker::from(Arc::new(Task { number, woken: AtomicBool::new(false), queue }))
    }

    /// Registers the waker of the runner.
    fn watch(&self, runner: &Waker) {
        let mut queue = lock(&self.queue);
        match &mut queue.runner {
            Some(known) => known.clone_from(runner),
            none => *none = Some(runner.clone()),
        }
        queue.busy = true;
    }

    /// Returns the next woken task. If there is none, registers the runner for the next wake-up.
    fn next(&self) -> Option<Arc<Task>> {
        let mut queue = lock(&self.queue);
        let task = queue.ready.pop_front();
        match &task {
            // From now on it can be woken again.
            Some(task) => task.woken.store(false, Ordering::Release),
            None => queue.busy = false,
        }
        task
    }

    /// Polls a task. A wake-up after its end may poll another task with its number once without
    /// need.
    fn turn(&self, number: usize) {
        let slot = |slots: &mut Slots<'a>| {
            let running = slots.all.get_mut(number)?.as_mut()?;
            Some((running.future.take()?, running.waker.clone()))
        };
        let Some((mut future, waker)) = slot(&mut self.slots.borrow_mut()) else { return };
        // The task may spawn others meanwhile.
        let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut slots = self.slots.borrow_mut();
        if done {
            slots.all[number] = None;
            slots.free.push(number);
            // Dropping it may use this list, which must not be borrowed then.
            drop(slots);
            drop(future);
        } else if let Some(running) = &mut slots.all[number] {
            running.future = Some(future);
        }
    }
}

impl Drop for Tasks<'_> {
    fn drop(&mut self) {
        // Tasks may wake each other when they are dropped.
        drop(std::mem::take(&mut *self.slots.borrow_mut()));
        *lock(&self.queue) = Queue::default();
    }
}

impl fmt::Debug for Tasks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.slots.borrow();
        write!(f, "Tasks({})", slots.all.len() - slots.free.len())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use futures_lite::future::{block_on, yield_now};

    // Fails if a task does not run, runs after its end, or does not run when another task has
    // spawned it.
    #[test]
    fn tasks_run_and_start_others() {
        let count = Cell::new(0);
        let (sender, receiver) = smol::channel::bounded(1);
        let tasks = Tasks::new();
        block_on(tasks.run(async {
            for _ in 0..3 {
                let (sender, count) = (sender.clone(), &count);
                tasks.spawn(async move {
                    yield_now().await;
                    count.set(count.get() + 1);
                    sender.send(()).await.unwrap();
                });
            }
            for _ in 0..3 {
                receiver.recv().await.unwrap();
            }
        }));
        assert_eq!(count.get(), 3);
        assert_eq!(format!("{tasks:?}"), "Tasks(0)");
    }

    // Fails if a task that never waits prevents turns of the main future or of the driver.
    #[test]
    fn task_that_never_waits_does_not_starve_others() {
        let tasks = Tasks::new();
        tasks.spawn(async {
            loop {
                yield_now().await;
            }
        });
        let mut run = pin!(tasks.run(async {
            for _ in 0..ROUND {
                yield_now().await;
            }
        }));
        let mut polls = 0;
        block_on(poll_fn(|cx| {
            polls += 1;
            run.as_mut().poll(cx)
        }));
        assert!(polls > 1, "never left");
    }

    // Fails if the main future is polled at each wake-up of a task: a poll of it may be expensive.
    #[test]
    fn the_main_future_is_asked_only_when_it_was_woken() {
        let (polls, (sender, receiver)) = (Cell::new(0), smol::channel::bounded::<()>(1));
        let tasks = Tasks::new();
        tasks.spawn(async move {
            for _ in 0..100 {
                yield_now().await;
            }
            sender.send(()).await.unwrap();
        });
        block_on(tasks.run(async {
            let mut wait = pin!(receiver.recv());
            poll_fn(|cx| {
                polls.set(polls.get() + 1);
                wait.as_mut().poll(cx)
            })
            .await
            .unwrap();
        }));
        assert_eq!(polls.get(), 2);
    }

    // Fails if unfinished tasks outlive the list: connections would not be closed.
    #[test]
    fn those_that_are_not_done_end_with_it() {
        let alive = std::rc::Rc::new(());
        let tasks = Tasks::new();
        let held = alive.clone();
        tasks.spawn(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        block_on(tasks.run(yield_now()));
        assert_eq!(std::rc::Rc::strong_count(&alive), 2);
        drop(tasks);
        assert_eq!(std::rc::Rc::strong_count(&alive), 1);
    }
}
