//! CONTROL `live-update`: the commands of a requester, with the rules of C xenstored.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::path::PathBuf;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use xenstore_protocol::{DomId, Errno, EvtchnPort, Features, Gfn, HEADER_LEN, Header, Operation};
use xenstore_store::{ConnId, DomainInfo, Host};

use super::error::HandoverError;
use super::quiesce::Quiesce;
use crate::log::Trace;

/// The state of live updates. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Update(Rc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    quiesce: Quiesce,
    /// The connection whose request is being executed.
    requester: Cell<Option<ConnId>>,
    session: RefCell<Option<Session>>,
    /// A request whose header is not known yet.
    new: RefCell<Option<UpdateRequest>>,
    /// A request that waits for [`Update::next_request`].
    ready: RefCell<Option<UpdateRequest>>,
    waiter: RefCell<Option<Waker>>,
    /// An update is done, and its requester has not asked for the result yet.
    done: Cell<bool>,
    /// Connections that are not served until their peer reconnects, with the reason.
    failed: RefCell<BTreeMap<ConnId, String>>,
}

/// Begun by `-f`. Ends with the update or with the connection that began it.
#[derive(Clone, Debug)]
struct Session {
    conn: ConnId,
    file: PathBuf,
    cmdline: Option<String>,
    /// Time of the first `-s`.
    started: Option<Instant>,
}

/// The request `-s`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UpdateRequest {
    /// The requester, and the header of the request.
    pub(crate) conn: ConnId,
    pub(crate) header: Header,
    /// The program to execute.
    pub(crate) file: PathBuf,
    /// Its options, if not those of this program.
    pub(crate) cmdline: Option<String>,
    /// Update also if open transactions are lost.
    pub(crate) force: bool,
    /// Only report what would happen.
    pub(crate) dry_run: bool,
    /// How long to wait for open transactions, and the begin of the wait.
    pub(crate) patience: Duration,
    pub(crate) since: Instant,
    /// Version of the stream, if the requester selects one.
    pub(crate) version: Option<u32>,
}

/// The reply to a command that succeeds.
const OK: &str = "OK";

impl Update {
    /// Arguments of CONTROL `live-update`, for CONTROL `help`.
    const COMMAND: (&str, &str) = ("live-update", "[-c <cmdline>] [-F] [-t <timeout>] <file>");

    /// Makes the next `-s` succeed: the update is done.
    pub(crate) fn set_done(&self) {
        self.0.done.set(true);
    }

    /// Returns which connections pause.
    pub(crate) fn quiesce(&self) -> &Quiesce {
        &self.0.quiesce
    }

    /// Must be called before a request of this connection is executed.
    pub(crate) fn set_requester(&self, conn: ConnId) {
        self.0.requester.set(Some(conn));
    }

    /// Removes the reply to a request from the end of `out`, if it is sent when the update has ended.
    /// Returns its length in bytes, or 0.
    pub(crate) fn withhold_reply(&self, header: &Header, out: &mut Vec<u8>) -> usize {
        let Some(request) = self.0.new.borrow_mut().take() else { return 0 };
        // Events precede a reply.
        let withheld = HEADER_LEN + OK.len() + 1;
        out.truncate(out.len() - withheld);
        self.quiesce().pause_one(request.conn);
        *self.0.ready.borrow_mut() = Some(UpdateRequest { header: *header, ..request });
        if let Some(waker) = self.0.waiter.borrow_mut().take() {
            waker.wake();
        }
        withheld
    }

    /// Records that a connection has failed. It is not served until its peer reconnects.
    pub(crate) fn failed(&self, conn: ConnId, reason: String) {
        self.0.failed.borrow_mut().insert(conn, reason);
    }

    /// Records that a connection is served again.
    pub(crate) fn recovered(&self, conn: ConnId) {
        self.0.failed.borrow_mut().remove(&conn);
    }

    /// Returns the lines of CONTROL `connections` about failed connections.
    fn connections(&self) -> Vec<u8> {
        let failed = self.0.failed.borrow();
        let line = |(conn, reason)| format!("conn {conn} failed, until it reconnects: {reason}\n");
        failed.iter().map(line).collect::<String>().into_bytes()
    }

    /// Must be called when a connection has ended.
    pub(crate) fn gone(&self, conn: ConnId) {
        self.recovered(conn);
        self.0.session.borrow_mut().take_if(|session| session.conn == conn);
        self.quiesce().take_reply_on_resume(conn);
    }

    /// Waits for the next request for an update.
    pub(crate) async fn next_request(&self) -> UpdateRequest {
        poll_fn(|cx| match self.0.ready.borrow_mut().take() {
            Some(request) => Poll::Ready(request),
            None => {
                *self.0.waiter.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    /// Fails if the requester has ended the session meanwhile.
    pub(crate) fn check_not_cancelled(&self) -> Result<(), HandoverError> {
        self.0.session.borrow().as_ref().map(drop).ok_or(HandoverError::Cancelled)
    }

    /// Replies to a request. Its session ends, unless the requester retries.
    pub(crate) fn reply(&self, request: &UpdateRequest, result: Result<String, HandoverError>) {
        if !matches!(result, Err(HandoverError::Busy)) {
            *self.0.session.borrow_mut() = None;
        }
        let text = result.unwrap_or_else(|error| error.to_string());
        self.quiesce().resume_one(request.conn, reply(&request.header, &text));
    }

    fn control(&self, args: &[&[u8]]) -> Result<Vec<u8>, Errno> {
        let texts: Result<Vec<&str>, _> = args.iter().map(|arg| std::str::from_utf8(arg)).collect();
        let texts = texts.map_err(|_| Errno::Einval)?;
        let done = match texts.as_slice() {
            ["-f", file] => self.begin(file),
            ["-c", words @ ..] if !words.is_empty() => self.with_session(|session| {
                session.cmdline = Some(words.join(" "));
            }),
            ["-s", ..] if self.0.done.take() => Ok(()),
            ["-s", options @ ..] => self.start(options)?,
            ["-a"] => match self.0.session.borrow_mut().take() {
                Some(_) => Ok(()),
                None => Err("No live-update session active."),
            },
            _ => return Err(Errno::Einval),
        };
        let text = done.err().unwrap_or(OK);
        Ok([text.as_bytes(), b"\0"].concat())
    }

    fn begin(&self, file: &str) -> Result<(), &'static str> {
        use std::os::unix::fs::PermissionsExt;
        let metadata = std::fs::metadata(file).map_err(|_| "File not accessible.")?;
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            return Err("File not executable.");
        }
        let mut session = self.0.session.borrow_mut();
        let conn = self.0.requester.get().ok_or("Not in live-update session.")?;
        if session.is_some() {
            return Err("live-update session already active.");
        }
        let file = PathBuf::from(file);
        *session = Some(Session { conn, file, cmdline: None, started: None });
        Ok(())
    }

    /// Changes the session. Fails if another connection began it.
    fn with_session<T>(&self, change: impl FnOnce(&mut Session) -> T) -> Result<T, &'static str> {
        let mut session = self.0.session.borrow_mut();
        let session =
            session.as_mut().filter(|session| Some(session.conn) == self.0.requester.get());
        session.map(change).ok_or("Not in live-update session.")
    }

    /// Handles `-s`. The inner error is a text for the requester.
    fn start(&self, options: &[&str]) -> Result<Result<(), &'static str>, Errno> {
        let (mut force, mut dry_run, mut seconds, mut version) = (false, false, 0, None);
        let mut options = options.iter();
        while let Some(option) = options.next() {
            let mut number = || options.next().and_then(|text| text.parse::<u32>().ok());
            match *option {
                "-F" => force = true,
                "-n" => dry_run = true,
                "-t" => seconds = number().ok_or(Errno::Einval)?,
                "-v" => version = Some(number().ok_or(Errno::Einval)?),
                _ => return Err(Errno::Einval),
            }
        }
        if version.is_some_and(|version| !(1..=2).contains(&version)) {
            return Ok(Err("Migration stream version not supported."));
        }
        let request = self.with_session(|session| UpdateRequest {
            conn: session.conn,
            header: Header::default(),
            file: session.file.clone(),
            cmdline: session.cmdline.clone(),
            force,
            dry_run,
            patience: Duration::from_secs(seconds.into()),
            since: *session.started.get_or_insert_with(Instant::now),
            version,
        });
        Ok(request.map(|request| *self.0.new.borrow_mut() = Some(request)))
    }
}

/// Returns the reply to a CONTROL request as bytes.
pub(crate) fn reply(header: &Header, text: &str) -> Vec<u8> {
    let len = u32::try_from(text.len() + 1).unwrap_or(0);
    let header = Header { ty: Operation::Control.as_wire(), len, ..*header };
    [&header.emit()[..], text.as_bytes(), b"\0"].concat()
}

/// A host whose CONTROL commands include those of a live update.
pub(crate) struct UpdatableHost {
    /// The host without them.
    pub(crate) host: Box<dyn Host>,
    /// Handles the commands.
    pub(crate) update: Update,
}

impl UpdatableHost {
    /// The commands of `control`, with their arguments.
    pub(crate) const COMMANDS: &'static [(&'static str, &'static str)] = {
        const OTHERS: [(&str, &str); 4] = Trace::COMMANDS;
        &[Update::COMMAND, OTHERS[0], OTHERS[1], OTHERS[2], OTHERS[3]]
    };
}

impl Host for UpdatableHost {
    fn domain(&mut self, domid: DomId) -> Option<DomainInfo> {
        self.host.domain(domid)
    }

    fn introduce(
        &mut self,
        domid: DomId,
        gfn: Gfn,
        port: EvtchnPort,
        features: Features,
    ) -> Result<(), Errno> {
        self.host.introduce(domid, gfn, port, features)
    }

    fn release(&mut self, domid: DomId) {
        self.host.release(domid);
    }

    fn control(&mut self, command: &[u8], args: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        match command {
            b"live-update" => Some(self.update.control(args)),
            b"connections" => Some(Ok(self.update.connections())),
            _ => self.host.control(command, args),
        }
    }

    fn control_commands(&self) -> &'static [(&'static str, &'static str)] {
        UpdatableHost::COMMANDS
    }
}
