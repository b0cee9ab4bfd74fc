//! Many clients at once, each in a closed loop: what it sends next depends on what was answered.

use std::cell::Cell;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{Timespec, epoll};
use xenstore_tests::raw::op;

use crate::meter::{Result, Tally};
use crate::wire::{Inbox, PATIENCE, Reply, SILENT};

/// Bytes to a daemon and back.
pub(crate) trait Link {
    /// Can be read when something may have come.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Waits until something may have come, unless [`Link::receive`] waits.
    fn wait(&self) -> Result<()>;
    /// Takes what is there, if anything.
    fn receive(&mut self, room: &mut [u8]) -> io::Result<usize>;
    fn send(&mut self, bytes: &[u8]) -> io::Result<()>;
}

impl Link for UnixStream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.as_fd()
    }

    fn wait(&self) -> Result<()> {
        Ok(())
    }

    fn receive(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self.read(room)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }
}

/// What an answer was to its client.
pub(crate) enum Step {
    /// There is more to do; it has been appended.
    More,
    /// A transaction failed; it is done again, from the request that has been appended.
    Again,
    /// The operation is done.
    Done,
}

/// What a client does.
pub(crate) trait Script {
    /// Appends the first request of an operation.
    fn begin(&mut self, out: &mut Vec<u8>);
    /// Takes an answer and appends the request after it, if there is one.
    fn reply(&mut self, reply: &Reply<'_>, out: &mut Vec<u8>) -> Result<Step>;
}

/// The same request again and again.
pub(crate) struct Repeat {
    pub(crate) ty: u32,
    pub(crate) frame: Vec<u8>,
}

impl Script for Repeat {
    fn begin(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.frame);
    }

    fn reply(&mut self, reply: &Reply<'_>, _: &mut Vec<u8>) -> Result<Step> {
        reply.expect(self.ty)?;
        Ok(Step::Done)
    }
}

struct Client<L, S> {
    link: L,
    script: S,
    inbox: Inbox,
    /// Requests that are to be sent.
    next: Vec<u8>,
    /// When its operation began.
    since: Instant,
    /// Nothing of its operation has been answered yet.
    begins: bool,
}

/// The clients, and what they wait on.
///
/// They stop between two requests when they rest, and go on from there when they are driven again.
pub(crate) struct Driver<L, S> {
    clients: Vec<Client<L, S>>,
    epoll: OwnedFd,
    depth: usize,
}

impl<L: Link, S: Script> Driver<L, S> {
    /// Clients with `depth` operations under way each; more than one only for [`Repeat`].
    pub(crate) fn new(links: Vec<(L, S)>, depth: usize) -> Result<Driver<L, S>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let since = Instant::now();
        let client = |(link, mut script): (L, S)| {
            let mut next = Vec::new();
            (0..depth).for_each(|_| script.begin(&mut next));
            Client { link, script, inbox: Inbox::default(), next, since, begins: true }
        };
        let clients: Vec<_> = links.into_iter().map(client).collect();
        for (at, client) in clients.iter().enumerate() {
            let data = epoll::EventData::new_u64(at as u64);
            epoll::add(&epoll, client.link.fd(), data, epoll::EventFlags::IN)?;
        }
        Ok(Driver { clients, epoll, depth })
    }

    /// Lets them work as long as `more` says.
    pub(crate) fn drive(&mut self, tally: &mut Tally, more: impl FnMut() -> bool) -> Result<()> {
        let start = Instant::now();
        for client in &mut self.clients {
            if client.begins {
                client.since = Instant::now();
            }
            client.send()?;
        }
        let work = |client: &mut Client<L, S>| {
            client.take(tally, start)?;
            Ok(client.send()?)
        };
        self.each(work, more)
    }

    /// Waits for the answers to all that was sent, so that the daemon has nothing to do while others
    /// are measured. What follows from them is sent when the clients are driven again.
    pub(crate) fn rest(&mut self) -> Result<()> {
        let (start, left) = (Instant::now(), Cell::new(self.clients.len() * self.depth));
        let work = |client: &mut Client<L, S>| {
            let answers = client.take(&mut Tally::default(), start)?;
            left.set(left.get() - answers);
            Ok(())
        };
        self.each(work, || left.get() > 0)
    }

    /// Does something with each client for which something may have come, as long as `more` says.
    fn each(
        &mut self,
        mut work: impl FnMut(&mut Client<L, S>) -> Result<()>,
        mut more: impl FnMut() -> bool,
    ) -> Result<()> {
        if let [client] = &mut self.clients[..] {
            while more() {
                client.link.wait()?;
                work(client)?;
            }
            return Ok(());
        }
        let mut events = Vec::with_capacity(256);
        let (mut idle_since, tick) = (Instant::now(), Timespec { tv_sec: 0, tv_nsec: 50_000_000 });
        while more() {
            events.clear();
            let room = rustix::buffer::spare_capacity(&mut events);
            if epoll::wait(&self.epoll, room, Some(&tick))? > 0 {
                idle_since = Instant::now();
            } else if idle_since.elapsed() > PATIENCE {
                return Err(SILENT.into());
            }
            for event in &events {
                let at = usize::try_from(event.data.u64())?;
                work(&mut self.clients[at])?;
            }
        }
        Ok(())
    }
}

impl<L: Link, S: Script> Client<L, S> {
    /// Takes what came; how many answers that was. What follows from them is to be sent.
    fn take(&mut self, tally: &mut Tally, start: Instant) -> Result<usize> {
        let Client { link, script, inbox, next, since, begins } = self;
        let mut answers = 0;
        inbox.fill(|room| link.receive(room))?;
        while let Some(reply) = inbox.next() {
            if reply.ty == op::WATCH_EVENT {
                continue;
            }
            answers += 1;
            let step = script.reply(&reply, next)?;
            *begins = matches!(step, Step::Done);
            match step {
                Step::More => {}
                Step::Again => tally.retries += 1,
                Step::Done => {
                    script.begin(next);
                    // One that was under way while another daemon had its turn is not timed.
                    if *since >= start {
                        *since = tally.done(*since);
                    } else {
                        tally.ops += 1;
                        *since = Instant::now();
                    }
                }
            }
        }
        Ok(answers)
    }

    fn send(&mut self) -> io::Result<()> {
        if !self.next.is_empty() {
            self.link.send(&self.next)?;
            self.next.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use rustix::event::{EventfdFlags, eventfd};
    use xenstore_tests::raw::frame;

    use super::*;

    const LEN: usize = 21;

    /// A daemon that answers one request whenever it is looked at.
    struct OneByOne {
        fd: OwnedFd,
        /// Requests that were sent, and those that were answered.
        counts: Rc<Cell<(usize, usize)>>,
    }

    impl Link for OneByOne {
        fn fd(&self) -> BorrowedFd<'_> {
            self.fd.as_fd()
        }
        fn wait(&self) -> Result<()> {
            Ok(())
        }
        fn receive(&mut self, room: &mut [u8]) -> io::Result<usize> {
            let (sent, answered) = self.counts.get();
            if answered == sent {
                return Err(io::Error::other("nothing is under way"));
            }
            self.counts.set((sent, answered + 1));
            let answer = frame(op::WRITE, 1, 0, b"OK\0");
            room[..answer.len()].copy_from_slice(&answer);
            Ok(answer.len())
        }
        fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
            let (sent, answered) = self.counts.get();
            self.counts.set((sent + bytes.len() / LEN, answered));
            Ok(())
        }
    }

    // Fails if a daemon still has something to do when its clients rest, or if a request is lost or
    // sent again.
    #[test]
    fn nothing_is_under_way_while_clients_rest() {
        let counts = Rc::<Cell<(usize, usize)>>::default();
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let frame = frame(op::WRITE, 1, 0, b"/a\0bc");
        assert_eq!(frame.len(), LEN);
        let link = OneByOne { fd, counts: counts.clone() };
        let mut driver = Driver::new(vec![(link, Repeat { ty: op::WRITE, frame })], 3).unwrap();
        let mut tally = Tally::default();
        for round in 1..=2 {
            let mut looks = 0..10;
            driver.drive(&mut tally, || looks.next().is_some()).unwrap();
            let done = (round - 1) * 13;
            assert_eq!(counts.get(), (done + 13, done + 10));
            driver.rest().unwrap();
            assert_eq!(counts.get(), (done + 13, done + 13));
        }
        assert_eq!(tally.ops, 20);
    }
}
