//! The log on standard error, and the trace of requests in a file.

mod output;
mod queue;

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xenstore_protocol::{Errno, Header};
use xenstore_sys::own_file::{self, Access, Others};

pub(crate) use output::{GUEST, flush, plain, start};
use queue::Queue;

/// Switches of C xenstored's trace, by the names that `xenstore-control log` uses. Only `io` does
/// anything here: a line for each request and reply. The others are off and cannot be turned on.
const SWITCHES: [&str; 5] = ["obj", "io", "wrl", "acc", "tdb"];
const IO: usize = 1;

/// Takes `+name` or `-name` apart.
pub(crate) fn check_switch(text: &str) -> Option<(bool, usize)> {
    let on = match text.as_bytes().first()? {
        b'+' => true,
        b'-' => false,
        _ => return None,
    };
    let at = SWITCHES.iter().position(|name| *name == &text[1..])?;
    Some((on, at))
}

#[derive(Debug, Default)]
struct State {
    path: Option<PathBuf>,
    file: Option<Arc<File>>,
    /// What writes the file, from when there is one for the first time.
    queue: Option<Queue>,
    on: bool,
    io: bool,
}

impl State {
    /// Queues a line for the file. Returns false if there is none.
    fn line(&self, line: Vec<u8>) -> bool {
        let Some((file, queue)) = self.file.as_ref().zip(self.queue.as_ref()) else { return false };
        queue.push(file.clone(), line);
        true
    }
}

/// A line for each request, in a file. Clones are the same trace.
#[derive(Clone, Debug, Default)]
pub(crate) struct Trace(Arc<Mutex<State>>);

impl Trace {
    /// What [`Trace::control`] knows.
    pub(crate) const COMMANDS: [(&'static str, &'static str); 4] = [
        ("log", "[on|off|+<switch>|-<switch>]"),
        ("logfile", "<file>"),
        ("memreport", "[<file>]"),
        ("print", "<string>"),
    ];

    /// A trace that is off until it gets a file.
    pub(crate) fn new() -> Trace {
        let trace = Trace::default();
        trace.lock().io = true;
        trace
    }

    /// Appends to `path` from now on, readable by the user alone.
    ///
    /// # Errors
    ///
    /// If the file cannot be opened, or the thread that writes it cannot be started.
    pub(crate) fn open(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        if state.queue.is_none() {
            state.queue = Some(output::trace_queue()?);
        }
        state.file = Some(Arc::new(append(path)?));
        state.path = Some(path.to_owned());
        state.on = true;
        Ok(())
    }

    /// Opens the file again, after something else has moved it away (SIGHUP).
    pub(crate) fn reopen(&self) -> io::Result<()> {
        let mut state = self.lock();
        if let Some(path) = state.path.clone() {
            state.file = Some(Arc::new(append(&path)?));
        }
        Ok(())
    }

    /// Turns a switch, such as `+io`. One that does nothing fails with ENOSYS when it is turned on.
    pub(crate) fn switch(&self, text: &str) -> Result<(), Errno> {
        match check_switch(text).ok_or(Errno::Einval)? {
            (on, IO) => self.lock().io = on,
            (true, _) => return Err(Errno::Enosys),
            (false, _) => {}
        }
        Ok(())
    }

    /// Writes a line about a frame, if that is wanted.
    pub(crate) fn frame(&self, direction: &str, who: &str, header: &Header, payload: &[u8]) {
        let state = self.lock();
        if !state.on || !state.io {
            return;
        }
        let op = header.operation_name();
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0.0, |since| since.as_secs_f64());
        let text = payload.escape_ascii().to_string().replace("\\x00", " ");
        let tx = header.tx_id;
        state.line(format!("{time:.6} {direction} {who} {op} tx {tx} {text}\n").into_bytes());
    }

    /// Is a line wanted for each frame?
    pub(crate) fn is_on(&self) -> bool {
        let state = self.lock();
        state.on && state.file.is_some()
    }

    /// CONTROL `log`, `logfile`, `memreport` and `print`.
    pub(crate) fn control(&self, command: &[u8], args: &[&[u8]]) -> Option<Result<Vec<u8>, Errno>> {
        let done = |ok: Option<()>| Some(ok.map(|()| b"OK\0".to_vec()).ok_or(Errno::Einval));
        match (command, args) {
            (b"log", []) => Some(Ok(self.settings())),
            (b"log", [arg @ (b"on" | b"off")]) => {
                self.lock().on = *arg == b"on";
                done(Some(()))
            }
            (b"log", [switch]) => {
                let text = std::str::from_utf8(switch).map_err(|_| Errno::Einval);
                Some(text.and_then(|text| self.switch(text)).map(|()| b"OK\0".to_vec()))
            }
            (b"logfile", [name]) => done(self.open_named(name).ok()),
            (b"memreport", []) => done(self.report_memory(None).ok()),
            (b"memreport", [name]) => done(self.report_memory(Some(name)).ok()),
            (b"print", [text]) => {
                tracing::info!(text = %String::from_utf8_lossy(text), "print");
                done(Some(()))
            }
            (b"log" | b"logfile" | b"memreport" | b"print", _) => Some(Err(Errno::Einval)),
            _ => None,
        }
    }

    fn settings(&self) -> Vec<u8> {
        let state = self.lock();
        let mut text = String::from("Log switch settings:\n");
        for (at, name) in SWITCHES.iter().enumerate() {
            let on = at == IO && state.io;
            text += &format!("{name:<8}: {}\n", if on { "on" } else { "off" });
        }
        text.push('\0');
        text.into_bytes()
    }

    fn open_named(&self, name: &[u8]) -> io::Result<()> {
        self.open(&file_name(name)?)
    }

    /// What the kernel says about the memory of this process.
    fn report_memory(&self, name: Option<&[u8]>) -> io::Result<()> {
        let status = std::fs::read_to_string("/proc/self/status")?;
        let lines = status.lines().filter(|line| line.starts_with("Vm") || line.starts_with("Rss"));
        let report = lines.fold(String::new(), |text, line| text + line + "\n");
        match name {
            Some(name) => append(&file_name(name)?)?.write_all(report.as_bytes()),
            None if self.lock().line(report.into_bytes()) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A relative name is below the directory where C xenstored puts it.
fn file_name(name: &[u8]) -> io::Result<PathBuf> {
    let name = std::str::from_utf8(name).map_err(io::Error::other)?;
    Ok(Path::new("/var/lib/xenstored").join(name))
}

fn append(path: &Path) -> io::Result<File> {
    own_file::open_or_create(path, Access::Append, Others::Read)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Fails if the trace waits for a FIFO in the place of its file, follows a link, or writes into a file
    // that others can change.
    #[test]
    fn a_trace_file_of_others_is_an_error() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let [fifo, link, open] = ["fifo", "link", "open"].map(|name| dir.path().join(name));
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, mode).unwrap();
        symlink(dir.path().join("target"), &link).unwrap();
        std::fs::write(&open, "").unwrap();
        std::fs::set_permissions(&open, PermissionsExt::from_mode(0o666)).unwrap();
        for (path, reason) in [(fifo, "FIFO"), (link, "symbolic link"), (open, "may write")] {
            let error = Trace::new().open(&path).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(!dir.path().join("target").exists());
    }

    // Fails if xenstore-control cannot turn the trace, or a line is missing; or if a switch that does
    // nothing is shown as on.
    #[test]
    fn the_trace_can_be_turned_and_moved() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("1"), dir.path().join("2"));
        let trace = Trace::new();
        let header = Header { ty: 2, ..Header::default() };
        trace.open(&first).unwrap();
        trace.frame("IN", "conn 1", &header, b"/a\0");
        for arg in ["off", "-io"] {
            assert_eq!(trace.control(b"log", &[arg.as_bytes()]), Some(Ok(b"OK\0".to_vec())));
            trace.frame("IN", "conn 1", &header, b"/hidden\0");
            trace.control(b"log", &[b"on"]);
        }
        assert_eq!(trace.control(b"log", &[b"+io"]), Some(Ok(b"OK\0".to_vec())));
        std::fs::rename(&first, &second).unwrap();
        trace.reopen().unwrap();
        trace.frame("OUT", "conn 1", &header, b"value");
        flush(std::time::Duration::from_secs(60));
        let read = |path| std::fs::read_to_string(path).unwrap();
        assert!(read(&second).ends_with("IN conn 1 READ tx 0 /a \n"));
        assert!(read(&first).ends_with("OUT conn 1 READ tx 0 value\n"));
        assert_eq!(trace.control(b"log", &[b"+bogus"]), Some(Err(Errno::Einval)));
        assert_eq!(trace.control(b"log", &[b"+obj"]), Some(Err(Errno::Enosys)));
        let shown = trace.control(b"log", &[]).unwrap().unwrap();
        let shown = String::from_utf8(shown).unwrap();
        assert_eq!(shown.lines().filter(|line| line.ends_with(": on")).count(), 1, "{shown}");
        assert_eq!(trace.control(b"bogus", &[]), None);
    }
}
