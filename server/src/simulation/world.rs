//! The environment of the daemon's process, which survives its end.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;
use xenstore_protocol::Operation;

use super::clients::{Guest, Message, PORT, Tool, daemon};
use super::script::{DOMIDS, Job, Step, frame};

/// In place of a domid, and the number of `VIRQ_DOM_EXC`.
const VIRQ: [u32; 2] = [u32::MAX, 3];

pub(super) struct World<'a> {
    dir: TempDir,
    script: &'a [Step],
    /// The step that is being done.
    at: usize,
    begun: bool,
    pub(super) guests: [Guest; 3],
    tool: Tool,
    job: Progress,
    /// The event channel device, stored while no process runs.
    channels: Option<OwnedFd>,
}

/// How far the tool is with its job.
#[derive(Default)]
struct Progress {
    next: usize,
    tx: u32,
    waits: bool,
    /// Its connection has ended, and whether the job was done is asked first.
    unsure: bool,
}

impl<'a> World<'a> {
    pub(super) fn new(script: &'a [Step], keeps: bool) -> World<'a> {
        // Memory, as /run is.
        let shm = tempfile::tempdir_in("/dev/shm");
        let dir = shm.or_else(|_| tempfile::tempdir()).unwrap();
        let xen = dir.path().join("xen");
        for path in [dir.path().join("run"), xen.join("0")] {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(xen.join("0/port"), PORT.to_string()).unwrap();
        mknodat(CWD, xen.join("events"), FileType::Fifo, Mode::from(0o600), 0).unwrap();
        let guests = DOMIDS.map(|domid| Guest::new(&xen, domid.into()));
        let (tool, job) = (Tool::default(), Progress::default());
        let channels = keeps.then(|| daemon(&xen).into());
        World { dir, script, at: 0, begun: false, guests, tool, job, channels }
    }

    pub(super) fn kept_channels(&self) -> Option<OwnedFd> {
        self.channels.as_ref().map(|kept| kept.try_clone().unwrap())
    }

    pub(super) fn xen(&self) -> PathBuf {
        self.dir.path().join("xen")
    }

    pub(super) fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The tool connects, if it is not connected; the other end.
    pub(super) fn connects(&mut self) -> Option<OwnedFd> {
        if self.tool.is_connected() {
            return None;
        }
        if let Step::Job(job) = &self.script[self.at]
            && !self.is_done(job)
        {
            self.job = Progress { unsure: self.begun, ..Progress::default() };
        }
        Some(self.tool.connect())
    }

    /// The step that begins now.
    fn begins(&mut self) -> Option<&'a Step> {
        let step = &self.script[self.at];
        (!std::mem::replace(&mut self.begun, true)).then_some(step)
    }

    /// Does what can be done now; `renew` makes the daemon begin a new journal.
    /// Returns true if there was anything to do.
    pub(super) fn turn(&mut self, renew: impl FnOnce()) -> bool {
        let begins = self.begins();
        match begins {
            Some(Step::Send(who, bytes)) => self.guests[*who].send(bytes),
            Some(Step::Reads(who, reads)) => self.guests[*who].reads = *reads,
            Some(Step::Reset(who)) => self.guests[*who].reset(),
            Some(Step::Zero(who)) => self.guests[*who].zero(),
            Some(Step::Dies(who)) => {
                let state = format!("{}/state", DOMIDS[*who]);
                fs::write(self.xen().join(state), "gone").unwrap();
                daemon(&self.xen()).write_all(&VIRQ.map(u32::to_le_bytes).concat()).unwrap();
            }
            Some(Step::Reborn(who)) => {
                let xen = self.xen();
                self.guests[*who].reborn(&xen);
            }
            Some(Step::Job(_)) => self.job = Progress::default(),
            Some(Step::Renew) => renew(),
            None => {}
        }
        let mut active = begins.is_some();
        for guest in &mut self.guests {
            active |= guest.look();
        }
        let script = self.script;
        let came = self.tool.receive();
        match &script[self.at] {
            Step::Job(job) => self.go_on(job, came) || active,
            _ => active,
        }
    }

    fn go_on(&mut self, job: &Job, came: Vec<Message>) -> bool {
        let active = !came.is_empty();
        for (ty, _, payload) in came {
            self.job.waits = false;
            let payload = String::from_utf8(payload).unwrap().replace('\0', "|");
            let progress = &mut self.job;
            if std::mem::take(&mut progress.unsure) {
                let done = payload == job.check.2;
                progress.next = if done { job.requests.len() } else { 0 };
                continue;
            }
            let (op, request) = &job.requests[progress.next];
            assert_eq!(ty, op.as_wire(), "{request}: {payload}");
            if *op == Operation::TransactionStart {
                progress.tx = payload.trim_end_matches('|').parse().unwrap();
            }
            progress.next += 1;
        }
        if self.job.waits || !self.tool.is_connected() || self.is_done(job) {
            return active;
        }
        let progress = &mut self.job;
        let (op, payload) = match progress.unsure {
            true => (job.check.0, &job.check.1),
            false => (job.requests[progress.next].0, &job.requests[progress.next].1),
        };
        let tx = if op == Operation::TransactionStart { 0 } else { progress.tx };
        self.tool.send(&frame(op, 1, tx, payload));
        progress.waits = true;
        true
    }

    fn is_done(&self, job: &Job) -> bool {
        self.job.next == job.requests.len() && !self.job.unsure
    }

    /// Called when all participants are idle. Returns true if the script has another step.
    pub(super) fn rests(&mut self) -> bool {
        if let Step::Job(job) = &self.script[self.at] {
            assert!(self.is_done(job), "step {}: {:?} is not answered", self.at, job.check.1);
        }
        self.at += 1;
        self.begun = false;
        self.at < self.script.len()
    }
}
