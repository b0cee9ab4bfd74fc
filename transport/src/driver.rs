//! Waiting for descriptors.
//!
//! [`Driver::any_executor`] leaves it to async-io, which works on every executor. [`Driver::new`] is
//! an event loop on one thread, for a server: it registers a descriptor once, edge-triggered, and one
//! `epoll_wait` waits for all descriptors.
//!
//! The loop calls epoll instead of the crate `polling`. `Poller::wait` makes four more system calls, which
//! cost 34 % more CPU for a READ; a wait on the poller's own descriptor avoids them, but `polling` does not
//! register `EPOLLRDHUP`, so that the end of a stream that comes with the last bytes is lost
//! (numbers: `docs/benchmarks/README.md`).

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker, ready};

use async_io::Async;
use atomic_waker::AtomicWaker;
use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use crate::sleep::Sleep;

/// The most events that one wait returns.
const EVENTS: usize = 256;
/// The event data of the eventfd that ends a wait; other data are numbers of sources.
const WAKE_UP: u64 = u64::MAX;

/// Waits for descriptors. A clone refers to the same event loop.
#[derive(Clone, Debug)]
pub struct Driver(Option<Arc<EventLoop>>);

#[derive(Debug)]
struct EventLoop {
    epoll: OwnedFd,
    /// Ends the wait of the thread that runs the loop.
    wake_up: OwnedFd,
    sleep: Sleep,
    sources: Mutex<Sources>,
    /// Tasks to wake after those whose descriptors are ready.
    deferred: Mutex<VecDeque<Waker>>,
    /// The number of events of the last wait.
    events: AtomicU32,
}

#[derive(Debug, Default)]
struct Sources {
    slots: Vec<Option<Arc<Readiness>>>,
    free: Vec<usize>,
}

/// The readiness of one descriptor, as far as events and attempts have shown.
#[derive(Debug, Default)]
struct Readiness {
    readable: AtomicBool,
    writable: AtomicBool,
    /// The kernel reports when there is room to write.
    write_interest: AtomicBool,
    /// The peer has closed: the descriptor stays readable.
    hung_up: AtomicBool,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The events of a descriptor. Room to write is reported only to a waiting writer: otherwise each
/// read of the peer of a socket would be an event.
fn event_flags(write: bool) -> epoll::EventFlags {
    let read = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    if write { read | epoll::EventFlags::OUT } else { read }
}

impl Driver {
    /// Waits with async-io, on any executor.
    pub fn any_executor() -> Driver {
        Driver(None)
    }

    /// Creates an event loop that [`Driver::block_on`] runs.
    ///
    /// # Errors
    ///
    /// Fails if the process or the host has no descriptors left.
    pub fn new() -> io::Result<Driver> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake_up = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(WAKE_UP);
        epoll::add(&epoll, &wake_up, data, epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        Ok(Driver(Some(Arc::new(EventLoop {
            epoll,
            wake_up,
            sleep: Sleep::new(),
            sources: Mutex::default(),
            deferred: Mutex::default(),
            events: AtomicU32::new(0),
        }))))
    }

    /// Registers a descriptor, which must be non-blocking.
    ///
    /// # Errors
    ///
    /// Fails if epoll does not accept the descriptor, as with a regular file, or if the limit of watched
    /// descriptors (`/proc/sys/fs/epoll/max_user_watches`) is reached.
    pub fn source<T: AsFd>(&self, io: T) -> io::Result<Source<T>> {
        let Some(event_loop) = &self.0 else {
            return Ok(Source(Backend::AsyncIo(Async::new_nonblocking(io)?)));
        };
        let readiness = Arc::new(Readiness::default());
        // A source that was ready before the registration is found by the first attempt.
        readiness.readable.store(true, Ordering::Relaxed);
        readiness.writable.store(true, Ordering::Relaxed);
        let mut sources = lock(&event_loop.sources);
        let number = sources.free.last().copied().unwrap_or(sources.slots.len());
        let data = epoll::EventData::new_u64(number as u64);
        epoll::add(&event_loop.epoll, &io, data, event_flags(false))?;
        // After the call that can fail, which would lose the number.
        match sources.free.pop() {
            Some(number) => sources.slots[number] = Some(readiness.clone()),
            None => sources.slots.push(Some(readiness.clone())),
        }
        let event_loop = event_loop.clone();
        Ok(Source(Backend::EventLoop(Registered { io, readiness, number, event_loop })))
    }

    /// Runs `future` on this thread until it completes.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let Some(event_loop) = &self.0 else { return async_io::block_on(future) };
        let waker = Waker::from(event_loop.clone());
        let mut cx = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            if event_loop.sleep.take_wake()
                && let Poll::Ready(value) = future.as_mut().poll(&mut cx)
            {
                return value;
            }
            event_loop.wait();
            // One deferred task a turn, after the tasks of the events.
            let next = lock(&event_loop.deferred).pop_front();
            if let Some(waker) = next {
                waker.wake();
            }
        }
    }

    /// Wakes a task that has more work, after the tasks whose descriptors are ready.
    pub fn defer(&self, waker: &Waker) {
        match &self.0 {
            Some(event_loop) => lock(&event_loop.deferred).push_back(waker.clone()),
            None => waker.wake_by_ref(),
        }
    }

    /// Returns the number of tasks that share the thread now: the events of the last wait, and the
    /// deferred tasks.
    pub fn load(&self) -> u32 {
        let Some(event_loop) = &self.0 else { return 1 };
        let deferred = u32::try_from(lock(&event_loop.deferred).len()).unwrap_or(u32::MAX);
        event_loop.events.load(Ordering::Relaxed).saturating_add(deferred)
    }
}

impl Wake for EventLoop {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.sleep.wake() {
            let _ = rustix::io::write(&self.wake_up, &1_u64.to_ne_bytes());
        }
    }
}

impl EventLoop {
    /// Waits for an event or a wake-up, and wakes the tasks of the events. Does not wait if there was a
    /// wake-up since the last turn, or if there are deferred tasks.
    fn wait(&self) {
        let mut events = [const { std::mem::MaybeUninit::uninit() }; EVENTS];
        let idle = self.sleep.begin() && lock(&self.deferred).is_empty();
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let found = epoll::wait(&self.epoll, &mut events, if idle { None } else { Some(&at_once) });
        self.sleep.end();
        let Ok((found, _)) = found else { return };
        let sources = lock(&self.sources);
        self.events.store(u32::try_from(found.len()).unwrap_or(u32::MAX), Ordering::Relaxed);
        for event in found.iter() {
            // The eventfd is edge-triggered: it does not have to be read.
            let number = usize::try_from(event.data.u64()).ok();
            // A source may have been dropped since the event was queued.
            if let Some(Some(readiness)) = number.and_then(|number| sources.slots.get(number)) {
                readiness.update(event.flags);
            }
        }
    }
}

impl Readiness {
    fn update(&self, flags: epoll::EventFlags) {
        type Flags = epoll::EventFlags;
        let failed = Flags::HUP | Flags::ERR;
        if flags.intersects(Flags::RDHUP | failed) {
            self.hung_up.store(true, Ordering::Release);
        }
        if flags.intersects(Flags::IN | Flags::RDHUP | failed) {
            self.readable.store(true, Ordering::Release);
            self.reader.wake();
        }
        if flags.intersects(Flags::OUT | failed) {
            self.writable.store(true, Ordering::Release);
            self.writer.wake();
        }
    }

    fn of(&self, interest: Interest) -> (&AtomicBool, &AtomicWaker) {
        match interest {
            Interest::Read => (&self.readable, &self.reader),
            Interest::Write => (&self.writable, &self.writer),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interest {
    Read,
    Write,
}

/// A registered descriptor.
#[derive(Debug)]
pub struct Source<T: AsFd>(Backend<T>);

#[derive(Debug)]
enum Backend<T: AsFd> {
    AsyncIo(Async<T>),
    EventLoop(Registered<T>),
}

#[derive(Debug)]
struct Registered<T: AsFd> {
    io: T,
    readiness: Arc<Readiness>,
    number: usize,
    event_loop: Arc<EventLoop>,
}

impl<T: AsFd> Drop for Registered<T> {
    fn drop(&mut self) {
        let _ = epoll::delete(&self.event_loop.epoll, &self.io);
        let mut sources = lock(&self.event_loop.sources);
        sources.slots[self.number] = None;
        sources.free.push(self.number);
    }
}

impl<T: AsFd> Registered<T> {
    fn is_ready(&self, cx: &Context<'_>, interest: Interest) -> bool {
        let (ready, waker) = self.readiness.of(interest);
        if ready.load(Ordering::Acquire) {
            return true;
        }
        waker.register(cx.waker());
        // The loop may have found an event on another thread before the registration.
        ready.load(Ordering::Acquire)
    }

    /// Sets whether the kernel reports that there is room to write. Reports existing room at once.
    fn set_write_interest(&self, wanted: bool) -> io::Result<()> {
        if wanted {
            self.readiness.writable.store(false, Ordering::Release);
        }
        if self.readiness.write_interest.load(Ordering::Relaxed) != wanted {
            self.readiness.write_interest.store(wanted, Ordering::Relaxed);
            let data = epoll::EventData::new_u64(self.number as u64);
            epoll::modify(&self.event_loop.epoll, &self.io, data, event_flags(wanted))?;
        }
        Ok(())
    }

    /// Notes the result of an attempt.
    fn attempted(&self, interest: Interest, blocked: bool) -> io::Result<()> {
        match interest {
            Interest::Write => self.set_write_interest(blocked)?,
            Interest::Read if blocked => self.readiness.readable.store(false, Ordering::Release),
            Interest::Read => {}
        }
        Ok(())
    }
}

impl<T: AsFd> Source<T> {
    /// The descriptor.
    pub fn get(&self) -> &T {
        match &self.0 {
            Backend::AsyncIo(io) => io.get_ref(),
            Backend::EventLoop(registered) => &registered.io,
        }
    }

    /// Calls `attempt` when the descriptor is readable. Events are edge-triggered: after a successful
    /// attempt the caller must attempt again until `WouldBlock`, or call [`Source::drained`] after a
    /// short read.
    ///
    /// # Errors
    ///
    /// Fails with the error of `attempt`, except `Interrupted` and `WouldBlock`.
    pub fn poll_read<R>(
        &self,
        cx: &mut Context<'_>,
        attempt: impl FnMut(&T) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        self.poll(cx, attempt, Interest::Read)
    }

    /// Calls `attempt` when the descriptor is writable.
    ///
    /// # Errors
    ///
    /// Fails with the error of `attempt`, except `Interrupted` and `WouldBlock`, or if epoll does not
    /// accept the changed interest.
    pub fn poll_write<R>(
        &self,
        cx: &mut Context<'_>,
        attempt: impl FnMut(&T) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        self.poll(cx, attempt, Interest::Write)
    }

    fn poll<R>(
        &self,
        cx: &mut Context<'_>,
        mut attempt: impl FnMut(&T) -> io::Result<R>,
        interest: Interest,
    ) -> Poll<io::Result<R>> {
        loop {
            if let Backend::EventLoop(registered) = &self.0
                && !registered.is_ready(cx, interest)
            {
                return Poll::Pending;
            }
            let result = attempt(self.get());
            let blocked = match &result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => error.kind() == io::ErrorKind::WouldBlock,
                Ok(_) => false,
            };
            if let Backend::EventLoop(registered) = &self.0 {
                registered.attempted(interest, blocked)?;
            }
            if !blocked {
                return Poll::Ready(result);
            }
            if let Backend::AsyncIo(io) = &self.0 {
                ready!(match interest {
                    Interest::Read => io.poll_readable(cx),
                    Interest::Write => io.poll_writable(cx),
                })?;
            }
        }
    }

    /// Notes that the last read returned all bytes that were there, which saves the attempt that would
    /// return `WouldBlock`.
    pub fn drained(&self) {
        if let Backend::EventLoop(Registered { readiness, .. }) = &self.0 {
            // The end of the stream may have come with the last bytes, in one event.
            if !readiness.hung_up.load(Ordering::Acquire) {
                readiness.readable.store(false, Ordering::Release);
            }
        }
    }
}

impl<T: AsFd> From<Async<T>> for Source<T> {
    fn from(io: Async<T>) -> Source<T> {
        Source(Backend::AsyncIo(io))
    }
}

impl<T: AsFd> AsFd for Source<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.get().as_fd()
    }
}

#[cfg(all(test, not(xenstore_loom)))]
mod tests;
