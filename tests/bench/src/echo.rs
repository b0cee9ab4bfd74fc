//! The floor: a server that reads a header and a payload and answers, and does nothing else. Beside
//! sockets, it serves rings in the same way.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use tempfile::TempDir;

use crate::ring_echo::Rings;

/// In place of descriptors of clients.
const LISTENER: u64 = u64::MAX;
const RINGS: u64 = u64::MAX - 1;

/// Makes this program the server.
pub(crate) const ARGUMENT: &str = "--echo-server";

/// The server in a separate process.
pub(crate) struct Echo {
    child: Child,
    dir: TempDir,
}

impl Echo {
    pub(crate) fn start() -> Result<Echo, String> {
        let start = || -> std::io::Result<Echo> {
            let dir = tempfile::tempdir()?;
            let program = std::env::current_exe()?;
            let child =
                Command::new(program).arg(ARGUMENT).arg(dir.path().join("socket")).spawn()?;
            Ok(Echo { child, dir })
        };
        let echo = start().map_err(|error| format!("echo server: {error}"))?;
        let deadline = Instant::now() + Duration::from_secs(5);
        while UnixStream::connect(echo.socket()).is_err() {
            if Instant::now() > deadline {
                return Err("the echo server does not answer".into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(echo)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Serves until it is killed.
pub(crate) fn serve(path: PathBuf) -> ExitCode {
    match serve_on(&path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: echo server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve_on(path: &Path) -> crate::meter::Result<()> {
    let mut rings = Rings::new(&path.with_file_name("xen"))?;
    let listener = UnixListener::bind(path)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let interest = |fd: &dyn AsFd, id: u64| {
        epoll::add(&epoll, fd.as_fd(), epoll::EventData::new_u64(id), epoll::EventFlags::IN)
    };
    interest(&listener, LISTENER)?;
    interest(&rings.fd(), RINGS)?;
    let mut clients: Vec<Option<UnixStream>> = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut events = Vec::with_capacity(64);
    loop {
        events.clear();
        epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let id = event.data.u64();
            if id == RINGS {
                rings.answer()?;
                continue;
            }
            if id == LISTENER {
                let (client, _) = listener.accept()?;
                let at = usize::try_from(client.as_raw_fd()).map_err(std::io::Error::other)?;
                clients.resize_with(clients.len().max(at + 1), || None);
                interest(&client, at as u64)?;
                clients[at] = Some(client);
                continue;
            }
            let at = usize::try_from(id).map_err(std::io::Error::other)?;
            let Some(client) = &mut clients[at] else { continue };
            let count = client.read(&mut buffer).unwrap_or(0);
            let answers = answers(&buffer[..count]);
            if count == 0 || client.write_all(&answers).is_err() {
                clients[at] = None;
            }
        }
    }
}

/// For each request `OK`, as WRITE is answered; the loads never cut a frame.
pub(crate) fn answers(mut requests: &[u8]) -> Vec<u8> {
    let mut answers = Vec::new();
    while let Some((header, rest)) = requests.split_first_chunk::<16>() {
        let len = u32::from_le_bytes([header[12], header[13], header[14], header[15]]) as usize;
        answers.extend_from_slice(&header[..12]);
        answers.extend_from_slice(&3_u32.to_le_bytes());
        answers.extend_from_slice(b"OK\0");
        requests = rest.get(len..).unwrap_or_default();
    }
    answers
}
