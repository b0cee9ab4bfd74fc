//! Snapshots of the whole state, for a live update and for the journal.
//!
//! Both write a snapshot while requests are served, then what happened since. A live update writes the
//! difference of two states: the destination reads it in time that depends on the difference, not on the
//! number of requests. The journal copies records, which recovery executes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::{Pin, pin};
use std::time::{Duration, Instant};

use futures_lite::future;
use tracing::{debug, error};
use xenstore_store::{Base, Caller, ConnId, ConnectionIo, State};

use super::envelope;
use super::source::Source;
use crate::journal::{CatchUp, Journal, NewSegment, Retired};
use crate::worker::unblock;

/// A snapshot in memory. The difference to a later state can follow it.
pub(super) struct Snapshot {
    /// Not sealed yet.
    memory: File,
    pub(super) bytes: u64,
    base: Base,
    /// How long it took to write.
    pub(super) time: Duration,
}

impl Snapshot {
    pub(super) fn write(state: State) -> io::Result<Snapshot> {
        let begun = Instant::now();
        let memory = envelope::memory("state")?;
        envelope::fill(&memory, |sink| state.encode_to(sink))?;
        let bytes = memory.metadata()?.len();
        Ok(Snapshot { memory, bytes, base: state.into_base(), time: begun.elapsed() })
    }

    /// Returns a read-only descriptor of it.
    pub(super) fn read_only(&self) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.memory.as_raw_fd()))
    }

    /// Appends the difference to `state` and seals the memory.
    pub(super) fn followed_by(&self, state: &State) -> io::Result<&File> {
        envelope::fill(&self.memory, |sink| state.encode_since(&self.base, sink))?;
        envelope::seal(&self.memory)?;
        Ok(&self.memory)
    }
}

impl Source<'_> {
    /// Adds the descriptors that do not belong to a connection.
    pub(super) fn name_descriptors(&self, state: &mut State) {
        state.io.listener = self.listener.map(|listener| listener.as_fd().as_raw_fd());
        if let Some((bound, _)) = &self.xen {
            state.io.evtchn = Some(bound.evtchn.descriptor().as_raw_fd());
            state.io.virq_port = Some(bound.domain_exc.get().0);
        }
    }

    /// Returns the whole state: that of the engine, and that of the server with its `paused` connections.
    pub(crate) fn state(&self, mut paused: BTreeMap<ConnId, ConnectionIo>) -> State {
        let mut state = self.server.with(|engine, _| engine.dump());
        self.name_descriptors(&mut state);
        state.io.other = self.server.clock().now().to_le_bytes().to_vec();
        for connection in &mut state.connections {
            let Some(io) = paused.remove(&connection.id) else {
                error!(conn = %connection.id, "live update: no task serves this connection");
                continue;
            };
            connection.io = io;
            if let (Caller::Domain(domid), Some((_, rings))) = (connection.caller, &self.xen) {
                let rings = rings.borrow();
                let (ring, io) = (rings.get(&domid), &mut connection.io);
                io.port = ring.and_then(|ring| ring.port).map(u32::from);
                io.gfn = ring.map(|ring| ring.gfn.0);
                io.remote_port = ring.and_then(|ring| ring.remote).map(u32::from);
            }
        }
        state
    }

    /// Rotates the journal whenever it is full.
    pub(crate) async fn keep_journal(&self) {
        loop {
            self.server.journal_is_due().await;
            let alone = self.pausing.lock().await;
            let begun = Instant::now();
            let paused = self.server.pause_all(false).await;
            self.server.finish_work().await;
            let state = self.state(paused);
            let checkpoint = self.server.with_journal(Journal::checkpoint);
            self.server.resume_all();
            drop(alone);
            let ms = begun.elapsed().as_secs_f64() * 1e3;
            let Some(checkpoint) = checkpoint else { return future::pending().await };
            let Some(checkpoint) = checkpoint else { continue };
            let write = move || checkpoint.write(|sink| state.encode_to(sink)).with_memory();
            let retired = self.rotate(pin!(unblock(write))).await;
            if let Some(retired) = retired {
                let recycled = unblock(|| retired.trim()).await.ok().flatten();
                self.server.with_journal(|journal| journal.recycle(recycled));
            }
            debug!(ms, "the journal has a new segment");
        }
    }

    /// Waits for the next segment of the journal, which then replaces the current one. Requests are
    /// served meanwhile, as long as the current segment has room.
    async fn rotate(
        &self,
        mut writing: Pin<&mut impl Future<Output = io::Result<NewSegment>>>,
    ) -> Option<Retired> {
        let written = async { Some(writing.as_mut().await) };
        let over = async {
            self.server.journal_is_due().await;
            None
        };
        let new = future::or(written, over).await;
        let waits = new.is_none();
        let _alone = if waits { Some(self.pausing.lock().await) } else { None };
        if waits {
            debug!("requests wait for the next segment of the journal");
            self.server.pause_all(false).await;
        }
        let new = match new {
            Some(new) => new,
            None => writing.await,
        };
        let new = new.unwrap_or_else(NewSegment::failed);
        self.server.with_journal(|journal| journal.accept(new));
        let retired = loop {
            match self.server.with_journal(Journal::catch_up) {
                Some(CatchUp::More) => self.server.next_turn().await,
                Some(CatchUp::Done(retired)) => break retired,
                None => break None,
            }
        };
        if waits {
            self.server.resume_all();
        }
        retired
    }
}
