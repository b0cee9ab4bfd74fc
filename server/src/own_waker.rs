//! Futures that are polled only when they themselves have been woken.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Wake, Waker};

use atomic_waker::AtomicWaker;

#[derive(Debug, Default)]
struct Bell {
    rung: AtomicBool,
    outer: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        self.outer.wake();
    }
}

/// The same future, which is left alone when others are woken that it is joined with. What waits for
/// a signal, for example, tries to read one whenever it is polled: a call of the kernel that each
/// request would pay for.
pub(crate) async fn own_waker<T>(future: impl Future<Output = T>) -> T {
    let bell = Arc::new(Bell::default());
    let waker = Waker::from(bell.clone());
    bell.rung.store(true, Ordering::Relaxed);
    let mut future = pin!(future);
    poll_fn(|cx| {
        // Before looking, so that nothing that comes afterwards is missed.
        bell.outer.register(cx.waker());
        match bell.rung.swap(false, Ordering::AcqRel) {
            true => future.as_mut().poll(&mut std::task::Context::from_waker(&waker)),
            false => Poll::Pending,
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::task::Context;

    use super::*;

    // Fails if the future is polled for others, or not when it has been woken, or not at first.
    #[test]
    fn it_is_polled_when_it_has_been_woken() {
        let (polls, inner) = (Cell::new(0), RefCell::new(None));
        let mut future = pin!(own_waker(poll_fn(|cx| {
            polls.set(polls.get() + 1);
            inner.replace(Some(cx.waker().clone()));
            if polls.get() < 3 { Poll::Pending } else { Poll::Ready(polls.get()) }
        })));
        let mut poll = || future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(poll().is_pending() && poll().is_pending() && poll().is_pending());
        assert_eq!(polls.get(), 1);
        inner.take().unwrap().wake();
        assert!(poll().is_pending() && poll().is_pending());
        assert_eq!(polls.get(), 2);
        inner.take().unwrap().wake_by_ref();
        assert_eq!(poll(), Poll::Ready(3));
    }
}
