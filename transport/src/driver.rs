//! Who waits for descriptors.
//!
//! [`Driver::any_executor`] leaves it to async-io, which works with every executor. [`Driver::new`]
//! is a loop of our own on one thread, for a server: a descriptor is registered once, edge-triggered,
//! instead of anew for every wait, and waiting takes one call of the kernel for all of them.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use async_io::Async;
use atomic_waker::AtomicWaker;
use rustix::event::{EventfdFlags, epoll, eventfd};

/// Events that one wait brings at the most.
const EVENTS: usize = 256;
/// In place of the number of a source: somebody wants the loop to go on.
const WAKE_UP: u64 = u64::MAX;

/// Whoever waits for descriptors. Clones are the same.
#[derive(Clone, Debug)]
pub struct Driver(Option<Arc<Loop>>);

#[derive(Debug)]
struct Loop {
    epoll: OwnedFd,
    /// Wakes the thread that waits.
    wake_up: OwnedFd,
    waiting: AtomicBool,
    woken: AtomicBool,
    sources: Mutex<Sources>,
    /// Tasks that have more to do, and whose turn comes after those for which something has come.
    later: Mutex<VecDeque<Waker>>,
    /// How many sources the last wait found ready.
    crowd: AtomicU32,
}

#[derive(Debug, Default)]
struct Sources {
    slots: Vec<Option<Arc<Slot>>>,
    free: Vec<usize>,
}

/// What is known of one descriptor.
#[derive(Debug, Default)]
struct Slot {
    readable: AtomicBool,
    writable: AtomicBool,
    /// The kernel has been asked to tell when there is room to write.
    asked: AtomicBool,
    /// The other end has closed: reading never has to wait again.
    ended: AtomicBool,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the kernel is to tell of a descriptor. That there is room to write is asked for only by
/// those who wait for it: otherwise a socket wakes us each time that its other end has read.
fn interest(writing: bool) -> epoll::EventFlags {
    let reading = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    if writing { reading | epoll::EventFlags::OUT } else { reading }
}

impl Driver {
    /// Leaves waiting to async-io, so that any executor will do.
    pub fn any_executor() -> Driver {
        Driver(None)
    }

    /// A loop of our own, which [`Driver::block_on`] runs.
    pub fn new() -> io::Result<Driver> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake_up = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let data = epoll::EventData::new_u64(WAKE_UP);
        epoll::add(&epoll, &wake_up, data, epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        Ok(Driver(Some(Arc::new(Loop {
            epoll,
            wake_up,
            waiting: AtomicBool::new(false),
            woken: AtomicBool::new(true),
            sources: Mutex::default(),
            later: Mutex::default(),
            crowd: AtomicU32::new(0),
        }))))
    }

    /// Makes a descriptor, which must be non-blocking, into something that can be waited for.
    pub fn source<T: AsFd>(&self, io: T) -> io::Result<Source<T>> {
        let Some(own) = &self.0 else {
            return Ok(Source(Way::AnyExecutor(Async::new_nonblocking(io)?)));
        };
        let slot = Arc::new(Slot::default());
        // Whether there is something already is found out by trying.
        slot.readable.store(true, Ordering::Relaxed);
        slot.writable.store(true, Ordering::Relaxed);
        let mut sources = lock(&own.sources);
        let number = sources.free.last().copied().unwrap_or(sources.slots.len());
        epoll::add(&own.epoll, &io, epoll::EventData::new_u64(number as u64), interest(false))?;
        // Only now, so that a number is not lost with a descriptor that the kernel refuses.
        match sources.free.pop() {
            Some(number) => sources.slots[number] = Some(slot.clone()),
            None => sources.slots.push(Some(slot.clone())),
        }
        Ok(Source(Way::Own(Registered { io, slot, number, own: own.clone() })))
    }

    /// Runs `future` on this thread, and waits when it does.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        let Some(own) = &self.0 else { return async_io::block_on(future) };
        let waker = Waker::from(own.clone());
        let mut cx = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            if own.woken.swap(false, Ordering::AcqRel)
                && let Poll::Ready(value) = future.as_mut().poll(&mut cx)
            {
                return value;
            }
            own.wait();
            // One of those who have more to do; what has just come is before it.
            let next = lock(&own.later).pop_front();
            if let Some(waker) = next {
                waker.wake();
            }
        }
    }

    /// Waits for a turn after those for whom something has come. For tasks that have more to do.
    pub fn later(&self, waker: &Waker) {
        match &self.0 {
            Some(own) => lock(&own.later).push_back(waker.clone()),
            None => waker.wake_by_ref(),
        }
    }

    /// How many had something to do at the same time, when it was last looked at, and how many have
    /// more to do.
    pub fn crowd(&self) -> u32 {
        let Some(own) = &self.0 else { return 1 };
        let waiting = u32::try_from(lock(&own.later).len()).unwrap_or(u32::MAX);
        own.crowd.load(Ordering::Relaxed).saturating_add(waiting)
    }
}

impl Wake for Loop {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) {
            let _ = rustix::io::write(&self.wake_up, &1_u64.to_ne_bytes());
        }
    }
}

impl Loop {
    /// Waits until something has come or somebody has been woken, and wakes whom it concerns.
    fn wait(&self) {
        let mut events = [const { std::mem::MaybeUninit::uninit() }; EVENTS];
        self.waiting.store(true, Ordering::SeqCst);
        let idle = !self.woken.load(Ordering::SeqCst) && lock(&self.later).is_empty();
        let at_once = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let found = epoll::wait(&self.epoll, &mut events, if idle { None } else { Some(&at_once) });
        self.waiting.store(false, Ordering::SeqCst);
        let Ok((found, _)) = found else { return };
        let sources = lock(&self.sources);
        self.crowd.store(u32::try_from(found.len()).unwrap_or(u32::MAX), Ordering::Relaxed);
        for event in found.iter() {
            let number = event.data.u64();
            if number == WAKE_UP {
                continue; // edge-triggered: it need not be read
            }
            // One that is gone may have been in the same batch.
            let slot = usize::try_from(number).ok().and_then(|n| sources.slots.get(n)?.as_ref());
            let Some(slot) = slot else { continue };
            let (flags, ending) = (event.flags, epoll::EventFlags::RDHUP | epoll::EventFlags::HUP);
            if flags.intersects(ending | epoll::EventFlags::ERR) {
                slot.ended.store(true, Ordering::Release);
            }
            if flags.intersects(epoll::EventFlags::IN | ending | epoll::EventFlags::ERR) {
                slot.readable.store(true, Ordering::Release);
                slot.reader.wake();
            }
            if flags.intersects(
                epoll::EventFlags::OUT | epoll::EventFlags::HUP | epoll::EventFlags::ERR,
            ) {
                slot.writable.store(true, Ordering::Release);
                slot.writer.wake();
            }
        }
    }
}

/// A descriptor that can be waited for.
#[derive(Debug)]
pub struct Source<T: AsFd>(Way<T>);

#[derive(Debug)]
enum Way<T: AsFd> {
    AnyExecutor(Async<T>),
    Own(Registered<T>),
}

#[derive(Debug)]
struct Registered<T: AsFd> {
    io: T,
    slot: Arc<Slot>,
    number: usize,
    own: Arc<Loop>,
}

impl<T: AsFd> Drop for Registered<T> {
    fn drop(&mut self) {
        let _ = epoll::delete(&self.own.epoll, &self.io);
        let mut sources = lock(&self.own.sources);
        sources.slots[self.number] = None;
        sources.free.push(self.number);
    }
}

impl<T: AsFd> Registered<T> {
    /// Asks the kernel to tell when there is room to write, or not to any more.
    fn ask(&self, writing: bool) -> io::Result<()> {
        if writing {
            self.slot.writable.store(false, Ordering::Release);
        }
        if self.slot.asked.load(Ordering::Relaxed) != writing {
            self.slot.asked.store(writing, Ordering::Relaxed);
            let data = epoll::EventData::new_u64(self.number as u64);
            epoll::modify(&self.own.epoll, &self.io, data, interest(writing))?;
        }
        Ok(())
    }
}

impl<T: AsFd> Source<T> {
    /// The descriptor itself.
    pub fn get(&self) -> &T {
        match &self.0 {
            Way::AnyExecutor(io) => io.get_ref(),
            Way::Own(registered) => &registered.io,
        }
    }

    /// Does `attempt`, now or when there is something to read. It must read until less than it asked
    /// for has come, or fail with `WouldBlock`, before it is done again in vain.
    pub fn poll_read<R>(
        &self,
        cx: &mut Context<'_>,
        attempt: impl FnMut(&T) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        self.poll(cx, attempt, true)
    }

    /// Does `attempt`, now or when there is room to write.
    pub fn poll_write<R>(
        &self,
        cx: &mut Context<'_>,
        attempt: impl FnMut(&T) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        self.poll(cx, attempt, false)
    }

    fn poll<R>(
        &self,
        cx: &mut Context<'_>,
        mut attempt: impl FnMut(&T) -> io::Result<R>,
        reading: bool,
    ) -> Poll<io::Result<R>> {
        loop {
            if let Way::Own(Registered { slot, .. }) = &self.0 {
                let (ready, waker) = slot.half(reading);
                if !ready.load(Ordering::Acquire) {
                    waker.register(cx.waker());
                    // It may have come in between, on another thread.
                    if !ready.load(Ordering::Acquire) {
                        return Poll::Pending;
                    }
                }
            }
            let result = attempt(self.get());
            let blocked = match &result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => error.kind() == io::ErrorKind::WouldBlock,
                Ok(_) => false,
            };
            if !reading && let Way::Own(registered) = &self.0 {
                registered.ask(blocked)?;
            }
            if !blocked {
                return Poll::Ready(result);
            }
            match &self.0 {
                // Asking anew tells at once what there is.
                Way::Own(_) if !reading => {}
                Way::Own(registered) => registered.slot.readable.store(false, Ordering::Release),
                Way::AnyExecutor(io) => {
                    let ready = if reading { io.poll_readable(cx) } else { io.poll_writable(cx) };
                    std::task::ready!(ready)?;
                }
            }
        }
    }

    /// The last read took all that was there, so that the next may wait without trying.
    pub fn drained(&self) {
        if let Way::Own(Registered { slot, .. }) = &self.0 {
            // The end may have come together with the last bytes, and is told only once.
            if !slot.ended.load(Ordering::Acquire) {
                slot.readable.store(false, Ordering::Release);
            }
        }
    }
}

impl<T: AsFd> From<Async<T>> for Source<T> {
    fn from(io: Async<T>) -> Source<T> {
        Source(Way::AnyExecutor(io))
    }
}

impl Slot {
    fn half(&self, reading: bool) -> (&AtomicBool, &AtomicWaker) {
        if reading { (&self.readable, &self.reader) } else { (&self.writable, &self.writer) }
    }
}

impl<T: AsFd> AsFd for Source<T> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.get().as_fd()
    }
}
